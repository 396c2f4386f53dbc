//! From log-probabilities to losses.

use rlhf_core::{Error as CoreError, check_same_shape};
use tch::{Kind, Tensor};

use super::{Divergence, DpoLoss, absolute, relative, sorted, unreferenced};
use crate::Result;

/// What [`dpo_loss`] reads; every tensor is `[B]`, one element per pair. Log-probabilities are
/// those of whole answers: sums over their tokens, in nats, f32.
#[derive(Debug, Clone, Copy)]
pub struct DpoInputs<'a> {
    /// `log π(chosen | prompt)` under the model in training.
    pub policy_chosen: &'a Tensor,
    /// `log π(rejected | prompt)` under the model in training.
    pub policy_rejected: &'a Tensor,
    /// The same under the reference. Without one, log-ratios are log-probabilities.
    pub reference: Option<ReferenceLogprobs<'a>>,
    /// Tokens of the chosen answers; read by the losses that average over tokens. An answer
    /// without a token counts as one, whose log-probability is 0.
    pub chosen_lengths: &'a Tensor,
    /// Tokens of the rejected answers.
    pub rejected_lengths: &'a Tensor,
    /// Of the prompts; [`DpoLoss::Orpo`] alone needs them.
    pub prompt: Option<PromptLogprobs<'a>>,
    /// Multiplies each pair's loss, but for the likelihood of chosen answers; without gradient.
    /// The weights of WPO ([`PairWeighting`](crate::PairWeighting)).
    pub pair_weights: Option<&'a Tensor>,
    /// Means over the batch that the pairs are a part of; `None` where they are all of it.
    pub means: Option<BatchMeans>,
}

/// Log-probabilities under the reference, `[B]` each.
#[derive(Debug, Clone, Copy)]
pub struct ReferenceLogprobs<'a> {
    /// `log π_ref(chosen | prompt)`.
    pub chosen: &'a Tensor,
    /// `log π_ref(rejected | prompt)`.
    pub rejected: &'a Tensor,
}

/// What the policy thinks of the prompts, `[B]` each.
#[derive(Debug, Clone, Copy)]
pub struct PromptLogprobs<'a> {
    /// Log-probability of each prompt after its first token.
    pub logprobs: &'a Tensor,
    /// Tokens that this is a sum over.
    pub lengths: &'a Tensor,
}

/// What losses need to know of a batch when they see a part of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BatchMeans {
    /// Mean number of chosen tokens of a pair, weighted as the pairs are.
    pub chosen_tokens: f64,
    /// The same with the prompt's tokens but the first.
    pub prompt_and_chosen_tokens: f64,
    /// BCO's `δ`.
    pub reward_shift: f64,
}

impl BatchMeans {
    /// The means of `inputs`, all pairs weighted alike, and no shift.
    ///
    /// # Errors
    /// libtorch's.
    pub fn of(inputs: &DpoInputs<'_>) -> Result<Self> {
        let mean = |lengths: &Tensor| -> Result<f64> {
            let mean = lengths.f_to_kind(Kind::Double).and_then(|l| l.f_mean(None));
            Ok(f64::try_from(mean.map_err(CoreError::from)?).map_err(CoreError::from)?)
        };
        let chosen_tokens = mean(inputs.chosen_lengths)?;
        let prompt_tokens = inputs.prompt.map(|p| mean(p.lengths)).transpose()?;
        Ok(Self {
            chosen_tokens,
            prompt_and_chosen_tokens: chosen_tokens + prompt_tokens.unwrap_or(0.0),
            reward_shift: 0.0,
        })
    }
}

