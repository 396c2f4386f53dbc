//! The algorithm, from prompts to updated weights.

use std::sync::Arc;
use std::time::Instant;

use rlhf_core::{
    Completions, DataCursor, Detokenize, Policy, RewardModel, RngStreams, Shift, Stats, ValueModel,
    joined_parameters,
};
use rlhf_scale::Updater;
use tch::Tensor;

use crate::measure::Forward;
use crate::minibatch::{Counts, microbatch_loss};
use crate::order::{parts, shuffled};
use crate::{
    Constraint, Error, GaeInput, KlControl, KlController, MinibatchStats, OldLogprobs, PpoConfig,
    Result, Rollout, ShapedRewardsInput, completions, gae, measure, shaped_rewards, stats,
};

/// Trains a policy and a value model by PPO against a reward model, held to a reference by a KL
/// penalty.
///
/// Three levels: [`train`](Self::train) · [`step`](Self::step) · [`rollout`](Self::rollout) and
/// [`update`](Self::update), below which are the pure functions of this crate. The source of this
/// file is meant to be read: its numbered comments are the algorithm.
///
/// Equal seeds give equal bytes on one machine, and a trainer that was [saved](Self::save) and
/// [loaded](Self::load) goes on as if nothing had happened.
pub struct PpoTrainer<P, V> {
    pub(crate) config: PpoConfig,
    pub(crate) policy: P,
    pub(crate) value_model: V,
    reference: Box<dyn Policy>,
    reward: Box<dyn RewardModel>,
    detokenizer: Option<Box<dyn Detokenize>>,
    constraints: Vec<Constraint>,
    pub(crate) updater: Updater,
    pub(crate) kl: KlController,
    pub(crate) steps_done: u64,
    pub(crate) completions_done: u64,
    pub(crate) cursor: Option<DataCursor>,
}

