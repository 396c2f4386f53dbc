//! SFT of a model in f32 and in bf16: how far the losses are apart, and how much faster bf16 is.

use std::path::{Path, PathBuf};
use std::time::Instant;

use rlhf::core::{Sequence, SequenceBatch};
use rlhf::models::{CausalLm, LoadOptions};
use rlhf::scale::{AdamWConfig, Precision, UpdateConfig};
use rlhf::sft::{SftConfig, SftTrainer};
use serde::{Deserialize, Serialize};

use crate::process::cpu_seconds;
use crate::{Result, median};

/// Pairs that are not trained on.
const HELD_OUT: usize = 64;

/// A run of one precision.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Training {
    pub(crate) precision: Precision,
    pub(crate) model: PathBuf,
    pub(crate) pairs: PathBuf,
    pub(crate) steps: usize,
    pub(crate) batch: usize,
}

/// What a run gives.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Cross-entropy of held-out responses before training.
    pub(crate) loss_before: f64,
    /// And after it.
    pub(crate) loss: f64,
    /// Median of all steps but the first.
    pub(crate) step_seconds: f64,
    /// Mean of all steps, of the processor.
    pub(crate) cpu_seconds: f64,
}

/// A line of the file of pairs; what else it has is not of use here.
#[derive(Deserialize)]
struct Pair {
    prompt: Vec<i64>,
    chosen: Vec<i64>,
}

impl Training {
    pub(crate) fn run(&self) -> Result<Outcome> {
        let mut data = read_pairs(&self.pairs)?;
        if data.len() < HELD_OUT + self.batch {
            return Err(format!("{} pairs are too few", data.len()).into());
        }
        let held_out = data.split_off(data.len() - HELD_OUT);
        let options = LoadOptions {
            kind: Some(self.precision.kind()),
            ..LoadOptions::default()
        };
        let update = UpdateConfig {
            optimizer: AdamWConfig {
                lr: 2e-5,
                ..AdamWConfig::default()
            },
            ..UpdateConfig::default()
        };
        let config = SftConfig {
            update: update.for_precision(self.precision),
            microbatch_size: self.batch,
            ..SftConfig::default()
        };
        let model = CausalLm::from_pretrained(&self.model, &options)?;
        let mut trainer = SftTrainer::new(model, config)?;
        let loss_before = trainer.evaluate(&held_out)?.loss;
        let (mut seconds, cpu) = (Vec::new(), cpu_seconds()?);
        // The file's order, again from its start where it ends: both precisions see the same.
        let mut rest = data.iter().cycle();
        for _ in 0..self.steps {
            let rows: Vec<Sequence> = rest.by_ref().take(self.batch).cloned().collect();
            let batch = SequenceBatch::new(rows)?;
            let start = Instant::now();
            trainer.step(&batch)?;
            seconds.push(start.elapsed().as_secs_f64());
        }
        let cpu_seconds = (cpu_seconds()? - cpu) / self.steps as f64;
        Ok(Outcome {
            loss_before,
            cpu_seconds,
            loss: trainer.evaluate(&held_out)?.loss,
            step_seconds: median(if seconds.len() > 1 {
                &seconds[1..]
            } else {
                &seconds
            }),
        })
    }
}

fn read_pairs(path: &Path) -> Result<Vec<Sequence>> {
    let text = std::fs::read_to_string(path)?;
    text.lines()
        .map(|line| {
            let pair: Pair = serde_json::from_str(line)?;
            Ok(Sequence::new(pair.prompt, pair.chosen))
        })
        .collect()
}
