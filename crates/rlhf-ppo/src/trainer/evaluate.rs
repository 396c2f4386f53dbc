//! From prompts to a rollout: the first half of the algorithm.

use std::sync::Arc;

use rlhf_core::{Completions, Policy, Shift};
use tch::{Device, Kind, Tensor};

use crate::first_pass::FirstPass;
use crate::measure::{self, Forward};
use crate::{
    CostEstimate, Critic, GaeInput, KlPlacement, LagrangianInput, LogprobTemperature, OldLogprobs,
    PpoTrainer, Result, Rollout, RunningMoments, SamplerMismatch, ScoreScaling, ShapedRewards,
    ShapedRewardsInput, Whitening, completions, gae, lagrangian_advantages, shaped_rewards,
};

impl<P: Policy, V: Critic<P>> PpoTrainer<P, V> {
    /// Samples responses to `prompts` and evaluates them.
    ///
    /// # Errors
    /// Those of [`Generator::generate`](rlhf_core::Generator::generate) (no prompt at all, for one)
    /// and of [`evaluate`](Self::evaluate). Nothing is changed then.
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

        // 2. Each response is scored; constraints say what must not be learnt from, or what a cost
        //    takes off the score.
        let scores = measure::scores(self.reward.as_ref(), &completions)?;
        let costs = self.constraints.costs(&completions)?;
        let verdict = self.constraints.verdict(&costs, batch.len());
        let used = verdict.allowed;
        let mut moments = self.moments;
        let final_scores =
            self.final_scores(&scores, &verdict.penalty, &completions, &mut moments)?;

        // 3. Log-probabilities of policy and reference, and values, of every token.
        let forward = Forward {
            temperature: config.temperature(),
            microbatching: config.microbatching(),
        };
        let mask = batch.response_mask(Device::Cpu);
        let sampled = self.sampled_logprobs(&completions)?;
        let what = "the reference's log-probability";
        let reference = self.reference.as_ref();
        let ref_logprobs = measure::logprobs(what, reference, &completions, forward)?;
        let first_pass = self.first_pass(&completions, &used)?;
        let logprobs = match (&sampled, config.old_logprobs) {
            (Some(sampled), OldLogprobs::Sampled) => sampled.shallow_clone(),
            _ => match first_pass.as_ref().and_then(FirstPass::logprobs) {
                Some(logprobs) => logprobs?,
                None => {
                    let what = "the policy's log-probability";
                    measure::logprobs(what, &self.policy, &completions, forward)?
                }
            },
        };
        let width = mask.size()[1] + 1;
        let values = match &first_pass {
            Some(pass) => pass.values()?,
            None => measure::values(batch, forward.microbatching, |part| {
                self.value_model.values_with(&self.policy, part)
            })?,
        };
        let (mismatch, weights) = match (&sampled, config.old_logprobs) {
            (Some(sampled), OldLogprobs::Recomputed) => (
                SamplerMismatch::between(&logprobs, sampled, &mask)?,
                config.rollout_correction.weights(&logprobs, sampled, &mask),
            ),
            _ => (None, None),
        };

        // 4. Rewards: the KL penalty at every token, the score at the end.
        let kl = config.kl_of(&logprobs, &ref_logprobs);
        let kl_coef = self.kl.kl_coef();
        let penalty = match config.kl_placement {
            KlPlacement::Reward => kl_coef,
            KlPlacement::Loss => 0.0,
        };
        let shape = |scores: &Tensor, kl_coef: f64| -> Result<ShapedRewards> {
            let mut shaped = shaped_rewards(&ShapedRewardsInput {
                kl: &kl,
                mask: &mask,
                scores,
                kl_coef,
                score_position: config.score_position,
                max_response_len: config.generation.max_new_tokens,
            })?;
            if let Some(limit) = config.reward_clip {
                shaped.rewards = shaped.rewards.clamp(-limit, limit);
            }
            Ok(shaped)
        };
        let shaped = shape(&final_scores, penalty)?;
        let steps = &shaped.mask;
        let values = values.masked_fill(&steps.logical_not(), 0.0);
        measure::check_finite("the value", &values)?;
        let used_rows = Tensor::from_slice(&used).unsqueeze(1);
        let rewards = whitened(
            config.whiten_rewards,
            &shaped.rewards,
            &steps.logical_and(&used_rows),
            Shift::KeepMean,
        )?;

