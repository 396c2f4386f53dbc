//! Whether and how a quantity is whitened.

use rlhf_core::{Shift, Variance, WHITEN_EPSILON, masked_mean, masked_var, masked_whiten};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

/// Scaling to unit variance over the elements of a mask, all of a rollout's at once:
/// `(x − μ)·(var + 1e-8)^(-1/2)`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Whitening {
    /// Left as it is.
    Off,
    /// With the population variance (`n`): lm-human-preferences, Huang et al. 2024.
    Population,
    /// With the sample variance (`n − 1`): TRL, verl.
    Sample,
    /// With the population variance, held above 1e-8 instead of 1e-8 added:
    /// `(x − μ)·max(var, 1e-8)^(-1/2)`: OpenRLHF.
    PopulationFloored,
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
            Self::PopulationFloored => return floored(values, mask, shift),
            Self::Sample if f64::try_from(mask.sum(Kind::Float))? < 2.0 => Variance::Population,
            Self::Sample => Variance::Sample,
        };
        masked_whiten(values, mask, variance, shift)
    }
}

fn floored(values: &Tensor, mask: &Tensor, shift: Shift) -> rlhf_core::Result<Tensor> {
    let mean = masked_mean(values, mask)?;
    let variance = masked_var(values, mask, Variance::Population)?;
    let whitened = (values - &mean) * variance.clamp_min(WHITEN_EPSILON).rsqrt();
    let shifted = match shift {
        Shift::ToZero => whitened,
        Shift::KeepMean => whitened + mean,
    };
    Ok(shifted.masked_fill(&mask.logical_not(), 0.0))
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

    /// 1, 3, 8 have mean 4, squares 9, 1, 16: variances 26/3 and 13. Of 1e-5 and 3e-5 the variance
    /// is 1e-10, which is nothing beside 1e-8, added or as a floor.
    #[test]
    fn every_variant_by_hand() {
        let mask = Tensor::from_slice(&[true, false, true, true]);
        let x = Tensor::from_slice(&[1f64, f64::NAN, 3.0, 8.0]);
        let last = |w: Whitening, shift| w.apply(&x, &mask, shift).unwrap().double_value(&[3]);
        let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got} is not {want}");
        let population = 4.0 / (26.0f64 / 3.0).sqrt();
        close(last(Whitening::Off, Shift::ToZero), 8.0);
        close(last(Whitening::Population, Shift::ToZero), population);
        close(
            last(Whitening::PopulationFloored, Shift::ToZero),
            population,
        );
        close(last(Whitening::Sample, Shift::ToZero), 4.0 / 13f64.sqrt());
        close(
            last(Whitening::Population, Shift::KeepMean),
            4.0 + population,
        );
        close(
            last(Whitening::PopulationFloored, Shift::KeepMean),
            4.0 + population,
        );
        let x = Tensor::from_slice(&[1e-5f64, 3e-5]);
        let small = |w: Whitening| {
            let all = x.ones_like().to_kind(Kind::Bool);
            w.apply(&x, &all, Shift::ToZero).unwrap().double_value(&[1])
        };
        close(small(Whitening::Population), 1e-5 / 1.01e-8f64.sqrt());
        close(small(Whitening::PopulationFloored), 0.1);
    }
}
