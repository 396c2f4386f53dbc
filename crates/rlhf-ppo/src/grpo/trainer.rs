//! The trainer: its parts, and a step.

use std::sync::Arc;
use std::time::Instant;

use rlhf_core::{DataCursor, Detokenize, Error as CoreError, Policy, RewardModel, Stats};
use rlhf_scale::Updater;

use super::choices::RewardMix;
use super::config::GrpoConfig;
use crate::constraints::Constraints;
use crate::train::NextPrompts;
use crate::{Constraint, ConstraintRule, Result};

mod evaluate;
mod update;

/// Trains a policy on the rewards of several answers to each prompt, which are each other's
/// baseline: no critic.
///
/// Three levels: [`train`](Self::train) · [`step`](Self::step) · [`rollout`](Self::rollout) and
/// [`update`](Self::update), below which are the pure functions [`group_advantages`](crate::group_advantages),
/// [`group_loss`](crate::group_loss) and their kin. The source of the last two is meant to be read:
/// their numbered comments are the algorithm. A prompt is computed once for all of its answers, when they are written and when
/// they are learnt from.
///
/// Equal seeds give equal bytes on one machine, and a trainer that was [saved](Self::save) and
/// [loaded](Self::load) goes on as if nothing had happened.
///
/// ```
/// use std::sync::Arc;
/// use rlhf_ppo::core::{PaddedBatch, Parameters, Policy, Result, reward_fn};
/// use rlhf_ppo::tch::{Device, Kind, Tensor};
/// use rlhf_ppo::{GrpoConfig, GrpoTrainer};
///
/// /// Logits of the next token that depend on the last one: a table `[V, V]`.
/// struct Bigram(Tensor);
///
/// impl Parameters for Bigram {
///     fn named_parameters(&self) -> Vec<(String, Tensor)> {
///         vec![("table".into(), self.0.shallow_clone())]
///     }
/// }
///
/// impl Policy for Bigram {
///     fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
///         let size = batch.input_ids.size();
///         let logits = self.0.f_index_select(0, &batch.input_ids.view(-1))?;
///         Ok(logits.view([size[0], size[1], -1]))
///     }
/// }
///
/// # fn main() -> Result<(), rlhf_ppo::Error> {
/// let mut config = GrpoConfig::dr_grpo();
/// config.generation.max_new_tokens = 6;
/// config.update.optimizer.lr = 0.05;
/// let zeros = Tensor::zeros([4, 4], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let program = reward_fn(|_prompt, answer| f64::from(answer.ends_with("dd")));
/// let mut trainer = GrpoTrainer::new(config, Bigram(zeros), program)?.with_detokenizer(
///     |ids: &[i64]| Ok(ids.iter().map(|&id| char::from(b'a' + id as u8)).collect()),
/// );
/// let prompts: Vec<Arc<[i64]>> = (0..8).map(|i| Arc::from([i % 4])).collect();
/// let first = trainer.step(&prompts)?;
/// trainer.train(&prompts, 30, &mut [])?;
/// let last = trainer.step(&prompts)?;
/// assert!(last.get("grpo/score/mean") > first.get("grpo/score/mean"));
/// # Ok(())
/// # }
/// ```
pub struct GrpoTrainer<P> {
    pub(crate) config: GrpoConfig,
    pub(crate) policy: P,
    reference: Option<Box<dyn Policy>>,
    pub(crate) rewards: Vec<WeightedReward>,
    pub(crate) constraints: Constraints,
    pub(crate) detokenizer: Option<Box<dyn Detokenize>>,
    pub(crate) updater: Updater,
    pub(crate) steps_done: u64,
    pub(crate) completions_done: u64,
    pub(crate) cursor: Option<DataCursor>,
}

/// One of the rewards.
pub(crate) struct WeightedReward {
    pub(crate) name: String,
    pub(crate) weight: f64,
    pub(crate) model: Box<dyn RewardModel>,
}

impl<P: Policy> GrpoTrainer<P> {
    /// A trainer without a reference. Dropout is [switched off](Policy::disable_dropout) in the
    /// policy.
    ///
    /// # Errors
    /// Those of [`GrpoConfig::validate`]; a KL penalty, which needs a reference; those of
    /// [`Updater::new`] for weights that cannot be trained.
    pub fn new(config: GrpoConfig, policy: P, reward: impl RewardModel + 'static) -> Result<Self> {
        if config.kl.needs_reference() {
            let reason = "needs a reference: see GrpoTrainer::with_reference";
            let penalty = format!("{:?}", config.kl);
            return Err(CoreError::config("kl", penalty, reason).into());
        }
        Self::build(config, policy, None, Box::new(reward))
    }

    /// A trainer whose divergence from `reference` is measured, and has a price where the
    /// configuration says so. `reference` is a copy of the policy, which is never trained.
    ///
    /// # Errors
    /// Those of [`GrpoConfig::validate`] and [`Updater::new`].
    pub fn with_reference(
        config: GrpoConfig,
        policy: P,
        reference: impl Policy + 'static,
        reward: impl RewardModel + 'static,
    ) -> Result<Self> {
        Self::build(config, policy, Some(Box::new(reference)), Box::new(reward))
    }

