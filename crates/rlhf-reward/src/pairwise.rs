//! The Bradley-Terry loss over comparisons, and what comparisons say about a scorer.

use rlhf_core::{Error as CoreError, check_same_shape};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::Result;

/// The terms of [`pairwise_loss`] beside the likelihood itself. All are off by default.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct PairwiseTerms {
    /// `κ`: how strongly scores are pulled towards 0. Eisenstein et al. 2023 use 0.01.
    pub center_coef: f64,
    /// `ε`: the share of comparisons whose answers were taken for one another.
    pub label_smoothing: f64,
}

impl PairwiseTerms {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        if !(self.center_coef.is_finite() && self.center_coef >= 0.0) {
            let reason = "a finite number that is not negative is needed";
            return Err(CoreError::config("center_coef", self.center_coef, reason).into());
        }
        if !(0.0..0.5).contains(&self.label_smoothing) {
            let reason = "a share from 0 up to, but not including, 0.5 is needed";
            return Err(CoreError::config("label_smoothing", self.label_smoothing, reason).into());
        }
        Ok(())
    }
}

/// What [`pairwise_loss`] reads. Every tensor is `[B]` f32, one element per pair.
#[derive(Debug, Clone, Copy)]
pub struct PairwiseInputs<'a> {
    /// Scores of the preferred responses.
    pub chosen: &'a Tensor,
    /// Scores of the others.
    pub rejected: &'a Tensor,
    /// By how much the chosen score ought to be above the rejected one; 0 if absent.
    pub margins: Option<&'a Tensor>,
    /// How much each pair counts; 1 if absent.
    pub weights: Option<&'a Tensor>,
}

/// What [`pairwise_loss`] returns.
#[derive(Debug)]
pub struct PairwiseLoss {
    /// Scalar: `Σ w_i · losses_i / denominator`.
    pub loss: Tensor,
    /// `[B]`, the loss of each pair before its weight.
    pub losses: Tensor,
}

/// The Bradley-Terry negative log-likelihood of comparisons, per pair
///
/// `−(1 − ε) log σ(d) − ε log σ(−d) + κ (r_c + r_r)²` with `d = r_c − r_r − margin`,
///
/// as in InstructGPT (Ouyang et al. 2022, equation 1), with the margin of Llama 2 (Touvron et
/// al. 2023, equation 2) and the centring term of Eisenstein et al. 2023 (section 2.1): the
/// likelihood sees only differences of scores, so a small `center_coef` κ keeps the scores
/// themselves near 0. `label_smoothing` ε is the probability that a label is wrong, as in the
/// conservative DPO of Mitchell 2023: it keeps `d` near `log((1 − ε)/ε)` where the likelihood
/// alone would let it grow without end.
///
/// The loss is the weighted sum over the pairs given here divided by `denominator`. For a whole
/// batch that is the sum of its weights (the number of pairs, without weights); for a microbatch
/// it is the sum *of the whole batch*, so that the losses of the microbatches add up to the
/// batch's.
///
/// ```
/// use rlhf_reward::{PairwiseInputs, PairwiseTerms, pairwise_loss, tch::Tensor};
///
/// let inputs = PairwiseInputs {
///     chosen: &Tensor::from_slice(&[1f32, 0.0]),
///     rejected: &Tensor::from_slice(&[1f32, 0.0]),
///     margins: None,
///     weights: None,
/// };
/// let loss = pairwise_loss(inputs, PairwiseTerms::default(), 2.0)?.loss;
/// assert!((loss.double_value(&[]) - 2f64.ln()).abs() < 1e-6);
/// # Ok::<(), rlhf_reward::Error>(())
/// ```
///
/// # Errors
/// A shape mismatch; an empty batch; a denominator that is not a positive number.
pub fn pairwise_loss(
    inputs: PairwiseInputs<'_>,
    terms: PairwiseTerms,
    denominator: f64,
) -> Result<PairwiseLoss> {
    terms.validate()?;
    let PairwiseInputs {
        chosen, rejected, ..
    } = inputs;
    check_pairs(chosen, rejected)?;
    if !(denominator.is_finite() && denominator > 0.0) {
        return Err(CoreError::config(
            "denominator",
            denominator,
            "the pairs' weights must add up to a positive number",
        )
        .into());
    }
    let mut difference = chosen - rejected;
    if let Some(margins) = inputs.margins {
        check_same_shape(("margins", margins), ("chosen", chosen))?;
        difference -= margins;
    }
    let mut losses = -difference.log_sigmoid();
    if terms.label_smoothing != 0.0 {
        // −log σ(−d) = d − log σ(d): the two differ by d alone.
        losses += &difference * terms.label_smoothing;
    }
    if terms.center_coef != 0.0 {
        losses += (chosen + rejected).square() * terms.center_coef;
    }
    let weighted = match inputs.weights {
        Some(weights) => {
            check_same_shape(("weights", weights), ("chosen", chosen))?;
            &losses * weights
        }
        None => losses.shallow_clone(),
    };
    Ok(PairwiseLoss {
        loss: weighted.sum(Kind::Float) / denominator,
        losses,
    })
}

