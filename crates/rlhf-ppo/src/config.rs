//! Options of PPO.

use rlhf_core::{Error, GenerationConfig, SamplingConfig};
use rlhf_scale::{AdamWConfig, Schedule, UpdateConfig};
use serde::{Deserialize, Serialize};

use crate::microbatching::Microbatching;
use crate::{Clip, KlControl, KlEstimator, MissingEos, Result, ScorePosition, Whitening};

/// Where the log-probabilities that ratios are taken against come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OldLogprobs {
    /// From a forward pass over the finished responses, as all known implementations do: the
    /// same arithmetic as in the update, so that the first ratios are 1.
    Recomputed,
    /// Those that the tokens were sampled with: spares a forward pass of the policy. Sampling
    /// must be unfiltered. Completions that bring none are recomputed.
    Sampled,
}

/// Options of a [`PpoTrainer`](crate::PpoTrainer).
///
/// The default is [`n_plus`](Self::n_plus). `generation.stop_token_ids` is the one thing that
/// must be set: without it no response ever counts as finished.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PpoConfig {
    /// Everything random follows from it: sampling, the order of prompts and of minibatches.
    pub seed: u64,
    /// Prompts of a step of [`train`](crate::PpoTrainer::train).
    pub batch_size: usize,
    /// Passes over a rollout.
    pub ppo_epochs: usize,
    /// Optimiser steps in a pass.
    pub minibatches: usize,
    /// Sequences in one forward pass. Changes memory and speed, not what is computed.
    pub microbatch_size: usize,
    /// Ratios count within `1 ± cliprange`.
    pub cliprange: f64,
    /// Values count within `old ± cliprange_value`.
    pub cliprange_value: f64,
    /// Weight of the value loss beside the policy loss.
    pub vf_coef: f64,
    /// Weight of an entropy bonus, in loss per nat.
    pub entropy_coef: f64,
    /// Discount.
    pub gamma: f64,
    /// Decay of generalised advantage estimation.
    pub lam: f64,
    /// The KL penalty's coefficient.
    pub kl_control: KlControl,
    /// How the KL of a token is estimated, in the penalty and in the statistics.
    pub kl_estimator: KlEstimator,
    /// Which step of an episode receives the score.
    pub score_position: ScorePosition,
    /// Scores count within plus and minus this.
    pub score_clip: Option<f64>,
    /// What becomes of the score of a response without a stop token; after clipping.
    pub missing_eos: MissingEos,
    /// Whitening of the rewards, which keeps their mean.
    pub whiten_rewards: Whitening,
    /// Whitening of the advantages, to mean 0.
    pub whiten_advantages: Whitening,
    /// Where old log-probabilities come from.
    pub old_logprobs: OldLogprobs,
    /// How responses are written. **Its temperature is that of all log-probabilities** (old, new
    /// and reference): the distribution that is sampled from is the one that is trained.
    pub generation: GenerationConfig,
    /// Optimiser, schedule and clipping; one for policy and value model.
    pub update: UpdateConfig,
}

impl Default for PpoConfig {
    /// [`PpoConfig::n_plus`].
    fn default() -> Self {
        Self::n_plus()
    }
}

