//! Learning-rate schedules, as transformers defines them.

use std::f64::consts::PI;

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};

use crate::Result;

/// How the learning rate changes from update to update: linear warm-up, then [`ScheduleKind`].
///
/// ```
/// use rlhf_scale::Schedule;
///
/// let schedule = Schedule::linear(5, 30);
/// assert_eq!(schedule.factor(0), 0.0);
/// assert_eq!(schedule.factor(5), 1.0);
/// assert_eq!(schedule.factor(30), 0.0);
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Schedule {
    /// Shape after the warm-up.
    pub kind: ScheduleKind,
    /// Updates in which the rate rises from 0.
    pub warmup_steps: u64,
    /// Updates in all, warm-up included. [`ScheduleKind::Constant`] and
    /// [`ScheduleKind::InverseSqrt`] have no end and ignore it.
    pub total_steps: u64,
}

/// Shape of a [`Schedule`] after its warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum ScheduleKind {
    /// Stays at 1 (transformers' `constant_with_warmup`; `constant` when there is no warm-up).
    #[default]
    Constant,
    /// Falls to 0 in a straight line (`linear`).
    Linear,
    /// Half a cosine wave from 1 down to `min_factor` (`cosine`; `cosine_with_min_lr` when
    /// `min_factor`, there `min_lr_rate`, is not 0).
    ///
    /// Past the last step the wave rises again, as it does in transformers.
    Cosine {
        /// Factor at the last step, in `[0, 1]`.
        #[serde(default)]
        min_factor: f64,
    },
    /// `cycles` half waves, each starting at 1 (`cosine_with_restarts`).
    CosineWithRestarts {
        /// Number of cycles, at least 1.
        cycles: u32,
    },
    /// Falls to `end_factor` along `(1 - progress)^power`, and stays there (`polynomial`).
    Polynomial {
        /// Exponent.
        power: f64,
        /// Factor at the last step: transformers' `lr_end` divided by the learning rate.
        #[serde(default)]
        end_factor: f64,
    },
    /// Falls with the root of the step (`inverse_sqrt`), on the time scale of the warm-up, or of
    /// 10,000 steps without one.
    InverseSqrt,
}

impl Schedule {
    /// No warm-up, no decay.
    pub fn constant() -> Self {
        Self::default()
    }

    /// Linear warm-up, then linear decay to 0 at `total_steps`.
    pub fn linear(warmup_steps: u64, total_steps: u64) -> Self {
        Self {
            kind: ScheduleKind::Linear,
            warmup_steps,
            total_steps,
        }
    }

    /// Linear warm-up, then cosine decay to 0 at `total_steps`.
    pub fn cosine(warmup_steps: u64, total_steps: u64) -> Self {
        Self {
            kind: ScheduleKind::Cosine { min_factor: 0.0 },
            warmup_steps,
            total_steps,
        }
    }

