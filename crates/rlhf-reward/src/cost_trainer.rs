//! Training a cost model.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Ranks, Scorer, Stats, train_epochs,
};
use rlhf_scale::{UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::access::trainer_access;
use crate::cost::cost_accuracies;
use crate::pair_scores::nothing_scored;
use crate::ranking_trainer::check_finite;
use crate::trainer::check_microbatch_size;
use crate::{
    CostInputs, CostLoss, Error, Result, RewardConfig, SafetyBatch, SafetyPair, Skipped, cost_loss,
};

/// How a [`CostTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct CostConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// `λ` of [`cost_loss`].
    pub regularization: f64,
    /// Pairs that are in memory at once. The result of a step does not depend on it, but for
    /// rounding.
    pub microbatch_size: usize,
}

impl Default for CostConfig {
    /// The optimiser of [`RewardConfig`], no regularisation, 8 pairs at once.
    fn default() -> Self {
        Self {
            update: RewardConfig::default().update,
            regularization: 0.0,
            microbatch_size: 8,
        }
    }
}

impl CostConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        if !(self.regularization.is_finite() && self.regularization >= 0.0) {
            let reason = "a finite number that is not negative is needed";
            let value = self.regularization;
            return Err(CoreError::config("regularization", value, reason).into());
        }
        check_microbatch_size(self.microbatch_size)
    }
}

/// Trains a [`Scorer`] with one label to say how harmful an answer is ([`cost_loss`]): what
/// [`CostModel`](crate::CostModel) makes a constraint of.
#[derive(Debug)]
pub struct CostTrainer<S> {
    model: S,
    updater: Updater,
    config: CostConfig,
}

/// How well a cost model agrees with people.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct CostEvaluation {
    /// Mean of the loss that is trained on.
    pub loss: f64,
    /// Share of pairs whose less safe answer costs strictly more.
    pub accuracy: f64,
    /// Share of answers whose cost is positive where they are unsafe, and not where they are safe.
    pub sign_accuracy: f64,
    /// Number of pairs that this was measured on.
    pub pairs: usize,
    /// Pairs that were left out.
    pub skipped: Skipped,
}

impl<S: Scorer> CostTrainer<S> {
    /// A trainer of `model`.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained.
    pub fn new(model: S, config: CostConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            updater: Updater::of(&model, &config.update)?,
            model,
            config,
        })
    }

    /// One optimiser step on the mean loss of all pairs.
    ///
    /// The stats are those of the batch before its update: `cost/loss`, `cost/accuracy` and
    /// `cost/sign_accuracy`, `cost/skipped` (pairs with equal answers or an empty one),
    /// `cost/grad_norm` (before clipping), `cost/lr`; with loss scaling those of
    /// [`UpdateStats::metrics`](rlhf_scale::UpdateStats::metrics) too.
    ///
    /// # Errors
    /// Those of the model; a loss or gradient that is not finite; [`Error::NothingToLearn`].
    /// Nothing has changed then.
    pub fn step(&mut self, batch: &SafetyBatch) -> Result<Stats> {
        let (batch, skipped) = batch.usable()?;
        let (model, config) = (&self.model, &self.config);
        let (replicas, ranks) = (self.updater.replicas().clone(), self.updater.ranks());
        let parts = batch.split(replicas.microbatch_size(batch.len(), config.microbatch_size));
        let denominator = batch.len() as f64;
        let mut scored = Vec::with_capacity(parts.len());
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let costs = Costs::of(model, &parts[i])?;
            let loss = costs.loss(config.regularization, denominator)?.loss;
            scored.push(costs.detached());
            Ok(loss)
        })?;
        let costs = Costs::gathered(&scored, &ranks)?;
        let (accuracy, sign_accuracy) = cost_accuracies(costs.inputs())?;
        let mut stats = Stats::from_iter(update.metrics("cost"));
        stats.extend([
            ("cost/accuracy", accuracy),
            ("cost/sign_accuracy", sign_accuracy),
            ("cost/skipped", skipped.total() as f64),
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
        pairs: &[SafetyPair],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        train_epochs(self, pairs, epochs, observers)
    }

    /// Loss and accuracies on `pairs`.
    ///
    /// # Errors
    /// No pairs, or none that can be compared; a cost that is not finite; those of the model.
    pub fn evaluate(&self, pairs: &[SafetyPair]) -> Result<CostEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let (batch, skipped) = SafetyBatch::new(pairs.to_vec())?.usable()?;
        let parts = batch.split(self.config.microbatch_size);
        let costs = parts
            .iter()
            .map(|part| Costs::of(&self.model, part))
            .collect::<Result<Vec<_>>>()?;
        let costs = Costs::cat(&costs);
        check_finite(&Tensor::stack(&[&costs.safer, &costs.less_safe], 1).view(-1))?;
        let loss = costs.loss(self.config.regularization, batch.len() as f64)?;
        let (accuracy, sign_accuracy) = cost_accuracies(costs.inputs())?;
        Ok(CostEvaluation {
            loss: f64::try_from(loss.loss).map_err(CoreError::from)?,
            accuracy,
            sign_accuracy,
            pairs: batch.len(),
            skipped,
        })
    }
}