impl PpoConfig {
    /// Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031,
    /// and its released code): batches of 512 prompts, 53 tokens at temperature 0.7,
    /// score −1 without EOS, population variance in whitening, AdamW with epsilon 1e-5, no
    /// gradient clipping. Its learning rate of 3e-6 falls to 0 in a straight line: see
    /// [`annealed`](Self::annealed), which needs to know the length of the run.
    pub fn n_plus() -> Self {
        Self {
            seed: 1,
            batch_size: 512,
            ppo_epochs: 4,
            minibatches: 1,
            microbatch_size: 8,
            cliprange: 0.2,
            cliprange_value: 0.2,
            vf_coef: 0.1,
            entropy_coef: 0.0,
            gamma: 1.0,
            lam: 0.95,
            kl_control: KlControl::Fixed { kl_coef: 0.05 },
            kl_estimator: KlEstimator::K1,
            score_position: ScorePosition::AfterLastToken,
            score_clip: None,
            missing_eos: MissingEos::Replace(-1.0),
            whiten_rewards: Whitening::Off,
            whiten_advantages: Whitening::Population,
            old_logprobs: OldLogprobs::Recomputed,
            generation: GenerationConfig {
                max_new_tokens: 53,
                sampling: SamplingConfig {
                    temperature: 0.7,
                    ..SamplingConfig::default()
                },
                ..GenerationConfig::default()
            },
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 3e-6,
                    eps: 1e-5,
                    ..AdamWConfig::default()
                },
                schedule: Schedule::constant(),
                max_grad_norm: None,
                ..UpdateConfig::default()
            },
        }
    }

    /// The arithmetic of `PPOTrainer` in TRL 1.12 (`trl/experimental/ppo`) at its defaults, which
    /// this crate's tests hold to its numbers: as [`n_plus`](Self::n_plus), but with the sample variance in whitening, scores that stand
    /// without EOS (`missing_eos_penalty` is [`MissingEos::Subtract`]), and epsilon 1e-8.
    pub fn trl() -> Self {
        let mut config = Self::n_plus();
        config.missing_eos = MissingEos::Keep;
        config.whiten_advantages = Whitening::Sample;
        config.update.optimizer.eps = 1e-8;
        config
    }

    /// The same with a learning rate that falls to 0, in a straight line, over `steps` steps of
    /// [`train`](crate::PpoTrainer::train).
    pub fn annealed(mut self, steps: u64) -> Self {
        self.update.schedule = Schedule::linear(0, self.optimizer_steps(steps));
        self
    }

    /// Optimiser steps in `steps` steps of training: the unit of `update.schedule`.
    pub fn optimizer_steps(&self, steps: u64) -> u64 {
        steps * (self.ppo_epochs * self.minibatches) as u64
    }

    /// How far ratios count.
    pub fn clip(&self) -> Clip {
        Clip::symmetric(self.cliprange)
    }

    pub(crate) fn microbatching(&self) -> Microbatching {
        Microbatching {
            sequences: self.microbatch_size,
            tokens: None,
        }
    }

    /// The temperature of sampling and of all log-probabilities.
    pub fn temperature(&self) -> f64 {
        self.generation.sampling.temperature
    }

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
            ("ppo_epochs", self.ppo_epochs),
            ("minibatches", self.minibatches),
            ("microbatch_size", self.microbatch_size),
        ] {
            check(value > 0, field, &value, "at least 1 is needed")?;
        }
        for (field, value) in [
            ("cliprange", self.cliprange),
            ("cliprange_value", self.cliprange_value),
            ("score_clip", self.score_clip.unwrap_or(1.0)),
        ] {
            let valid = value.is_finite() && value > 0.0;
            check(valid, field, &value, "a positive number is needed")?;
        }
        for (field, value) in [
            ("vf_coef", self.vf_coef),
            ("entropy_coef", self.entropy_coef),
        ] {
            let valid = value.is_finite() && value >= 0.0;
            check(valid, field, &value, "a number that is not negative")?;
        }
        for (field, value) in [("gamma", self.gamma), ("lam", self.lam)] {
            let valid = (0.0..=1.0).contains(&value);
            check(valid, field, &value, "a number in [0, 1] is needed")?;
        }
        self.kl_control.validate()?;
        if let MissingEos::Replace(value) | MissingEos::Subtract(value) = self.missing_eos {
            check(value.is_finite(), "missing_eos", &value, "a finite number")?;
            let reason = "needs generation.stop_token_ids, or no response ever finishes; \
                          use MissingEos::Keep for a model without a stop token";
            let has_stop = !self.generation.stop_token_ids.is_empty();
            check(has_stop, "missing_eos", &value, reason)?;
        }
        self.generation.validate()?;
        let temperature = self.temperature();
        let reason = "PPO needs samples: a positive temperature";
        let field = "generation.sampling.temperature";
        check(temperature > 0.0, field, &temperature, reason)?;
        if self.old_logprobs == OldLogprobs::Sampled {
            let plain = SamplingConfig {
                temperature,
                ..SamplingConfig::default()
            };
            let unfiltered =
                self.generation.sampling == plain && self.generation.min_new_tokens == 0;
            let reason = "needs sampling without filters, penalties or min_new_tokens";
            check(unfiltered, "old_logprobs", &"sampled", reason)?;
        }
        Ok(self.update.validate()?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn valid() -> PpoConfig {
        let mut config = PpoConfig::default();
        config.generation.stop_token_ids = vec![0];
        config
    }

    #[test]
    fn errors_name_the_field() {
        type BreakIt = fn(&mut PpoConfig);
        valid().validate().unwrap();
        PpoConfig::trl().validate().unwrap();
        let broken: [(&str, BreakIt); 8] = [
            ("minibatches", |c| c.minibatches = 0),
            ("cliprange ", |c| c.cliprange = 0.0),
            ("gamma", |c| c.gamma = 1.1),
            ("vf_coef", |c| c.vf_coef = f64::NAN),
            ("missing_eos", |c| c.generation.stop_token_ids.clear()),
            ("kl_control.kl_coef", |c| {
                c.kl_control = KlControl::Fixed { kl_coef: -1.0 };
            }),
            ("temperature", |c| c.generation.sampling.temperature = 0.0),
            ("old_logprobs", |c| {
                c.old_logprobs = OldLogprobs::Sampled;
                c.generation.sampling.top_p = Some(0.9);
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
        let mut config = valid();
        config.kl_control = KlControl::ziegler();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<PpoConfig>(&text).unwrap(), config);
        assert!(serde_json::from_str::<PpoConfig>(r#"{"clip_range": 0.1}"#).is_err());
    }

    #[test]
    fn annealing_ends_with_the_run() {
        let config = valid().annealed(10);
        assert_eq!(config.update.schedule.factor(40), 0.0);
        assert!(config.update.schedule.factor(39) > 0.0);
    }
}
