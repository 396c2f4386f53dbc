//! Optimisers, mixed precision, gradient checkpointing and the one update path of the rlhf crates.
