//! Losses that compare each log-ratio with a number of its own; `c` and `r` are those of the
//! chosen and the rejected answers.

use tch::Tensor;

pub(super) fn nca(c: &Tensor, r: &Tensor, beta: f64) -> Tensor {
    let (c, r) = (c * beta, r * beta);
    -c.log_sigmoid() - ((-c).log_sigmoid() + (-r).log_sigmoid()) * 0.5
}

pub(super) fn bco(c: &Tensor, r: &Tensor, beta: f64, shift: f64) -> Tensor {
    -(c * beta - shift).log_sigmoid() - (r * -beta + shift).log_sigmoid()
}

pub(super) fn sppo(c: &Tensor, r: &Tensor, beta: f64) -> Tensor {
    (c - 0.5 / beta).square() + (r + 0.5 / beta).square()
}

pub(super) fn apo_zero(c: &Tensor, r: &Tensor, beta: f64) -> Tensor {
    1.0 - (c * beta).sigmoid() + (r * beta).sigmoid()
}

pub(super) fn apo_down(c: &Tensor, r: &Tensor, beta: f64) -> Tensor {
    (c * beta).sigmoid() + 1.0 - ((c - r) * beta).sigmoid()
}