/// What [`dpo_loss`] returns; all `[B]` f32.
#[derive(Debug)]
pub struct DpoOutput {
    /// The loss of each pair; nothing is reduced. Those of a likelihood are scaled so that the
    /// mean over the batch is a mean over its tokens.
    pub losses: Tensor,
    /// Implicit rewards of the chosen answers, without gradient: `β (log π − log π_ref)` whatever
    /// the loss and the divergence. Without a reference `β log π`, averaged over the answer's
    /// tokens where the loss averages; AlphaPO's has its own form.
    pub chosen_rewards: Tensor,
    /// The same of the rejected answers.
    pub rejected_rewards: Tensor,
    /// The part of `losses` that is a likelihood of chosen answers, without gradient and before
    /// its coefficient, where there is one.
    pub nll: Option<Tensor>,
}

/// The loss of every pair, see [`DpoLoss`].
///
/// ```
/// use rlhf_dpo::{Divergence, DpoInputs, DpoLoss, ReferenceLogprobs, dpo_loss, tch::Tensor};
///
/// let (policy, reference) = (Tensor::from_slice(&[-4f32]), Tensor::from_slice(&[-5f32]));
/// let length = Tensor::from_slice(&[3i64]);
/// let inputs = DpoInputs {
///     policy_chosen: &policy,
///     policy_rejected: &reference,
///     reference: Some(ReferenceLogprobs { chosen: &reference, rejected: &reference }),
///     chosen_lengths: &length,
///     rejected_lengths: &length,
///     prompt: None,
///     pair_weights: None,
///     means: None,
/// };
/// let out = dpo_loss(inputs, DpoLoss::default(), Divergence::default(), 0.1)?;
/// let expected = (-0.1f64).exp().ln_1p(); // −log σ(0.1 · 1)
/// assert!((out.losses.double_value(&[0]) - expected).abs() < 1e-6);
/// # Ok::<(), rlhf_dpo::Error>(())
/// ```
///
/// # Errors
/// A shape mismatch; an empty batch; parameters out of range; ORPO without log-probabilities of
/// prompts; libtorch's.
pub fn dpo_loss(
    inputs: DpoInputs<'_>,
    loss: DpoLoss,
    divergence: Divergence,
    beta: f64,
) -> Result<DpoOutput> {
    weighted_losses(inputs, &[(loss, 1.0)], divergence, beta)
}

/// The weighted sum of several losses. The rewards are those of the first.
pub(crate) fn weighted_losses(
    inputs: DpoInputs<'_>,
    losses: &[(DpoLoss, f64)],
    divergence: Divergence,
    beta: f64,
) -> Result<DpoOutput> {
    divergence.validate()?;
    check_beta(beta)?;
    check_inputs(&inputs)?;
    let pairs = Pairs::new(&inputs, divergence, beta)?;
    let mut sum: Option<Tensor> = None;
    let (mut rewards, mut nll) = (None, None);
    for &(loss, weight) in losses {
        loss.validate()?;
        let parts = pairs.losses(loss)?;
        let total = parts.total(inputs.pair_weights, weight)?;
        sum = Some(match sum {
            None => total,
            Some(sum) => sum + total,
        });
        nll = nll.or(parts.likelihood.map(|(nll, _)| nll.detach()));
        if rewards.is_none() {
            rewards = Some(pairs.rewards(loss));
        }
    }
    match (sum, rewards) {
        (Some(losses), Some([chosen_rewards, rejected_rewards])) => Ok(DpoOutput {
            losses,
            chosen_rewards,
            rejected_rewards,
            nll,
        }),
        _ => Err(CoreError::Empty {
            what: "the list of losses",
            help: "name at least one",
        }
        .into()),
    }
}

/// Losses of some pairs.
struct Parts {
    preference: Option<Tensor>,
    /// A likelihood and its coefficient.
    likelihood: Option<(Tensor, f64)>,
}

impl Parts {
    fn total(&self, pair_weights: Option<&Tensor>, weight: f64) -> Result<Tensor> {
        let preference = self.preference.as_ref().map(|losses| match pair_weights {
            Some(pair_weights) => losses * pair_weights * weight,
            None if weight == 1.0 => losses.shallow_clone(),
            None => losses * weight,
        });
        let likelihood = self.likelihood.as_ref();
        let likelihood = likelihood.map(|(losses, coefficient)| losses * (coefficient * weight));
        match (preference, likelihood) {
            (Some(a), Some(b)) => Ok(a.f_add(&b).map_err(CoreError::from)?),
            (Some(part), None) | (None, Some(part)) => Ok(part),
            (None, None) => Err(CoreError::Empty {
                what: "a loss",
                help: "it has neither a preference nor a likelihood",
            }
            .into()),
        }
    }
}

