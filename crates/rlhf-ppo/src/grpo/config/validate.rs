//! What the options must be.

use rlhf_core::Error;

use super::{DynamicSampling, GrpoConfig};
use crate::grpo::choices::{KlPenalty, RewardMix};
use crate::grpo::off_policy::OffPolicy;
use crate::{MissingEos, OldLogprobs, Result};

impl GrpoConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig) for the first field that makes no
    /// sense, alone or beside another.
    pub fn validate(&self) -> Result<()> {
        let check = |valid: bool, field, value: &dyn ToString, reason| match valid {
            true => Ok(()),
            false => Err(Error::config(field, value.to_string(), reason)),
        };
        for (field, value) in [
            ("batch_size", self.batch_size),
            ("num_iterations", self.num_iterations),
            ("minibatches", self.minibatches),
            ("microbatch_size", self.microbatch_size),
            ("microbatch_tokens", self.microbatch_tokens.unwrap_or(1)),
        ] {
            check(value > 0, field, &value, "at least 1 is needed")?;
        }
        self.generation.validate()?;
        let reason = "answers are each other's baseline: at least 2 are needed";
        let (field, size) = ("generation.samples_per_prompt", self.group_size());
        check(size >= 2, field, &size, reason)?;
        self.objective.validate()?;
        self.kl.validate()?;
        self.off_policy.validate()?;
        self.validate_rewards()?;
        if let Some(DynamicSampling { max_rounds }) = self.dynamic_sampling {
            let field = "dynamic_sampling.max_rounds";
            check(max_rounds > 0, field, &max_rounds, "at least 1 is needed")?;
        }
        let temperature = self.temperature();
        let reason = "answers must differ: a positive temperature is needed";
        let field = "generation.sampling.temperature";
        check(temperature > 0.0, field, &temperature, reason)?;
        let penalty = self.generation.sampling.repetition_penalty;
        let (field, reason) = (
            "generation.sampling.repetition_penalty",
            "must be 1: a penalty depends on what a sequence holds, and is not replayed",
        );
        check(penalty == 1.0, field, &penalty, reason)?;
        if self.old_logprobs == OldLogprobs::Sampled {
            let reason = "there is nothing to correct where old log-probabilities are the sampled";
            let corrected = self.off_policy != OffPolicy::Ignore;
            check(
                !corrected,
                "off_policy",
                &format!("{:?}", self.off_policy),
                reason,
            )?;
        }
        Ok(self.update.validate()?)
    }

    fn validate_rewards(&self) -> Result<()> {
        let fail = |field, value: &dyn ToString, reason| {
            Err(Error::config(field, value.to_string(), reason).into())
        };
        if let MissingEos::Replace(value) | MissingEos::Subtract(value) = self.missing_eos {
            if !value.is_finite() {
                return fail("missing_eos", &value, "a finite number");
            }
            if self.generation.stop_token_ids.is_empty() && self.generation.stop_strings.is_empty()
            {
                let reason = "needs generation.stop_token_ids, or no answer ever finishes; \
                              use MissingEos::Keep for a model without a stop token";
                return fail("missing_eos", &value, reason);
            }
        }
        if let Some(penalty) = &self.length_penalty {
            penalty.validate(self.generation.max_new_tokens)?;
        }
        if let Some((low, high)) = self.reward_clip
            && low.partial_cmp(&high) != Some(std::cmp::Ordering::Less)
        {
            return fail(
                "reward_clip",
                &format!("{low}, {high}"),
                "low must be below high",
            );
        }
        let on_the_sum = self.missing_eos != MissingEos::Keep
            || self.length_penalty.is_some()
            || self.reward_clip.is_some()
            || matches!(self.kl, KlPenalty::InReward { .. });
        if self.mix == RewardMix::NormalizeThenSum && on_the_sum {
            let reason = "has no summed reward for missing_eos, length_penalty, reward_clip or a KL \
                          penalty in the reward to act on: make each a reward of its own";
            return fail("mix", &"normalize_then_sum", reason);
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::grpo::choices::Objective;
    use crate::grpo::off_policy::Excess;
    use crate::{KlEstimator, LengthPenalty};

    #[test]
    fn all_methods_are_valid_and_survive_json() {
        for config in [
            GrpoConfig::default(),
            GrpoConfig::grpo(),
            GrpoConfig::rloo(),
            GrpoConfig::dapo(100).corrected(),
            GrpoConfig::dr_grpo(),
            GrpoConfig::bnpo(),
            GrpoConfig::gspo(),
            GrpoConfig::cispo(),
            GrpoConfig::reinforce_plus_plus_baseline(),
        ] {
            config.validate().unwrap();
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<GrpoConfig>(&text).unwrap(), config);
        }
        assert!(serde_json::from_str::<GrpoConfig>(r#"{"epsilon": 0.1}"#).is_err());
    }

    #[test]
    fn errors_name_the_field() {
        type BreakIt = fn(&mut GrpoConfig);
        let broken: [(&str, BreakIt); 12] = [
            ("num_iterations", |c| c.num_iterations = 0),
            ("samples_per_prompt", |c| {
                c.generation.samples_per_prompt = 1
            }),
            ("objective.low", |c| c.objective = Objective::symmetric(0.0)),
            ("objective.dual", |c| {
                c.objective = Objective::Surrogate(crate::Clip {
                    dual: Some(1.2),
                    ..crate::Clip::symmetric(0.2)
                });
            }),
            ("kl.kl_coef", |c| {
                c.kl = KlPenalty::InReward {
                    kl_coef: f64::NAN,
                    estimator: KlEstimator::K1,
                };
            }),
            ("off_policy.cap", |c| {
                c.off_policy = OffPolicy::Tokens {
                    cap: 0.5,
                    excess: Excess::Drop,
                };
            }),
            ("missing_eos", |c| c.missing_eos = MissingEos::Replace(-1.0)),
            ("length_penalty.buffer", |c| {
                c.length_penalty = Some(LengthPenalty::SoftOverlong {
                    buffer: 0,
                    max: 1.0,
                });
            }),
            ("max_rounds", |c| {
                c.dynamic_sampling = Some(DynamicSampling { max_rounds: 0 });
            }),
            ("reward_clip", |c| c.reward_clip = Some((1.0, -1.0))),
            ("mix", |c| {
                c.mix = RewardMix::NormalizeThenSum;
                c.reward_clip = Some((-1.0, 1.0));
            }),
            ("repetition_penalty", |c| {
                c.generation.sampling.repetition_penalty = 1.1;
            }),
        ];
        for (field, break_it) in broken {
            let mut config = GrpoConfig::default();
            break_it(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(field), "{message} does not name {field}");
        }
    }
}
