//! What an update reports.

use serde::{Deserialize, Deserializer, Serialize};

/// What one update did.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
pub struct UpdateStats {
    /// Sum of the microbatch losses, without the loss scale.
    pub loss: f64,
    /// Euclidean norm of all gradients before clipping, computed in f32; infinite where the update
    /// was skipped.
    #[serde(deserialize_with = "number_or_null")]
    pub grad_norm: f64,
    /// Learning rate that was used, before the groups' own.
    pub lr: f64,
    /// Updates done so far; a skipped one is not among them.
    pub step: u64,
    /// Whether nothing was updated, because a gradient was not finite at this loss scale.
    #[serde(default)]
    pub skipped: bool,
    /// The loss scale of this update, where there is one.
    #[serde(default)]
    pub loss_scale: Option<f64>,
    /// Updates skipped so far, this one included.
    #[serde(default)]
    pub skipped_steps: u64,
}

impl UpdateStats {
    /// What a trainer logs: `PHASE/loss`, `PHASE/lr`, and `PHASE/grad_norm` unless the update was
    /// skipped; with loss scaling also `PHASE/loss_scale` and `PHASE/skipped` (1 or 0).
    ///
    /// ```
    /// let stats = rlhf_scale::UpdateStats { loss: 2.0, lr: 0.1, ..Default::default() };
    /// let names: Vec<String> = stats.metrics("sft").map(|(name, _)| name).collect();
    /// assert_eq!(names, ["sft/loss", "sft/lr", "sft/grad_norm"]);
    /// ```
    pub fn metrics(&self, phase: &str) -> impl Iterator<Item = (String, f64)> + use<> {
        let skipped = self.loss_scale.map(|_| f64::from(self.skipped));
        [
            ("loss", Some(self.loss)),
            ("lr", Some(self.lr)),
            ("grad_norm", (!self.skipped).then_some(self.grad_norm)),
            ("loss_scale", self.loss_scale),
            ("skipped", skipped),
        ]
        .map(|(name, value)| Some((format!("{phase}/{name}"), value?)))
        .into_iter()
        .flatten()
    }
}

/// JSON has no infinity: it is written as null.
fn number_or_null<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or(f64::INFINITY))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn a_skipped_update_survives_json_and_has_no_norm_to_log() {
        let stats = UpdateStats {
            grad_norm: f64::INFINITY,
            skipped: true,
            loss_scale: Some(4.0),
            skipped_steps: 3,
            ..UpdateStats::default()
        };
        let text = serde_json::to_string(&stats).unwrap();
        assert_eq!(serde_json::from_str::<UpdateStats>(&text).unwrap(), stats);
        let metrics: Vec<_> = stats.metrics("p").skip(2).collect();
        assert_eq!(
            metrics,
            [("p/loss_scale".into(), 4.0), ("p/skipped".into(), 1.0)]
        );
    }
}
