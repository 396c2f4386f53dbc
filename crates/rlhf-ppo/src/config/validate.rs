//! What the options must be.

use rlhf_core::Error;

use super::{KlPlacement, LogprobTemperature, OldLogprobs, PpoConfig};
use crate::{KlEstimator, MissingEos, Result, RolloutCorrection};

impl PpoConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig) for the first field that makes no
    /// sense, alone or beside another.
    pub fn validate(&self) -> Result<()> {
        for (field, value) in [
            ("batch_size", self.batch_size),
            ("ppo_epochs", self.ppo_epochs),
            ("minibatches", self.minibatches),
            ("microbatch_size", self.microbatch_size),
            ("microbatch_tokens", self.microbatch_tokens.unwrap_or(1)),
        ] {
            check(value > 0, field, &value, "at least 1 is needed")?;
        }
        for (field, value) in [
            ("cliprange", self.cliprange),
            ("cliprange_value", self.cliprange_value),
            ("score_clip", self.score_clip.unwrap_or(1.0)),
            ("reward_clip", self.reward_clip.unwrap_or(1.0)),
            ("kl_clamp", self.kl_clamp.unwrap_or(1.0)),
        ] {
            let valid = value.is_finite() && value > 0.0;
            check(valid, field, &value, "a positive number is needed")?;
        }
        if let Some(c) = self.dual_clip {
            let reason = "a number above 1 is needed: below, good tokens would count less";
            check(c.is_finite() && c > 1.0, "dual_clip", &c, reason)?;
        }
        for (field, value) in [
            ("vf_coef", self.vf_coef),
            ("entropy_coef", self.entropy_coef),
            ("critic_lr", self.critic_lr.unwrap_or(0.0)),
        ] {
            let valid = value.is_finite() && value >= 0.0;
            check(valid, field, &value, "a number that is not negative")?;
        }
        for (field, value) in [("gamma", self.gamma), ("lam", self.lam)] {
            let valid = (0.0..=1.0).contains(&value);
            check(valid, field, &value, "a number in [0, 1] is needed")?;
        }
        self.kl_control.validate()?;
        if self.kl_placement == KlPlacement::Loss {
            let reason = "has a gradient of mean zero whatever the reference, so it is no loss; \
                          use k2, or k1_plus for its value with the gradient of k2";
            let useful = self.kl_estimator != KlEstimator::K1;
            check(useful, "kl_estimator", &"k1", reason)?;
        }
        if let Some(penalty) = &self.length_penalty {
            penalty.validate(self.generation.max_new_tokens)?;
        }
        if let RolloutCorrection::TruncatedImportance { cap } = self.rollout_correction {
            let field = "rollout_correction.cap";
            let valid = cap.is_finite() && cap > 0.0;
            check(valid, field, &cap, "a positive number is needed")?;
            let reason = "has nothing to correct where old log-probabilities are those of sampling";
            let recomputed = self.old_logprobs == OldLogprobs::Recomputed;
            check(
                recomputed,
                "rollout_correction",
                &"truncated_importance",
                reason,
            )?;
        }
        self.guards.validate()?;
        if let Some(ptx) = &self.ptx {
            ptx.validate()?;
        }
        self.validate_generation()?;
        Ok(self.update.validate()?)
    }

    fn validate_generation(&self) -> Result<()> {
        if let MissingEos::Replace(value) | MissingEos::Subtract(value) = self.missing_eos {
            check(value.is_finite(), "missing_eos", &value, "a finite number")?;
            let reason = "needs generation.stop_token_ids, or no response ever finishes; \
                          use MissingEos::Keep for a model without a stop token";
            let can_stop = !(self.generation.stop_token_ids.is_empty()
                && self.generation.stop_strings.is_empty());
            check(can_stop, "missing_eos", &value, reason)?;
        }
        self.generation.validate()?;
        let sampling = &self.generation.sampling;
        let reason = "PPO needs samples: a positive temperature";
        let field = "generation.sampling.temperature";
        let temperature = sampling.temperature;
        check(temperature > 0.0, field, &temperature, reason)?;
        let reason = "is no part of the distribution that is trained, so ratios would be wrong; \
                      punish repetition by the reward instead";
        let field = "generation.sampling.repetition_penalty";
        let penalty = sampling.repetition_penalty;
        check(penalty == 1.0, field, &penalty, reason)?;
        if self.old_logprobs == OldLogprobs::Sampled {
            let same =
                self.logprob_temperature == LogprobTemperature::OfSampling || temperature == 1.0;
            let reason = "were sampled at another temperature than logprob_temperature says";
            check(same, "old_logprobs", &"sampled", reason)?;
        }
        Ok(())
    }
}