/// What the scores of both sides of some comparisons have in common with what people said.
#[derive(Debug, Clone, Copy, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct PairwiseMetrics {
    /// Share of pairs whose chosen score is strictly above the rejected one.
    pub accuracy: f64,
    /// Mean of chosen minus rejected score.
    pub mean_margin: f64,
    /// Mean score of both sides.
    pub mean_reward: f64,
    /// Lowest score of either side.
    pub min_reward: f64,
    /// Highest score of either side.
    pub max_reward: f64,
}

/// Accuracy, margins and range of scores.
///
/// # Shapes
/// Both `[B]` f32.
///
/// # Errors
/// A shape mismatch; an empty batch.
pub fn pairwise_metrics(chosen: &Tensor, rejected: &Tensor) -> Result<PairwiseMetrics> {
    check_pairs(chosen, rejected)?;
    let pairs: Vec<f64> =
        Vec::try_from(Tensor::cat(&[chosen, rejected], 0).detach()).map_err(CoreError::from)?;
    let (chosen, rejected) = pairs.split_at(pairs.len() / 2);
    let count = chosen.len() as f64;
    let right = chosen.iter().zip(rejected).filter(|(c, r)| c > r).count();
    Ok(PairwiseMetrics {
        accuracy: right as f64 / count,
        mean_margin: (chosen.iter().sum::<f64>() - rejected.iter().sum::<f64>()) / count,
        mean_reward: pairs.iter().sum::<f64>() / (2.0 * count),
        min_reward: pairs.iter().copied().fold(f64::INFINITY, f64::min),
        max_reward: pairs.iter().copied().fold(f64::NEG_INFINITY, f64::max),
    })
}

