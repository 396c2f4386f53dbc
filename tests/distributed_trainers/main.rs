//! Trainers on several processes: the numbers of one process, checkpoints written once, and what
//! happens when a process is killed.
#![cfg(feature = "distributed")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::print_stdout, clippy::print_stderr)] // ranks talk to the test

mod killed;
mod trainers;

use std::path::{Path, PathBuf};
use std::time::Duration;

use rlhf::core::{EpochConfig, Sequence};
use rlhf::models::{CausalLm, CheckpointPolicy, LoadOptions};
use rlhf::scale::UpdateConfig;
use rlhf::scale::distributed::{DataParallel, GroupOptions};

const STEPS: u64 = 5;

fn options(seconds: u64) -> DataParallel {
    DataParallel {
        group: GroupOptions {
            limit: Duration::from_secs(seconds),
            ..GroupOptions::default()
        },
        bucket_bytes: 64 << 10, // several
        ..DataParallel::default()
    }
}

fn epochs() -> EpochConfig {
    EpochConfig {
        epochs: 20,
        batch_size: 7, // neither two nor four divide it
        max_steps: Some(STEPS),
        seed: 4,
        ..EpochConfig::default()
    }
}

/// AdamW divides gradients by their size. One that is nothing but rounding, as that of the biases of
/// attention keys, would move its weight by a whole learning rate in a direction of its own: a larger
/// epsilon keeps rounding small.
fn learn(update: &mut UpdateConfig, lr: f64) {
    update.optimizer.lr = lr;
    update.optimizer.eps = 1e-4;
}

fn model(name: &str, checkpointing: CheckpointPolicy) -> CausalLm {
    let options = LoadOptions {
        gradient_checkpointing: checkpointing.into(),
        ..LoadOptions::default()
    };
    CausalLm::from_pretrained(model_dir(name), &options).unwrap()
}

/// Ragged: from one to six response tokens.
fn texts() -> Vec<Sequence> {
    let text = |i: i64| Sequence::new([5 + i, 9, 2], vec![(i * 5) % 40; 1 + i as usize % 6]);
    (0..16).map(text).collect()
}

fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens/models")
        .join(name)
}
