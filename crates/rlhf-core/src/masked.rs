//! Statistics over the elements that a mask lets through.

use tch::{Kind, Tensor};

use crate::error::check_same_shape;
use crate::{Error, Result};

/// Which denominator a variance has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variance {
    /// Divided by `n`: "biased". lm-human-preferences, the N+ implementation details paper.
    Population,
    /// Divided by `n - 1`: "unbiased". TRL, verl.
    Sample,
}

/// Whether whitening takes the mean away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Shift {
    /// The result has mean 0.
    ToZero,
    /// The mean is put back after scaling.
    KeepMean,
}

/// Added to the variance before the square root when whitening, as all known implementations do.
pub const WHITEN_EPSILON: f64 = 1e-8;

/// Mean of `values` where `mask` is `true`: `Σ m x / Σ m`.
///
/// # Shapes
/// Both of any one shape; returns a scalar.
///
/// # Errors
/// [`Error::ShapeMismatch`]; [`Error::Empty`] if the mask lets nothing through.
pub fn masked_mean(values: &Tensor, mask: &Tensor) -> Result<Tensor> {
    let count = count(values, mask)?;
    Ok(masked_sum(values, mask) / count)
}

/// Sum of `values` where `mask` is `true`. What is masked may be anything, NaN included.
pub fn masked_sum(values: &Tensor, mask: &Tensor) -> Tensor {
    values
        .masked_fill(&mask.logical_not(), 0.0)
        .sum(Kind::Float)
}

/// Variance of `values` where `mask` is `true`.
///
/// # Errors
/// Those of [`masked_mean`]; [`Error::Empty`] for a sample variance of a single element.
pub fn masked_var(values: &Tensor, mask: &Tensor, variance: Variance) -> Result<Tensor> {
    let count = count(values, mask)?;
    let centred = values - masked_mean(values, mask)?;
    let sum = masked_sum(&centred.square(), mask);
    match variance {
        Variance::Population => Ok(sum / count),
        Variance::Sample if count > 1.0 => Ok(sum / (count - 1.0)),
        Variance::Sample => Err(Error::Empty {
            what: "a sample variance of one element",
            help: "use a larger batch, or the population variance",
        }),
    }
}

/// Scales `values` to variance 1 over the mask: `(x − μ)·(var + 1e-8)^(-1/2)`, plus `μ` where the
/// mean is kept. Masked elements become 0.
///
/// # Errors
/// Those of [`masked_var`].
pub fn masked_whiten(
    values: &Tensor,
    mask: &Tensor,
    variance: Variance,
    shift: Shift,
) -> Result<Tensor> {
    let mean = masked_mean(values, mask)?;
    let scale = (masked_var(values, mask, variance)? + WHITEN_EPSILON).rsqrt();
    let whitened = (values - &mean) * scale;
    let shifted = match shift {
        Shift::ToZero => whitened,
        Shift::KeepMean => whitened + mean,
    };
    Ok(shifted.masked_fill(&mask.logical_not(), 0.0))
}

fn count(values: &Tensor, mask: &Tensor) -> Result<f64> {
    check_same_shape(("values", values), ("mask", mask))?;
    let count = f64::try_from(mask.sum(Kind::Float))?;
    if count == 0.0 {
        return Err(Error::Empty {
            what: "the mask",
            help: "statistics need at least one element; drop the batch instead",
        });
    }
    Ok(count)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn case() -> (Tensor, Tensor) {
        (
            Tensor::from_slice(&[1f32, f32::NAN, 3.0, 8.0]),
            Tensor::from_slice(&[true, false, true, true]),
        )
    }

    #[test]
    fn by_hand() {
        let (x, m) = case(); // 1, 3, 8: mean 4, squares 9 + 1 + 16
        let number = |t: Tensor| f64::try_from(t).unwrap();
        assert_eq!(number(masked_mean(&x, &m).unwrap()), 4.0);
        let sample = number(masked_var(&x, &m, Variance::Sample).unwrap());
        assert_eq!(sample, 13.0);
        let population = number(masked_var(&x, &m, Variance::Population).unwrap());
        assert!((population - 26.0 / 3.0).abs() < 1e-6);
        let w = masked_whiten(&x, &m, Variance::Sample, Shift::KeepMean).unwrap();
        let w = Vec::<f32>::try_from(w).unwrap();
        assert_eq!(w[1], 0.0);
        assert!((w[3] - (4.0 + 4.0 / 13f32.sqrt())).abs() < 1e-6);
    }

    #[test]
    fn nothing_to_average_is_an_error() {
        let (x, m) = case();
        let none = m.zeros_like();
        assert!(matches!(masked_mean(&x, &none), Err(Error::Empty { .. })));
        let one = Tensor::from_slice(&[true, false, false, false]);
        let var = masked_var(&x, &one, Variance::Sample);
        assert!(matches!(var, Err(Error::Empty { .. })));
        let short = Tensor::from_slice(&[true]);
        let mean = masked_mean(&x, &short);
        assert!(matches!(mean, Err(Error::ShapeMismatch { .. })));
    }
}
