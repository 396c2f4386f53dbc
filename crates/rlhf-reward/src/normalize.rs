//! Scores on a known scale.

use std::path::Path;

use rlhf_core::{Completions, Error as CoreError, RewardModel, Stats};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Where a model's folder keeps the scale of its scores.
const FILE: &str = "score_normalizer.json";

/// An affine map of scores, `(s − mean) / deviation`, that gives the scores it was fitted to mean
/// 0 and deviation 1.
///
/// The Bradley-Terry loss fixes neither origin nor unit of the scores, while PPO's KL coefficient
/// and value loss depend on both: Stiennon et al. 2020 (appendix C) shift a reward model so that
/// the reference summaries score 0 on average.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScoreNormalizer {
    /// What is taken away from each score.
    pub mean: f64,
    /// What is divided by then.
    pub deviation: f64,
}

impl ScoreNormalizer {
    /// The map that fits `scores`, by their mean and population deviation.
    ///
    /// # Errors
    /// [`Error::Uncalibrated`] where the scores are all the same, one or none; a score that is
    /// not finite.
    pub fn fit(scores: &[f64]) -> Result<Self> {
        if let Some(row) = scores.iter().position(|s| !s.is_finite()) {
            return Err(non_finite(row, scores[row]));
        }
        let count = scores.len().max(1) as f64;
        let mean = scores.iter().sum::<f64>() / count;
        let squares: f64 = scores.iter().map(|s| (s - mean).powi(2)).sum();
        let deviation = (squares / count).sqrt();
        // Scores that differ by rounding alone count as the same.
        if deviation <= 1e-6 * mean.abs() {
            return Err(Error::Uncalibrated {
                count: scores.len(),
                deviation,
            });
        }
        Ok(Self { mean, deviation })
    }

    /// Writes the map into a model's folder, beside the files of transformers, which does not look
    /// at it. The file is complete or not there.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        std::fs::create_dir_all(dir).map_err(CoreError::io("creating", dir))?;
        let (path, staged) = (dir.join(FILE), dir.join(format!(".{FILE}.partial")));
        let json = serde_json::to_string_pretty(self).map_err(CoreError::model)?;
        std::fs::write(&staged, json + "\n").map_err(CoreError::io("writing", &staged))?;
        std::fs::rename(&staged, &path).map_err(CoreError::io("renaming", &staged))?;
        Ok(())
    }

    /// Reads the map of a model's folder; `None` where it has none.
    ///
    /// # Errors
    /// A file that cannot be read, or that holds no map with a finite mean and a positive, finite
    /// deviation.
    pub fn from_dir(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(FILE);
        let text = match std::fs::read_to_string(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            text => text.map_err(CoreError::io("reading", &path))?,
        };
        let corrupt = |reason: String| CoreError::Corrupt {
            path: path.clone(),
            reason,
        };
        let map: Self = serde_json::from_str(&text).map_err(|e| corrupt(e.to_string()))?;
        let Self { mean, deviation } = map;
        if !(mean.is_finite() && deviation.is_finite() && deviation > 0.0) {
            let reason = format!("mean {mean} and deviation {deviation} are no scale");
            return Err(corrupt(reason).into());
        }
        Ok(Some(map))
    }

    /// The map that leaves scores as they are.
    pub fn identity() -> Self {
        Self {
            mean: 0.0,
            deviation: 1.0,
        }
    }

    /// Maps scores of any shape.
    pub fn apply(&self, scores: &Tensor) -> Tensor {
        (scores - self.mean) / self.deviation
    }
}

/// A reward model whose scores are put on a known scale.
///
/// ```
/// use rlhf_reward::Normalized;
/// use rlhf_reward::core::{Completions, RewardModel, Sequence, SequenceBatch, Text, reward_fn};
///
/// let batch = SequenceBatch::new(vec![Sequence::new([1], [2]), Sequence::new([1], [3])])?;
/// let text = |response: &str| Text { prompt: "Hello".into(), response: response.into() };
/// let completions = Completions::written(batch).with_texts(vec![text("Hi"), text("Good day")])?;
///
/// let length = reward_fn(|_prompt, response| response.len() as f64);
/// let model = Normalized::fit(length, [&completions])?;
/// let scores = model.score(&completions)?;
/// assert_eq!((scores.double_value(&[0]), scores.double_value(&[1])), (-1.0, 1.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Normalized<M> {
    model: M,
    normalizer: ScoreNormalizer,
}

