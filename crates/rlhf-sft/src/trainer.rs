//! Training a policy on written responses.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, LogprobOptions, Observer, Policy, Sequence,
    SequenceBatch, Stats, train_epochs,
};
use rlhf_scale::{AdamWConfig, UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::weighted::WeightedBatch;
use crate::{Error, Result};

/// How an [`SftTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SftConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// How much a prompt token counts beside a response token's 1. With 0 only responses are
    /// learned; a model that starts from nothing learns the language faster with some weight on
    /// the prompts. A prompt's first token, which nothing predicts, never counts.
    pub prompt_weight: f64,
    /// Sequences that are in memory at once. The result of a step does not depend on it, but for
    /// rounding.
    pub microbatch_size: usize,
}

impl Default for SftConfig {
    /// TRL's `SFTConfig`: learning rate 2e-5, loss on completions only, 8 sequences at once. Its
    /// schedule is linear; this one is constant until it is told how many steps there will be.
    fn default() -> Self {
        Self {
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 2e-5,
                    ..AdamWConfig::default()
                },
                ..UpdateConfig::default()
            },
            prompt_weight: 0.0,
            microbatch_size: 8,
        }
    }
}

impl SftConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        if !(self.prompt_weight.is_finite() && self.prompt_weight >= 0.0) {
            let reason = "a finite number that is not negative is needed";
            return Err(CoreError::config("prompt_weight", self.prompt_weight, reason).into());
        }
        if self.microbatch_size == 0 {
            return Err(CoreError::config("microbatch_size", 0, "must be at least 1").into());
        }
        Ok(())
    }
}

/// Trains a [`Policy`] to write the responses of a dataset ([`sft_loss`](crate::sft_loss), through
/// [`Policy::weighted_nll`]).
///
/// One [`step`](Self::step) at a time, or epochs over a dataset with [`train`](Self::train).
#[derive(Debug)]
pub struct SftTrainer<P> {
    model: P,
    updater: Updater,
    config: SftConfig,
}

/// How well a policy predicts responses.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct SftEvaluation {
    /// Mean cross-entropy of a response token, in nats.
    pub loss: f64,
    /// `e^loss`.
    pub perplexity: f64,
    /// Number of response tokens.
    pub tokens: usize,
}

impl<P: Policy> SftTrainer<P> {
    /// A trainer of `model`.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained.
    pub fn new(model: P, config: SftConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            updater: Updater::of(&model, &config.update)?,
            model,
            config,
        })
    }

    /// One optimiser step on the mean cross-entropy of all tokens of the batch that count.
    ///
    /// The stats: `sft/loss` before the update, `sft/tokens` (response tokens), `sft/grad_norm`
    /// (before clipping), `sft/lr`; with loss scaling those of [`UpdateStats::metrics`] too.
    ///
    /// [`UpdateStats::metrics`]: rlhf_scale::UpdateStats::metrics
    ///
    /// # Errors
    /// A batch without response tokens; those of the model; a loss or gradient that is not
    /// finite. Nothing has changed then.
    pub fn step(&mut self, batch: &SequenceBatch) -> Result<Stats> {
        check_responses(batch)?;
        let (model, prompt_weight) = (&self.model, self.config.prompt_weight);
        let mut parts = Vec::new();
        let most = self.config.microbatch_size;
        let size = self.updater.replicas().microbatch_size(batch.len(), most);
        for part in batch.split(size)? {
            let part = WeightedBatch::new(part, prompt_weight)?;
            // A microbatch without a token to learn adds nothing to the loss.
            if part.total_weight() > 0.0 {
                parts.push(part);
            }
        }
        let denominator: f64 = parts.iter().map(WeightedBatch::total_weight).sum();
        // `sft_loss`, by a model that may know how to save work when the tokens' weights are given.
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let weights = parts[i].weights(model.device());
            Ok(model.weighted_nll(parts[i].sequences(), weights.as_ref())? / denominator)
        })?;
        let mut stats = Stats::from_iter(update.metrics("sft"));
        stats.insert("sft/tokens", batch.response_tokens() as f64);
        Ok(stats)
    }

    /// Epochs over `data`; see [`train_epochs`] for order, checkpoints, resumption and
    /// observers. Returns the steps done.
    ///
    /// # Errors
    /// Those of [`train_epochs`] and [`step`](Self::step).
    pub fn train(
        &mut self,
        data: &[Sequence],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        train_epochs(self, data, epochs, observers)
    }

    /// Cross-entropy and perplexity of the responses of `data`; prompts never count.
    ///
    /// # Errors
    /// No response tokens; a log-probability that is not finite; those of the model.
    pub fn evaluate(&self, data: &[Sequence]) -> Result<SftEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let batch = SequenceBatch::new(data.to_vec())?;
        check_responses(&batch)?;
        let tokens = batch.response_tokens();
        let mut sum = 0.0;
        let mut row = 0;
        for part in batch.split(self.config.microbatch_size)? {
            let logprobs = self
                .model
                .logprobs(&part, &LogprobOptions::default())?
                .logprobs;
            // Masked tokens are 0.
            let sums = logprobs.sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
            for value in Vec::<f64>::try_from(sums).map_err(CoreError::from)? {
                if !value.is_finite() {
                    let what = "log-probability of the response";
                    return Err(CoreError::NonFinite { what, row, value }.into());
                }
                sum += value;
                row += 1;
            }
        }
        let loss = -sum / tokens as f64;
        Ok(SftEvaluation {
            loss,
            perplexity: loss.exp(),
            tokens,
        })
    }

    /// The model in training.
    pub fn model(&self) -> &P {
        &self.model
    }

    /// The model, trained.
    pub fn into_model(self) -> P {
        self.model
    }

    /// The options this trainer was made with.
    pub fn config(&self) -> &SftConfig {
        &self.config
    }

    /// The update path: its learning rate, loss scale and averaged weights.
    pub fn updater(&self) -> &Updater {
        &self.updater
    }

    /// Writes weights, optimiser state and step into the folder `dir`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        Ok(self.updater.save(dir)?)
    }

    /// Restores bit for bit what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// A missing or damaged file; a file of another model or configuration. Nothing has changed
    /// then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        Ok(self.updater.load(dir)?)
    }
}

impl<P: Policy> EpochTrainer for SftTrainer<P> {
    type Item = Sequence;
    type Error = Error;
    const PHASE: &'static str = "sft";

    fn step_on(&mut self, items: Vec<Sequence>) -> Result<Stats> {
        self.step(&SequenceBatch::new(items)?)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

fn check_responses(batch: &SequenceBatch) -> Result<()> {
    match batch.response_tokens() {
        0 => Err(CoreError::Empty {
            what: "every response of the batch",
            help: "give at least one sequence a response to learn",
        }
        .into()),
        _ => Ok(()),
    }
}