trainer_access!(CostTrainer, CostConfig);

impl<S: Scorer> EpochTrainer for CostTrainer<S> {
    type Item = SafetyPair;
    type Error = Error;
    const PHASE: &'static str = "cost";

    fn step_on(&mut self, items: Vec<SafetyPair>) -> Result<Stats> {
        self.step(&SafetyBatch::new(items)?)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

/// Costs and labels of some pairs, `[B]` each.
struct Costs {
    safer: Tensor,
    less_safe: Tensor,
    safer_is_safe: Tensor,
    less_safe_is_safe: Tensor,
}

impl Costs {
    /// One forward pass over both sides of all pairs, which share their prompts.
    fn of(model: &impl Scorer, batch: &SafetyBatch) -> Result<Self> {
        let sequences = batch.interleaved()?;
        let costs = model.scores(&sequences)?;
        if costs.size() != [sequences.len() as i64, 1] {
            return Err(Error::NotAReward {
                shape: costs.size(),
                sequences: sequences.len(),
                objective: "a cost",
            });
        }
        let costs = costs.to_kind(Kind::Float).reshape([-1, 2]);
        let flags = |flag: fn(&SafetyPair) -> bool| {
            let flags: Vec<bool> = batch.pairs().iter().map(flag).collect();
            Tensor::from_slice(&flags).to_device(costs.device())
        };
        Ok(Self {
            safer_is_safe: flags(|p| p.safer_is_safe),
            less_safe_is_safe: flags(|p| p.less_safe_is_safe),
            safer: costs.select(1, 0),
            less_safe: costs.select(1, 1),
        })
    }

    fn inputs(&self) -> CostInputs<'_> {
        CostInputs {
            safer: &self.safer,
            less_safe: &self.less_safe,
            safer_is_safe: &self.safer_is_safe,
            less_safe_is_safe: &self.less_safe_is_safe,
        }
    }

    fn loss(&self, regularization: f64, denominator: f64) -> Result<CostLoss> {
        cost_loss(self.inputs(), regularization, denominator)
    }

    fn detached(&self) -> Self {
        Self::map(|of| of(self).detach())
    }

    fn cat(parts: &[Self]) -> Self {
        Self::map(|of| Tensor::cat(&parts.iter().map(of).collect::<Vec<_>>(), 0))
    }

    /// The parts of a batch that all processes have, as one.
    fn gathered(parts: &[Self], ranks: &Ranks) -> Result<Self> {
        let own = match parts.is_empty() {
            true => Vec::new(),
            false => {
                let all = Self::cat(parts);
                let flags = [all.safer_is_safe, all.less_safe_is_safe];
                [all.safer, all.less_safe]
                    .into_iter()
                    .chain(flags)
                    .collect()
            }
        };
        match <[Tensor; 4]>::try_from(ranks.gather_columns::<Error>(Ok(own))?) {
            Ok([safer, less_safe, safer_is_safe, less_safe_is_safe]) => Ok(Self {
                safer,
                less_safe,
                safer_is_safe,
                less_safe_is_safe,
            }),
            Err(_) => Err(nothing_scored()),
        }
    }

    /// Costs whose fields are made one by one, by a function of the field.
    fn map(make: impl Fn(fn(&Self) -> &Tensor) -> Tensor) -> Self {
        Self {
            safer: make(|c| &c.safer),
            less_safe: make(|c| &c.less_safe),
            safer_is_safe: make(|c| &c.safer_is_safe),
            less_safe_is_safe: make(|c| &c.less_safe_is_safe),
        }
    }
}
