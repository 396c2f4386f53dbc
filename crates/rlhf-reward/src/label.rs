//! Texts with labels.

use rlhf_core::{Error as CoreError, Sequence, SequenceBatch};
use tch::{Device, Tensor};

use crate::{Error, Result};

/// What somebody said of a text.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Label {
    /// One of several classes, counted from 0.
    Class(i64),
    /// A score.
    Score(f64),
}

impl Label {
    fn kind(self) -> &'static str {
        match self {
            Self::Class(_) => "class",
            Self::Score(_) => "score",
        }
    }
}

/// A text and its label. A text that answers nothing is the prompt of an empty response.
#[derive(Debug, Clone, PartialEq)]
pub struct Labelled {
    /// The text.
    pub sequence: Sequence,
    /// Its label.
    pub label: Label,
}

impl Labelled {
    /// A text that answers nothing.
    pub fn text(tokens: impl Into<std::sync::Arc<[i64]>>, label: Label) -> Self {
        Self {
            sequence: Sequence::new(tokens, []),
            label,
        }
    }
}

/// A non-empty batch of texts whose labels are all of one kind.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelledBatch {
    sequences: SequenceBatch,
    labels: Vec<Label>,
}

/// Labels as a tensor.
#[derive(Debug)]
pub(crate) enum Targets {
    /// `[B]` i64.
    Classes(Tensor),
    /// `[B]` f32.
    Scores(Tensor),
}

impl LabelledBatch {
    /// Checks and wraps labelled texts.
    ///
    /// # Errors
    /// [`Error::MixedLabels`]; a score that is not finite; those of [`SequenceBatch::new`].
    pub fn new(items: Vec<Labelled>) -> Result<Self> {
        let (sequences, labels): (Vec<_>, Vec<_>) =
            items.into_iter().map(|i| (i.sequence, i.label)).unzip();
        let sequences = SequenceBatch::new(sequences)?;
        let expected = labels[0].kind();
        for (row, label) in labels.iter().enumerate() {
            let found = label.kind();
            if found != expected {
                return Err(Error::MixedLabels {
                    row,
                    found,
                    expected,
                });
            }
            match *label {
                Label::Score(value) if !value.is_finite() => {
                    let what = "label";
                    return Err(CoreError::NonFinite { what, row, value }.into());
                }
                _ => {}
            }
        }
        Ok(Self { sequences, labels })
    }

    /// Number of texts.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.labels.len()
    }

    /// The texts.
    pub fn sequences(&self) -> &SequenceBatch {
        &self.sequences
    }

    /// The labels.
    pub fn labels(&self) -> &[Label] {
        &self.labels
    }

    /// The texts by turns of at most `size`, in order.
    pub(crate) fn split(&self, size: usize) -> Result<Vec<Self>> {
        let sequences = self.sequences.split(size)?;
        let parts = sequences.into_iter().zip(self.labels.chunks(size));
        Ok(parts
            .map(|(sequences, labels)| Self {
                sequences,
                labels: labels.to_vec(),
            })
            .collect())
    }

    pub(crate) fn targets(&self, device: Device) -> Targets {
        let (mut classes, mut scores) = (Vec::new(), Vec::new());
        for label in &self.labels {
            match *label {
                Label::Class(class) => classes.push(class),
                Label::Score(score) => scores.push(score as f32),
            }
        }
        if scores.is_empty() {
            Targets::Classes(Tensor::from_slice(&classes).to_device(device))
        } else {
            Targets::Scores(Tensor::from_slice(&scores).to_device(device))
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn labels_of_one_kind_only() {
        let mixed = vec![
            Labelled::text([1], Label::Class(0)),
            Labelled::text([1], Label::Score(0.5)),
        ];
        assert!(matches!(
            LabelledBatch::new(mixed),
            Err(Error::MixedLabels { row: 1, .. })
        ));
        let nan = vec![Labelled::text([1], Label::Score(f64::NAN))];
        assert!(matches!(
            LabelledBatch::new(nan),
            Err(Error::Core(CoreError::NonFinite { row: 0, .. }))
        ));
        assert!(matches!(
            LabelledBatch::new(vec![]),
            Err(Error::Core(CoreError::Empty { .. }))
        ));
    }
}
