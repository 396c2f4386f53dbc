//! Comparisons: which of two responses a person preferred.

use std::sync::Arc;

use crate::{Error, Result, Sequence, SequenceBatch};

/// One comparison.
#[derive(Debug, Clone, PartialEq)]
pub struct Preference {
    /// What both responses answer.
    pub prompt: Arc<[i64]>,
    /// The response that was preferred.
    pub chosen: Vec<i64>,
    /// The response that was not.
    pub rejected: Vec<i64>,
    /// By how much, in reward units, where the labellers said so.
    pub margin: Option<f64>,
    /// How much the pair counts; 1 unless the data says otherwise.
    pub weight: f64,
}

impl Preference {
    /// A comparison with no margin and weight 1.
    pub fn new(
        prompt: impl Into<Arc<[i64]>>,
        chosen: impl Into<Vec<i64>>,
        rejected: impl Into<Vec<i64>>,
    ) -> Self {
        Self {
            prompt: prompt.into(),
            chosen: chosen.into(),
            rejected: rejected.into(),
            margin: None,
            weight: 1.0,
        }
    }
}

/// A non-empty batch of comparisons.
#[derive(Debug, Clone, PartialEq)]
pub struct PreferenceBatch {
    pairs: Vec<Preference>,
}

impl PreferenceBatch {
    /// Checks and wraps comparisons.
    ///
    /// # Errors
    /// [`Error::Empty`] without pairs, [`Error::NonFinite`] for a margin or weight that is not
    /// finite, and those of [`SequenceBatch::new`].
    pub fn new(pairs: Vec<Preference>) -> Result<Self> {
        for (row, pair) in pairs.iter().enumerate() {
            for (what, value) in [
                ("margin", pair.margin.unwrap_or(0.0)),
                ("weight", pair.weight),
            ] {
                if !value.is_finite() {
                    return Err(Error::NonFinite { what, row, value });
                }
            }
        }
        let batch = Self { pairs };
        batch.interleaved()?;
        Ok(batch)
    }

    /// Number of pairs.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The pairs, in order.
    pub fn pairs(&self) -> &[Preference] {
        &self.pairs
    }

    /// The pairs by turns of at most `size`, in order.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if `size` is 0.
    pub fn split(&self, size: usize) -> Result<Vec<Self>> {
        if size == 0 {
            return Err(Error::config("size", size, "must be at least 1"));
        }
        let part = |pairs: &[Preference]| Self {
            pairs: pairs.to_vec(),
        };
        Ok(self.pairs.chunks(size).map(part).collect())
    }

    /// Sum of the pairs' weights.
    pub fn total_weight(&self) -> f64 {
        self.pairs.iter().map(|p| p.weight).sum()
    }

    /// Chosen and rejected by turns (rows `2i` and `2i + 1`); both share the pair's prompt.
    ///
    /// # Errors
    /// Those of [`SequenceBatch::new`].
    pub fn interleaved(&self) -> Result<SequenceBatch> {
        let sequence = |prompt: &Arc<[i64]>, response: &[i64]| Sequence {
            prompt: Arc::clone(prompt),
            response: response.to_vec(),
        };
        SequenceBatch::new(
            self.pairs
                .iter()
                .flat_map(|p| {
                    [
                        sequence(&p.prompt, &p.chosen),
                        sequence(&p.prompt, &p.rejected),
                    ]
                })
                .collect(),
        )
    }
}
