//! Training a scorer on labelled texts.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Scorer, Stats, train_epochs,
};
use rlhf_scale::{UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::access::trainer_access;
use crate::label::Targets;
use crate::trainer::check_microbatch_size;
use crate::{Error, Labelled, LabelledBatch, Result, classification_loss, regression_loss};

/// How a [`LabelTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LabelConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// Texts that are in memory at once. The result of a step does not depend on it, but for
    /// rounding.
    pub microbatch_size: usize,
}

impl Default for LabelConfig {
    /// transformers' `TrainingArguments` with a constant schedule: learning rate 5e-5, 8 texts at
    /// once.
    fn default() -> Self {
        Self {
            update: UpdateConfig::default(),
            microbatch_size: 8,
        }
    }
}

impl LabelConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        check_microbatch_size(self.microbatch_size)
    }
}

/// Trains a [`Scorer`] on labelled texts: with cross-entropy where the labels are classes
/// ([`classification_loss`]), with squared error where they are scores ([`regression_loss`]; the
/// scorer must have one label then, and is a reward model).
#[derive(Debug)]
pub struct LabelTrainer<S> {
    model: S,
    updater: Updater,
    config: LabelConfig,
}

/// How well a scorer agrees with labels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct LabelEvaluation {
    /// Mean of the loss that is trained on.
    pub loss: f64,
    /// Share of texts whose class has the largest logit; `None` where labels are scores.
    pub accuracy: Option<f64>,
    /// Number of texts.
    pub texts: usize,
}

impl<S: Scorer> LabelTrainer<S> {
    /// A trainer of `model`.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained.
    pub fn new(model: S, config: LabelConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            updater: Updater::of(&model, &config.update)?,
            model,
            config,
        })
    }

    /// One optimiser step on the mean loss of all texts.
    ///
    /// The stats are those of the batch before its update: `label/loss`, `label/accuracy` (of
    /// classes), `label/grad_norm` (before clipping), `label/lr`; with loss scaling those of
    /// [`UpdateStats::metrics`] too.
    ///
    /// [`UpdateStats::metrics`]: rlhf_scale::UpdateStats::metrics
    ///
    /// # Errors
    /// Those of the model; a label that the model does not know; a loss or gradient that is not
    /// finite. Nothing has changed then.
    pub fn step(&mut self, batch: &LabelledBatch) -> Result<Stats> {
        let model = &self.model;
        let (replicas, ranks) = (self.updater.replicas().clone(), self.updater.ranks());
        let size = replicas.microbatch_size(batch.len(), self.config.microbatch_size);
        let parts = batch.split(size)?;
        let texts = batch.len() as f64;
        let mut correct = Vec::new();
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let judged = Judged::of(model, &parts[i], texts)?;
            correct.extend(judged.correct);
            Ok(judged.loss)
        })?;
        let mut stats = Stats::from_iter(update.metrics("label"));
        let own = count(&correct)?;
        // A process without a text does not know whether there is anything to count.
        let numbers = vec![own.unwrap_or(0.0), f64::from(own.is_some())];
        let sums = ranks.sum::<Error>(Ok(numbers))?;
        if sums[1] > 0.0 {
            stats.insert("label/accuracy", sums[0] / texts);
        }
        Ok(stats)
    }

    /// Epochs over `data`; see [`train_epochs`] for order, checkpoints, resumption and
    /// observers. Returns the steps done.
    ///
    /// # Errors
    /// Those of [`train_epochs`] and [`step`](Self::step).
    pub fn train(
        &mut self,
        data: &[Labelled],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        train_epochs(self, data, epochs, observers)
    }

    /// Loss and accuracy on `data`.
    ///
    /// # Errors
    /// No texts; a score that is not finite; those of the model.
    pub fn evaluate(&self, data: &[Labelled]) -> Result<LabelEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let batch = LabelledBatch::new(data.to_vec())?;
        let (mut losses, mut correct, mut row) = (0.0, Vec::new(), 0);
        for part in batch.split(self.config.microbatch_size)? {
            let judged = Judged::of(&self.model, &part, data.len() as f64)?;
            judged.check_finite(row)?;
            losses += f64::try_from(&judged.loss).map_err(CoreError::from)?;
            correct.extend(judged.correct);
            row += part.len();
        }
        Ok(LabelEvaluation {
            loss: losses,
            accuracy: count(&correct)?.map(|correct| correct / data.len() as f64),
            texts: data.len(),
        })
    }
}

trainer_access!(LabelTrainer, LabelConfig);

impl<S: Scorer> EpochTrainer for LabelTrainer<S> {
    type Item = Labelled;
    type Error = Error;
    const PHASE: &'static str = "label";

    fn step_on(&mut self, items: Vec<Labelled>) -> Result<Stats> {
        self.step(&LabelledBatch::new(items)?)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

/// A microbatch's part of the loss, and how many of its classes were right (a scalar tensor,
/// so that it need not be waited for).
struct Judged {
    loss: Tensor,
    /// `[B, num_labels]`, without gradient.
    logits: Tensor,
    correct: Option<Tensor>,
}

impl Judged {
    fn of(model: &impl Scorer, batch: &LabelledBatch, texts: f64) -> Result<Self> {
        let logits = model.scores(batch.sequences())?.to_kind(Kind::Float);
        match batch.targets(logits.device()) {
            Targets::Classes(classes) => {
                let loss = classification_loss(&logits, &classes, texts)?;
                let right = logits.detach().argmax(-1, false).eq_tensor(&classes);
                Ok(Self {
                    loss,
                    logits: logits.detach(),
                    correct: Some(right.sum(Kind::Double)),
                })
            }
            Targets::Scores(scores) => {
                if logits.size() != [batch.len() as i64, 1] {
                    return Err(Error::NotAReward {
                        shape: logits.size(),
                        sequences: batch.len(),
                        objective: "a regression",
                    });
                }
                Ok(Self {
                    loss: regression_loss(&logits.squeeze_dim(1), &scores, texts)?,
                    logits: logits.detach(),
                    correct: None,
                })
            }
        }
    }

    /// Fails for a text whose logits are not finite; `first_row` is where the microbatch starts.
    fn check_finite(&self, first_row: usize) -> Result<()> {
        let sums = self
            .logits
            .sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
        let sums = Vec::<f64>::try_from(sums).map_err(CoreError::from)?;
        match sums.iter().position(|sum| !sum.is_finite()) {
            Some(row) => Err(CoreError::NonFinite {
                what: "score",
                row: first_row + row,
                value: sums[row],
            }
            .into()),
            None => Ok(()),
        }
    }
}

/// Sum of the counts, if there are any.
fn count(counts: &[Tensor]) -> Result<Option<f64>> {
    if counts.is_empty() {
        return Ok(None);
    }
    let sum = Tensor::stack(counts, 0).sum(Kind::Double);
    Ok(Some(f64::try_from(sum).map_err(CoreError::from)?))
}
