//! Losses that read no reference, on averages over an answer's tokens.

use tch::Tensor;

use super::divergence::MAX_EXPONENT;

/// AlphaPO's reward of average log-probabilities.
pub(super) fn alpha_reward(average: &Tensor, alpha: f64) -> Tensor {
    (1.0 - (average * -alpha).clamp_max(MAX_EXPONENT).exp()) / alpha
}

/// Log-odds of the chosen answers over the rejected ones.
pub(super) fn log_odds(chosen: &Tensor, rejected: &Tensor) -> Tensor {
    chosen - rejected - (log_of_rest(chosen) - log_of_rest(rejected))
}

/// `log(1 − e^x)`. An answer that is certain, one without a token for instance, has infinite odds;
/// its average counts as `−1e−6`.
fn log_of_rest(x: &Tensor) -> Tensor {
    (-x.clamp_max(-1e-6).expm1()).log()
}
