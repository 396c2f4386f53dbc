//! The losses of comparisons: one enum for the whole family.

mod absolute;
mod compute;
mod divergence;
mod relative;
mod sorted;
mod unreferenced;

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};

use crate::Result;

pub use compute::{BatchMeans, DpoInputs, DpoOutput, PromptLogprobs, ReferenceLogprobs, dpo_loss};
pub use divergence::Divergence;

pub(crate) use compute::{check_beta, weighted_losses};

/// The loss of a pair.
///
/// In the formulas `log π(y)` is the log-probability of a whole answer, `c` and `r` are the
/// log-ratios `log π − log π_ref` of the chosen answer `y_c` and the rejected one `y_r` (without a
/// reference `log π` itself), `Δ = c − r`, `n` an answer's number of tokens, `ā = log π(y) / n`, `σ`
/// the logistic function and `ε` the label smoothing. [`FAMILY`](Self::FAMILY) lists all of them
/// by name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum DpoLoss {
    /// `−(1−ε) log σ(βΔ) − ε log σ(−βΔ)`. With `ε = 0` it is DPO (Rafailov et al. 2023, arXiv
    /// 2305.18290, equation 7), otherwise conservative DPO, cDPO (Mitchell 2023, equation 3):
    /// labels are taken to be wrong with probability `ε`. TRL ignores `ε` here.
    Sigmoid {
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// `[−(1−ε) log σ(βΔ) + ε log σ(−βΔ)] / (1 − 2ε)`: unbiased under labels flipped with
    /// probability `ε` (Chowdhury et al. 2024, arXiv 2403.00409, equation 5).
    Robust {
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// `max(0, 1 − βΔ)` (SLiC, Zhao et al. 2023, arXiv 2305.10425; RSO, Liu et al. 2023, arXiv
    /// 2309.06657, equation 10).
    Hinge,
    /// `(c/n_c − r/n_r − 1/(2β))²` (Azar et al. 2023, arXiv 2310.12036, equation 17), on averages
    /// over tokens as its authors advise and TRL does; OpenRLHF uses the sums.
    Ipo,
    /// `−log σ(β(c/n_c − r/n_r))`: DPO on averages over tokens (Meng et al. 2024, arXiv
    /// 2405.14734, appendix).
    SigmoidNorm,
    /// `KL([σ(βΔ), σ(−βΔ)] ‖ [1−ε, ε])` (EXO, Ji et al. 2024, arXiv 2402.00856, equation 16).
    ExoPair {
        /// `ε`, in `(0, 0.5)`.
        label_smoothing: f64,
    },
    /// `−log σ(βc) − ½ log σ(−βc) − ½ log σ(−βr)` (NCA, Chen et al. 2024, arXiv 2402.05369).
    NcaPair,
    /// `−log σ(βc − δ) − log σ(−(βr − δ))` (BCO, Jung et al. 2024, arXiv 2404.04656, equation 11).
    /// TRL has no shift here.
    BcoPair {
        /// What `δ` is.
        shift: RewardShift,
    },
    /// `(c − 1/(2β))² + (r + 1/(2β))²` (SPPO with hard labels, Wu et al. 2024, arXiv 2405.00675,
    /// equation 4.8 up to a factor).
    SppoHard,
    /// cDPO on quantiles: `u = β(sort(log π(y_c) − log π(y_r)) − sort(the same under π_ref))`, then
    /// `−(1−ε) log σ(u) − ε log σ(−u)` (AOT, Melnyk et al. 2024, arXiv 2406.05882, paired). What
    /// is sorted is the batch of an optimiser step, however it is split. Losses are in the order
    /// of the quantiles.
    Aot {
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// The same with `u = β(sort(c) − sort(r))` (AOT, unpaired).
    AotUnpaired {
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// `1 − σ(βc) + σ(βr)`, for chosen answers better than the model's (APO-zero, D'Oosterlinck et
    /// al. 2024, arXiv 2408.06266, equation 7).
    ApoZero,
    /// `σ(βc) + 1 − σ(βΔ)`, for chosen answers worse than the model's (APO-down, equation 8).
    ApoDown,
    /// `(1 − g)(−log σ(u)) + g e^{−u}` with `u = βΔ`, `g = σ(u/τ)` (DiscoPOP, Lu et al. 2024, arXiv
    /// 2406.08414). Not convex: at `τ = 0.05` it rises from `u = −0.12` to `0.07`, so a policy that
    /// starts as its reference, at 0, is first led the wrong way, and may stay there.
    Discopop {
        /// `τ`; 0.05 in the paper.
        temperature: f64,
    },
    /// `−log σ(βΔ + α(n_c − n_r))`: a longer chosen answer has less to win (R-DPO, Park et al.
    /// 2024, arXiv 2403.19159, equation 9).
    RDpo {
        /// `α`, in nats per token, not negative.
        alpha: f64,
    },
    /// `−log σ(βΔ) − α ā_c` (iterative RPO, Pang et al. 2024, arXiv 2404.19733, equation 1): the
    /// pair's own average. TRL's former `rpo_alpha` averages over the tokens of a batch, which is
    /// [`Sigmoid`](Self::Sigmoid) with [`Sft`](Self::Sft) weighted `α` beside it.
    Rpo {
        /// `α`, not negative.
        alpha: f64,
    },
    /// `−log π(y_c)` summed over the batch and divided by its chosen tokens: supervised
    /// fine-tuning. Of use beside another loss, as in MPO (Wang et al. 2024, arXiv 2411.10442).
    Sft,
    /// `−(1−ε) log σ(u) − ε log σ(−u)` with `u = β(ā_c − ā_r) − γ` (SimPO, Meng et al. 2024, arXiv
    /// 2405.14734, equation 6).
    SimPo {
        /// `γ`, the margin asked for, not negative.
        gamma: f64,
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// [`SimPo`](Self::SimPo) with `(1 − e^{−αā}) / α` in place of `ā` (AlphaPO, Gupta et al. 2025,
    /// arXiv 2501.03884, equation 7).
    AlphaPo {
        /// `α`, not 0 (the limit there is SimPO).
        alpha: f64,
        /// `γ`, not negative.
        gamma: f64,
    },
    /// cDPO on `u = β(log π(y_c) − log π(y_r))`, and `α` times [`Sft`](Self::Sft) (CPO, Xu et al.
    /// 2024, arXiv 2401.08417, equation 5).
    Cpo {
        /// `α`, the weight of the chosen answers' likelihood; 1 in the paper.
        alpha: f64,
        /// `ε`, in `[0, 0.5)`.
        label_smoothing: f64,
    },
    /// `−β log σ(log odds(y_c) − log odds(y_r))` with `odds(y) = e^ā / (1 − e^ā)`, and the negative
    /// log-likelihood of prompt and chosen answer, averaged over the batch's tokens (ORPO, Hong et
    /// al. 2024, arXiv 2403.07691, equations 6 and 7). `β` is the paper's `λ`.
    Orpo,
}

/// The `δ` of BCO.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RewardShift {
    /// 0, as TRL has it for pairs.
    #[default]
    None,
    /// The mean of all implicit rewards seen so far, those of the step included (the paper's
    /// section 4.2; TRL's `BCOTrainer`). It is part of a checkpoint.
    RunningMean,
}

impl Default for DpoLoss {
    /// Rafailov et al. 2023.
    fn default() -> Self {
        Self::SIGMOID
    }
}

/// What a loss does with a reference.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ReferenceUse {
    /// Compares differences of log-ratios, which make sense under a constant reference too.
    Difference,
    /// Compares log-ratios with fixed numbers.
    Absolute,
    /// Reads none.
    Nothing,
    /// Reads none, but does not mind one that the rewards are computed from.
    Indifferent,
}

impl DpoLoss {
    const SIGMOID: Self = Self::Sigmoid {
        label_smoothing: 0.0,
    };

    /// Every loss with its usual parameters, by the name that TRL uses where it has it.
    pub const FAMILY: [(&'static str, Self); 23] = [
        ("sigmoid", Self::SIGMOID),
        (
            "cdpo",
            Self::Sigmoid {
                label_smoothing: 0.1,
            },
        ),
        (
            "robust",
            Self::Robust {
                label_smoothing: 0.1,
            },
        ),
        ("hinge", Self::Hinge),
        ("ipo", Self::Ipo),
        ("sigmoid_norm", Self::SigmoidNorm),
        (
            "exo_pair",
            Self::ExoPair {
                label_smoothing: 1e-3,
            },
        ),
        ("nca_pair", Self::NcaPair),
        (
            "bco_pair",
            Self::BcoPair {
                shift: RewardShift::None,
            },
        ),
        (
            "bco_pair_shift",
            Self::BcoPair {
                shift: RewardShift::RunningMean,
            },
        ),
        ("sppo_hard", Self::SppoHard),
        (
            "aot",
            Self::Aot {
                label_smoothing: 0.0,
            },
        ),
        (
            "aot_unpaired",
            Self::AotUnpaired {
                label_smoothing: 0.0,
            },
        ),
        ("apo_zero", Self::ApoZero),
        ("apo_down", Self::ApoDown),
        ("discopop", Self::Discopop { temperature: 0.05 }),
        ("r_dpo", Self::RDpo { alpha: 0.01 }),
        ("rpo", Self::Rpo { alpha: 1.0 }),
        ("sft", Self::Sft),
        (
            "simpo",
            Self::SimPo {
                gamma: 0.5,
                label_smoothing: 0.0,
            },
        ),
        (
            "alphapo",
            Self::AlphaPo {
                alpha: 0.25,
                gamma: 0.1,
            },
        ),
        (
            "cpo",
            Self::Cpo {
                alpha: 1.0,
                label_smoothing: 0.0,
            },
        ),
        ("orpo", Self::Orpo),
    ];

    /// The loss of [`FAMILY`](Self::FAMILY) with this name.
    pub fn named(name: &str) -> Option<Self> {
        let found = Self::FAMILY.into_iter().find(|(known, _)| *known == name);
        found.map(|(_, loss)| loss)
    }

    /// A `β` in the range that its authors use: 2 for the losses on averages over tokens that have
    /// a margin to reach, 0.1 for the others.
    pub fn usual_beta(&self) -> f64 {
        match self {
            Self::SimPo { .. } | Self::AlphaPo { .. } | Self::SigmoidNorm => 2.0,
            _ => 0.1,
        }
    }

    /// Fails for a parameter outside its range.
    ///
    /// # Errors
    /// An invalid configuration, naming the parameter.
    pub fn validate(&self) -> Result<()> {
        let smoothing = |e: f64| {
            let reason = "a number in [0, 0.5) is needed";
            ("loss.label_smoothing", e, (0.0..0.5).contains(&e), reason)
        };
        let not_negative = |field: &'static str, x: f64| {
            let reason = "a number not below 0 is needed";
            (field, x, x.is_finite() && x >= 0.0, reason)
        };
        let checks = match *self {
            Self::Sigmoid { label_smoothing: e }
            | Self::Robust { label_smoothing: e }
            | Self::Aot { label_smoothing: e }
            | Self::AotUnpaired { label_smoothing: e } => vec![smoothing(e)],
            Self::ExoPair { label_smoothing: e } => vec![(
                "loss.label_smoothing",
                e,
                e > 0.0 && e < 0.5,
                "a number in (0, 0.5) is needed: without smoothing the divergence is infinite",
            )],
            Self::Discopop { temperature } => vec![(
                "loss.temperature",
                temperature,
                temperature.is_finite() && temperature > 0.0,
                "a positive number is needed",
            )],
            Self::RDpo { alpha } | Self::Rpo { alpha } => vec![not_negative("loss.alpha", alpha)],
            Self::SimPo {
                gamma,
                label_smoothing,
            } => vec![
                not_negative("loss.gamma", gamma),
                smoothing(label_smoothing),
            ],
            Self::AlphaPo { alpha, gamma } => vec![
                (
                    "loss.alpha",
                    alpha,
                    alpha.is_finite() && alpha != 0.0,
                    "a finite number other than 0 is needed; use sim_po for the limit at 0",
                ),
                not_negative("loss.gamma", gamma),
            ],
            Self::Cpo {
                alpha,
                label_smoothing,
            } => vec![
                not_negative("loss.alpha", alpha),
                smoothing(label_smoothing),
            ],
            _ => Vec::new(),
        };
        match checks.into_iter().find(|(_, _, valid, _)| !valid) {
            Some((field, value, _, reason)) => Err(CoreError::config(field, value, reason).into()),
            None => Ok(()),
        }
    }

    /// Whether a pair's loss depends on the other pairs of its batch.
    pub(crate) fn is_batchwise(self) -> bool {
        self.sorts()
            || matches!(
                self,
                Self::BcoPair {
                    shift: RewardShift::RunningMean
                }
            )
    }

    /// Whether the batch is sorted, so that a loss is no pair's own.
    pub(crate) fn sorts(self) -> bool {
        matches!(self, Self::Aot { .. } | Self::AotUnpaired { .. })
    }

    /// Whether log-probabilities are averaged over an answer's tokens.
    pub(crate) fn averages(self) -> bool {
        matches!(
            self,
            Self::Ipo | Self::SigmoidNorm | Self::SimPo { .. } | Self::AlphaPo { .. } | Self::Orpo
        )
    }

    /// Whether there is a term in a likelihood: of chosen answers, or prompts too.
    pub(crate) fn has_likelihood(self) -> bool {
        matches!(
            self,
            Self::Sft | Self::Rpo { .. } | Self::Cpo { .. } | Self::Orpo
        )
    }

    pub(crate) fn reference_use(self) -> ReferenceUse {
        match self {
            Self::Sigmoid { .. }
            | Self::Robust { .. }
            | Self::Hinge
            | Self::Ipo
            | Self::SigmoidNorm
            | Self::ExoPair { .. }
            | Self::Aot { .. }
            | Self::AotUnpaired { .. }
            | Self::Discopop { .. }
            | Self::RDpo { .. }
            | Self::Rpo { .. } => ReferenceUse::Difference,
            Self::NcaPair
            | Self::BcoPair { .. }
            | Self::SppoHard
            | Self::ApoZero
            | Self::ApoDown => ReferenceUse::Absolute,
            Self::SimPo { .. } | Self::AlphaPo { .. } | Self::Cpo { .. } | Self::Orpo => {
                ReferenceUse::Nothing
            }
            Self::Sft => ReferenceUse::Indifferent,
        }
    }

    /// Whether it is derived from the ratio of two answers' probabilities, which another
    /// divergence than the reverse KL changes.
    pub(crate) fn takes_divergence(self) -> bool {
        self.reference_use() == ReferenceUse::Difference && !self.sorts() || self == Self::Sft
    }
}