    fn build(
        config: GrpoConfig,
        mut policy: P,
        reference: Option<Box<dyn Policy>>,
        reward: Box<dyn RewardModel>,
    ) -> Result<Self> {
        config.validate()?;
        policy.disable_dropout();
        Ok(Self {
            updater: Updater::of(&policy, &config.update)?,
            config,
            policy,
            reference,
            rewards: vec![WeightedReward {
                name: "reward".to_string(),
                weight: 1.0,
                model: reward,
            }],
            constraints: Constraints::default(),
            detokenizer: None,
            steps_done: 0,
            completions_done: 0,
            cursor: None,
        })
    }

    /// Attaches a tokenizer, for rewards that read text.
    #[must_use]
    pub fn with_detokenizer(mut self, detokenizer: impl Detokenize + 'static) -> Self {
        self.detokenizer = Some(Box::new(detokenizer));
        self
    }

    /// Adds a reward that counts `weight` times, reported as `grpo/score/NAME`; the first has
    /// weight 1 and is called `reward`.
    ///
    /// # Errors
    /// [`InvalidConfig`](CoreError::InvalidConfig) for a weight that is not finite, or a name that
    /// is taken.
    pub fn with_reward(
        mut self,
        name: impl Into<String>,
        weight: f64,
        model: impl RewardModel + 'static,
    ) -> Result<Self> {
        let name = name.into();
        if !weight.is_finite() {
            return Err(CoreError::config("weight", weight, "must be finite").into());
        }
        let taken = ["mean", "std", "length_correlation"];
        if taken.contains(&name.as_str()) || self.rewards.iter().any(|r| r.name == name) {
            let reason = "another statistic of the scores has this name";
            return Err(CoreError::config("name", name, reason).into());
        }
        self.rewards.push(WeightedReward {
            name,
            weight,
            model: Box::new(model),
        });
        Ok(self)
    }

    /// Adds a constraint. Any number of them hold together. An answer that is skipped is in no
    /// baseline either. A [`Lagrangian`](ConstraintRule::Lagrangian) is given
    /// [`with_rule`](Constraint::with_rule), without a critic: the answers' rewards become
    /// `(r − Σ λ cost) / (1 + Σ λ)`, and their advantages with them.
    ///
    /// # Errors
    /// A threshold or rule that makes no sense; a name that another constraint has; a critic; a
    /// trainer that has trained; a rule that changes the rewards under
    /// [`RewardMix::NormalizeThenSum`], which has no sum to change.
    pub fn with_constraint(mut self, constraint: Constraint) -> Result<Self> {
        constraint.validate_without_critic()?;
        let on_the_sum = matches!(
            constraint.rule,
            ConstraintRule::Shaping { .. } | ConstraintRule::Lagrangian(_)
        );
        if on_the_sum && self.config.mix == RewardMix::NormalizeThenSum {
            let reason = "there is no summed reward to take a cost off under \
                          RewardMix::NormalizeThenSum: make the cost a reward of negative weight";
            return Err(CoreError::config("constraint.rule", &constraint.name, reason).into());
        }
        if self.steps_done > 0 {
            let reason = "is too late: add constraints before training and loading";
            return Err(CoreError::config("constraint", &constraint.name, reason).into());
        }
        self.constraints.push(constraint)?;
        Ok(self)
    }

    /// One step: answers to `prompts`, and an update on them. With dynamic sampling, prompts whose
    /// answers all score the same are dropped, and there are no others: see
    /// [`train`](Self::train).
    ///
    /// # Errors
    /// Those of [`rollout`](Self::rollout) and [`update`](Self::update).
    pub fn step(&mut self, prompts: &[Arc<[i64]>]) -> Result<Stats> {
        let mut given = Some(prompts.to_vec());
        self.step_from(prompts.len(), &mut |_| given.take().unwrap_or_default())
    }

    /// A step on as many prompts as `wanted`, which `next` hands out.
    pub(crate) fn step_from(&mut self, wanted: usize, next: &mut NextPrompts<'_>) -> Result<Stats> {
        let start = Instant::now();
        let before = self.completions_done;
        let rollout = self
            .collect(wanted, next)
            .and_then(|judged| self.finish(judged));
        let rollout_s = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let updated = rollout.and_then(|rollout| self.update(&rollout));
        if updated.is_err() {
            self.completions_done = before; // a step that fails uses up no random numbers
        }
        let mut stats = updated?;
        stats.insert("grpo/time/rollout_s", rollout_s);
        stats.insert("grpo/time/update_s", start.elapsed().as_secs_f64());
        Ok(stats)
    }

    /// The options.
    pub fn config(&self) -> &GrpoConfig {
        &self.config
    }

    /// The update path: its learning rate, loss scale and averaged weights.
    pub fn updater(&self) -> &Updater {
        &self.updater
    }

    /// The policy, as trained so far.
    pub fn policy(&self) -> &P {
        &self.policy
    }

    /// The reference policy, if there is one.
    pub fn reference(&self) -> Option<&dyn Policy> {
        self.reference.as_deref()
    }

    /// The first reward model.
    pub fn reward_model(&self) -> &dyn RewardModel {
        self.rewards[0].model.as_ref()
    }

    /// The constraints, in the order they were added.
    pub fn constraints(&self) -> &[Constraint] {
        self.constraints.all()
    }

    /// The multiplier of the constraint of that name, where it has one.
    pub fn multiplier(&self, constraint: &str) -> Option<f64> {
        self.constraints.multiplier(constraint)
    }

    /// Updates done so far, those that were skipped included.
    pub fn steps_done(&self) -> u64 {
        self.steps_done
    }

    /// The trained policy.
    pub fn into_policy(self) -> P {
        self.policy
    }
}
