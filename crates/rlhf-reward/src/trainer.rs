//! Training a scorer on comparisons.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Preference, PreferenceBatch, Scorer,
    Stats, train_epochs,
};
use rlhf_scale::{AdamWConfig, UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, PairwiseInputs, PairwiseLoss, Result, pairwise_loss, pairwise_metrics};

/// How a [`RewardTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// `κ` of [`pairwise_loss`]: how strongly scores are pulled towards 0. Eisenstein et al. 2023
    /// use 0.01.
    pub center_coef: f64,
    /// Pairs that are in memory at once. The result of a step does not depend on it, but for
    /// rounding.
    pub microbatch_size: usize,
}

impl Default for RewardConfig {
    /// TRL's `RewardConfig`: learning rate 1e-4, no centring, 8 pairs at once. Its schedule is
    /// linear; this one is constant until it is told how many steps there will be.
    fn default() -> Self {
        Self {
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 1e-4,
                    ..AdamWConfig::default()
                },
                ..UpdateConfig::default()
            },
            center_coef: 0.0,
            microbatch_size: 8,
        }
    }
}

impl RewardConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        if !(self.center_coef.is_finite() && self.center_coef >= 0.0) {
            let reason = "a finite number that is not negative is needed";
            return Err(CoreError::config("center_coef", self.center_coef, reason).into());
        }
        check_microbatch_size(self.microbatch_size)
    }
}

pub(crate) fn check_microbatch_size(size: usize) -> Result<()> {
    match size {
        0 => Err(CoreError::config("microbatch_size", size, "must be at least 1").into()),
        _ => Ok(()),
    }
}

/// Trains a [`Scorer`] on comparisons with the Bradley-Terry loss ([`pairwise_loss`]).
///
/// One [`step`](Self::step) at a time, or epochs over a dataset with [`train`](Self::train).
/// Margins and weights of the pairs are used where they are given.
#[derive(Debug)]
pub struct RewardTrainer<S> {
    model: S,
    updater: Updater,
    config: RewardConfig,
}

/// How well a scorer agrees with comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RewardEvaluation {
    /// Mean of the loss that is trained on.
    pub loss: f64,
    /// Share of pairs whose chosen score is strictly above the rejected one.
    pub accuracy: f64,
    /// Mean of chosen minus rejected score.
    pub mean_margin: f64,
    /// Mean score of both sides.
    pub mean_reward: f64,
    /// Number of pairs.
    pub pairs: usize,
}

