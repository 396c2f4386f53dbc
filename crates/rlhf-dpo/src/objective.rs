//! What is minimised: losses with weights, and the options that change what they see.

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};

use crate::loss::{ReferenceUse, check_beta, weighted_losses};
use crate::{Divergence, DpoInputs, DpoLoss, DpoOutput, Error, Result};

/// A loss and how much it counts.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WeightedLoss {
    /// The loss.
    pub loss: DpoLoss,
    /// Its weight in the sum.
    pub weight: f64,
}

/// How much each pair counts beside the weight that the data gives it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum PairWeighting {
    /// All alike.
    #[default]
    Uniform,
    /// WPO (Zhou et al. 2024, arXiv 2406.11827, equation 5 with the alignment of section 3.3): as
    /// likely as the policy is to write the answers itself. A pair's weight is the product over
    /// its answers of `exp(mean over tokens of (log π(token) − log Σ_v π(v)²))`, without gradient;
    /// an answer without a token has 1. It multiplies the losses of preferences, and no
    /// likelihood of chosen answers. Costs a second forward pass of the policy.
    Wpo,
}

/// What a [`DpoTrainer`](crate::DpoTrainer) minimises: the mean over pairs of a weighted sum of
/// losses.
///
/// ```
/// use rlhf_dpo::{DpoLoss, Objective};
///
/// let simpo = Objective::new(DpoLoss::named("simpo").unwrap());
/// assert_eq!(simpo.beta, 2.0);
/// let mixed = Objective::mpo(); // sigmoid, BCO and likelihood
/// assert_eq!(mixed.losses.len(), 3);
/// # mixed.validate()?;
/// # Ok::<(), rlhf_dpo::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Objective {
    /// The losses; the implicit rewards that are reported are those of the first.
    pub losses: Vec<WeightedLoss>,
    /// `β`: how strongly the policy is held to the reference.
    pub beta: f64,
    /// The divergence from the reference that rewards are derived from.
    pub divergence: Divergence,
    /// What the pairs count.
    pub weighting: PairWeighting,
    /// `α` of LD-DPO (Liu et al. 2024, arXiv 2409.06411, equation 11), in `[0, 1]`: the tokens of
    /// the longer answer past the length of the shorter one count `α`, under policy and reference
    /// alike. `None` is DPO's own, as is 1.
    pub ld_alpha: Option<f64>,
}

impl Default for Objective {
    /// DPO with β 0.1.
    fn default() -> Self {
        Self::new(DpoLoss::default())
    }
}

impl From<DpoLoss> for Objective {
    fn from(loss: DpoLoss) -> Self {
        Self::new(loss)
    }
}

impl Objective {
    /// One loss with its [usual β](DpoLoss::usual_beta).
    pub fn new(loss: DpoLoss) -> Self {
        Self::sum([(loss, 1.0)], loss.usual_beta())
    }

    /// A weighted sum.
    pub fn sum(losses: impl IntoIterator<Item = (DpoLoss, f64)>, beta: f64) -> Self {
        let weighted = |(loss, weight)| WeightedLoss { loss, weight };
        Self {
            losses: losses.into_iter().map(weighted).collect(),
            beta,
            divergence: Divergence::default(),
            weighting: PairWeighting::default(),
            ld_alpha: None,
        }
    }

    /// MPO (Wang et al. 2024, arXiv 2411.10442): 0.8 sigmoid + 0.2 BCO + likelihood, β 0.1. The
    /// paper's BCO has the shift; here there is none, as in TRL.
    pub fn mpo() -> Self {
        let bco = DpoLoss::BcoPair {
            shift: crate::RewardShift::None,
        };
        let losses = [(DpoLoss::default(), 0.8), (bco, 0.2), (DpoLoss::Sft, 1.0)];
        Self::sum(losses, 0.1)
    }

    /// Checks every field, and that each loss can use the options given.
    ///
    /// # Errors
    /// An invalid configuration, naming the field; [`Error::Unusable`] with the reason.
    pub fn validate(&self) -> Result<()> {
        check_beta(self.beta)?;
        self.divergence.validate()?;
        if self.losses.is_empty() {
            let reason = "at least one loss is needed";
            return Err(CoreError::config("objective.losses", "[]", reason).into());
        }
        for WeightedLoss { loss, weight } in &self.losses {
            loss.validate()?;
            if !(weight.is_finite() && *weight >= 0.0) {
                let reason = "a number not below 0 is needed";
                return Err(CoreError::config("objective.losses.weight", weight, reason).into());
            }
            self.check_options(*loss)?;
        }
        match self.ld_alpha {
            Some(alpha) if !(0.0..=1.0).contains(&alpha) => {
                let reason = "a number in [0, 1] is needed";
                Err(CoreError::config("objective.ld_alpha", alpha, reason).into())
            }
            _ => Ok(()),
        }
    }