fn check(
    valid: bool,
    field: &'static str,
    value: &dyn ToString,
    reason: &'static str,
) -> rlhf_core::Result<()> {
    match valid {
        true => Ok(()),
        false => Err(Error::config(field, value.to_string(), reason)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::{KlControl, KlGuard, LengthPenalty, OnKl, PtxConfig};

    fn valid() -> PpoConfig {
        let mut config = PpoConfig::default();
        config.generation.stop_token_ids = vec![0];
        config
    }

    #[test]
    fn profiles_are_valid() {
        valid().validate().unwrap();
        PpoConfig::trl().validate().unwrap();
        PpoConfig::openrlhf().validate().unwrap();
        PpoConfig::deepspeed_chat().validate().unwrap();
        PpoConfig::safe_rlhf().validate().unwrap();
    }

    #[test]
    fn errors_name_the_field() {
        type BreakIt = fn(&mut PpoConfig);
        let broken: [(&str, BreakIt); 18] = [
            ("minibatches", |c| c.minibatches = 0),
            ("microbatch_tokens", |c| c.microbatch_tokens = Some(0)),
            ("cliprange ", |c| c.cliprange = 0.0),
            ("dual_clip", |c| c.dual_clip = Some(1.0)),
            ("gamma", |c| c.gamma = 1.1),
            ("vf_coef", |c| c.vf_coef = f64::NAN),
            ("kl_clamp", |c| c.kl_clamp = Some(0.0)),
            ("reward_clip", |c| c.reward_clip = Some(-1.0)),
            ("missing_eos", |c| c.generation.stop_token_ids.clear()),
            ("kl_control.kl_coef", |c| {
                c.kl_control = KlControl::Fixed { kl_coef: -1.0 };
            }),
            ("kl_estimator", |c| c.kl_placement = KlPlacement::Loss),
            ("length_penalty.max", |c| {
                let (buffer, max) = (3, f64::NAN);
                c.length_penalty = Some(LengthPenalty::SoftOverlong { buffer, max });
            }),
            ("rollout_correction", |c| {
                c.old_logprobs = OldLogprobs::Sampled;
                c.rollout_correction = RolloutCorrection::TruncatedImportance { cap: 2.0 };
            }),
            ("guards.kl.limit", |c| {
                c.guards.kl = Some(KlGuard {
                    limit: 0.0,
                    estimator: KlEstimator::K3,
                    action: OnKl::SkipStep,
                });
            }),
            ("ptx.coef", |c| {
                c.ptx = Some(PtxConfig {
                    coef: -1.0,
                    ..PtxConfig::default()
                });
            }),
            ("temperature", |c| c.generation.sampling.temperature = 0.0),
            ("repetition_penalty", |c| {
                c.generation.sampling.repetition_penalty = 1.2;
            }),
            ("old_logprobs", |c| {
                c.old_logprobs = OldLogprobs::Sampled;
                c.logprob_temperature = LogprobTemperature::One;
            }),
        ];
        for (field, break_it) in broken {
            let mut config = valid();
            break_it(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.contains(field), "{message} does not name {field}");
        }
    }

    #[test]
    fn json_round_trip_and_unknown_fields() {
        for mut config in [valid(), PpoConfig::openrlhf(), PpoConfig::safe_rlhf()] {
            config.kl_control = KlControl::ziegler();
            config.ptx = Some(PtxConfig::deepspeed_chat());
            config.guards.max_mean_ratio = Some(10.0);
            config.length_penalty = Some(LengthPenalty::PerToken { coef: 0.1, free: 2 });
            let text = serde_json::to_string(&config).unwrap();
            assert_eq!(serde_json::from_str::<PpoConfig>(&text).unwrap(), config);
        }
        assert!(serde_json::from_str::<PpoConfig>(r#"{"clip_range": 0.1}"#).is_err());
    }

    #[test]
    fn annealing_ends_with_the_run() {
        let config = valid().annealed(10);
        assert_eq!(config.update.schedule.factor(40), 0.0);
        assert!(config.update.schedule.factor(39) > 0.0);
        let mut with_ptx = valid();
        with_ptx.ptx = Some(PtxConfig::deepspeed_chat());
        assert_eq!(with_ptx.optimizer_steps(10), 80);
    }
}