impl<P: Policy, V: ValueModel> PpoTrainer<P, V> {
    /// A trainer that has done nothing yet. `reference` is a copy of the policy, which is never
    /// trained.
    ///
    /// # Errors
    /// Those of [`PpoConfig::validate`], and of [`Updater::new`] for weights that cannot be
    /// trained.
    pub fn new(
        config: PpoConfig,
        policy: P,
        value_model: V,
        reference: impl Policy + 'static,
        reward: impl RewardModel + 'static,
    ) -> Result<Self> {
        config.validate()?;
        let parameters = joined_parameters(&[("policy", &policy), ("value", &value_model)]);
        Ok(Self {
            updater: Updater::new(parameters, &config.update)?,
            kl: KlController::new(config.kl_control),
            config,
            policy,
            value_model,
            reference: Box::new(reference),
            reward: Box::new(reward),
            detokenizer: None,
            constraints: Vec::new(),
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

    /// Adds a constraint.
    #[must_use]
    pub fn with_constraint(mut self, constraint: Constraint) -> Self {
        self.constraints.push(constraint);
        self
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

    /// Samples responses to `prompts` and evaluates them.
    ///
    /// # Errors
    /// Those of [`Generator::generate`] (no prompt at all, for one) and of [`evaluate`](Self::evaluate).
    /// Nothing is changed then.
    pub fn rollout(&mut self, prompts: &[Arc<[i64]>]) -> Result<Rollout> {
        // 1. The policy answers the prompts.
        let place = (self.config.seed, self.completions_done);
        let detokenizer = self.detokenizer.as_deref();
        let generation = &self.config.generation;
        let completions =
            completions::write(&self.policy, generation, detokenizer, prompts, place)?;
        let count = completions.batch.len() as u64;
        let rollout = self.evaluate(completions)?;
        self.completions_done += count;
        Ok(rollout)
    }

    /// Judges, scores and turns into advantages what the policy, or somebody else, has written.
    ///
    /// # Errors
    /// A score, a cost or a model's output that is not finite, naming the sample; a model that
    /// returns the wrong shape; and the models' own. Nothing is changed then.
    pub fn evaluate(&self, completions: Completions) -> Result<Rollout> {
        let _no_grad = tch::no_grad_guard();
        let config = &self.config;
        let completions = completions::with_texts(completions, self.detokenizer.as_deref())?;
        let batch = &completions.batch;

        // 2. Each response is scored; one that breaks a constraint will not be learnt from.
        let scores = measure::scores(self.reward.as_ref(), &completions)?;
        let clipped = match config.score_clip {
            Some(limit) => scores.clamp(-limit, limit),
            None => scores.shallow_clone(),
        };
        let final_scores = config
            .missing_eos
            .apply(&clipped, &completions.finish_reasons)?;
        let mut used = vec![true; batch.len()];
        let mut costs = Vec::with_capacity(self.constraints.len());
        for constraint in &self.constraints {
            let cost = measure::costs(constraint, &completions)?;
            for (used, cost) in used.iter_mut().zip(&cost) {
                *used &= *cost <= constraint.threshold;
            }
            costs.push(Tensor::from_slice(&cost).to_kind(tch::Kind::Float));
        }

        // 3. Log-probabilities of policy and reference, and values, of every token.
        let forward = Forward {
            temperature: config.temperature(),
            microbatching: config.microbatching(),
        };
        let logprobs = match (&completions.sampling_logprobs, config.old_logprobs) {
            (Some(sampled), OldLogprobs::Sampled) => measure::sampled_logprobs(batch, sampled)?,
            _ => {
                let what = "the policy's log-probability";
                measure::logprobs(what, &self.policy, &completions, forward)?
            }
        };
        let what = "the reference's log-probability";
        let reference = self.reference.as_ref();
        let ref_logprobs = measure::logprobs(what, reference, &completions, forward)?;
        let values = measure::values(&self.value_model, batch, forward.microbatching)?;

        // 4. Rewards: the KL penalty at every token, the score at the end.
        let mask = batch.response_mask(tch::Device::Cpu);
        let kl = config.kl_estimator.estimate(&logprobs, &ref_logprobs);
        let shaped = shaped_rewards(&ShapedRewardsInput {
            kl: &kl,
            mask: &mask,
            scores: &final_scores,
            kl_coef: self.kl.kl_coef(),
            score_position: config.score_position,
            max_response_len: config.generation.max_new_tokens,
        })?;
        let values = values.masked_fill(&shaped.mask.logical_not(), 0.0);
        measure::check_finite("the value", &values)?;
        let used_rows = Tensor::from_slice(&used).unsqueeze(1);
        let rewards = whitened(
            config.whiten_rewards,
            &shaped.rewards,
            &shaped.mask.logical_and(&used_rows),
            Shift::KeepMean,
        )?;

        // 5. Advantages and returns; the returns use the advantages as they were before whitening.
        let estimate = gae(&GaeInput {
            rewards: &rewards,
            values: &values,
            mask: &shaped.mask,
            gamma: config.gamma,
            lam: config.lam,
        })?;
        let width = mask.size()[1];
        let advantages = whitened(
            config.whiten_advantages,
            &estimate.advantages.narrow(1, 0, width),
            &mask.logical_and(&used_rows),
            Shift::ToZero,
        )?;
        Ok(Rollout {
            kl: kl.masked_fill(&mask.logical_not(), 0.0),
            mask,
            value_mask: shaped.mask,
            used,
            logprobs,
            ref_logprobs,
            kl_coef: self.kl.kl_coef(),
            values,
            scores,
            final_scores,
            costs,
            rewards,
            advantages,
            returns: estimate.returns,
            completions,
        })
    }

    /// Trains on a rollout: `ppo_epochs` passes, each in a new order, cut into `minibatches`.
    ///
    /// Where every sample breaks a constraint, the update is skipped: the statistics say so in
    /// `ppo/update_skipped`, and hold nothing about losses.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, and the models' own. The optimiser step in which
    /// that happens changes nothing; those before it stay.
    pub fn update(&mut self, rollout: &Rollout) -> Result<Stats> {
        let rng = RngStreams::new(self.config.seed);
        let mut done = Vec::new();
        for epoch in 0..self.config.ppo_epochs {
            // 6. Every epoch visits the samples that may be learnt from in an order of its own.
            let index = self.steps_done * self.config.ppo_epochs as u64 + epoch as u64;
            let order = shuffled(
                rollout.used_rows(),
                &mut rng.stream("ppo/minibatches", index),
            );
            for rows in parts(&order, self.config.minibatches) {
                done.extend(self.update_minibatch(rollout, rows)?);
            }
        }
        let lr = done.last().map_or_else(|| self.updater.lr(), |m| m.lr);
        let mut stats = stats::rollout_stats(rollout, &self.constraints);
        stats.extend(stats::update_stats(&done, lr));
        if let KlControl::Adaptive { target, .. } = self.config.kl_control {
            stats.insert("ppo/kl_target", target);
        }
        let report = self.reward.take_report().into_iter();
        stats.extend(report.map(|(name, value)| (format!("ppo/judge/{name}"), value)));

        // 8. The KL coefficient follows what was measured, per sequence.
        self.kl.observe(rollout.kl_per_sequence(), rollout.len());
        self.steps_done += 1;
        Ok(stats)
    }

    /// One optimiser step on the samples `rows` of a rollout. `None`, and no step, where they
    /// have no token.
    ///
    /// # Errors
    /// Those of [`update`](Self::update).
    ///
    /// # Panics
    /// If a row is not below the number of samples.
    pub fn update_minibatch(
        &mut self,
        rollout: &Rollout,
        rows: &[usize],
    ) -> Result<Option<MinibatchStats>> {
        // Samples of one prompt are neighbours in the rollout; in a microbatch they share its
        // forward pass.
        let mut rows = rows.to_vec();
        rows.sort_unstable();
        let batch = &rollout.completions.batch;
        let microbatching = self.config.microbatching();
        let microbatches = microbatching
            .cut(batch, &rows)
            .into_iter()
            .map(|rows| rollout.microbatch(rows))
            .collect::<Result<Vec<_>, _>>()?;
        let counts = Counts::of(&microbatches);
        if counts.tokens == 0.0 {
            return Ok(None);
        }
        // 7. Clipped policy and value losses, as means over the whole minibatch; one step of the
        //    optimiser for both models.
        let (policy, value_model, config) = (&self.policy, &self.value_model, &self.config);
        let mut parts = Vec::with_capacity(microbatches.len());
        let update = self.updater.update::<Error>(microbatches.len(), |i| {
            let out = microbatch_loss(policy, value_model, config, &microbatches[i], counts)?;
            parts.push(out.parts);
            Ok(out.loss)
        })?;
        Ok(Some(MinibatchStats::new(&parts, &update)?))
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

/// Whitening of what may be nothing at all: zeros then.
fn whitened(
    whitening: crate::Whitening,
    values: &Tensor,
    mask: &Tensor,
    shift: Shift,
) -> Result<Tensor> {
    if !bool::try_from(mask.any()).map_err(rlhf_core::Error::from)? {
        return Ok(values.zeros_like());
    }
    Ok(whitening.apply(values, mask, shift)?)
}
