//! Reward models: Bradley-Terry comparisons and labelled texts.