        // 5. Advantages and returns of the reward and of every cost that has a price; the returns
        //    use the advantages as they were before whitening.
        let estimate = |rewards: &Tensor, values: &Tensor| {
            gae(&GaeInput {
                rewards,
                values,
                mask: steps,
                gamma: config.gamma,
                lam: config.lam,
            })
        };
        let of_reward = estimate(&rewards, &values)?;
        let (mut cost_estimates, mut cost_advantages) = (Vec::new(), Vec::new());
        let prices = self.constraints.all().iter().zip(verdict.multipliers);
        for (place, (constraint, multiplier)) in prices.enumerate() {
            let (Some(critic), Some(multiplier)) = (&constraint.critic, multiplier) else {
                continue;
            };
            // The penalty raises every cost as it lowers the reward, so that their sum, divided by
            // its weights, holds it once.
            let shaped = shape(&float(&costs[place]), -penalty)?;
            let values = measure::values(batch, forward.microbatching, |part| critic.values(part))?;
            let values = values.masked_fill(&steps.logical_not(), 0.0);
            measure::check_finite("the cost critic's value", &values)?;
            let of_cost = estimate(&shaped.rewards, &values)?;
            cost_advantages.push((multiplier.value(), of_cost.advantages));
            cost_estimates.push(CostEstimate {
                constraint: place,
                multiplier,
                values,
                returns: of_cost.returns,
            });
        }
        let advantages = match cost_advantages.is_empty() {
            true => of_reward.advantages,
            false => lagrangian_advantages(&LagrangianInput {
                rewards: &of_reward.advantages,
                costs: &cost_advantages,
            })?,
        };
        let advantages = whitened(
            config.whiten_advantages,
            &advantages.narrow(1, 0, width - 1),
            &mask.logical_and(&used_rows),
            Shift::ToZero,
        )?;
        Ok(Rollout {
            kl: kl.masked_fill(&mask.logical_not(), 0.0),
            mask,
            value_mask: shaped.mask,
            used,
            skipped_by: verdict.skipped_by,
            logprobs,
            ref_logprobs,
            mismatch,
            weights,
            kl_coef,
            kl_in_reward: config.kl_placement == KlPlacement::Reward,
            values,
            scores,
            final_scores,
            costs,
            rewards,
            advantages,
            returns: of_reward.returns,
            cost_estimates,
            moments,
            first_pass: first_pass.into(),
            completions,
        })
    }

    /// The pass over all samples that the update will begin with, if it will.
    fn first_pass(&self, completions: &Completions, used: &[bool]) -> Result<Option<FirstPass>> {
        let (config, models) = (&self.config, (&self.policy, &self.value_model));
        let replicas = self.updater.replicas();
        FirstPass::is_shared(config, models, completions, used, replicas)
            .then(|| FirstPass::record(config, models, completions))
            .transpose()
    }

    /// Scores on the scale of those before, clipped, after the rule for a missing EOS, less what
    /// length and costs take off.
    fn final_scores(
        &self,
        scores: &Tensor,
        penalty: &[f64],
        completions: &Completions,
        moments: &mut RunningMoments,
    ) -> Result<Tensor> {
        let config = &self.config;
        let numbers =
            Vec::<f64>::try_from(scores.to_kind(Kind::Double)).map_err(rlhf_core::Error::from)?;
        moments.update(&numbers)?;
        let scaled = match config.score_scaling {
            ScoreScaling::Off => scores.shallow_clone(),
            scaling => {
                let scaled: Vec<f64> = numbers.iter().map(|&x| moments.scale(scaling, x)).collect();
                float(&scaled)
            }
        };
        let clipped = match config.score_clip {
            Some(limit) => scaled.clamp(-limit, limit),
            None => scaled,
        };
        let mut scores = config
            .missing_eos
            .apply(&clipped, &completions.finish_reasons)?;
        if let Some(too_long) = &config.length_penalty {
            let most = config.generation.max_new_tokens;
            scores -= too_long.of_batch(&completions.batch, most);
        }
        if penalty.iter().any(|penalty| *penalty != 0.0) {
            scores -= float(penalty);
        }
        Ok(scores)
    }

    /// What the tokens were sampled with, if that is under the distribution that is trained.
    fn sampled_logprobs(&self, completions: &Completions) -> Result<Option<Tensor>> {
        let sampling = &self.config.generation.sampling;
        let same = self.config.logprob_temperature == LogprobTemperature::OfSampling
            || sampling.temperature == 1.0;
        let noted = match same {
            true => &completions.sampling_logprobs,
            // Without filters, the policy's own distribution is the one at temperature 1.
            false if completions.kept.is_none() => &completions.policy_logprobs,
            false => &None,
        };
        let noted = noted.as_ref();
        noted
            .map(|noted| measure::sampled_logprobs(&completions.batch, noted))
            .transpose()
    }
}

fn float(numbers: &[f64]) -> Tensor {
    Tensor::from_slice(numbers).to_kind(Kind::Float)
}

/// Whitening of what may be nothing at all: zeros then.
fn whitened(whitening: Whitening, values: &Tensor, mask: &Tensor, shift: Shift) -> Result<Tensor> {
    if !bool::try_from(mask.any()).map_err(rlhf_core::Error::from)? {
        return Ok(values.zeros_like());
    }
    Ok(whitening.apply(values, mask, shift)?)
}
