//! Options of the optimiser and of the update.

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};

use crate::{EmaConfig, LossScale, ParamGroup, Precision, Result, Schedule};

/// Options of [`AdamW`](crate::AdamW).
///
/// The defaults are those of transformers' `TrainingArguments`: learning rate 5e-5, betas 0.9 and
/// 0.999, epsilon 1e-8, no weight decay.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct AdamWConfig {
    /// Learning rate at a schedule factor of 1.
    pub lr: f64,
    /// Decay of the running mean of gradients.
    pub beta1: f64,
    /// Decay of the running mean of squared gradients.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay: each step first multiplies a weight by `1 - lr * weight_decay`.
    pub weight_decay: f64,
    /// Which parameters the weight decay spares.
    pub no_decay: DecayRule,
    /// Parameters with a learning rate or weight decay of their own; the first group that a name
    /// fits counts.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<ParamGroup>,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 5e-5,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.0,
            no_decay: DecayRule::default(),
            groups: Vec::new(),
        }
    }
}

impl AdamWConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        let not_negative = |value: f64| value.is_finite() && value >= 0.0;
        let rate = |value: f64| (0.0..1.0).contains(&value);
        let checks = [
            (
                "optimizer.lr",
                self.lr,
                not_negative(self.lr),
                "must be finite and not negative",
            ),
            (
                "optimizer.beta1",
                self.beta1,
                rate(self.beta1),
                "must lie in [0, 1)",
            ),
            (
                "optimizer.beta2",
                self.beta2,
                rate(self.beta2),
                "must lie in [0, 1)",
            ),
            (
                "optimizer.eps",
                self.eps,
                not_negative(self.eps) && self.eps > 0.0,
                "must be finite and positive",
            ),
            (
                "optimizer.weight_decay",
                self.weight_decay,
                not_negative(self.weight_decay),
                "must be finite and not negative",
            ),
        ];
        for (field, value, valid, reason) in checks {
            if !valid {
                return Err(CoreError::config(field, value, reason).into());
            }
        }
        self.groups.iter().try_for_each(ParamGroup::validate)
    }
}

/// Which parameters are spared weight decay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecayRule {
    /// Parameters with fewer than two dimensions: the biases and norm weights that transformers'
    /// `Trainer` spares by name. Matrices and embeddings decay.
    #[default]
    Vectors,
    /// None is spared: every parameter decays.
    Nothing,
    /// All are spared, whatever `weight_decay` says.
    Everything,
}

impl DecayRule {
    /// Whether a parameter of this shape is decayed.
    pub fn decays(self, shape: &[i64]) -> bool {
        match self {
            Self::Vectors => shape.len() >= 2,
            Self::Nothing => true,
            Self::Everything => false,
        }
    }
}

/// Options of an [`Updater`](crate::Updater).
///
/// The defaults are those of transformers' `TrainingArguments` but for the schedule, which is
/// constant: gradients are clipped to norm 1. Neither loss scaling nor averaged weights unless
/// asked for.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct UpdateConfig {
    /// The optimiser.
    pub optimizer: AdamWConfig,
    /// How the learning rate changes from update to update.
    pub schedule: Schedule,
    /// Gradients with a larger norm are scaled down to this one; `None` leaves them alone.
    pub max_grad_norm: Option<f64>,
    /// Loss scaling, for f16 weights; `None` for none. See [`UpdateConfig::for_precision`].
    pub loss_scale: Option<LossScale>,
    /// Averages of the weights, kept up to date by every update that is not skipped; `None` for
    /// none.
    pub ema: Option<EmaConfig>,
    /// Seed of what losses draw from libtorch's generators, such as dropout.
    pub seed: u64,
}

impl Default for UpdateConfig {
    fn default() -> Self {
        Self {
            optimizer: AdamWConfig::default(),
            schedule: Schedule::default(),
            max_grad_norm: Some(1.0),
            loss_scale: None,
            ema: None,
            seed: 0,
        }
    }
}

impl UpdateConfig {
    /// These options with the loss scaling that weights of `precision` need: the default one for
    /// f16, none for the others.
    pub fn for_precision(self, precision: Precision) -> Self {
        Self {
            loss_scale: precision.loss_scale(),
            ..self
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        self.optimizer.validate()?;
        self.schedule.validate()?;
        if let Some(loss_scale) = &self.loss_scale {
            loss_scale.validate()?;
        }
        if let Some(ema) = &self.ema {
            ema.validate()?;
        }
        match self.max_grad_norm {
            Some(norm) if !(norm.is_finite() && norm > 0.0) => Err(CoreError::config(
                "max_grad_norm",
                norm,
                "must be finite and positive; leave it out to clip nothing",
            )
            .into()),
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn invalid_fields_are_named() {
        type Change = fn(&mut UpdateConfig);
        let cases: [(Change, &str); 10] = [
            (|c| c.optimizer.lr = f64::NAN, "optimizer.lr"),
            (|c| c.optimizer.lr = -1.0, "optimizer.lr"),
            (|c| c.optimizer.beta1 = 1.0, "optimizer.beta1"),
            (|c| c.optimizer.beta2 = -0.1, "optimizer.beta2"),
            (|c| c.optimizer.eps = 0.0, "optimizer.eps"),
            (
                |c| c.optimizer.weight_decay = f64::INFINITY,
                "optimizer.weight_decay",
            ),
            (|c| c.max_grad_norm = Some(0.0), "max_grad_norm"),
            (
                |c| c.optimizer.groups = vec![ParamGroup::default()],
                "optimizer.groups.params",
            ),
            (
                |c| c.loss_scale = Some(LossScale::fixed(-1.0)),
                "loss_scale.initial",
            ),
            (
                |c| {
                    c.ema = Some(EmaConfig {
                        decay: 1.5,
                        ..EmaConfig::default()
                    });
                },
                "ema.decay",
            ),
        ];
        UpdateConfig::default().validate().unwrap();
        for (change, field) in cases {
            let mut config = UpdateConfig::default();
            change(&mut config);
            let message = config.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{field} = ")), "{message}");
        }
    }

    #[test]
    fn survives_json_and_refuses_unknown_fields() {
        let config = UpdateConfig {
            schedule: Schedule::cosine(3, 7),
            max_grad_norm: None,
            optimizer: AdamWConfig {
                groups: vec![ParamGroup {
                    params: vec!["head.*".into()],
                    lr: Some(0.5),
                    weight_decay: None,
                }],
                ..AdamWConfig::default()
            },
            ema: Some(EmaConfig::default()),
            ..UpdateConfig::default().for_precision(Precision::F16)
        };
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<UpdateConfig>(&text).unwrap(), config);
        assert_eq!(
            serde_json::from_str::<UpdateConfig>("{}").unwrap(),
            UpdateConfig::default()
        );
        let typo = r#"{"optimizer": {"learning_rate": 1}}"#;
        assert!(serde_json::from_str::<UpdateConfig>(typo).is_err());
    }

    #[test]
    fn the_rules_tell_matrices_from_vectors() {
        let decays = |rule: DecayRule| [rule.decays(&[]), rule.decays(&[4]), rule.decays(&[4, 1])];
        assert_eq!(decays(DecayRule::Vectors), [false, false, true]);
        assert_eq!(decays(DecayRule::Nothing), [true; 3]);
        assert_eq!(decays(DecayRule::Everything), [false; 3]);
    }
}