impl<S: Scorer> RewardTrainer<S> {
    /// A trainer of `model`.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained.
    pub fn new(model: S, config: RewardConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            updater: Updater::new(model.named_parameters(), &config.update)?,
            model,
            config,
        })
    }

    /// One optimiser step on the weighted mean loss of all pairs.
    ///
    /// The stats are those of the batch before its update: `reward/loss`, `reward/accuracy`,
    /// `reward/mean_margin`, `reward/mean_reward`, `reward/min_reward`, `reward/max_reward`,
    /// `reward/grad_norm` (before clipping), `reward/lr`; with loss scaling those of
    /// [`UpdateStats::metrics`] too.
    ///
    /// [`UpdateStats::metrics`]: rlhf_scale::UpdateStats::metrics
    ///
    /// # Errors
    /// Those of the model; a loss or gradient that is not finite; weights that add up to 0.
    /// Nothing has changed then.
    pub fn step(&mut self, batch: &PreferenceBatch) -> Result<Stats> {
        let (model, config) = (&self.model, &self.config);
        let parts = batch.split(config.microbatch_size)?;
        let denominator = batch.total_weight();
        let mut scored = Vec::with_capacity(parts.len());
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let scores = PairScores::of(model, &parts[i])?;
            let loss = scores
                .loss(&parts[i], config.center_coef, denominator)?
                .loss;
            scored.push(scores.detached());
            Ok(loss)
        })?;
        let scores = PairScores::cat(&scored);
        let metrics = pairwise_metrics(&scores.chosen, &scores.rejected)?;
        let mut stats = Stats::from_iter(update.metrics("reward"));
        stats.extend([
            ("reward/accuracy", metrics.accuracy),
            ("reward/mean_margin", metrics.mean_margin),
            ("reward/mean_reward", metrics.mean_reward),
            ("reward/min_reward", metrics.min_reward),
            ("reward/max_reward", metrics.max_reward),
        ]);
        Ok(stats)
    }

    /// Epochs over `pairs`; see [`train_epochs`] for order, checkpoints, resumption and
    /// observers. Returns the steps done.
    ///
    /// # Errors
    /// Those of [`train_epochs`] and [`step`](Self::step).
    pub fn train(
        &mut self,
        pairs: &[Preference],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        train_epochs(self, pairs, epochs, observers)
    }

    /// Scores `pairs` and compares the scores with what people preferred.
    ///
    /// # Errors
    /// No pairs; a score that is not finite; those of the model.
    pub fn evaluate(&self, pairs: &[Preference]) -> Result<RewardEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let batch = PreferenceBatch::new(pairs.to_vec())?;
        let mut scored = Vec::new();
        for part in batch.split(self.config.microbatch_size)? {
            scored.push(PairScores::of(&self.model, &part)?);
        }
        let scores = PairScores::cat(&scored);
        scores.check_finite()?;
        let loss = scores.loss(&batch, self.config.center_coef, batch.total_weight())?;
        let metrics = pairwise_metrics(&scores.chosen, &scores.rejected)?;
        Ok(RewardEvaluation {
            loss: f64::try_from(loss.loss).map_err(CoreError::from)?,
            accuracy: metrics.accuracy,
            mean_margin: metrics.mean_margin,
            mean_reward: metrics.mean_reward,
            pairs: pairs.len(),
        })
    }

    /// The model in training.
    pub fn model(&self) -> &S {
        &self.model
    }

    /// The model, trained.
    pub fn into_model(self) -> S {
        self.model
    }

    /// The options this trainer was made with.
    pub fn config(&self) -> &RewardConfig {
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

impl<S: Scorer> EpochTrainer for RewardTrainer<S> {
    type Item = Preference;
    type Error = Error;
    const PHASE: &'static str = "reward";

    fn step_on(&mut self, items: Vec<Preference>) -> Result<Stats> {
        self.step(&PreferenceBatch::new(items)?)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

/// Scores of both sides of some pairs, `[B]` each.
struct PairScores {
    chosen: Tensor,
    rejected: Tensor,
}

impl PairScores {
    fn of(model: &impl Scorer, batch: &PreferenceBatch) -> Result<Self> {
        let sequences = batch.interleaved()?;
        let scores = model.scores(&sequences)?;
        let rows = sequences.len();
        if scores.size() != [rows as i64, 1] {
            return Err(Error::NotAReward {
                shape: scores.size(),
                sequences: rows,
                objective: "a comparison",
            });
        }
        let scores = scores.to_kind(Kind::Float).view([-1, 2]);
        Ok(Self {
            chosen: scores.select(1, 0),
            rejected: scores.select(1, 1),
        })
    }

    fn loss(
        &self,
        batch: &PreferenceBatch,
        center_coef: f64,
        denominator: f64,
    ) -> Result<PairwiseLoss> {
        let device = self.chosen.device();
        let of_pairs = |value: fn(&Preference) -> f64| {
            let values: Vec<f32> = batch.pairs().iter().map(|p| value(p) as f32).collect();
            Tensor::from_slice(&values).to_device(device)
        };
        let inputs = PairwiseInputs {
            chosen: &self.chosen,
            rejected: &self.rejected,
            margins: Some(&of_pairs(|p| p.margin.unwrap_or(0.0))),
            weights: Some(&of_pairs(|p| p.weight)),
        };
        pairwise_loss(inputs, center_coef, denominator)
    }

    fn detached(&self) -> Self {
        Self {
            chosen: self.chosen.detach(),
            rejected: self.rejected.detach(),
        }
    }

    fn cat(parts: &[Self]) -> Self {
        let cat = |side: fn(&Self) -> &Tensor| {
            Tensor::cat(&parts.iter().map(side).collect::<Vec<_>>(), 0)
        };
        Self {
            chosen: cat(|s| &s.chosen),
            rejected: cat(|s| &s.rejected),
        }
    }

    fn check_finite(&self) -> Result<()> {
        let sides = Tensor::stack(&[&self.chosen, &self.rejected], 1).view(-1);
        let scores = Vec::<f64>::try_from(sides).map_err(CoreError::from)?;
        match scores.iter().position(|s| !s.is_finite()) {
            Some(i) => Err(CoreError::NonFinite {
                what: "score",
                row: i / 2,
                value: scores[i],
            }
            .into()),
            None => Ok(()),
        }
    }
}
