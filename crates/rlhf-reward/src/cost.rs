//! Comparisons of how harmful two answers are, and the loss of cost models.

use std::sync::Arc;

use rlhf_core::{Error as CoreError, Sequence, SequenceBatch, check_same_shape};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// Which of two answers is safer, and whether each is safe at all.
#[derive(Debug, Clone, PartialEq)]
pub struct SafetyPair {
    /// What both answer.
    pub prompt: Arc<[i64]>,
    /// The answer that does less harm.
    pub safer: Vec<i64>,
    /// The other one.
    pub less_safe: Vec<i64>,
    /// Whether the safer answer is safe.
    pub safer_is_safe: bool,
    /// Whether the less safe one is, too.
    pub less_safe_is_safe: bool,
}

impl SafetyPair {
    fn teaches_order(&self) -> bool {
        self.safer != self.less_safe
    }
}

/// A non-empty batch of consistent comparisons.
#[derive(Debug, Clone, PartialEq)]
pub struct SafetyBatch {
    pairs: Vec<SafetyPair>,
}

impl SafetyBatch {
    /// Checks and wraps comparisons.
    ///
    /// # Errors
    /// [`Error::InconsistentSafety`]; those of [`SequenceBatch::new`].
    pub fn new(pairs: Vec<SafetyPair>) -> Result<Self> {
        let inconsistent = |pair: &SafetyPair| pair.less_safe_is_safe && !pair.safer_is_safe;
        if let Some(row) = pairs.iter().position(inconsistent) {
            return Err(Error::InconsistentSafety { row });
        }
        let batch = Self { pairs };
        batch.interleaved()?;
        Ok(batch)
    }

    /// Number of comparisons.
    #[allow(clippy::len_without_is_empty)] // never empty
    pub fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The comparisons.
    pub fn pairs(&self) -> &[SafetyPair] {
        &self.pairs
    }

    /// Both answers of each pair, the safer first, sharing their prompt.
    ///
    /// # Errors
    /// Those of [`SequenceBatch::new`].
    pub fn interleaved(&self) -> Result<SequenceBatch> {
        let both = |pair: &SafetyPair| {
            [&pair.safer, &pair.less_safe].map(|response| Sequence {
                prompt: Arc::clone(&pair.prompt),
                response: response.clone(),
            })
        };
        Ok(SequenceBatch::new(
            self.pairs.iter().flat_map(both).collect(),
        )?)
    }

    /// The comparisons that teach something, and how many do not: those with an empty answer,
    /// and those of equal answers.
    ///
    /// # Errors
    /// [`Error::NothingToLearn`] if none does.
    pub(crate) fn usable(&self) -> Result<(Self, crate::Skipped)> {
        let mut skipped = crate::Skipped::default();
        let mut keep = |pair: &&SafetyPair| {
            let empty = pair.safer.is_empty() || pair.less_safe.is_empty();
            skipped.empty += usize::from(empty);
            skipped.equal += usize::from(!empty && !pair.teaches_order());
            !empty && pair.teaches_order()
        };
        let mut pairs = Vec::with_capacity(self.len());
        pairs.extend(self.pairs.iter().filter(|pair| keep(pair)).cloned());
        match pairs.is_empty() {
            true => Err(Error::NothingToLearn {
                pairs: self.len(),
                skipped,
            }),
            false => Ok((Self { pairs }, skipped)),
        }
    }

    /// The comparisons by turns of at most `size`, in order.
    pub(crate) fn split(&self, size: usize) -> Vec<Self> {
        let part = |pairs: &[SafetyPair]| Self {
            pairs: pairs.to_vec(),
        };
        self.pairs.chunks(size).map(part).collect()
    }
}

/// What [`cost_loss`] reads, one element a pair.
#[derive(Debug, Clone, Copy)]
pub struct CostInputs<'a> {
    /// Costs of the safer answers, `[B]` f32.
    pub safer: &'a Tensor,
    /// Costs of the less safe ones, `[B]` f32.
    pub less_safe: &'a Tensor,
    /// Whether the safer answers are safe, `[B]` bool.
    pub safer_is_safe: &'a Tensor,
    /// Whether the less safe ones are, `[B]` bool.
    pub less_safe_is_safe: &'a Tensor,
}

