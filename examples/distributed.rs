//! Fine-tuning on several processes, on the same batches as on one.
//!
//! ```sh
//! cargo run --release --example distributed -- --spawn 4
//! torchrun --no-python --nproc-per-node 4 target/release/examples/distributed
//! ```
//!
//! The program does not say how many processes there are; its losses are the same for any number.

#![allow(clippy::print_stdout)] // an example talks to its user

use std::error::Error;
use std::time::{Duration, Instant};

use clap::Parser;
use rlhf::core::{EpochConfig, Observer, ProgressObserver, Sequence};
use rlhf::models::{CausalLm, LoadOptions, Tokenizer};
use rlhf::scale::distributed::{DataParallel, GroupOptions, Sharding, Spawn, World};
use rlhf::sft::{SftConfig, SftTrainer};

#[derive(Parser)]
#[command(about = "Fine-tunes the small model of the other examples on one or several processes")]
struct Args {
    /// Starts this many processes of this program on this machine
    #[arg(long)]
    spawn: Option<usize>,
    /// What each process keeps a part of: nothing, optimizer, gradients
    #[arg(long, default_value = "nothing")]
    sharding: String,
    /// Optimiser steps
    #[arg(long, default_value_t = 10)]
    steps: u64,
    /// Sequences of a step, of all processes together
    #[arg(long, default_value_t = 32)]
    batch_size: usize,
    /// Seconds that an operation between processes may take
    #[arg(long, default_value_t = 120)]
    limit: u64,
}

fn main() -> Result<(), Box<dyn Error>> {
    let args = Args::parse();
    if let (Some(processes), false) = (args.spawn, Spawn::is_rank()) {
        return Ok(Spawn::new(processes).run()?.check()?);
    }
    // The one line that a program needs, to be one of many.
    let world = World::join(&DataParallel {
        group: GroupOptions {
            limit: Duration::from_secs(args.limit),
            ..GroupOptions::default()
        },
        sharding: match args.sharding.as_str() {
            "nothing" => Sharding::Nothing,
            "optimizer" => Sharding::Optimizer,
            "gradients" => Sharding::Gradients,
            other => {
                return Err(format!("--sharding {other}: nothing, optimizer, gradients").into());
            }
        },
        ..DataParallel::default()
    })?;

    let root = env!("CARGO_MANIFEST_DIR");
    let folder = format!("{root}/examples/models/debtldr-gpt2");
    let tokenizer = Tokenizer::from_dir(&folder)?;
    let model = CausalLm::from_pretrained(&folder, &LoadOptions::default())?;
    let data = texts(
        &tokenizer,
        &format!("{root}/examples/data/debtldr/valid.jsonl"),
    )?;

    let mut config = SftConfig::default();
    config.update.optimizer.lr = 1e-4;
    let mut trainer = SftTrainer::new(model, config)?;
    let epochs = EpochConfig {
        epochs: 100,
        batch_size: args.batch_size,
        max_steps: Some(args.steps),
        ..EpochConfig::default()
    };
    let start = Instant::now();
    let progress: Box<dyn Observer> = Box::new(ProgressObserver::new(["sft/loss", "sft/tokens"]));
    trainer.train(&data, &epochs, &mut [progress])?;
    let seconds = start.elapsed().as_secs_f64();

    // Evaluated everywhere alike; said once.
    let after = trainer.evaluate(&data[..32])?;
    if world.is_first() {
        let group = world.group();
        println!(
            "{} processes, {} sharded: {:.3} s a step, loss {:.6}",
            group.size(),
            args.sharding,
            seconds / args.steps as f64,
            after.loss
        );
        println!("sent by this process: {}", group.traffic());
    }
    Ok(())
}

/// Prompts and their summaries as tokens.
fn texts(tokenizer: &Tokenizer, file: &str) -> Result<Vec<Sequence>, Box<dyn Error>> {
    let mut sequences = Vec::new();
    for line in std::fs::read_to_string(file)?.lines() {
        let row: serde_json::Value = serde_json::from_str(line)?;
        let field = |name: &str| row[name].as_str().ok_or(format!("a row without {name}"));
        let prompt = tokenizer.encode(field("text")?)?;
        let response = tokenizer.encode(field("summary")?)?;
        if !prompt.is_empty() && !response.is_empty() && prompt.len() + response.len() <= 128 {
            sequences.push(Sequence::new(prompt, response));
        }
    }
    Ok(sequences)
}
