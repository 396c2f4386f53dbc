//! The DPO family's losses over pairs of sequence log-probabilities.

use rlhf_core::{Error as CoreError, check_same_shape};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::Result;

/// What [`dpo_loss`] reads; every tensor is `[B]`, one element per pair. Log-probabilities are
/// those of whole responses: sums over their tokens, in nats, f32.
#[derive(Debug, Clone, Copy)]
pub struct DpoInputs<'a> {
    /// `log π(chosen | prompt)` under the model in training.
    pub policy_chosen: &'a Tensor,
    /// `log π(rejected | prompt)` under the model in training.
    pub policy_rejected: &'a Tensor,
    /// `log π_ref(chosen | prompt)` under the reference.
    pub ref_chosen: &'a Tensor,
    /// `log π_ref(rejected | prompt)` under the reference.
    pub ref_rejected: &'a Tensor,
    /// Tokens of the chosen responses; read by the losses that average over tokens.
    pub chosen_lengths: &'a Tensor,
    /// Tokens of the rejected responses; read by the losses that average over tokens.
    pub rejected_lengths: &'a Tensor,
}

/// The loss of a pair. In the formulas `c` and `r` are the log-ratios `log π − log π_ref` of the
/// chosen and the rejected response, `Δ = c − r`, `n` a response's number of tokens, `σ` the
/// logistic function and `ε` the label smoothing.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum DpoLoss {
    /// `−(1−ε) log σ(βΔ) − ε log σ(−βΔ)`. With `ε = 0` it is DPO (Rafailov et al. 2023,
    /// equation 7), otherwise conservative DPO, cDPO (Mitchell 2023, equation 3): labels are
    /// taken to be wrong with probability `ε`. TRL ignores `ε` here.
    Sigmoid {
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// `[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε)`: unbiased under labels flipped with
    /// probability `ε` (Chowdhury et al. 2024, equation 5).
    Robust {
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// `max(0, 1 − βΔ)` (SLiC, Zhao et al. 2023; RSO, Liu et al. 2023).
    Hinge,
    /// `(c/n_c − r/n_r − 1/(2β))²` (Azar et al. 2023, equation 17), on averages over tokens as
    /// its authors advise and TRL does; OpenRLHF uses the sums.
    Ipo,
    /// `−log σ(β(c/n_c − r/n_r))`: DPO on averages over tokens (Meng et al. 2024, appendix).
    SigmoidNorm,
    /// `KL([σ(βΔ), σ(−βΔ)] ‖ [1−ε, ε])` (EXO, Ji et al. 2024, equation 16).
    ExoPair {
        /// `ε`, in `(0, 0.5)`.
        label_smoothing: f64,
    },
    /// `−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)` (NCA, Chen et al. 2024).
    NcaPair,
    /// `−log σ(βc) − log σ(−βr)`: BCO (Jung et al. 2024) without its reward shift, as in TRL.
    BcoPair,
    /// `(c − 1/(2β))² + (r + 1/(2β))²` (SPPO with hard labels, Wu et al. 2024).
    SppoHard,
    /// `1 − σ(βc) + σ(βr)` (APO-zero, D'Oosterlinck et al. 2024).
    ApoZero,
    /// `σ(βc) + 1 − σ(βΔ)` (APO-down, D'Oosterlinck et al. 2024).
    ApoDown,
    /// `(1 − g)(−log σ(u)) + g e^{−u}` with `u = βΔ`, `g = σ(u/τ)` (DiscoPOP, Lu et al. 2024).
    Discopop {
        /// `τ`; 0.05 in the paper.
        temperature: f64,
    },
}

impl Default for DpoLoss {
    /// Rafailov et al. 2023.
    fn default() -> Self {
        Self::Sigmoid {
            label_smoothing: 0.0,
        }
    }
}

impl DpoLoss {
    /// Fails for a parameter outside its range.
    ///
    /// # Errors
    /// An invalid configuration, naming the parameter.
    pub fn validate(&self) -> Result<()> {
        let (field, value, valid, reason) = match *self {
            Self::Sigmoid { label_smoothing: e } | Self::Robust { label_smoothing: e } => (
                "loss.label_smoothing",
                e,
                (0.0..0.5).contains(&e),
                "a number in [0, 0.5) is needed",
            ),
            Self::ExoPair { label_smoothing: e } => (
                "loss.label_smoothing",
                e,
                e > 0.0 && e < 0.5,
                "a number in (0, 0.5) is needed: without smoothing the divergence is infinite",
            ),
            Self::Discopop { temperature } => (
                "loss.temperature",
                temperature,
                temperature.is_finite() && temperature > 0.0,
                "a positive number is needed",
            ),
            _ => return Ok(()),
        };
        if valid {
            return Ok(());
        }
        Err(CoreError::config(field, value, reason).into())
    }
}

/// Which divergence from the reference the reward is derived from (f-DPO, Wang et al. 2023): a
/// function applied to each log-ratio before the loss sees it.
#[derive(Debug, Clone, Copy, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Divergence {
    /// `x`: DPO's own.
    #[default]
    ReverseKl,
    /// `1 − e^{−x}`.
    ForwardKl,
    /// `log 2 + log σ(x)`.
    JensenShannon,
    /// `(e^{(α−1)x} − 1) / (α − 1)`, the exponent at most 80.
    Alpha {
        /// `α`, not 1.
        alpha: f64,
    },
}

