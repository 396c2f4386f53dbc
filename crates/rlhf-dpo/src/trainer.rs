//! Training a policy on comparisons.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Policy, Preference, PreferenceBatch,
    Stats, train_epochs,
};
use rlhf_scale::{AdamWConfig, UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::loss::check_beta;
use crate::metrics::means;
use crate::reference::{PairLogprobs, PairTargets};
use crate::{
    Divergence, DpoInputs, DpoLoss, Error, Result, ScoredPreference, dpo_loss, reward_metrics,
    score_preferences,
};

/// How a [`DpoTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct DpoConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// The loss of a pair.
    pub loss: DpoLoss,
    /// The divergence from the reference that rewards are derived from.
    pub divergence: Divergence,
    /// `β`: how strongly the policy is held to the reference.
    pub beta: f64,
    /// Pairs that are in memory at once. The result of a step does not depend on it, but for
    /// rounding.
    pub microbatch_size: usize,
}

impl Default for DpoConfig {
    /// TRL's `DPOConfig`: learning rate 1e-6, β 0.1, 8 pairs at once. Its schedule is linear; this
    /// one is constant until it is told how many steps there will be.
    fn default() -> Self {
        Self {
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 1e-6,
                    ..AdamWConfig::default()
                },
                ..UpdateConfig::default()
            },
            loss: DpoLoss::default(),
            divergence: Divergence::default(),
            beta: 0.1,
            microbatch_size: 8,
        }
    }
}

impl DpoConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        self.loss.validate()?;
        self.divergence.validate()?;
        check_beta(self.beta)?;
        match self.microbatch_size {
            0 => Err(CoreError::config("microbatch_size", 0, "must be at least 1").into()),
            _ => Ok(()),
        }
    }
}

/// Trains a [`Policy`] on comparisons, held to a reference by [`dpo_loss`].
///
/// Weights of the pairs are used, margins are not. [`train`](Self::train) scores the dataset
/// under the reference once; [`step`](Self::step) scores the batch it is given.
pub struct DpoTrainer<P> {
    model: P,
    reference: Box<dyn Policy>,
    updater: Updater,
    config: DpoConfig,
}

/// How a policy's implicit rewards agree with comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DpoEvaluation {
    /// Weighted mean of the loss that is trained on.
    pub loss: f64,
    /// Share of pairs whose chosen implicit reward is strictly above the rejected one.
    pub accuracy: f64,
    /// Mean of chosen minus rejected implicit reward.
    pub margin: f64,
    /// Number of pairs.
    pub pairs: usize,
}

