//! Hugging Face language models, tokenizers and datasets for the rlhf crates.
