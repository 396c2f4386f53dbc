//! Losses over labelled texts.

use rlhf_core::{Error as CoreError, check_same_shape};
use tch::{Kind, Reduction, Tensor};

use crate::{Error, Result};

/// Cross-entropy of class labels: `Σ_i −log softmax(logits_i)[label_i] / denominator`.
///
/// `denominator` is the number of texts of the whole batch, so that the losses of its
/// microbatches add up to its mean.
///
/// # Shapes
/// `logits`: `[B, num_labels]` f32; `labels`: `[B]` i64. Returns a scalar.
///
/// # Errors
/// A shape mismatch; [`Error::LabelOutOfRange`].
pub fn classification_loss(logits: &Tensor, labels: &Tensor, denominator: f64) -> Result<Tensor> {
    let num_labels = check_logits(logits, labels)?;
    let rows = Vec::<i64>::try_from(labels).map_err(CoreError::from)?;
    if let Some(row) = rows.iter().position(|l| !(0..num_labels).contains(l)) {
        return Err(Error::LabelOutOfRange {
            row,
            label: rows[row],
            num_labels,
        });
    }
    let sum = logits.f_cross_entropy_loss(labels, None::<Tensor>, Reduction::Sum, -100, 0.0);
    Ok(sum.map_err(CoreError::from)? / denominator)
}

/// Squared error of scores: `Σ_i (score_i − target_i)² / denominator`.
///
/// `denominator` is the number of texts of the whole batch, so that the losses of its
/// microbatches add up to its mean.
///
/// # Shapes
/// Both `[B]` f32. Returns a scalar.
///
/// # Errors
/// A shape mismatch.
pub fn regression_loss(scores: &Tensor, targets: &Tensor, denominator: f64) -> Result<Tensor> {
    check_same_shape(("scores", scores), ("targets", targets))?;
    Ok((scores - targets).square().sum(Kind::Float) / denominator)
}

/// Number of columns, once the shapes are known to fit.
fn check_logits(logits: &Tensor, labels: &Tensor) -> Result<i64> {
    match (logits.size().as_slice(), labels.size().as_slice()) {
        ([rows, num_labels], [labels]) if rows == labels => Ok(*num_labels),
        (logits, labels) => Err(CoreError::ShapeMismatch {
            left: "logits",
            left_shape: logits.to_vec(),
            right: "labels",
            right_shape: labels.to_vec(),
        }
        .into()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn cross_entropy_by_hand() {
        let logits = Tensor::from_slice2(&[[0f32, 1.0, 2.0], [1.0, 1.0, 1.0]]);
        let loss = classification_loss(&logits, &Tensor::from_slice(&[0i64, 2]), 2.0).unwrap();
        let first = (1.0 + 1f64.exp() + 2f64.exp()).ln();
        let expected = (first + 3f64.ln()) / 2.0;
        assert!((loss.double_value(&[]) - expected).abs() < 1e-6);
    }

    #[test]
    fn squared_error_by_hand() {
        let scores = Tensor::from_slice(&[1f32, 2.0]);
        let loss = regression_loss(&scores, &Tensor::from_slice(&[0f32, 4.0]), 2.0).unwrap();
        assert_eq!(loss.double_value(&[]), 2.5);
    }

    #[test]
    fn labels_are_checked() {
        let logits = Tensor::from_slice2(&[[0f32, 1.0]]);
        assert!(matches!(
            classification_loss(&logits, &Tensor::from_slice(&[2i64]), 1.0),
            Err(Error::LabelOutOfRange {
                row: 0,
                label: 2,
                num_labels: 2
            })
        ));
        assert!(classification_loss(&logits, &Tensor::from_slice(&[0i64, 1]), 1.0).is_err());
    }
}
