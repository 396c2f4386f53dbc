//! Losses of the difference between two log-ratios.

use tch::Tensor;

/// `−(1−ε) log σ(u) − ε log σ(−u)`.
pub(super) fn logistic(u: &Tensor, e: f64) -> Tensor {
    match e == 0.0 {
        true => -u.log_sigmoid(),
        false => -(u.log_sigmoid() * (1.0 - e)) - (-u).log_sigmoid() * e,
    }
}

pub(super) fn robust(u: &Tensor, e: f64) -> Tensor {
    ((-u).log_sigmoid() * e - u.log_sigmoid() * (1.0 - e)) / (1.0 - 2.0 * e)
}

pub(super) fn hinge(u: &Tensor) -> Tensor {
    (-u + 1.0).relu()
}

pub(super) fn ipo(per_token: &Tensor, beta: f64) -> Tensor {
    (per_token - 0.5 / beta).square()
}

pub(super) fn exo(u: &Tensor, e: f64) -> Tensor {
    let right = u.sigmoid() * (u.log_sigmoid() - (1.0 - e).ln());
    right + (-u).sigmoid() * ((-u).log_sigmoid() - e.ln())
}

pub(super) fn discopop(u: &Tensor, temperature: f64) -> Tensor {
    let gate = (u / temperature).sigmoid();
    (&gate - 1.0) * u.log_sigmoid() + gate * (-u).exp()
}