/// What [`cost_loss`] returns: scalars that are divided by `denominator`.
#[derive(Debug)]
pub struct CostLoss {
    /// The sum of the parts below and of the regularisation: what is trained on.
    pub loss: Tensor,
    /// Which answer does more harm, `−log σ(c_less_safe − c_safer)`.
    pub order: Tensor,
    /// Whether each is harmful, `−log σ(s_less_safe c_less_safe) − log σ(s_safer c_safer)`.
    pub sign: Tensor,
}

/// The loss of a cost model (Dai et al. 2023, Safe RLHF, arXiv 2310.12773, equation 6): per pair
///
/// `−log σ(c_less − c_safer) − log σ(s_less c_less) − log σ(s_safer c_safer) + λ (c_less² + c_safer²)`
///
/// with `s = +1` for an unsafe answer and `−1` for a safe one. The first term orders the answers;
/// the next two give the cost a zero: positive means unsafe, so a constraint's threshold is 0.
/// `regularization` λ is that of the authors' code and 0 in the paper.
///
/// The sum over the pairs given here is divided by `denominator`, the number of pairs of the whole
/// batch, so that the losses of its microbatches add up to its mean.
///
/// # Errors
/// A shape mismatch.
pub fn cost_loss(
    inputs: CostInputs<'_>,
    regularization: f64,
    denominator: f64,
) -> Result<CostLoss> {
    let CostInputs {
        safer, less_safe, ..
    } = inputs;
    check_same_shape(("safer", safer), ("less_safe", less_safe))?;
    check_same_shape(("safer_is_safe", inputs.safer_is_safe), ("safer", safer))?;
    let (safe, costs) = (inputs.less_safe_is_safe, ("less_safe", less_safe));
    check_same_shape(("less_safe_is_safe", safe), costs)?;
    let mean = |losses: Tensor| -> Tensor { losses.sum(Kind::Float) / denominator };
    let of_sign = |costs: &Tensor, safe: &Tensor| {
        let signed: Tensor = (1.0 - safe.to_kind(Kind::Float) * 2.0) * costs;
        -signed.log_sigmoid()
    };
    let order = mean(-(less_safe - safer).log_sigmoid());
    let sign =
        mean(of_sign(safer, inputs.safer_is_safe) + of_sign(less_safe, inputs.less_safe_is_safe));
    let mut loss = &order + &sign;
    if regularization != 0.0 {
        loss += mean(safer.square() + less_safe.square()) * regularization;
    }
    Ok(CostLoss { loss, order, sign })
}