struct Pairs<'a> {
    inputs: &'a DpoInputs<'a>,
    means: BatchMeans,
    beta: f64,
    /// Log-ratios.
    raw: [Tensor; 2],
    /// Log-ratios after the divergence.
    ratios: [Tensor; 2],
    /// Tokens, at least 1.
    lengths: [Tensor; 2],
}

impl<'a> Pairs<'a> {
    fn new(inputs: &'a DpoInputs<'a>, divergence: Divergence, beta: f64) -> Result<Self> {
        let raw = match inputs.reference {
            Some(reference) => [
                inputs.policy_chosen - reference.chosen,
                inputs.policy_rejected - reference.rejected,
            ],
            None => [
                inputs.policy_chosen.shallow_clone(),
                inputs.policy_rejected.shallow_clone(),
            ],
        };
        Ok(Self {
            inputs,
            means: match inputs.means {
                Some(means) => means,
                None => BatchMeans::of(inputs)?,
            },
            beta,
            ratios: [0, 1].map(|i| divergence.of(raw[i].shallow_clone())),
            raw,
            lengths: [inputs.chosen_lengths, inputs.rejected_lengths].map(|l| l.clamp_min(1)),
        })
    }

    fn losses(&self, loss: DpoLoss) -> Result<Parts> {
        let (beta, [c, r]) = (self.beta, &self.ratios);
        let u = || (c - r) * beta;
        let per_token = || c / &self.lengths[0] - r / &self.lengths[1];
        let [chosen, rejected] = [self.inputs.policy_chosen, self.inputs.policy_rejected];
        let averages = || [chosen / &self.lengths[0], rejected / &self.lengths[1]];
        let preference = match loss {
            DpoLoss::Sigmoid { label_smoothing: e } => relative::logistic(&u(), e),
            DpoLoss::Robust { label_smoothing: e } => relative::robust(&u(), e),
            DpoLoss::Hinge => relative::hinge(&u()),
            DpoLoss::Ipo => relative::ipo(&per_token(), beta),
            DpoLoss::SigmoidNorm => relative::logistic(&(per_token() * beta), 0.0),
            DpoLoss::ExoPair { label_smoothing: e } => relative::exo(&u(), e),
            DpoLoss::Discopop { temperature } => relative::discopop(&u(), temperature),
            DpoLoss::RDpo { alpha } => {
                let longer = self.inputs.chosen_lengths - self.inputs.rejected_lengths;
                relative::logistic(&(u() + longer * alpha), 0.0)
            }
            DpoLoss::NcaPair => absolute::nca(c, r, beta),
            DpoLoss::BcoPair { .. } => absolute::bco(c, r, beta, self.means.reward_shift),
            DpoLoss::SppoHard => absolute::sppo(c, r, beta),
            DpoLoss::ApoZero => absolute::apo_zero(c, r, beta),
            DpoLoss::ApoDown => absolute::apo_down(c, r, beta),
            DpoLoss::Aot { label_smoothing: e } => {
                let reference = self.inputs.reference.map(|r| [r.chosen, r.rejected]);
                let u = sorted::paired([chosen, rejected], reference).map_err(CoreError::from)?;
                relative::logistic(&(u * beta), e)
            }
            DpoLoss::AotUnpaired { label_smoothing: e } => {
                let u = sorted::unpaired(c, r).map_err(CoreError::from)?;
                relative::logistic(&(u * beta), e)
            }
            DpoLoss::SimPo {
                gamma,
                label_smoothing: e,
            } => {
                let [c, r] = averages();
                relative::logistic(&((c - r) * beta - gamma), e)
            }
            DpoLoss::AlphaPo { alpha, gamma } => {
                let [c, r] = averages().map(|a| unreferenced::alpha_reward(&a, alpha));
                relative::logistic(&((c - r) * beta - gamma), 0.0)
            }
            DpoLoss::Rpo { alpha } => {
                return Ok(Parts {
                    preference: Some(relative::logistic(&u(), 0.0)),
                    likelihood: Some((-(chosen / &self.lengths[0]), alpha)),
                });
            }
            DpoLoss::Cpo {
                alpha,
                label_smoothing: e,
            } => {
                return Ok(Parts {
                    preference: Some(relative::logistic(&((chosen - rejected) * beta), e)),
                    likelihood: (alpha > 0.0).then(|| (self.chosen_nll(), alpha)),
                });
            }
            DpoLoss::Orpo => {
                let [c, r] = averages();
                let odds = unreferenced::log_odds(&c, &r);
                return Ok(Parts {
                    preference: Some(odds.log_sigmoid() * -beta),
                    likelihood: Some((self.prompt_nll()?, 1.0)),
                });
            }
            DpoLoss::Sft => {
                return Ok(Parts {
                    preference: None,
                    likelihood: Some((self.chosen_nll(), 1.0)),
                });
            }
        };
        Ok(Parts {
            preference: Some(preference),
            likelihood: None,
        })
    }