impl Divergence {
    /// Fails for an `α` of 1.
    ///
    /// # Errors
    /// An invalid configuration.
    pub fn validate(&self) -> Result<()> {
        match *self {
            Self::Alpha { alpha } if !alpha.is_finite() || alpha == 1.0 => Err(CoreError::config(
                "divergence.alpha",
                alpha,
                "a finite number other than 1 is needed; use reverse_kl for the limit at 1",
            )
            .into()),
            _ => Ok(()),
        }
    }

    fn of(self, logratio: Tensor) -> Tensor {
        match self {
            Self::ReverseKl => logratio,
            Self::ForwardKl => 1.0 - (-logratio).exp(),
            Self::JensenShannon => logratio.log_sigmoid() + std::f64::consts::LN_2,
            Self::Alpha { alpha } => {
                let exponent = (logratio * (alpha - 1.0)).clamp_max(80.0); // e^80 is finite in f32
                (exponent.exp() - 1.0) / (alpha - 1.0)
            }
        }
    }
}

/// What [`dpo_loss`] returns; all `[B]` f32.
#[derive(Debug)]
pub struct DpoOutput {
    /// The loss of each pair; nothing is reduced.
    pub losses: Tensor,
    /// Implicit rewards `β (log π − log π_ref)` of the chosen responses, without gradient,
    /// whatever the loss and the divergence.
    pub chosen_rewards: Tensor,
    /// The same of the rejected responses.
    pub rejected_rewards: Tensor,
}

