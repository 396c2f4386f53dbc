//! Fine-tuning on several processes, on the same batches as on one.
//!
//! ```sh
//! cargo run --release --example distributed -- --spawn 4
//! torchrun --no-python --nproc-per-node 4 target/release/examples/distributed
//! cargo run --release --example distributed -- --spawn 4 --tensor 2 --pipeline 2
//! ```
//!
//! The program does not say how many processes there are; its losses are the same for any number.

#![allow(clippy::print_stdout)] // an example talks to its user

use std::error::Error;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use rlhf::core::{EpochConfig, Observer, ProgressObserver, Sequence};
use rlhf::models::{CausalLm, LoadOptions, PipelineParallel, Placement, TensorParallel, Tokenizer};
use rlhf::scale::distributed::{
    DataParallel, GroupOptions, Mesh, MeshShape, ProcessGroup, Sharding, Spawn, World,
};
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
    /// Processes that each layer is split over
    #[arg(long, default_value_t = 1)]
    tensor: usize,
    /// Processes that the blocks are spread over
    #[arg(long, default_value_t = 1)]
    pipeline: usize,
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
    let options = DataParallel {
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
    };
    // `World::join(&options)` is the one line that a program needs to be one of many, each with a copy
    // of the model. Here copies may be spread over several processes, too.
    let all = ProcessGroup::from_env(&options.group)?;
    let shape = MeshShape {
        data: all.size() / (args.tensor * args.pipeline).max(1),
        pipeline: args.pipeline,
        tensor: args.tensor,
    };
    let mesh = Mesh::new(&all, shape)?;
    let world = World::on(&mesh, &options)?;
    let placement = placement(&mesh);

    let root = env!("CARGO_MANIFEST_DIR");
    let folder = format!("{root}/examples/models/debtldr-gpt2");
    let tokenizer = Tokenizer::from_dir(&folder)?;
    let model = CausalLm::from_pretrained_parallel(&folder, &LoadOptions::default(), &placement)?;
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
    // Of all processes the first's are told.
    let progress: Box<dyn Observer> = Box::new(ProgressObserver::new(["sft/loss", "sft/tokens"]));
    trainer.train(&data, &epochs, &mut [progress])?;
    let seconds = start.elapsed().as_secs_f64();

    // Evaluated by all, said once.
    let loss = trainer.evaluate(&data[..32])?.loss;
    if world.is_first() {
        println!(
            "{} processes ({} copies of {} stages of {} parts), {} sharded: {:.3} s a step, loss {:.6}",
            all.size(),
            shape.data,
            shape.pipeline,
            shape.tensor,
            args.sharding,
            seconds / args.steps as f64,
            loss
        );
        println!("sent to other copies: {}", mesh.data().traffic());
        println!("to other parts of layers: {}", mesh.tensor().traffic());
        println!("to other stages: {}", mesh.pipeline().traffic());
    }
    Ok(())
}

/// Where this process's part of the model is.
fn placement(mesh: &Mesh) -> Placement {
    let shape = mesh.shape();
    let mut placement = Placement::default();
    if shape.tensor > 1 {
        placement.tensor = Some(TensorParallel::new(Arc::new(mesh.tensor().clone())));
    }
    if shape.pipeline > 1 {
        placement.pipeline = Some(PipelineParallel::new(Arc::new(mesh.pipeline().clone())));
    }
    placement
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