    /// Its mean over the batch is the mean over the batch's chosen tokens.
    fn chosen_nll(&self) -> Tensor {
        self.inputs.policy_chosen * (-1.0 / at_least(self.means.chosen_tokens))
    }

    /// The same over prompts and chosen answers.
    fn prompt_nll(&self) -> Result<Tensor> {
        let Some(prompt) = self.inputs.prompt else {
            return Err(CoreError::config(
                "inputs.prompt",
                "none",
                "ORPO learns the prompts too: give it their log-probabilities",
            )
            .into());
        };
        let tokens = at_least(self.means.prompt_and_chosen_tokens);
        Ok((self.inputs.policy_chosen + prompt.logprobs) * (-1.0 / tokens))
    }

    fn rewards(&self, loss: DpoLoss) -> [Tensor; 2] {
        let policy = [self.inputs.policy_chosen, self.inputs.policy_rejected];
        let averages = || [0, 1].map(|i| policy[i].detach() / &self.lengths[i]);
        let rewards = match loss {
            DpoLoss::AlphaPo { alpha, .. } => {
                averages().map(|a| unreferenced::alpha_reward(&a, alpha))
            }
            _ if loss.averages() && self.inputs.reference.is_none() => averages(),
            _ => [0, 1].map(|i| self.raw[i].detach()),
        };
        rewards.map(|reward| reward * self.beta)
    }
}

/// A denominator: a batch without a token has log-probability 0, not 0/0.
fn at_least(tokens: f64) -> f64 {
    match tokens > 0.0 {
        true => tokens,
        false => 1.0,
    }
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
    check_same_shape(("chosen_lengths", inputs.chosen_lengths), first)?;
    check_same_shape(("rejected_lengths", inputs.rejected_lengths), first)?;
    if let Some(reference) = inputs.reference {
        check_same_shape(("reference.chosen", reference.chosen), first)?;
        check_same_shape(("reference.rejected", reference.rejected), first)?;
    }
    if let Some(prompt) = inputs.prompt {
        check_same_shape(("prompt.logprobs", prompt.logprobs), first)?;
        check_same_shape(("prompt.lengths", prompt.lengths), first)?;
    }
    if let Some(pair_weights) = inputs.pair_weights {
        check_same_shape(("pair_weights", pair_weights), first)?;
    }
    if inputs.policy_chosen.numel() == 0 {
        return Err(CoreError::Empty {
            what: "the batch of comparisons",
            help: "give it at least one pair",
        }
        .into());
    }
    Ok(())
}
