//! Loss scaling, which keeps the gradients of f16 weights within their range.

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Result, backward};

/// Options of a [`LossScaler`].
///
/// The defaults are those of PyTorch's `torch.amp.GradScaler`, but for the floor, which it does not
/// have: fairseq stops at 1e-4, we at 2⁻¹⁴ ≈ 6e-5.
///
/// ```
/// use rlhf_scale::{Error, LossScale, UpdateConfig, Updater};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Error> {
/// let weight = Tensor::ones([2], (Kind::Half, Device::Cpu)).set_requires_grad(true);
/// let mut updater = Updater::new(
///     vec![("weight".to_string(), weight.shallow_clone())],
///     &UpdateConfig { loss_scale: Some(LossScale::default()), ..UpdateConfig::default() },
/// )?;
/// // The gradient is 1, which fits f16 at half the initial scale.
/// let skipped = [0, 1].map(|_| {
///     updater.update::<Error>(1, |_| Ok(weight.sum(Kind::Float))).map(|stats| stats.skipped)
/// });
/// assert!(matches!(skipped, [Ok(true), Ok(false)]));
/// assert_eq!(updater.step(), 1);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LossScale {
    /// The first scale. Powers of two change no digit of a gradient.
    pub initial: f64,
    /// The scale is multiplied by this after `growth_interval` good steps in a row; 1 lets it only
    /// fall.
    pub growth_factor: f64,
    /// The scale is multiplied by this when a gradient is not finite.
    pub backoff_factor: f64,
    /// Good steps in a row after which the scale grows.
    pub growth_interval: u64,
    /// A scale that would have to fall below this is an error: what is not finite there is so for
    /// another reason than the scale.
    pub floor: f64,
}

impl Default for LossScale {
    fn default() -> Self {
        Self {
            initial: 65536.0,
            growth_factor: 2.0,
            backoff_factor: 0.5,
            growth_interval: 2000,
            floor: 2f64.powi(-14),
        }
    }
}

impl LossScale {
    /// A scale that never changes. A gradient that is not finite is then an error, since skipping
    /// the step would lead to the same place again.
    pub fn fixed(scale: f64) -> Self {
        Self {
            initial: scale,
            growth_factor: 1.0,
            floor: scale,
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        let scale = |value: f64| (value as f32).is_normal() && value > 0.0;
        let checks = [
            (
                "loss_scale.initial",
                self.initial,
                scale(self.initial),
                "must be positive and within the range of f32",
            ),
            (
                "loss_scale.growth_factor",
                self.growth_factor,
                self.growth_factor.is_finite() && self.growth_factor >= 1.0,
                "must be finite and at least 1",
            ),
            (
                "loss_scale.backoff_factor",
                self.backoff_factor,
                self.backoff_factor > 0.0 && self.backoff_factor < 1.0,
                "must lie between 0 and 1",
            ),
            (
                "loss_scale.growth_interval",
                self.growth_interval as f64,
                self.growth_interval > 0,
                "must be at least 1",
            ),
            (
                "loss_scale.floor",
                self.floor,
                scale(self.floor) && self.floor <= self.initial,
                "must be positive and at most `initial`",
            ),
        ];
        for (field, value, valid, reason) in checks {
            if !valid {
                return Err(CoreError::config(field, value, reason).into());
            }
        }
        Ok(())
    }
}

/// The scale of a run and how it came about; its course is that of PyTorch's `GradScaler`.
///
/// Backward starts from the scale rather than from 1, so every gradient comes out as many times
/// larger, and is divided by it afterwards, in f32. A gradient that is not finite means that the
/// scale was too large: the step is skipped and the scale falls. After a run of good steps it grows.
/// [`Updater`](crate::Updater) does all of this; a loop of one's own looks so:
///
/// ```
/// use rlhf_scale::{Error, LossScale, LossScaler};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Error> {
/// let weight = Tensor::ones([2], (Kind::Half, Device::Cpu)).set_requires_grad(true);
/// let mut scaler = LossScaler::new(&LossScale::default())?;
/// let (mut steps, mut gradient) = (0, f64::NAN);
/// while steps < 1 {
///     rlhf_scale::clear_grads(std::slice::from_ref(&weight))?;
///     // 3 · 65536 is more than f16 holds, 3 · 16384 is not.
///     scaler.backward(&(&weight * 3.0).sum(Kind::Float))?;
///     let unscaled = weight.grad().to_kind(Kind::Float) / scaler.scale();
///     gradient = unscaled.double_value(&[0]);
///     if gradient.is_finite() {
///         steps += 1; // here the optimiser would step
///         scaler.succeeded();
///     } else if !scaler.overflowed() {
///         break; // at the floor
///     }
/// }
/// assert_eq!((gradient, scaler.scale(), scaler.skipped_steps()), (3.0, 16384.0, 2));
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LossScaler {
    config: LossScale,
    /// Always an f32 number: GradScaler's is, and its rounding must be ours.
    scale: f64,
    growth_tracker: u64,
    skipped_steps: u64,
}

impl LossScaler {
    /// A scaler at its initial scale.
    ///
    /// # Errors
    /// If the config is invalid.
    pub fn new(config: &LossScale) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            config: *config,
            scale: as_f32(config.initial),
            growth_tracker: 0,
            skipped_steps: 0,
        })
    }

    /// What gradients are multiplied by now.
    pub fn scale(&self) -> f64 {
        self.scale
    }

    /// Good steps since the scale changed last.
    pub fn growth_tracker(&self) -> u64 {
        self.growth_tracker
    }

    /// Steps skipped so far.
    pub fn skipped_steps(&self) -> u64 {
        self.skipped_steps
    }

    /// Backward from `loss` times the scale, without forming that product, which could overflow
    /// where no gradient does. A 16-bit loss is converted to f32 first; one of several elements
    /// counts as their sum.
    ///
    /// # Errors
    /// If `loss` has no graph, or backward fails.
    pub fn backward(&self, loss: &Tensor) -> Result<()> {
        let loss = match loss.kind() {
            Kind::Half | Kind::BFloat16 => loss.f_to_kind(Kind::Float)?,
            _ => loss.shallow_clone(),
        };
        let seed = loss.f_full_like(self.scale)?;
        backward(&[loss], &[seed])
    }

    /// Notes a step whose gradients were finite.
    pub fn succeeded(&mut self) {
        self.growth_tracker += 1;
        if self.growth_tracker < self.config.growth_interval {
            return;
        }
        self.growth_tracker = 0;
        let grown = as_f32(self.scale * self.config.growth_factor);
        if grown.is_finite() {
            self.scale = grown;
        }
    }

    /// Notes a step that was skipped because a gradient was not finite, and lowers the scale.
    ///
    /// `false`, and nothing is noted, where the scale would fall below the floor.
    #[must_use = "at the floor, skipping more steps leads nowhere"]
    pub fn overflowed(&mut self) -> bool {
        let lowered = as_f32(self.scale * self.config.backoff_factor);
        if lowered < self.config.floor {
            return false;
        }
        self.scale = lowered;
        self.growth_tracker = 0;
        self.skipped_steps += 1;
        true
    }

    /// The smallest scale.
    pub(crate) fn floor(&self) -> f64 {
        self.config.floor
    }

    /// This scaler as it was saved: JSON readers may be off in the last digit of an f64, which
    /// rounding to f32 mends. `None` if no run has such a state.
    pub(crate) fn restored(self) -> Option<Self> {
        let scale = as_f32(self.scale);
        (scale.is_normal() && scale > 0.0).then_some(Self { scale, ..self })
    }
}