impl<M: RewardModel> Normalized<M> {
    /// Scores a calibration set, batch by batch, and fits the map to it.
    ///
    /// # Errors
    /// Those of the model and of [`ScoreNormalizer::fit`].
    pub fn fit<'a>(
        model: M,
        completions: impl IntoIterator<Item = &'a Completions>,
    ) -> Result<Self> {
        let _no_grad = tch::no_grad_guard();
        let mut scores = Vec::new();
        for batch in completions {
            let batch_scores = model.score(batch)?.to_kind(Kind::Double).contiguous();
            scores.extend(Vec::<f64>::try_from(batch_scores.view(-1)).map_err(CoreError::from)?);
        }
        let normalizer = ScoreNormalizer::fit(&scores)?;
        Ok(Self { model, normalizer })
    }

    /// A model whose map is known already.
    pub fn new(model: M, normalizer: ScoreNormalizer) -> Self {
        Self { model, normalizer }
    }

    /// A model that was loaded from `dir`, with the map that is stored there
    /// ([`ScoreNormalizer::save`]); scores stay as they are where there is none.
    ///
    /// # Errors
    /// Those of [`ScoreNormalizer::from_dir`].
    pub fn from_dir(model: M, dir: impl AsRef<Path>) -> Result<Self> {
        let stored = ScoreNormalizer::from_dir(dir.as_ref())?;
        let normalizer = stored.unwrap_or(ScoreNormalizer::identity());
        Ok(Self { model, normalizer })
    }

    /// The map.
    pub fn normalizer(&self) -> ScoreNormalizer {
        self.normalizer
    }

    /// The model whose scores are normalised.
    pub fn model(&self) -> &M {
        &self.model
    }

    /// The model without the map.
    pub fn into_inner(self) -> M {
        self.model
    }
}

impl<M: RewardModel> RewardModel for Normalized<M> {
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        Ok(self.normalizer.apply(&self.model.score(completions)?))
    }

    fn take_report(&self) -> Stats {
        self.model.take_report()
    }

    fn is_asked_everywhere(&self) -> bool {
        self.model.is_asked_everywhere()
    }
}

fn non_finite(row: usize, value: f64) -> Error {
    CoreError::NonFinite {
        what: "calibration score",
        row,
        value,
    }
    .into()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn fitted_scores_have_mean_0_and_deviation_1() {
        let scores = [3.0, 5.0, 10.0];
        let map = ScoreNormalizer::fit(&scores).unwrap();
        let mapped = map.apply(&Tensor::from_slice(&scores));
        assert!(mapped.mean(Kind::Double).double_value(&[]).abs() < 1e-12);
        assert!((mapped.std(false).double_value(&[]) - 1.0).abs() < 1e-12);
    }

    #[test]
    fn a_folder_keeps_the_map() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(ScoreNormalizer::from_dir(dir.path()).unwrap(), None);
        let map = ScoreNormalizer {
            mean: 0.1 + 0.2,
            deviation: 1e-3,
        };
        map.save(dir.path()).unwrap();
        assert_eq!(ScoreNormalizer::from_dir(dir.path()).unwrap(), Some(map));
        for bad in [
            "{",
            r#"{"mean": 0}"#,
            r#"{"mean": 0, "deviation": 0}"#,
            r#"{"mean": 0, "deviation": -1}"#,
            r#"{"mean": 0, "deviation": 1, "x": 2}"#,
        ] {
            std::fs::write(dir.path().join(FILE), bad).unwrap();
            assert!(matches!(
                ScoreNormalizer::from_dir(dir.path()),
                Err(Error::Core(CoreError::Corrupt { .. }))
            ));
        }
    }

    #[test]
    fn scores_that_cannot_be_calibrated_are_errors() {
        for scores in [&[][..], &[1.0], &[0.1, 0.1, 0.1]] {
            assert!(matches!(
                ScoreNormalizer::fit(scores),
                Err(Error::Uncalibrated { .. })
            ));
        }
        assert!(matches!(
            ScoreNormalizer::fit(&[1.0, f64::NAN]),
            Err(Error::Core(CoreError::NonFinite { row: 1, .. }))
        ));
    }
}
