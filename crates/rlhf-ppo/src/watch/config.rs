//! From where on the watch speaks up.

use rlhf_core::Error;
use serde::{Deserialize, Serialize};

use super::finding::FindingKind;

/// Options of a [`HackingWatch`](crate::HackingWatch): the thresholds of its rules.
///
/// The defaults are rules of thumb for runs of some dozens of steps and more; none of them is a
/// law. A run that sharpens a policy on purpose, as one on verifiable rewards does, may well be
/// told that its entropy collapses.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatchConfig {
    /// Steps of the windows that are compared: the first ones of the run and the last ones so far.
    /// Nothing is said before two of them are full.
    pub window: usize,
    /// A change counts if it is at least so many of its own standard errors.
    pub z: f64,
    /// The reward has risen if its mean is higher by so many of the standard deviations that its
    /// samples have within a step (`score/std`) — and by `z` standard errors.
    pub reward_rise: f64,
    /// Divergence from the reference, nats **per sequence**, from which on a rising reward is no
    /// longer to be believed. Gao et al. 2023 see gold rewards peak at about 10 to 40.
    pub max_kl: f64,
    /// Share by which the length of answers may change while the reward rises.
    pub length_change: f64,
    /// Share by which distinct pairs of tokens within an answer may fall.
    pub repetition_drop: f64,
    /// Share by which distinct pairs of tokens over all answers may fall.
    pub variety_drop: f64,
    /// Share by which the disagreement of an ensemble of judges may rise.
    pub disagreement_rise: f64,
    /// The metric that holds the second, gold reward, below the phase.
    pub gold: String,
    /// Share of answers that may stop being finished.
    pub finished_drop: f64,
    /// An answer is empty talk below this share of its first length.
    pub short_answers: f64,
    /// Share of its first value that the entropy may fall to.
    pub entropy_left: f64,
    /// Steps with an explained variance of 0 or less until a critic counts as dead.
    pub critic_patience: usize,
    /// Share of prompts whose answers may all have the same reward.
    pub idle_groups: f64,
    /// Factor by which a measured KL may miss the controller's target throughout a window.
    pub kl_units: f64,
    /// Whether, and when, the watch ends the run.
    pub stop: StopRule,
}

/// When the watch ends a run.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum StopRule {
    /// Never.
    #[default]
    Never,
    /// When one of these has been found for `steps` steps in a row.
    On {
        /// What ends a run.
        kinds: Vec<FindingKind>,
        /// Steps in a row, 1 for at once.
        steps: usize,
    },
}

impl StopRule {
    pub(super) fn ends(&self, kind: FindingKind, found_for: usize) -> bool {
        match self {
            Self::Never => false,
            Self::On { kinds, steps } => kinds.contains(&kind) && found_for >= *steps,
        }
    }
}

impl Default for WatchConfig {
    fn default() -> Self {
        Self {
            window: 8,
            z: 3.0,
            reward_rise: 0.25,
            max_kl: 30.0,
            length_change: 0.3,
            repetition_drop: 0.15,
            variety_drop: 0.4,
            disagreement_rise: 0.5,
            gold: "judge/gold".to_string(),
            finished_drop: 0.3,
            short_answers: 0.25,
            entropy_left: 0.3,
            critic_patience: 24,
            idle_groups: 0.8,
            kl_units: 5.0,
            stop: StopRule::Never,
        }
    }
}

impl WatchConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// [`InvalidConfig`](Error::InvalidConfig) for the first field that makes no sense.
    pub fn validate(&self) -> rlhf_core::Result<()> {
        let reason = "at least 2 are needed, or nothing is known of the noise";
        if self.window < 2 {
            return Err(Error::config("window", self.window, reason));
        }
        if self.critic_patience == 0 {
            let field = "critic_patience";
            return Err(Error::config(field, 0, "at least 1 is needed"));
        }
        if let StopRule::On { steps: 0, .. } = self.stop {
            return Err(Error::config("stop.steps", 0, "at least 1 is needed"));
        }
        for (field, value) in [
            ("z", self.z),
            ("reward_rise", self.reward_rise),
            ("max_kl", self.max_kl),
            ("length_change", self.length_change),
            ("repetition_drop", self.repetition_drop),
            ("variety_drop", self.variety_drop),
            ("disagreement_rise", self.disagreement_rise),
            ("finished_drop", self.finished_drop),
            ("short_answers", self.short_answers),
            ("entropy_left", self.entropy_left),
            ("idle_groups", self.idle_groups),
            ("kl_units", self.kl_units),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                let reason = "a number that is not negative";
                return Err(Error::config(field, value, reason));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn errors_name_the_field_and_json_round_trips() {
        let config = WatchConfig {
            stop: StopRule::On {
                kinds: vec![FindingKind::GoldDecline],
                steps: 2,
            },
            ..WatchConfig::default()
        };
        config.validate().unwrap();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<WatchConfig>(&text).unwrap(), config);
        let broken = WatchConfig {
            length_change: f64::NAN,
            ..WatchConfig::default()
        };
        let message = broken.validate().unwrap_err().to_string();
        assert!(message.contains("length_change"), "{message}");
        let broken = WatchConfig {
            window: 1,
            ..WatchConfig::default()
        };
        assert!(broken.validate().is_err());
    }
}
