//! Reads a model folder and writes it again, in another precision or in shards:
//!
//! ```text
//! cargo run --release -p rlhf-models --example convert_checkpoint -- FROM TO [bf16|f16|f32] [SHARD_BYTES]
//! ```
//!
//! The tokenizer's files are not copied.

#![allow(clippy::print_stdout)]

use std::error::Error;

use rlhf_models::tch::Kind;
use rlhf_models::{CausalLm, LoadOptions, ModelConfig, SaveOptions, SequenceClassifier};

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [from, to, rest @ ..] = arguments.as_slice() else {
        return Err("usage: convert_checkpoint FROM TO [bf16|f16|f32] [SHARD_BYTES]".into());
    };
    let mut options = SaveOptions::default();
    for argument in rest {
        match argument.as_str() {
            "bf16" => options.kind = Some(Kind::BFloat16),
            "f16" => options.kind = Some(Kind::Half),
            "f32" => options.kind = Some(Kind::Float),
            bytes => options.max_shard_size = bytes.parse()?,
        }
    }
    let config = ModelConfig::from_dir(from)?;
    println!(
        "{} layers, {} token ids",
        config.layers(),
        config.vocab_size()
    );
    match CausalLm::from_pretrained(from, &LoadOptions::default()) {
        Ok(model) => model.save_pretrained_with(to, &options)?,
        // No output layer: a classifier?
        Err(error) => match SequenceClassifier::from_pretrained(from, &LoadOptions::default()) {
            Ok(model) => model.save_pretrained_with(to, &options)?,
            Err(_) => return Err(error.into()),
        },
    }
    println!("written to {to}");
    Ok(())
}
