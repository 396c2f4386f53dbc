//! The choices in which the critic-free methods differ.

use rlhf_core::Error;
use serde::{Deserialize, Serialize};

use crate::{Clip, KlEstimator};

/// What an answer's reward is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Baseline {
    /// The mean of all answers to the prompt, its own included (Shao et al. 2024,
    /// arXiv 2402.03300).
    GroupMean,
    /// The mean of the *other* answers to the prompt, which does not depend on its own reward and
    /// so leaves the gradient unbiased (Ahmadian et al. 2024, arXiv 2402.14740). It is
    /// `G / (G − 1)` times the advantage over the group's mean.
    LeaveOneOut,
}

/// What advantages are divided by. Deviations are unbiased (`n − 1`), and
/// [`STD_EPSILON`](crate::STD_EPSILON) is added to them, as in TRL.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdvantageScale {
    /// The deviation of the group's rewards: every prompt weighs the same, however easy it is.
    Group,
    /// The deviation of the rewards of the whole rollout.
    Batch,
    /// Nothing: dividing by the group's deviation favours prompts that are too easy or too hard
    /// (Liu et al. 2025, arXiv 2503.20783).
    None,
    /// Advantages are whitened over the rollout: less their mean, over their deviation
    /// (REINFORCE++, arXiv 2501.03262; TRL's `normalize_advantages` for RLOO).
    Whitened,
}

/// How several rewards become advantages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardMix {
    /// Weighted and summed first: a reward counts by its weight times its spread.
    #[default]
    Sum,
    /// Each is centred and scaled within its group first, then weighted and summed, and the sums
    /// are whitened over the rollout: a reward counts by its weight alone (GDPO,
    /// arXiv 2601.05242). Takes the place of [`AdvantageScale`].
    NormalizeThenSum,
}

/// What has one probability ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RatioLevel {
    /// Every token its own: `ρ_t = exp(logprob_t − old_logprob_t)`.
    Token,
    /// The answer, by the geometric mean of its tokens' ratios, `exp(mean_t (…))` (GSPO,
    /// Zheng et al. 2025, arXiv 2507.18071, equation 7).
    SequenceMean,
    /// The answer, by the product of its tokens' ratios, `exp(Σ_t (…))`: the true ratio, whose
    /// spread grows with the length (RLOO).
    SequenceProduct,
}

/// What of an answer is made likelier. `ρ` is the ratio, `A` the advantage.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Objective {
    /// PPO's clipped [`surrogate`](crate::surrogate), `max(−A ρ, −A clip(ρ, 1 − low, 1 + high))`;
    /// with `high > low` DAPO's, which leaves unlikely tokens more room to rise (Yu et al. 2025,
    /// arXiv 2503.14476). TRL's `delta` is [`Clip::dual`].
    Surrogate(Clip),
    /// `−sg(clip(ρ, 1 − low, 1 + high)) · A · logprob`: REINFORCE with truncated importance
    /// weights, in which every token keeps a gradient (CISPO, MiniMax 2025, arXiv 2506.13585,
    /// equation 4). TRL's `epsilon_high` is `1 + high` here.
    DetachedWeight {
        /// Room below 1; 1 or more is no bound.
        low: f64,
        /// Room above 1.
        high: f64,
    },
}

impl Objective {
    /// PPO's clipping, as far up as down.
    pub const fn symmetric(cliprange: f64) -> Self {
        Self::Surrogate(Clip::symmetric(cliprange))
    }

    /// PPO's clipping with other room above 1 than below.
    pub const fn asymmetric(low: f64, high: f64) -> Self {
        Self::Surrogate(Clip {
            low,
            high,
            dual: None,
        })
    }

    /// Room below and above 1.
    pub(crate) const fn room(self) -> (f64, f64) {
        match self {
            Self::Surrogate(Clip { low, high, .. }) | Self::DetachedWeight { low, high } => {
                (low, high)
            }
        }
    }

    pub(crate) fn validate(self) -> rlhf_core::Result<()> {
        let (low, high) = self.room();
        for (field, value) in [("objective.low", low), ("objective.high", high)] {
            if !(value.is_finite() && value > 0.0) {
                return Err(Error::config(field, value, "a positive number is needed"));
            }
        }
        match self {
            Self::Surrogate(Clip {
                dual: Some(dual), ..
            }) if !(dual.is_finite() && dual > 1.0 + high) => Err(Error::config(
                "objective.dual",
                dual,
                "must be more than 1 + high, or it would undo the clipping above",
            )),
            _ => Ok(()),
        }
    }
}

/// What a KL penalty in the loss is multiplied by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KlWeight {
    /// Nothing (Shao et al. 2024).
    #[default]
    Plain,
    /// The ratio, through which a gradient flows too: unbiased where the policy has moved since
    /// it wrote the answers. TRL's default (`use_bias_correction_kl`).
    Ratio,
}

/// The price of moving away from the reference.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum KlPenalty {
    /// None. A reference is measured against if there is one, and not needed.
    None,
    /// `kl_coef` times the divergence **per sequence**, in nats, is taken off the reward
    /// before the baseline.
    InReward {
        /// Price of a nat.
        kl_coef: f64,
        /// How the divergence of a token is estimated; `K1` in RLOO.
        estimator: KlEstimator,
    },
    /// `kl_coef` times the divergence **per token** is added to the loss.
    InLoss {
        /// Price of a nat.
        kl_coef: f64,
        /// How the divergence is estimated; `K3` in GRPO. The gradient of `K1` is no
        /// gradient of the divergence: its expectation is 0.
        estimator: KlEstimator,
        /// What it is multiplied by.
        weight: KlWeight,
    },
}

impl KlPenalty {
    /// The price of a nat.
    pub const fn kl_coef(self) -> f64 {
        match self {
            Self::None => 0.0,
            Self::InReward { kl_coef, .. } | Self::InLoss { kl_coef, .. } => kl_coef,
        }
    }

    /// Whether there must be a reference.
    pub fn needs_reference(self) -> bool {
        self.kl_coef() > 0.0
    }

    pub(crate) fn validate(self) -> rlhf_core::Result<()> {
        let kl_coef = self.kl_coef();
        if kl_coef.is_finite() && kl_coef >= 0.0 {
            return Ok(());
        }
        let reason = "a number that is not negative";
        Err(Error::config("kl.kl_coef", kl_coef, reason))
    }
}