    fn check_options(&self, loss: DpoLoss) -> Result<()> {
        let unusable = |option: &'static str, reason: &'static str| {
            Err(Error::Unusable {
                loss: format!("{loss:?}"),
                option,
                reason,
            })
        };
        if self.divergence != Divergence::ReverseKl && !loss.takes_divergence() {
            return unusable(
                "divergence",
                "f-DPO's derivation needs the difference of one pair's log-ratios, which this \
                 loss does not have; use reverse_kl",
            );
        }
        if self.weighting == PairWeighting::Wpo {
            if loss.sorts() {
                return unusable(
                    "weighting",
                    "it sorts the batch, so that a loss belongs to a quantile and a weight to a \
                     pair; use uniform",
                );
            }
            if self.losses.len() == 1 && loss == DpoLoss::Sft {
                return unusable("weighting", "a likelihood is not weighted; use uniform");
            }
        }
        if self.ld_alpha.is_some() && loss.averages() {
            return unusable(
                "ld_alpha",
                "it averages over all tokens of an answer, whose length has no influence then; \
                 leave it out",
            );
        }
        if self.ld_alpha.is_some() && loss.has_likelihood() {
            return unusable(
                "ld_alpha",
                "the likelihood of the chosen answer would lose the answer's end; leave it out",
            );
        }
        Ok(())
    }

    /// Whether a reference is read: by a loss, or for the rewards that are reported beside a
    /// likelihood. Without, a trainer takes [`Reference::Free`](crate::Reference::Free) alone.
    pub fn reads_reference(&self) -> bool {
        let uses = |wanted: ReferenceUse| self.any(|loss| loss.reference_use() == wanted);
        uses(ReferenceUse::Difference)
            || uses(ReferenceUse::Absolute)
            || !uses(ReferenceUse::Nothing)
    }

    /// Fails unless the losses can do with a reference, or without one.
    ///
    /// # Errors
    /// [`Error::Unusable`] with the reason.
    pub(crate) fn check_reference(&self, there_is_one: bool) -> Result<()> {
        let unusable = |loss: DpoLoss, reason: &'static str| {
            Err(Error::Unusable {
                loss: format!("{loss:?}"),
                option: "reference",
                reason,
            })
        };
        if there_is_one {
            let uses: Vec<_> = self.losses.iter().map(|l| l.loss.reference_use()).collect();
            let idle =
                |u: &ReferenceUse| matches!(u, ReferenceUse::Nothing | ReferenceUse::Indifferent);
            if uses.iter().all(idle)
                && let Some(at) = uses.iter().position(|u| *u == ReferenceUse::Nothing)
            {
                return unusable(
                    self.losses[at].loss,
                    "it reads no reference, whose forward passes would be for nothing; use \
                     Reference::Free",
                );
            }
            return Ok(());
        }
        for WeightedLoss { loss, .. } in &self.losses {
            if loss.reference_use() == ReferenceUse::Absolute {
                return unusable(
                    *loss,
                    "it compares log-ratios with fixed numbers, and log-probabilities are far \
                     from all of them; give it a reference model",
                );
            }
        }
        if self.divergence != Divergence::ReverseKl {
            return Err(Error::Unusable {
                loss: format!("{:?}", self.losses[0].loss),
                option: "divergence",
                reason: "without a reference there is nothing to diverge from; use reverse_kl",
            });
        }
        Ok(())
    }

    /// The losses of some pairs; see [`dpo_loss`](crate::dpo_loss).
    ///
    /// # Errors
    /// Those of [`dpo_loss`](crate::dpo_loss).
    pub fn losses(&self, inputs: DpoInputs<'_>) -> Result<DpoOutput> {
        let losses: Vec<_> = self.losses.iter().map(|l| (l.loss, l.weight)).collect();
        weighted_losses(inputs, &losses, self.divergence, self.beta)
    }

    fn any(&self, property: impl Fn(DpoLoss) -> bool) -> bool {
        self.losses.iter().any(|l| property(l.loss))
    }

    /// Whether a pair's loss depends on the other pairs of its batch.
    pub(crate) fn is_batchwise(&self) -> bool {
        self.any(DpoLoss::is_batchwise)
    }

    /// Whether a loss is no pair's own.
    pub(crate) fn sorts(&self) -> bool {
        self.any(DpoLoss::sorts)
    }

    /// Whether BCO's shift is kept.
    pub(crate) fn has_shift(&self) -> bool {
        self.any(|loss| loss.is_batchwise() && !loss.sorts())
    }

    /// Whether prompts are learned too.
    pub(crate) fn learns_prompts(&self) -> bool {
        self.any(|loss| loss == DpoLoss::Orpo)
    }
}
