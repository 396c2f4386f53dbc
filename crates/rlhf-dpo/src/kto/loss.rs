//! Losses of answers that are labelled one by one.

use rlhf_core::{Error as CoreError, check_same_shape};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::loss::check_beta;
use crate::{Result, RewardShift};

/// The loss of an answer. In the formulas `x` is its log-ratio `log π − log π_ref`, and `s` is 1
/// for a desirable answer and −1 for an undesirable one.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum KtoLoss {
    /// `1 − σ(s β (x − z))` (KTO, Ethayarajh et al. 2024, arXiv 2402.01306, equation 8). `z` is
    /// `max(0, mean of x over answers to other prompts)`, a constant for the gradient: see
    /// [`mismatched_answers`](crate::mismatched_answers).
    Kto,
    /// `1 − σ(s β x)` (APO-zero without pairs, D'Oosterlinck et al. 2024, arXiv 2408.06266,
    /// equation 7): needs no `z`.
    ApoZeroUnpaired,
    /// `−log σ(s (β x − δ))` (BCO, Jung et al. 2024, arXiv 2404.04656, equation 11).
    Bco {
        /// What `δ` is.
        shift: RewardShift,
    },
}

impl KtoLoss {
    /// Whether it compares with answers to other prompts.
    pub(crate) fn needs_kl(self) -> bool {
        self == Self::Kto
    }

    pub(crate) fn has_shift(self) -> bool {
        matches!(
            self,
            Self::Bco {
                shift: RewardShift::RunningMean
            }
        )
    }
}

/// What a [`KtoTrainer`](crate::KtoTrainer) minimises: the mean over answers of a weighted loss.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KtoObjective {
    /// The loss.
    pub loss: KtoLoss,
    /// `β`: how strongly the policy is held to the reference.
    pub beta: f64,
    /// Multiplies the losses of desirable answers. The paper advises to choose both so that
    /// `desirable_weight · desirable answers` is 1 to 4/3 times its counterpart
    /// ([`balanced`](Self::balanced)).
    pub desirable_weight: f64,
    /// Multiplies the losses of undesirable answers.
    pub undesirable_weight: f64,
}

impl Default for KtoObjective {
    /// TRL's `KTOConfig`: KTO, β 0.1, both weights 1.
    fn default() -> Self {
        Self {
            loss: KtoLoss::Kto,
            beta: 0.1,
            desirable_weight: 1.0,
            undesirable_weight: 1.0,
        }
    }
}

impl From<KtoLoss> for KtoObjective {
    fn from(loss: KtoLoss) -> Self {
        Self {
            loss,
            ..Self::default()
        }
    }
}

impl KtoObjective {
    /// Weights under which both kinds of answers count alike, the rarer kind by more than 1.
    #[must_use]
    pub fn balanced(mut self, desirable: usize, undesirable: usize) -> Self {
        let ratio = |a: usize, b: usize| (a as f64 / b.max(1) as f64).max(1.0);
        self.desirable_weight = ratio(undesirable, desirable);
        self.undesirable_weight = ratio(desirable, undesirable);
        self
    }

    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        check_beta(self.beta)?;
        for (field, weight) in [
            ("objective.desirable_weight", self.desirable_weight),
            ("objective.undesirable_weight", self.undesirable_weight),
        ] {
            if !(weight.is_finite() && weight >= 0.0) {
                let reason = "a number not below 0 is needed";
                return Err(CoreError::config(field, weight, reason).into());
            }
        }
        Ok(())
    }
}

/// What [`kto_loss`] reads; every tensor is `[B]`, one element an answer. Log-probabilities are
/// sums over the answer's tokens, in nats, f32.
#[derive(Debug, Clone, Copy)]
pub struct KtoInputs<'a> {
    /// `log π(answer | prompt)` under the model in training.
    pub policy: &'a Tensor,
    /// The same under the reference.
    pub reference: &'a Tensor,
    /// Bool: which answers are desirable.
    pub desirable: &'a Tensor,
    /// `z`, in nats; read by [`KtoLoss::Kto`].
    pub kl: f64,
    /// `δ`; read by [`KtoLoss::Bco`].
    pub reward_shift: f64,
}

/// What [`kto_loss`] returns; all `[B]` f32.
#[derive(Debug)]
pub struct KtoOutput {
    /// The weighted loss of each answer; nothing is reduced.
    pub losses: Tensor,
    /// Implicit rewards `β (log π − log π_ref)`, without gradient.
    pub rewards: Tensor,
}

/// The loss of every answer, see [`KtoLoss`].
///
/// # Errors
/// A shape mismatch; an empty batch; parameters out of range.
pub fn kto_loss(inputs: KtoInputs<'_>, objective: &KtoObjective) -> Result<KtoOutput> {
    objective.validate()?;
    let first = ("policy", inputs.policy);
    check_same_shape(("reference", inputs.reference), first)?;
    check_same_shape(("desirable", inputs.desirable), first)?;
    if inputs.policy.numel() == 0 {
        return Err(CoreError::Empty {
            what: "the batch of answers",
            help: "give it at least one",
        }
        .into());
    }
    let desirable = inputs.desirable.to_kind(inputs.policy.kind());
    let sign = &desirable * 2.0 - 1.0;
    let ratio = inputs.policy - inputs.reference;
    let rewards = ratio.detach() * objective.beta;
    let losses = match objective.loss {
        KtoLoss::Kto => 1.0 - ((ratio - inputs.kl) * sign * objective.beta).sigmoid(),
        KtoLoss::ApoZeroUnpaired => 1.0 - (ratio * sign * objective.beta).sigmoid(),
        KtoLoss::Bco { .. } => {
            -((ratio * objective.beta - inputs.reward_shift) * sign).log_sigmoid()
        }
    };
    let (high, low) = (objective.desirable_weight, objective.undesirable_weight);
    let weights: Tensor = desirable * (high - low) + low;
    Ok(KtoOutput {
        losses: losses * weights,
        rewards,
    })
}