/// Rounded to f32.
fn as_f32(value: f64) -> f64 {
    f64::from(value as f32)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn invalid_fields_are_named() {
        type Change = fn(&mut LossScale);
        let cases: [(Change, &str); 8] = [
            (|c| c.initial = 0.0, "loss_scale.initial"),
            (|c| c.initial = 1e39, "loss_scale.initial"),
            (|c| c.growth_factor = 0.9, "loss_scale.growth_factor"),
            (|c| c.backoff_factor = 1.0, "loss_scale.backoff_factor"),
            (|c| c.backoff_factor = 0.0, "loss_scale.backoff_factor"),
            (|c| c.growth_interval = 0, "loss_scale.growth_interval"),
            (|c| c.floor = f64::NAN, "loss_scale.floor"),
            (|c| c.floor = 1e6, "loss_scale.floor"),
        ];
        LossScale::default().validate().unwrap();
        LossScale::fixed(128.0).validate().unwrap();
        for (change, field) in cases {
            let mut config = LossScale::default();
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{field} = ")), "{message}");
        }
    }

    #[test]
    fn a_scale_at_the_end_of_f32_stays() {
        let config = LossScale {
            initial: 2f64.powi(127),
            growth_interval: 1,
            ..LossScale::default()
        };
        let mut scaler = LossScaler::new(&config).unwrap();
        scaler.succeeded();
        assert_eq!(
            (scaler.scale(), scaler.growth_tracker()),
            (2f64.powi(127), 0)
        );
    }

    #[test]
    fn a_fixed_scale_neither_grows_nor_falls() {
        let mut scaler = LossScaler::new(&LossScale {
            growth_interval: 1,
            ..LossScale::fixed(8.0)
        })
        .unwrap();
        scaler.succeeded();
        assert!(!scaler.overflowed());
        assert_eq!((scaler.scale(), scaler.skipped_steps()), (8.0, 0));
    }

    #[test]
    fn scales_are_f32_and_survive_json() {
        let config = LossScale {
            initial: 0.1,
            backoff_factor: 0.3,
            floor: 1e-30,
            ..LossScale::default()
        };
        let mut scaler = LossScaler::new(&config).unwrap();
        for _ in 0..40 {
            assert!(scaler.overflowed());
            let scale = scaler.scale();
            assert_eq!(f64::from(scale as f32), scale);
            let text = serde_json::to_string(&scaler).unwrap();
            let read: LossScaler = serde_json::from_str(&text).unwrap();
            assert_eq!(read.restored().unwrap(), scaler);
        }
        let broken = LossScaler {
            scale: 0.0,
            ..scaler
        };
        assert!(broken.restored().is_none());
    }
}
