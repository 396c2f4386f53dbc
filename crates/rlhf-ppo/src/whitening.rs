//! Whether and how a quantity is whitened.

use rlhf_core::{Shift, Variance, masked_whiten};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Scaling to unit variance over the elements of a mask: `(x − μ)·(var + 1e-8)^(-1/2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whitening {
    /// Left as it is.
    Off,
    /// With the population variance (`n`): lm-human-preferences, Huang et al. 2024.
    Population,
    /// With the sample variance (`n − 1`): TRL, verl.
    Sample,
}

impl Whitening {
    /// Whitens `values` over `mask`; elements outside it become 0.
    ///
    /// A single element has no variance: its deviation from the mean is 0 and stays so, whichever
    /// denominator is asked for.
    ///
    /// # Shapes
    /// Both of any one shape.
    ///
    /// # Errors
    /// [`rlhf_core::Error::ShapeMismatch`], and [`rlhf_core::Error::Empty`] for an empty mask.
    pub fn apply(self, values: &Tensor, mask: &Tensor, shift: Shift) -> rlhf_core::Result<Tensor> {
        rlhf_core::check_same_shape(("values", values), ("mask", mask))?;
        let variance = match self {
            Self::Off => return Ok(values.masked_fill(&mask.logical_not(), 0.0)),
            Self::Population => Variance::Population,
            Self::Sample if f64::try_from(mask.sum(Kind::Float))? < 2.0 => Variance::Population,
            Self::Sample => Variance::Sample,
        };
        masked_whiten(values, mask, variance, shift)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn one_element_is_no_signal() {
        let x = Tensor::from_slice(&[3f32, 9.0]);
        let mask = Tensor::from_slice(&[true, false]);
        let whitened =
            |w: Whitening, shift| Vec::<f32>::try_from(w.apply(&x, &mask, shift).unwrap()).unwrap();
        assert_eq!(whitened(Whitening::Sample, Shift::ToZero), [0.0, 0.0]);
        assert_eq!(whitened(Whitening::Sample, Shift::KeepMean), [3.0, 0.0]);
        assert_eq!(whitened(Whitening::Off, Shift::ToZero), [3.0, 0.0]);
    }
}