fn check_pairs(chosen: &Tensor, rejected: &Tensor) -> Result<()> {
    check_same_shape(("chosen", chosen), ("rejected", rejected))?;
    if chosen.numel() == 0 {
        return Err(CoreError::Empty {
            what: "the batch of comparisons",
            help: "give it at least one pair",
        }
        .into());
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn f(x: &[f64]) -> Tensor {
        Tensor::from_slice(x).to_kind(Kind::Float)
    }

    fn centred(center_coef: f64) -> PairwiseTerms {
        PairwiseTerms {
            center_coef,
            ..PairwiseTerms::default()
        }
    }

    fn softplus(x: f64) -> f64 {
        x.exp().ln_1p()
    }

    #[test]
    fn margin_centring_and_weights_by_hand() {
        let (chosen, rejected) = (f(&[1.0, -0.5]), f(&[0.25, 2.0]));
        let (margins, weights) = (f(&[0.5, 0.0]), f(&[3.0, 1.0]));
        let inputs = PairwiseInputs {
            chosen: &chosen,
            rejected: &rejected,
            margins: Some(&margins),
            weights: Some(&weights),
        };
        let out = pairwise_loss(inputs, centred(0.1), 4.0).unwrap();
        let first = softplus(-0.25) + 0.1 * 1.25 * 1.25;
        let second = softplus(2.5) + 0.1 * 1.5 * 1.5;
        assert!((out.losses.double_value(&[0]) - first).abs() < 1e-6);
        assert!((out.losses.double_value(&[1]) - second).abs() < 1e-6);
        let mean = (3.0 * first + second) / 4.0;
        assert!((out.loss.double_value(&[]) - mean).abs() < 1e-6);
    }

    #[test]
    fn label_smoothing_by_hand() {
        let (chosen, rejected) = (f(&[1.0, -2.0]), f(&[0.25, 3.0]));
        let inputs = PairwiseInputs {
            chosen: &chosen,
            rejected: &rejected,
            margins: Some(&f(&[0.5, 0.0])),
            weights: None,
        };
        let terms = PairwiseTerms {
            label_smoothing: 0.1,
            ..PairwiseTerms::default()
        };
        let out = pairwise_loss(inputs, terms, 2.0).unwrap();
        for (row, d) in [0.25, -5.0].into_iter().enumerate() {
            let expected = 0.9 * softplus(-d) + 0.1 * softplus(d);
            assert!((out.losses.double_value(&[row as i64]) - expected).abs() < 1e-6);
        }
        for label_smoothing in [0.5, -0.1, f64::NAN] {
            let terms = PairwiseTerms {
                label_smoothing,
                ..terms
            };
            assert!(pairwise_loss(inputs, terms, 2.0).is_err());
        }
    }

    #[test]
    fn microbatches_add_up_to_the_batch() {
        let (chosen, rejected) = (f(&[1.0, -0.5, 0.3]), f(&[0.25, 2.0, 0.1]));
        let loss = |from: i64, len: i64| {
            let inputs = PairwiseInputs {
                chosen: &chosen.narrow(0, from, len),
                rejected: &rejected.narrow(0, from, len),
                margins: None,
                weights: None,
            };
            let out = pairwise_loss(inputs, centred(0.01), 3.0).unwrap();
            out.loss.double_value(&[])
        };
        assert!((loss(0, 3) - loss(0, 1) - loss(1, 2)).abs() < 1e-6);
    }

    #[test]
    fn the_gradient_is_that_of_the_logistic_function() {
        let chosen = f(&[0.7]).set_requires_grad(true);
        let inputs = PairwiseInputs {
            chosen: &chosen,
            rejected: &f(&[-0.1]),
            margins: None,
            weights: None,
        };
        pairwise_loss(inputs, PairwiseTerms::default(), 1.0)
            .unwrap()
            .loss
            .backward();
        let expected = -1.0 / (1.0 + 0.8f64.exp()); // −σ(r_r − r_c)
        assert!((chosen.grad().double_value(&[0]) - expected).abs() < 1e-6);
    }

    #[test]
    fn an_extreme_difference_stays_finite() {
        let inputs = PairwiseInputs {
            chosen: &f(&[-1e4]),
            rejected: &f(&[1e4]),
            margins: None,
            weights: None,
        };
        let loss = pairwise_loss(inputs, PairwiseTerms::default(), 1.0)
            .unwrap()
            .loss;
        assert_eq!(loss.double_value(&[]), 2e4);
    }

    #[test]
    fn a_tie_is_no_success() {
        let metrics = pairwise_metrics(&f(&[1.0, 2.0, 0.0]), &f(&[1.0, -1.0, 0.5])).unwrap();
        assert_eq!(metrics.accuracy, 1.0 / 3.0);
        assert!((metrics.mean_margin - 2.5 / 3.0).abs() < 1e-12);
        assert_eq!((metrics.min_reward, metrics.max_reward), (-1.0, 2.0));
        assert!((metrics.mean_reward - 3.5 / 6.0).abs() < 1e-12);
    }

    #[test]
    fn wrong_inputs_are_errors() {
        let one = f(&[1.0]);
        let inputs = |chosen, rejected| PairwiseInputs {
            chosen,
            rejected,
            margins: None,
            weights: None,
        };
        let two = f(&[1.0, 2.0]);
        assert!(pairwise_loss(inputs(&one, &two), PairwiseTerms::default(), 1.0).is_err());
        assert!(pairwise_loss(inputs(&one, &one), PairwiseTerms::default(), 0.0).is_err());
        let none = f(&[]);
        assert!(pairwise_loss(inputs(&none, &none), PairwiseTerms::default(), 1.0).is_err());
    }
}