    /// What the learning rate is multiplied by in update number `step`, counted from 0.
    ///
    /// With `w` warm-up steps and `n` total steps the factor is `step / w` below `w`. After that,
    /// with `p = (step - w) / (n - w)`:
    ///
    /// | kind | factor |
    /// |---|---|
    /// | `Constant` | `1` |
    /// | `Linear` | `max(0, 1 - p)` |
    /// | `Cosine` | `min_factor + (1 - min_factor) * (1 + cos(π p)) / 2` |
    /// | `CosineWithRestarts` | `(1 + cos(π frac(cycles * p))) / 2`, 0 from `p = 1` on |
    /// | `Polynomial` | `end_factor + (1 - end_factor) * (1 - p)^power`, `end_factor` past the end |
    /// | `InverseSqrt` | `sqrt(t / (step + t - w))`, `t = w` or 10,000 if `w` is 0 |
    ///
    /// With a warm-up the first update has a rate of 0, as in transformers.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            return step as f64 / self.warmup_steps as f64;
        }
        let length = self.total_steps.saturating_sub(self.warmup_steps).max(1);
        let progress = (step - self.warmup_steps) as f64 / length as f64;
        match self.kind {
            ScheduleKind::Constant => 1.0,
            ScheduleKind::Linear => (1.0 - progress).max(0.0),
            ScheduleKind::Cosine { min_factor } => {
                min_factor + (1.0 - min_factor) * half_wave(progress)
            }
            ScheduleKind::CosineWithRestarts { .. } if progress >= 1.0 => 0.0,
            ScheduleKind::CosineWithRestarts { cycles } => {
                half_wave((f64::from(cycles) * progress).fract())
            }
            ScheduleKind::Polynomial { power, end_factor } => {
                end_factor + (1.0 - end_factor) * (1.0 - progress).max(0.0).powf(power)
            }
            ScheduleKind::InverseSqrt => {
                let scale = match self.warmup_steps {
                    0 => 10_000.0,
                    warmup => warmup as f64,
                };
                (scale / (step as f64 + scale - self.warmup_steps as f64)).sqrt()
            }
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        let invalid = |field, value: &dyn ToString, reason| {
            Err(CoreError::config(field, value.to_string(), reason).into())
        };
        match self.kind {
            ScheduleKind::Constant | ScheduleKind::InverseSqrt => return Ok(()),
            ScheduleKind::Linear => {}
            ScheduleKind::Cosine { min_factor } => {
                if !(0.0..=1.0).contains(&min_factor) {
                    return invalid(
                        "schedule.kind.min_factor",
                        &min_factor,
                        "must lie in [0, 1]",
                    );
                }
            }
            ScheduleKind::CosineWithRestarts { cycles } => {
                if cycles == 0 {
                    return invalid("schedule.kind.cycles", &cycles, "must be at least 1");
                }
            }
            ScheduleKind::Polynomial { power, end_factor } => {
                if !(power.is_finite() && power > 0.0) {
                    return invalid("schedule.kind.power", &power, "must be finite and positive");
                }
                if !(0.0..=1.0).contains(&end_factor) {
                    return invalid(
                        "schedule.kind.end_factor",
                        &end_factor,
                        "must lie in [0, 1]",
                    );
                }
            }
        }
        if self.total_steps == 0 || self.total_steps < self.warmup_steps {
            return invalid(
                "schedule.total_steps",
                &self.total_steps,
                "must be positive and not less than warmup_steps: this kind of schedule has an end",
            );
        }
        Ok(())
    }
}

/// Half a cosine wave: 1 at 0, 0 at 1.
fn half_wave(progress: f64) -> f64 {
    0.5 * (1.0 + (PI * progress).cos())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn parse(text: &str) -> Result<Schedule, serde_json::Error> {
        serde_json::from_str(text)
    }

    #[test]
    fn reads_short_forms_and_refuses_typos() {
        let linear = parse(r#"{"kind": "linear", "warmup_steps": 3, "total_steps": 9}"#).unwrap();
        assert_eq!(linear, Schedule::linear(3, 9));
        let cosine = parse(r#"{"kind": {"cosine": {}}, "total_steps": 9}"#).unwrap();
        assert_eq!(cosine, Schedule::cosine(0, 9));
        assert!(parse(r#"{"kind": "linaer"}"#).is_err());
        assert!(parse(r#"{"kind": {"cosine": {"min_facto": 0.1}}}"#).is_err());
        assert!(parse(r#"{"warmup": 3}"#).is_err());
    }

    #[test]
    fn invalid_fields_are_named() {
        let of = |kind| Schedule {
            kind,
            warmup_steps: 2,
            total_steps: 9,
        };
        let polynomial = |power, end_factor| of(ScheduleKind::Polynomial { power, end_factor });
        let cases = [
            (Schedule::linear(0, 0), "schedule.total_steps"),
            (Schedule::cosine(10, 9), "schedule.total_steps"),
            (
                of(ScheduleKind::Cosine { min_factor: 1.5 }),
                "schedule.kind.min_factor",
            ),
            (
                of(ScheduleKind::CosineWithRestarts { cycles: 0 }),
                "schedule.kind.cycles",
            ),
            (polynomial(0.0, 0.0), "schedule.kind.power"),
            (polynomial(1.0, f64::NAN), "schedule.kind.end_factor"),
        ];
        for (schedule, field) in cases {
            let message = schedule.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{field} = ")), "{message}");
        }
        for schedule in [Schedule::constant(), of(ScheduleKind::InverseSqrt)] {
            schedule.validate().unwrap();
        }
    }
}
