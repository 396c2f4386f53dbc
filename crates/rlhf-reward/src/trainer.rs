//! Training a scorer on comparisons.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Preference, PreferenceBatch, Scorer,
    Stats, train_epochs,
};
use rlhf_scale::{AdamWConfig, UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::access::trainer_access;
use crate::pair_scores::PairScores;
use crate::screen::usable;
use crate::{Error, Heads, PairwiseTerms, Result, Skipped, pairwise_metrics};

/// How a [`RewardTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RewardConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// `κ` of [`pairwise_loss`](crate::pairwise_loss): how strongly scores are pulled towards 0. Eisenstein et al. 2023
    /// use 0.01.
    pub center_coef: f64,
    /// `ε` of [`pairwise_loss`](crate::pairwise_loss): which share of the labels is wrong, below
    /// 0.5.
    pub label_smoothing: f64,
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
            label_smoothing: 0.0,
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
        self.terms().validate()?;
        check_microbatch_size(self.microbatch_size)
    }

    fn terms(&self) -> PairwiseTerms {
        PairwiseTerms {
            center_coef: self.center_coef,
            label_smoothing: self.label_smoothing,
        }
    }
}

pub(crate) fn check_microbatch_size(size: usize) -> Result<()> {
    match size {
        0 => Err(CoreError::config("microbatch_size", size, "must be at least 1").into()),
        _ => Ok(()),
    }
}

/// Trains a [`Scorer`] on comparisons with the Bradley-Terry loss
/// ([`pairwise_loss`](crate::pairwise_loss)).
///
/// One [`step`](Self::step) at a time, or epochs over a dataset with [`train`](Self::train).
/// Margins and weights of the pairs are used where they are given. A pair whose answers are equal,
/// or one of them empty, teaches nothing: it is skipped and counted ([`screen_pairs`] leaves such
/// pairs out beforehand). Both answers of a pair go through the model in one batch and share their
/// prompt, which a model may compute once.
///
/// A scorer with several labels can be trained as an ensemble of heads:
/// [`with_heads`](Self::with_heads).
///
/// [`screen_pairs`]: crate::screen_pairs
#[derive(Debug)]
pub struct RewardTrainer<S> {
    model: S,
    updater: Updater,
    config: RewardConfig,
    heads: Heads,
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
    /// Number of pairs that this was measured on.
    pub pairs: usize,
    /// Pairs that were left out.
    pub skipped: Skipped,
}

impl<S: Scorer> RewardTrainer<S> {
    /// A trainer of `model`.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained.
    pub fn new(model: S, config: RewardConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            updater: Updater::of(&model, &config.update)?,
            model,
            config,
            heads: Heads::ONE,
        })
    }

    /// Trains every head of a scorer with several labels, an ensemble on one trunk (for
    /// [`HeadEnsemble`](crate::HeadEnsemble)). The loss is the mean over pairs and heads;
    /// accuracy, margin and levels are those of the heads' mean score.
    ///
    /// # Errors
    /// An invalid configuration: no head.
    pub fn with_heads(mut self, heads: Heads) -> Result<Self> {
        if heads.count == 0 {
            return Err(CoreError::config("heads.count", 0, "must be at least 1").into());
        }
        self.heads = heads;
        Ok(self)
    }

    /// One optimiser step on the weighted mean loss of all pairs.
    ///
    /// The stats are those of the batch before its update: `reward/loss`, `reward/accuracy`,
    /// `reward/mean_margin`, `reward/mean_reward`, `reward/min_reward`, `reward/max_reward`,
    /// `reward/skipped` (pairs that teach nothing), `reward/grad_norm` (before clipping),
    /// `reward/lr`; of several heads `reward/disagreement`, the mean deviation of a pair's score
    /// difference over the heads; with loss scaling those of [`UpdateStats::metrics`] too.
    ///
    /// [`UpdateStats::metrics`]: rlhf_scale::UpdateStats::metrics
    ///
    /// # Errors
    /// Those of the model; a loss or gradient that is not finite; weights that add up to 0;
    /// [`Error::NothingToLearn`] where every pair is skipped. Nothing has changed then.
    pub fn step(&mut self, batch: &PreferenceBatch) -> Result<Stats> {
        let (batch, skipped) = usable(batch)?;
        let (model, heads, terms) = (&self.model, self.heads, self.config.terms());
        let (replicas, ranks) = (self.updater.replicas().clone(), self.updater.ranks());
        let size = replicas.microbatch_size(batch.len(), self.config.microbatch_size);
        let parts = batch.split(size)?;
        let denominator = heads.weights(&batch).iter().sum();
        let mut scored = Vec::with_capacity(parts.len());
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let scores = PairScores::of(model, &parts[i], heads)?;
            let loss = scores.loss(&parts[i], heads, terms, denominator)?.loss;
            scored.push(scores.detached());
            Ok(loss)
        })?;
        let scores = PairScores::gathered(&scored, &ranks)?;
        let (chosen, rejected) = scores.means();
        let metrics = pairwise_metrics(&chosen, &rejected)?;
        let mut stats = Stats::from_iter(update.metrics("reward"));
        stats.extend([
            ("reward/accuracy", metrics.accuracy),
            ("reward/mean_margin", metrics.mean_margin),
            ("reward/mean_reward", metrics.mean_reward),
            ("reward/min_reward", metrics.min_reward),
            ("reward/max_reward", metrics.max_reward),
            ("reward/skipped", skipped.total() as f64),
        ]);
        if heads.count > 1 {
            stats.insert("reward/disagreement", scores.disagreement()?);
        }
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
    /// No pairs, or none that can be compared; a score that is not finite; those of the model.
    pub fn evaluate(&self, pairs: &[Preference]) -> Result<RewardEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let (batch, skipped) = usable(&PreferenceBatch::new(pairs.to_vec())?)?;
        let mut scored = Vec::new();
        for part in batch.split(self.config.microbatch_size)? {
            scored.push(PairScores::of(&self.model, &part, self.heads)?);
        }
        let scores = PairScores::cat(&scored);
        scores.check_finite()?;
        let denominator = self.heads.weights(&batch).iter().sum();
        let loss = scores.loss(&batch, self.heads, self.config.terms(), denominator)?;
        let (chosen, rejected) = scores.means();
        let metrics = pairwise_metrics(&chosen, &rejected)?;
        Ok(RewardEvaluation {
            loss: f64::try_from(loss.loss).map_err(CoreError::from)?,
            accuracy: metrics.accuracy,
            mean_margin: metrics.mean_margin,
            mean_reward: metrics.mean_reward,
            pairs: batch.len(),
            skipped,
        })
    }
}

trainer_access!(RewardTrainer, RewardConfig);

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