impl<P: Policy> DpoTrainer<P> {
    /// A trainer of `model`. The reference is commonly a copy of it, made before the first step;
    /// it is never changed.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained.
    pub fn new(model: P, reference: Box<dyn Policy>, config: DpoConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            updater: Updater::new(model.named_parameters(), &config.update)?,
            model,
            reference,
            config,
        })
    }

    /// One optimiser step on the weighted mean loss of all pairs.
    ///
    /// The stats are those of the batch before its update: `dpo/loss`, `dpo/rewards/chosen`,
    /// `dpo/rewards/rejected`, `dpo/rewards/margin`, `dpo/rewards/accuracy`,
    /// `dpo/logprobs/chosen`, `dpo/logprobs/rejected` (of whole responses), `dpo/grad_norm`
    /// (before clipping), `dpo/lr`; with loss scaling those of [`UpdateStats::metrics`] too.
    ///
    /// [`UpdateStats::metrics`]: rlhf_scale::UpdateStats::metrics
    ///
    /// # Errors
    /// Those of both models; a loss or gradient that is not finite; weights that do not add up
    /// to a positive number. Nothing has changed then.
    pub fn step(&mut self, batch: &PreferenceBatch) -> Result<Stats> {
        let scored = self.score(batch.pairs())?;
        self.step_scored(&scored)
    }

    /// [`step`](Self::step) on pairs that the reference has scored already.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub fn step_scored(&mut self, pairs: &[ScoredPreference]) -> Result<Stats> {
        let denominator = total_weight(pairs)?;
        let parts: Vec<_> = pairs.chunks(self.config.microbatch_size).collect();
        let (model, config) = (&self.model, &self.config);
        let mut judged = Vec::with_capacity(parts.len());
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let part = Judged::of(model, parts[i], config, denominator)?;
            judged.push(part.detached());
            Ok(part.loss)
        })?;
        let judged = Judged::cat(&judged);
        let rewards = reward_metrics(&judged.chosen_rewards, &judged.rejected_rewards)?;
        let [chosen, rejected] = means([&judged.chosen_logprobs, &judged.rejected_logprobs])?;
        let mut stats = Stats::from_iter(update.metrics("dpo"));
        stats.extend([
            ("dpo/rewards/chosen", rewards.chosen),
            ("dpo/rewards/rejected", rewards.rejected),
            ("dpo/rewards/margin", rewards.margin),
            ("dpo/rewards/accuracy", rewards.accuracy),
            ("dpo/logprobs/chosen", chosen),
            ("dpo/logprobs/rejected", rejected),
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
        let scored = self.score(pairs)?;
        train_epochs(self, &scored, epochs, observers)
    }

    /// Loss and implicit rewards of `pairs`.
    ///
    /// # Errors
    /// No pairs; a log-probability that is not finite; those of both models.
    pub fn evaluate(&self, pairs: &[Preference]) -> Result<DpoEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let scored = self.score(pairs)?;
        let denominator = total_weight(&scored)?;
        let parts = scored.chunks(self.config.microbatch_size);
        let parts = parts
            .map(|part| Judged::of(&self.model, part, &self.config, denominator))
            .collect::<Result<Vec<_>>>()?;
        let judged = Judged::cat(&parts);
        check_finite(&judged.chosen_logprobs, &judged.rejected_logprobs)?;
        let loss = f64::try_from(&judged.loss).map_err(CoreError::from)?;
        let rewards = reward_metrics(&judged.chosen_rewards, &judged.rejected_rewards)?;
        Ok(DpoEvaluation {
            loss,
            accuracy: rewards.accuracy,
            margin: rewards.margin,
            pairs: pairs.len(),
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
    pub fn config(&self) -> &DpoConfig {
        &self.config
    }

    /// The update path: its learning rate, loss scale and averaged weights.
    pub fn updater(&self) -> &Updater {
        &self.updater
    }

    /// Writes weights, optimiser state and step into the folder `dir`; the reference is not
    /// written, as it never changes.
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

    fn score(&self, pairs: &[Preference]) -> Result<Vec<ScoredPreference>> {
        score_preferences(&self.reference, pairs, self.config.microbatch_size)
    }
}

impl<P: Policy> EpochTrainer for DpoTrainer<P> {
    type Item = ScoredPreference;
    type Error = Error;
    const PHASE: &'static str = "dpo";

    fn step_on(&mut self, items: Vec<ScoredPreference>) -> Result<Stats> {
        self.step_scored(&items)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

fn total_weight(pairs: &[ScoredPreference]) -> Result<f64> {
    let total: f64 = pairs.iter().map(|p| p.pair.weight).sum();
    if total.is_finite() && total > 0.0 {
        return Ok(total);
    }
    let reason = "the weights of a batch must add up to a positive number";
    Err(CoreError::config("the sum of the pairs' weights", total, reason).into())
}

fn check_finite(chosen: &Tensor, rejected: &Tensor) -> Result<()> {
    for (what, side) in [
        ("log-probability of the chosen response", chosen),
        ("log-probability of the rejected response", rejected),
    ] {
        let side = Vec::<f64>::try_from(side).map_err(CoreError::from)?;
        if let Some(row) = side.iter().position(|value| !value.is_finite()) {
            let value = side[row];
            return Err(CoreError::NonFinite { what, row, value }.into());
        }
    }
    Ok(())
}

/// Some pairs under the policy: their part of the loss (a scalar), and `[B]` tensors.
struct Judged {
    loss: Tensor,
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
}

impl Judged {
    fn of(
        model: &impl Policy,
        pairs: &[ScoredPreference],
        config: &DpoConfig,
        denominator: f64,
    ) -> Result<Self> {
        let batch = PreferenceBatch::new(pairs.iter().map(|p| p.pair.clone()).collect())?;
        let policy = PairLogprobs::of(model, &batch)?;
        let targets = PairTargets::new(pairs, policy.chosen.device());
        let inputs = DpoInputs {
            policy_chosen: &policy.chosen,
            policy_rejected: &policy.rejected,
            ref_chosen: &targets.ref_chosen,
            ref_rejected: &targets.ref_rejected,
            chosen_lengths: &targets.chosen_lengths,
            rejected_lengths: &targets.rejected_lengths,
        };
        let out = dpo_loss(inputs, config.loss, config.divergence, config.beta)?;
        Ok(Self {
            loss: (out.losses * &targets.weights).sum(Kind::Float) / denominator,
            chosen_rewards: out.chosen_rewards,
            rejected_rewards: out.rejected_rewards,
            chosen_logprobs: policy.chosen,
            rejected_logprobs: policy.rejected,
        })
    }

    fn detached(&self) -> Self {
        Self {
            loss: self.loss.detach(),
            chosen_rewards: self.chosen_rewards.detach(),
            rejected_rewards: self.rejected_rewards.detach(),
            chosen_logprobs: self.chosen_logprobs.detach(),
            rejected_logprobs: self.rejected_logprobs.detach(),
        }
    }

    /// The parts of a batch as one; their losses add up.
    fn cat(parts: &[Self]) -> Self {
        let column = |of: fn(&Self) -> &Tensor| parts.iter().map(of).collect::<Vec<_>>();
        let cat = |of: fn(&Self) -> &Tensor| Tensor::cat(&column(of), 0);
        Self {
            loss: Tensor::stack(&column(|p| &p.loss), 0).sum(Kind::Float),
            chosen_rewards: cat(|p| &p.chosen_rewards),
            rejected_rewards: cat(|p| &p.rejected_rewards),
            chosen_logprobs: cat(|p| &p.chosen_logprobs),
            rejected_logprobs: cat(|p| &p.rejected_logprobs),
        }
    }
}