/// Shares of right answers, `(order, sign)`: pairs whose less safe answer costs strictly more, and
/// answers whose cost has the sign of their label.
pub(crate) fn cost_accuracies(inputs: CostInputs<'_>) -> Result<(f64, f64)> {
    let share = |right: Tensor| {
        f64::try_from(right.to_kind(Kind::Double).mean(Kind::Double)).map_err(CoreError::from)
    };
    let order = inputs.less_safe.gt_tensor(inputs.safer);
    let right_sign = |costs: &Tensor, safe: &Tensor| costs.gt(0.0).not_equal_tensor(safe);
    let sign = Tensor::cat(
        &[
            right_sign(inputs.safer, inputs.safer_is_safe),
            right_sign(inputs.less_safe, inputs.less_safe_is_safe),
        ],
        0,
    );
    Ok((share(order)?, share(sign)?))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn softplus(x: f64) -> f64 {
        x.exp().ln_1p()
    }

    fn f(x: &[f64]) -> Tensor {
        Tensor::from_slice(x)
    }

    /// Three pairs: safe against unsafe, both safe, both unsafe.
    fn loss(safer: &Tensor, less_safe: &Tensor, regularization: f64) -> CostLoss {
        let inputs = CostInputs {
            safer,
            less_safe,
            safer_is_safe: &Tensor::from_slice(&[true, true, false]),
            less_safe_is_safe: &Tensor::from_slice(&[false, true, false]),
        };
        cost_loss(inputs, regularization, 3.0).unwrap()
    }

    #[test]
    fn by_hand() {
        let (safer, less_safe) = (f(&[-0.5, -2.0, 0.25]), f(&[1.5, -1.0, 3.0]));
        let out = loss(&safer, &less_safe, 0.1);
        let order = (softplus(-2.0) + softplus(-1.0) + softplus(-2.75)) / 3.0;
        let safer_sign = softplus(-0.5) + softplus(-2.0) + softplus(-0.25);
        let less_safe_sign = softplus(-1.5) + softplus(-1.0) + softplus(-3.0);
        let sign = (safer_sign + less_safe_sign) / 3.0;
        let squares = 0.25 + 4.0 + 0.0625 + 2.25 + 1.0 + 9.0;
        for (got, want) in [
            (&out.order, order),
            (&out.sign, sign),
            (&out.loss, order + sign + 0.1 * squares / 3.0),
        ] {
            assert!((got.double_value(&[]) - want).abs() < 1e-6, "{got} {want}");
        }
    }

    #[test]
    fn the_gradient_is_that_of_finite_differences() {
        let start = [[-0.5, -2.0, 0.25], [1.5, -1.0, 3.0]];
        let (safer, less_safe) = (
            f(&start[0]).set_requires_grad(true),
            f(&start[1]).set_requires_grad(true),
        );
        // Doubles all the way, or the differences drown in rounding.
        loss(&safer, &less_safe, 0.05).loss.backward();
        const STEP: f64 = 1e-3;
        for side in 0..2 {
            for i in 0..3 {
                let value = |offset: f64| {
                    let mut moved = start;
                    moved[side][i] += offset;
                    let (a, b) = (f(&moved[0]), f(&moved[1]));
                    loss(&a, &b, 0.05).loss.double_value(&[])
                };
                let numeric = (value(STEP) - value(-STEP)) / (2.0 * STEP);
                let exact = [&safer, &less_safe][side].grad().double_value(&[i as i64]);
                // The sums are f32: their rounding over 2 · STEP.
                assert!(
                    (numeric - exact).abs() < 5e-4,
                    "{side} {i}: {numeric} {exact}"
                );
            }
        }
    }

    #[test]
    fn accuracies_count_order_and_sign() {
        let inputs = CostInputs {
            safer: &f(&[-1.0, 0.5]),
            less_safe: &f(&[1.0, 0.25]),
            safer_is_safe: &Tensor::from_slice(&[true, true]),
            less_safe_is_safe: &Tensor::from_slice(&[false, true]),
        };
        assert_eq!(cost_accuracies(inputs).unwrap(), (0.5, 0.5));
    }

    #[test]
    fn batches_are_checked() {
        let pair = |safer_is_safe, less_safe_is_safe| SafetyPair {
            prompt: [1].into(),
            safer: vec![2],
            less_safe: vec![3],
            safer_is_safe,
            less_safe_is_safe,
        };
        assert!(matches!(
            SafetyBatch::new(vec![pair(true, false), pair(false, true)]),
            Err(Error::InconsistentSafety { row: 1 })
        ));
        let mut equal = pair(true, true);
        equal.less_safe = vec![2];
        let mut empty = pair(true, true);
        empty.safer.clear();
        let batch = SafetyBatch::new(vec![pair(true, false), equal.clone(), empty]).unwrap();
        let (usable, skipped) = batch.usable().unwrap();
        assert_eq!((usable.len(), skipped.equal, skipped.empty), (1, 1, 1));
        let nothing = SafetyBatch::new(vec![equal]).unwrap().usable();
        assert!(matches!(
            nothing,
            Err(Error::NothingToLearn { pairs: 1, .. })
        ));
        let (three, two) = (f(&[1.0, 2.0, 3.0]), f(&[1.0, 2.0]));
        let flags = Tensor::from_slice(&[true, true]);
        let inputs = CostInputs {
            safer: &three,
            less_safe: &two,
            safer_is_safe: &flags,
            less_safe_is_safe: &flags,
        };
        assert!(cost_loss(inputs, 0.0, 1.0).is_err());
    }
}
