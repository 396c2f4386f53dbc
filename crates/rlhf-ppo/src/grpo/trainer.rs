//! The algorithm, from prompts to updated weights.

use std::sync::Arc;
use std::time::Instant;

use rlhf_core::{
    Completions, DataCursor, Detokenize, Error as CoreError, Policy, RewardModel, RngStreams, Stats,
};
use rlhf_scale::Updater;
use tch::{Device, Kind, Tensor};

use super::advantages::{GroupAdvantagesInput, group_advantages};
use super::aggregation::{Aggregation, TokenWeightsInput, token_weights};
use super::choices::{KlPenalty, RatioLevel, RewardMix};
use super::collect::Judged;
use super::config::{GrpoConfig, Truncated};
use super::minibatch::{Counts, GroupMinibatchStats, Measured, microbatch_loss};
use super::rewards::{mixed_rewards, normalized_sum};
use super::rollout::{GroupRollout, RowWeights};
use super::stats;
use crate::measure::Forward;
use crate::order::{parts, shuffled};
use crate::train::NextPrompts;

use crate::constraints::Constraints;
use crate::{Constraint, ConstraintRule, Error, Multiplier, OldLogprobs, Result, measure};

/// Trains a policy on the rewards of several answers to each prompt, which are each other's
/// baseline: no critic.
///
/// Three levels: [`train`](Self::train) · [`step`](Self::step) · [`rollout`](Self::rollout) and
/// [`update`](Self::update), below which are the pure functions [`group_advantages`],
/// [`group_loss`](crate::group_loss) and their kin. The numbered comments of this file are the
/// algorithm. A prompt is computed once for all of its answers, when they are written and when
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

    /// Samples answers to `prompts` and evaluates them.
    ///
    /// # Errors
    /// Those of [`Generator::generate`](rlhf_core::Generator::generate) (no prompt at all, for
    /// one) and of [`evaluate`](Self::evaluate). Nothing is changed then.
    pub fn rollout(&mut self, prompts: &[Arc<[i64]>]) -> Result<GroupRollout> {
        // 1. The policy answers every prompt several times; see collect.rs.
        let before = self.completions_done;
        let mut given = Some(prompts.to_vec());
        let rollout = self
            .collect(prompts.len(), &mut |_| given.take().unwrap_or_default())
            .and_then(|judged| self.finish(judged));
        if rollout.is_err() {
            self.completions_done = before;
        }
        rollout
    }

    /// Judges and turns into advantages what the policy, or somebody else, has written:
    /// `generation.samples_per_prompt` neighbouring answers to each prompt.
    ///
    /// # Errors
    /// [`Error::BrokenGroup`] where neighbours answer different prompts; a score or log-probability
    /// that is not finite, naming the answer; a model that returns the wrong shape; and the
    /// models' own. Nothing is changed then.
    pub fn evaluate(&self, completions: Completions) -> Result<GroupRollout> {
        let completions = self.in_groups(completions)?;
        let judged = Judged::all(self.judge(completions)?, self.config.group_size());
        self.finish(judged)
    }

    /// What follows the scores.
    fn finish(&self, judged: Judged) -> Result<GroupRollout> {
        let _no_grad = tch::no_grad_guard();
        let config = &self.config;
        let Judged {
            completions,
            scores,
            prompts,
            learn,
        } = judged;
        let batch = &completions.batch;

        // 3. Log-probabilities of policy and reference, of every token.
        let forward = Forward {
            temperature: config.temperature(),
            microbatching: config.microbatching(),
        };
        let sampling_logprobs = completions
            .sampling_logprobs
            .as_ref()
            .map(|sampled| measure::sampled_logprobs(batch, sampled))
            .transpose()?;
        // Of answers that are not learnt from, an update computes none.
        let before_update = self.reference.is_some()
            && (matches!(config.kl, KlPenalty::InReward { .. })
                || config.truncated == Truncated::Mask);
        let old_logprobs = match (&sampling_logprobs, config.old_logprobs) {
            (Some(sampled), OldLogprobs::Sampled) => Some(sampled.shallow_clone()),
            _ if config.one_step() && !before_update => None,
            _ => {
                let what = "the policy's log-probability";
                Some(measure::logprobs(
                    what,
                    &self.policy,
                    &completions,
                    forward,
                )?)
            }
        };
        let what = "the reference's log-probability";
        let reference = self.reference.as_deref();
        let ref_logprobs = reference
            .map(|model| measure::logprobs(what, model, &completions, forward))
            .transpose()?;

        // 4. One reward for each answer: the scores weighted and summed, penalties, the KL, and
        //    what the constraints charge. What they forbid counts nowhere.
        let weights: Vec<f64> = self.rewards.iter().map(|r| r.weight).collect();
        let mixed = mixed_rewards(&scores, &weights)?;
        let costs = self.constraints.costs(&completions)?;
        let verdict = self.constraints.verdict(&costs, batch.len());
        let counted: Vec<bool> = mixed
            .counted
            .iter()
            .zip(&verdict.allowed)
            .map(|(scored, allowed)| *scored && *allowed)
            .collect();
        let mut rewards = mixed.rewards;
        if let Some((low, high)) = config.reward_clip {
            rewards.iter_mut().for_each(|r| *r = r.clamp(low, high));
        }
        rewards = on_tensor(&rewards, |rewards| {
            config
                .missing_eos
                .apply(rewards, &completions.finish_reasons)
        })?;
        if let Some(penalty) = config.length_penalty {
            for (reward, sequence) in rewards.iter_mut().zip(batch.sequences()) {
                *reward -= penalty.of(sequence.response.len(), config.generation.max_new_tokens);
            }
        }
        if let (KlPenalty::InReward { kl_coef, estimator }, Some(old), Some(reference)) =
            (config.kl, &old_logprobs, &ref_logprobs)
        {
            // Both are 0 outside the mask, and so is the estimate.
            let kl = estimator.estimate(old, reference);
            let kl = kl.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?;
            let kl = Vec::<f64>::try_from(kl).map_err(CoreError::from)?;
            for (reward, kl) in rewards.iter_mut().zip(kl) {
                *reward -= kl_coef * kl;
            }
        }

        for (reward, penalty) in rewards.iter_mut().zip(&verdict.penalty) {
            *reward -= penalty;
        }
        priced(&mut rewards, &costs, &verdict.multipliers);

        // 5. Advantages: each answer against the others to its prompt.
        let estimate = group_advantages(&GroupAdvantagesInput {
            rewards: &rewards,
            counted: &counted,
            group_size: config.group_size(),
            baseline: config.baseline,
            scale: config.scale,
        })?;
        let advantages = match config.mix {
            RewardMix::Sum => estimate.advantages,
            RewardMix::NormalizeThenSum => {
                normalized_sum(&scores, &weights, &counted, config.group_size())?
            }
        };
        let used: Vec<bool> = completions
            .finish_reasons
            .iter()
            .zip(&counted)
            .map(|(finish, counted)| {
                let cut = *finish == rlhf_core::FinishReason::Length;
                learn && *counted && !(cut && config.truncated == Truncated::Mask)
            })
            .collect();
        let used_rows = Tensor::from_slice(&used).unsqueeze(1);
        Ok(GroupRollout {
            mask: batch.response_mask(Device::Cpu).logical_and(&used_rows),
            group_size: config.group_size(),
            used,
            skipped_by: verdict.skipped_by,
            scores,
            costs,
            multipliers: verdict.multipliers,
            rewards,
            advantages,
            group_std: estimate.group_std,
            old_logprobs,
            ref_logprobs,
            sampling_logprobs,
            prompts,
            completions,
        })
    }

    /// Trains on a rollout: `num_iterations` passes, each over the prompts in a new order, cut into
    /// `minibatches`.
    ///
    /// Where no answer takes part, the update is skipped: the statistics say so in
    /// `grpo/update_skipped`, and hold nothing about losses.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, and the models' own. The optimiser step in which
    /// that happens changes nothing; those before it stay.
    pub fn update(&mut self, rollout: &GroupRollout) -> Result<Stats> {
        let rng = RngStreams::new(self.config.seed);
        let mut done = Vec::new();
        for iteration in 0..self.config.num_iterations {
            // 6. Every pass visits the prompts in an order of its own.
            let index = self.steps_done * self.config.num_iterations as u64 + iteration as u64;
            let groups = (0..rollout.groups()).collect();
            let order = shuffled(groups, &mut rng.stream("grpo/minibatches", index));
            for groups in parts(&order, self.config.minibatches) {
                done.extend(self.update_minibatch(rollout, groups)?);
            }
        }
        let lr = done.last().map_or_else(|| self.updater.lr(), |m| m.lr);
        let mut stats = stats::rollout_stats(rollout, &self.config, &self.rewards);
        let skipped_by = rollout.skipped_by.as_deref();
        let (costs, multipliers) = (&rollout.costs, &rollout.multipliers);
        let constraints = &mut self.constraints;
        stats.extend(constraints.stats("grpo", costs, skipped_by, multipliers));
        stats.extend(stats::update_stats(rollout, &done, lr));
        for reward in &self.rewards {
            let report = reward.model.take_report().into_iter();
            stats.extend(report.map(|(name, value)| (format!("grpo/judge/{name}"), value)));
        }
        // 8. The prices of the constraints are those of this rollout.
        constraints.go_on_with(multipliers);
        self.steps_done += 1;
        Ok(stats)
    }

    /// One optimiser step on the answers to the prompts `groups` of a rollout. `None`, and no
    /// step, where none of their tokens takes part.
    ///
    /// # Errors
    /// Those of [`update`](Self::update).
    ///
    /// # Panics
    /// If a group is not below the number of prompts.
    pub fn update_minibatch(
        &mut self,
        rollout: &GroupRollout,
        groups: &[usize],
    ) -> Result<Option<GroupMinibatchStats>> {
        // Answers to one prompt are neighbours: in a microbatch they share its forward pass.
        let rows = rollout.used_rows(groups);
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let mask = rollout.mask.index_select(0, &Tensor::from_slice(&index));
        let tokens = mask.sum(Kind::Double).double_value(&[]);
        if tokens == 0.0 {
            return Ok(None);
        }
        // 7. The clipped loss, and the KL's where it is there, aggregated over the whole
        //    minibatch; one step of the optimiser.
        let config = &self.config;
        let input = TokenWeightsInput {
            mask: &mask,
            rollout_tokens: rollout.tokens(),
            minibatches: config.minibatches.min(rollout.groups()) as f64,
            max_new_tokens: config.generation.max_new_tokens,
        };
        let ratios = match config.ratio {
            RatioLevel::Token => Aggregation::LocalTokens,
            RatioLevel::SequenceMean | RatioLevel::SequenceProduct => Aggregation::SequenceMean,
        };
        let numbers = |t: &Tensor| Vec::<f64>::try_from(t).map_err(CoreError::from);
        let loss = numbers(&token_weights(config.aggregation, &input)?)?;
        let stat = numbers(&token_weights(ratios, &input)?)?;
        let weights: Vec<RowWeights> = loss
            .into_iter()
            .zip(stat)
            .map(|(loss, stat)| RowWeights { loss, stat })
            .collect();
        let mut weights = weights.as_slice();
        let mut microbatches = Vec::new();
        for rows in config
            .microbatching()
            .shared(self.updater.replicas(), rows.len())
            .cut(&rollout.completions.batch, &rows)
        {
            let (own, rest) = weights.split_at(rows.len());
            microbatches.push(rollout.microbatch(rows, own)?);
            weights = rest;
        }
        let counts = Counts {
            tokens,
            answers: rows.len() as f64,
        };
        let measured = Measured {
            reference: rollout.ref_logprobs.is_some(),
            sampling: rollout.sampling_logprobs.is_some(),
        };
        let policy = &self.policy;
        let mut parts = Vec::with_capacity(microbatches.len());
        let update = self.updater.update::<Error>(microbatches.len(), |i| {
            let out = microbatch_loss(policy, config, &microbatches[i], counts)?;
            parts.push((out.sums, out.max));
            Ok(out.loss)
        })?;
        let replicas = self.updater.replicas();
        let stats = GroupMinibatchStats::new(&parts, &update, measured, replicas)?;
        Ok(Some(stats))
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

/// `(r − Σ λ cost) / (1 + Σ λ)`, over the constraints that have a price: see
/// [`lagrangian_advantages`](crate::lagrangian_advantages). Advantages are linear in the rewards.
fn priced(rewards: &mut [f64], costs: &[Vec<f64>], multipliers: &[Option<Multiplier>]) {
    let mut weights = 1.0;
    for (costs, multiplier) in costs.iter().zip(multipliers) {
        let Some(price) = multiplier.as_ref().map(Multiplier::value) else {
            continue;
        };
        for (reward, cost) in rewards.iter_mut().zip(costs) {
            *reward -= price * cost;
        }
        weights += price;
    }
    rewards.iter_mut().for_each(|reward| *reward /= weights);
}

/// A function of scores on their tensor, on numbers.
fn on_tensor(
    numbers: &[f64],
    f: impl FnOnce(&Tensor) -> rlhf_core::Result<Tensor>,
) -> rlhf_core::Result<Vec<f64>> {
    let tensor = f(&Tensor::from_slice(numbers))?;
    Ok(Vec::<f64>::try_from(tensor.to_kind(Kind::Double))?)
}
