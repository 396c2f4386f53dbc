//! From prompts to a rollout: the first half of the algorithm.

use std::sync::Arc;

use rlhf_core::{Completions, Error as CoreError, FinishReason, Policy};
use tch::{Device, Kind, Tensor};

use super::GrpoTrainer;
use crate::constraints::Verdict;
use crate::grpo::advantages::{GroupAdvantagesInput, group_advantages};
use crate::grpo::choices::{KlPenalty, RewardMix};
use crate::grpo::collect::Judged;
use crate::grpo::config::Truncated;
use crate::grpo::rewards::{mixed_rewards, normalized_sum};
use crate::grpo::rollout::GroupRollout;
use crate::measure::{self, Forward};
use crate::{Multiplier, OldLogprobs, Result};

impl<P: Policy> GrpoTrainer<P> {
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
    /// [`Error::BrokenGroup`](crate::Error::BrokenGroup) where neighbours answer different prompts; a score or log-probability
    /// that is not finite, naming the answer; a model that returns the wrong shape; and the
    /// models' own. Nothing is changed then.
    pub fn evaluate(&self, completions: Completions) -> Result<GroupRollout> {
        let completions = self.in_groups(completions)?;
        let judged = Judged::all(self.judge(completions)?, self.config.group_size());
        self.finish(judged)
    }

    /// What follows the scores.
    pub(super) fn finish(&self, judged: Judged) -> Result<GroupRollout> {
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
        let logprobs = self.logprobs(&completions)?;

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
        let mut rewards = self.shaped(mixed.rewards, &completions, &logprobs)?;
        charge(&mut rewards, &costs, &verdict);

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
                let cut = *finish == FinishReason::Length;
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
            old_logprobs: logprobs.old,
            ref_logprobs: logprobs.reference,
            sampling_logprobs: logprobs.sampling,
            prompts,
            completions,
        })
    }

    fn logprobs(&self, completions: &Completions) -> Result<Logprobs> {
        let config = &self.config;
        let forward = Forward {
            temperature: config.temperature(),
            microbatching: config.microbatching(),
        };
        let sampling = completions
            .sampling_logprobs
            .as_ref()
            .map(|sampled| measure::sampled_logprobs(&completions.batch, sampled))
            .transpose()?;
        // Of answers that are not learnt from, an update computes none.
        let before_update = self.reference.is_some()
            && (matches!(config.kl, KlPenalty::InReward { .. })
                || config.truncated == Truncated::Mask);
        let old = match (&sampling, config.old_logprobs) {
            (Some(sampled), OldLogprobs::Sampled) => Some(sampled.shallow_clone()),
            _ if config.one_step() && !before_update => None,
            _ => {
                let what = "the policy's log-probability";
                let policy = &self.policy;
                Some(measure::logprobs(what, policy, completions, forward)?)
            }
        };
        let what = "the reference's log-probability";
        let reference = self.reference.as_deref();
        let reference = reference
            .map(|model| measure::logprobs(what, model, completions, forward))
            .transpose()?;
        Ok(Logprobs {
            old,
            reference,
            sampling,
        })
    }

    /// Rewards clipped, and less what the options charge for.
    fn shaped(
        &self,
        mut rewards: Vec<f64>,
        completions: &Completions,
        logprobs: &Logprobs,
    ) -> Result<Vec<f64>> {
        let config = &self.config;
        if let Some((low, high)) = config.reward_clip {
            rewards.iter_mut().for_each(|r| *r = r.clamp(low, high));
        }
        rewards = on_tensor(&rewards, |rewards| {
            config
                .missing_eos
                .apply(rewards, &completions.finish_reasons)
        })?;
        if let Some(penalty) = config.length_penalty {
            let sequences = completions.batch.sequences();
            for (reward, sequence) in rewards.iter_mut().zip(sequences) {
                *reward -= penalty.of(sequence.response.len(), config.generation.max_new_tokens);
            }
        }
        if let (KlPenalty::InReward { kl_coef, estimator }, Some(old), Some(reference)) =
            (config.kl, &logprobs.old, &logprobs.reference)
        {
            // Both are 0 outside the mask, and so is the estimate.
            let kl = estimator.estimate(old, reference);
            let kl = kl.f_sum_dim_intlist([1i64].as_slice(), false, Kind::Double)?;
            let kl = Vec::<f64>::try_from(kl).map_err(CoreError::from)?;
            for (reward, kl) in rewards.iter_mut().zip(kl) {
                *reward -= kl_coef * kl;
            }
        }
        Ok(rewards)
    }
}

/// Log-probabilities of every token, `[B, R]`, where they are needed and there.
struct Logprobs {
    /// The policy's.
    old: Option<Tensor>,
    reference: Option<Tensor>,
    /// Those that the tokens were sampled with.
    sampling: Option<Tensor>,
}

/// Takes off what the constraints charge.
fn charge(rewards: &mut [f64], costs: &[Vec<f64>], verdict: &Verdict) {
    for (reward, penalty) in rewards.iter_mut().zip(&verdict.penalty) {
        *reward -= penalty;
    }
    priced(rewards, costs, &verdict.multipliers);
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
