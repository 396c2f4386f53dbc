//! The trainer: its parts, and a step.

use std::sync::Arc;
use std::time::Instant;

use rlhf_core::{
    DataCursor, Detokenize, Error as CoreError, Parameters, Policy, RewardModel, Sequence, Stats,
    joined_parameters, joined_shards,
};
use rlhf_scale::{ParamGroup, Updater};

use crate::constraints::Constraints;
use crate::pretraining::Pretraining;
use crate::{Constraint, Critic, KlController, PpoConfig, Result, RunningMoments};

mod evaluate;
mod update;

/// Trains a policy and a critic by PPO against a reward model, held to a reference by a KL
/// penalty.
///
/// Three levels: [`train`](Self::train) · [`step`](Self::step) · [`rollout`](Self::rollout) and
/// [`update`](Self::update), below which are the pure functions of this crate. The source of the
/// last two is meant to be read: their numbered comments are the algorithm.
///
/// The critic is a [`ValueModel`](rlhf_core::ValueModel) of its own, or [`OnPolicy`](crate::OnPolicy)
/// for a policy that values states itself.
///
/// Equal seeds give equal bytes on one machine, and a trainer that was [saved](Self::save) and
/// [loaded](Self::load) goes on as if nothing had happened.
pub struct PpoTrainer<P, V> {
    pub(crate) config: PpoConfig,
    pub(crate) policy: P,
    pub(crate) value_model: V,
    reference: Box<dyn Policy>,
    reward: Box<dyn RewardModel>,
    pub(crate) detokenizer: Option<Box<dyn Detokenize>>,
    pub(crate) constraints: Constraints,
    pub(crate) moments: RunningMoments,
    pub(crate) pretraining: Option<Pretraining>,
    pub(crate) updater: Updater,
    pub(crate) kl: KlController,
    pub(crate) steps_done: u64,
    pub(crate) completions_done: u64,
    pub(crate) cursor: Option<DataCursor>,
}

impl<P: Policy, V: Critic<P>> PpoTrainer<P, V> {
    /// A trainer that has done nothing yet. `reference` is a copy of the policy, which is never
    /// trained. Dropout is [switched off](Policy::disable_dropout) in policy and critic, and stays
    /// so: with it, ratios would differ from 1 before anything has moved.
    ///
    /// # Errors
    /// Those of [`PpoConfig::validate`], and of [`Updater::new`] for weights that cannot be
    /// trained.
    pub fn new(
        config: PpoConfig,
        mut policy: P,
        mut value_model: V,
        reference: impl Policy + 'static,
        reward: impl RewardModel + 'static,
    ) -> Result<Self> {
        config.validate()?;
        policy.disable_dropout();
        value_model.disable_dropout();
        Ok(Self {
            updater: updater(&config, &policy, &value_model, &[])?,
            kl: KlController::new(config.kl_control),
            config,
            policy,
            value_model,
            reference: Box::new(reference),
            reward: Box::new(reward),
            detokenizer: None,
            constraints: Constraints::default(),
            moments: RunningMoments::default(),
            pretraining: None,
            steps_done: 0,
            completions_done: 0,
            cursor: None,
        })
    }

    /// Attaches a tokenizer, for rewards and constraints that read text.
    #[must_use]
    pub fn with_detokenizer(mut self, detokenizer: impl Detokenize + 'static) -> Self {
        self.detokenizer = Some(Box::new(detokenizer));
        self
    }

    /// Adds a constraint. Any number of them hold together. To be called before anything is
    /// trained or loaded: a cost critic joins the optimiser.
    ///
    /// # Errors
    /// Those of [`Constraint::validate`] and [`Updater::new`]; a name that another constraint has;
    /// a trainer that has trained.
    pub fn with_constraint(mut self, mut constraint: Constraint) -> Result<Self> {
        constraint.validate()?;
        if self.steps_done > 0 || self.updater.step() > 0 {
            let reason = "is too late: add constraints before training and loading";
            return Err(CoreError::config("constraint", &constraint.name, reason).into());
        }
        if let Some(critic) = &mut constraint.critic {
            critic.disable_dropout();
        }
        self.constraints.push(constraint)?;
        self.updater = updater(
            &self.config,
            &self.policy,
            &self.value_model,
            self.constraints.all(),
        )?;
        Ok(self)
    }

    /// Gives the texts of the pretraining loss ([`PpoConfig::ptx`]). Their *responses* are scored:
    /// a plain text is a prompt of one token and the rest.
    ///
    /// # Errors
    /// No texts, or one without a response.
    pub fn with_pretraining(mut self, texts: Vec<Sequence>) -> Result<Self> {
        self.pretraining = Some(Pretraining::new(texts, self.config.seed)?);
        Ok(self)
    }

    /// One step: a rollout over `prompts` and an update on it.
    ///
    /// # Errors
    /// Those of [`rollout`](Self::rollout) and [`update`](Self::update).
    pub fn step(&mut self, prompts: &[Arc<[i64]>]) -> Result<Stats> {
        let start = Instant::now();
        let before = self.completions_done;
        let rollout = self.rollout(prompts)?;
        let rollout_s = start.elapsed().as_secs_f64();

        let start = Instant::now();
        let updated = self.update(&rollout);
        if updated.is_err() {
            self.completions_done = before; // a step that fails uses up no random numbers
        }
        let mut stats = updated?;
        stats.insert("ppo/time/rollout_s", rollout_s);
        stats.insert("ppo/time/update_s", start.elapsed().as_secs_f64());
        Ok(stats)
    }

    /// The options.
    pub fn config(&self) -> &PpoConfig {
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

    /// The value model, as trained so far.
    pub fn value_model(&self) -> &V {
        &self.value_model
    }

    /// The reference policy, which the divergence is measured from.
    pub fn reference(&self) -> &dyn Policy {
        self.reference.as_ref()
    }

    /// The reward model.
    pub fn reward_model(&self) -> &dyn RewardModel {
        self.reward.as_ref()
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

    /// The coefficient of the KL penalty of the next rollout.
    pub fn kl_coef(&self) -> f64 {
        self.kl.kl_coef()
    }

    /// The trained models.
    pub fn into_models(self) -> (P, V) {
        (self.policy, self.value_model)
    }
}

/// The update path of all that is trained, with the critics' learning rate.
fn updater<P: Policy, V: Critic<P>>(
    config: &PpoConfig,
    policy: &P,
    critic: &V,
    constraints: &[Constraint],
) -> Result<Updater> {
    let prefixes: Vec<String> = constraints
        .iter()
        .map(|constraint| format!("cost.{}", constraint.name))
        .collect();
    let mut parts: Vec<(&str, &dyn Parameters)> = vec![("policy", policy), ("value", critic)];
    for (constraint, prefix) in constraints.iter().zip(&prefixes) {
        if let Some(critic) = &constraint.critic {
            parts.push((prefix, critic.as_ref()));
        }
    }
    let mut update = config.update.clone();
    if let Some(lr) = config.critic_lr {
        if critic.shares_trunk() {
            let reason = "has nothing to act on where the critic is on the policy's trunk";
            return Err(CoreError::config("critic_lr", lr, reason).into());
        }
        let critics = parts.iter().filter(|(prefix, _)| *prefix != "policy");
        update.optimizer.groups.push(ParamGroup {
            params: critics.map(|(prefix, _)| format!("{prefix}.*")).collect(),
            lr: Some(lr),
            ..ParamGroup::default()
        });
    }
    let mut updater = Updater::new(joined_parameters(&parts), &update)?;
    updater.set_shards(joined_shards(&parts));
    Ok(updater)
}
