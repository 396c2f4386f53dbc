//! Losses of the quantiles of a batch (AOT): what is compared are distributions, not pairs.

use tch::{Result, Tensor};

/// `sort(chosen − rejected of the policy) − sort(the same of the reference)`.
pub(super) fn paired(policy: [&Tensor; 2], reference: Option<[&Tensor; 2]>) -> Result<Tensor> {
    let policy = ascending(&(policy[0] - policy[1]))?;
    match reference {
        None => Ok(policy), // a constant has no order
        Some([chosen, rejected]) => policy.f_sub(&ascending(&(chosen - rejected))?),
    }
}

/// `sort(chosen) − sort(rejected)`.
pub(super) fn unpaired(chosen: &Tensor, rejected: &Tensor) -> Result<Tensor> {
    ascending(chosen)?.f_sub(&ascending(rejected)?)
}

fn ascending(values: &Tensor) -> Result<Tensor> {
    Ok(values.f_sort(0, false)?.0)
}