/// The loss of every pair, see [`DpoLoss`].
///
/// ```
/// use rlhf_dpo::{Divergence, DpoInputs, DpoLoss, dpo_loss, tch::Tensor};
///
/// let (policy, reference) = (Tensor::from_slice(&[-4f32]), Tensor::from_slice(&[-5f32]));
/// let length = Tensor::from_slice(&[3i64]);
/// let inputs = DpoInputs {
///     policy_chosen: &policy,
///     policy_rejected: &reference,
///     ref_chosen: &reference,
///     ref_rejected: &reference,
///     chosen_lengths: &length,
///     rejected_lengths: &length,
/// };
/// let out = dpo_loss(inputs, DpoLoss::default(), Divergence::default(), 0.1)?;
/// let expected = (-0.1f64).exp().ln_1p(); // −log σ(0.1 · 1)
/// assert!((out.losses.double_value(&[0]) - expected).abs() < 1e-6);
/// # Ok::<(), rlhf_dpo::Error>(())
/// ```
///
/// # Errors
/// A shape mismatch; an empty batch; parameters out of range.
pub fn dpo_loss(
    inputs: DpoInputs<'_>,
    loss: DpoLoss,
    divergence: Divergence,
    beta: f64,
) -> Result<DpoOutput> {
    loss.validate()?;
    divergence.validate()?;
    check_beta(beta)?;
    check_inputs(&inputs)?;
    let chosen = inputs.policy_chosen - inputs.ref_chosen;
    let rejected = inputs.policy_rejected - inputs.ref_rejected;
    let chosen_rewards = chosen.detach() * beta;
    let rejected_rewards = rejected.detach() * beta;
    let (c, r) = (divergence.of(chosen), divergence.of(rejected));
    let per_token = || -> Tensor {
        let c = &c / inputs.chosen_lengths.clamp_min(1);
        c - &r / inputs.rejected_lengths.clamp_min(1)
    };
    let logits = || -> Tensor { (&c - &r) * beta };
    let losses = match loss {
        DpoLoss::Sigmoid { label_smoothing: e } => {
            let u = logits();
            -(u.log_sigmoid() * (1.0 - e)) - (-u).log_sigmoid() * e
        }
        DpoLoss::Robust { label_smoothing: e } => {
            let u = logits();
            ((-&u).log_sigmoid() * e - u.log_sigmoid() * (1.0 - e)) / (1.0 - 2.0 * e)
        }
        DpoLoss::Hinge => (-logits() + 1.0).relu(),
        DpoLoss::Ipo => (per_token() - 0.5 / beta).square(),
        DpoLoss::SigmoidNorm => -(per_token() * beta).log_sigmoid(),
        DpoLoss::ExoPair { label_smoothing: e } => {
            let u = logits();
            let right = u.sigmoid() * (u.log_sigmoid() - (1.0 - e).ln());
            right + (-&u).sigmoid() * ((-u).log_sigmoid() - e.ln())
        }
        DpoLoss::NcaPair => {
            let (c, r) = (c * beta, r * beta);
            -c.log_sigmoid() - ((-c).log_sigmoid() + (-r).log_sigmoid()) * 0.5
        }
        DpoLoss::BcoPair => -(c * beta).log_sigmoid() - (r * -beta).log_sigmoid(),
        DpoLoss::SppoHard => (c - 0.5 / beta).square() + (r + 0.5 / beta).square(),
        DpoLoss::ApoZero => 1.0 - (c * beta).sigmoid() + (r * beta).sigmoid(),
        DpoLoss::ApoDown => (&c * beta).sigmoid() + 1.0 - logits().sigmoid(),
        DpoLoss::Discopop { temperature } => {
            let u = logits();
            let gate = (&u / temperature).sigmoid();
            (&gate - 1.0) * u.log_sigmoid() + gate * (-u).exp()
        }
    };
    Ok(DpoOutput {
        losses,
        chosen_rewards,
        rejected_rewards,
    })
}

pub(crate) fn check_beta(beta: f64) -> Result<()> {
    if beta.is_finite() && beta > 0.0 {
        return Ok(());
    }
    Err(CoreError::config("beta", beta, "a positive number is needed").into())
}

fn check_inputs(inputs: &DpoInputs<'_>) -> Result<()> {
    let first = ("policy_chosen", inputs.policy_chosen);
    check_same_shape(("policy_rejected", inputs.policy_rejected), first)?;
    check_same_shape(("ref_chosen", inputs.ref_chosen), first)?;
    check_same_shape(("ref_rejected", inputs.ref_rejected), first)?;
    check_same_shape(("chosen_lengths", inputs.chosen_lengths), first)?;
    check_same_shape(("rejected_lengths", inputs.rejected_lengths), first)?;
    if inputs.policy_chosen.numel() == 0 {
        return Err(CoreError::Empty {
            what: "the batch of comparisons",
            help: "give it at least one pair",
        }
        .into());
    }
    Ok(())
}
