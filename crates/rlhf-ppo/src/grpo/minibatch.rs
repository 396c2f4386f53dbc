//! The loss of a microbatch, and what an optimiser step reports.

use rlhf_core::{Error as CoreError, LogprobOptions, Policy, Ranks};
use rlhf_scale::UpdateStats;
use tch::{Kind, Tensor};

use super::config::GrpoConfig;
use super::loss::{GroupLossInput, group_loss};
use super::off_policy::importance_weights;
use super::rollout::Microbatch;
use crate::named_sums::named_sums;
use crate::{Result, critic};

/// What one optimiser step did, however it was split into microbatches. "Mean over ratios" is
/// over tokens where every token has its own ratio, and over answers where an answer has one.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct GroupMinibatchStats {
    /// The loss, aggregated as configured.
    pub loss: f64,
    /// The surrogate's share of it.
    pub policy_loss: f64,
    /// Mean over tokens of the divergence that is penalised in the loss, nats; 0 without.
    pub kl_in_loss: f64,
    /// The divergence of the policy that wrote the answers from the reference, nats **per
    /// sequence**, estimated by k1. `None` without a reference.
    pub kl: Option<f64>,
    /// Share of the ratios that are below their range while the advantage is negative.
    pub clipfrac_low: f64,
    /// Share of the ratios that are above their range while the advantage is positive.
    pub clipfrac_high: f64,
    /// Mean of the ratios.
    pub ratio: f64,
    /// Their population variance.
    pub ratio_var: f64,
    /// `½ (logprob − old_logprob)²`, nats, mean over tokens.
    pub approx_kl: f64,
    /// Entropy of the policy's distribution, nats, mean over tokens.
    pub entropy: f64,
    /// How the sampler's log-probabilities differ from the trainer's, where it said them.
    pub mismatch: Option<Mismatch>,
    /// Norm of all gradients before clipping; infinite where the step was skipped.
    pub grad_norm: f64,
    /// Learning rate of the step.
    pub lr: f64,
    /// Whether the step was skipped because a gradient was not finite at its loss scale.
    pub skipped: bool,
    /// The step's loss scale, where there is one.
    pub loss_scale: Option<f64>,
}

/// The same tokens under the arithmetic that sampled them and the one that trains on them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Mismatch {
    /// Mean over tokens of the absolute difference, nats.
    pub mean: f64,
    /// The greatest, nats.
    pub max: f64,
    /// Mean of the importance weights that correct for it, over tokens; 1 without a correction.
    pub weight: f64,
}

/// A microbatch's share of the loss, and of the statistics.
pub(crate) struct MicrobatchLoss {
    pub(crate) loss: Tensor,
    /// `[Sums::COUNT]` f64, detached, on the device: see [`Sums`].
    pub(crate) sums: Tensor,
    /// The greatest mismatch, scalar f64.
    pub(crate) max: Tensor,
}

named_sums! {
    /// What the microbatches' statistics add up to.
    Sums {
        policy_loss,
        kl_in_loss,
        kl,
        clipped_low,
        clipped_high,
        ratio,
        ratio_deviation,
        approx_kl,
        entropy,
        /// The sampler's and the trainer's log-probabilities apart.
        gap,
        /// Weights that correct for that.
        importance,
    }
}

/// What the sums of statistics are divided by, of a whole minibatch.
#[derive(Clone, Copy)]
pub(crate) struct Counts {
    pub(crate) tokens: f64,
    pub(crate) answers: f64,
}

pub(crate) fn microbatch_loss(
    policy: &dyn Policy,
    config: &GrpoConfig,
    microbatch: &Microbatch,
    counts: Counts,
) -> Result<MicrobatchLoss> {
    let options = LogprobOptions {
        temperature: config.temperature(),
        entropy: true,
    };
    let kept = microbatch.kept.as_deref();
    let new = critic::logprobs(policy, &microbatch.batch, kept, &options)?;
    let device = new.logprobs.device();
    let there = |t: &Tensor| t.to_device(device);
    let mask = there(&microbatch.mask);
    let old_logprobs = match &microbatch.old_logprobs {
        Some(old) => there(old),
        None => new.logprobs.detach(),
    };
    let ref_logprobs = microbatch.ref_logprobs.as_ref().map(there);
    let sampling = microbatch.sampling_logprobs.as_ref().map(there);
    let importance = match &sampling {
        Some(sampling) => importance_weights(config.off_policy, &old_logprobs, sampling, &mask)?,
        None => None,
    };
    let out = group_loss(&GroupLossInput {
        logprobs: &new.logprobs,
        old_logprobs: &old_logprobs,
        ref_logprobs: ref_logprobs.as_ref(),
        advantages: &there(&microbatch.advantages),
        mask: &mask,
        token_weights: &there(&microbatch.loss_weights),
        importance_weights: importance.as_ref(),
        ratio: config.ratio,
        objective: config.objective,
        kl: config.kl,
    })?;
    let entropy = new.entropy.ok_or(CoreError::Empty {
        what: "TokenLogprobs::entropy",
        help: "a policy returns it where LogprobOptions::entropy asks for it",
    })?;

    let _no_grad = tch::no_grad_guard();
    let outside = mask.logical_not();
    let total = |x: &Tensor| {
        x.to_kind(Kind::Double)
            .masked_fill(&outside, 0.0)
            .sum(Kind::Double)
    };
    let over_tokens = |x: &Tensor| total(x) / counts.tokens;
    let stat_weights = there(&microbatch.stat_weights).unsqueeze(1);
    let over_ratios = |x: &Tensor| total(&(x * &stat_weights));
    let nothing = || Tensor::zeros([], (Kind::Double, device));
    let moved = new.logprobs.detach() - &old_logprobs;
    let gap = sampling.map(|s| (&old_logprobs - s).abs().masked_fill(&outside, 0.0));
    let sums = Sums {
        policy_loss: out.policy.to_kind(Kind::Double),
        kl_in_loss: out.kl.as_ref().map_or_else(nothing, over_tokens),
        kl: ref_logprobs.map_or_else(nothing, |r| total(&(&old_logprobs - r)) / counts.answers),
        clipped_low: over_ratios(&out.clipped_low),
        clipped_high: over_ratios(&out.clipped_high),
        ratio: over_ratios(&out.ratio),
        ratio_deviation: over_ratios(&(&out.ratio - 1.0).square()),
        approx_kl: over_tokens(&(moved.square() * 0.5)),
        entropy: over_tokens(&entropy.detach()),
        gap: gap.as_ref().map_or_else(nothing, over_tokens),
        importance: over_tokens(
            &importance
                .unwrap_or_else(|| out.ratio.ones_like())
                .expand_as(&mask),
        ),
    };
    Ok(MicrobatchLoss {
        loss: out.loss,
        sums: Tensor::f_stack(&sums.into_array(), 0)?,
        max: gap.map_or_else(nothing, |gap| gap.max().to_kind(Kind::Double)),
    })
}

/// Which of the optional statistics there are.
#[derive(Clone, Copy)]
pub(crate) struct Measured {
    pub(crate) reference: bool,
    pub(crate) sampling: bool,
}

impl GroupMinibatchStats {
    /// Adds up what the microbatches of all processes contributed; waits for the device.
    pub(crate) fn new(
        parts: &[(Tensor, Tensor)],
        update: &UpdateStats,
        measured: Measured,
        ranks: &Ranks,
    ) -> rlhf_core::Result<Self> {
        let sums: Vec<&Tensor> = parts.iter().map(|(sums, _)| sums).collect();
        let maxima: Vec<&Tensor> = parts.iter().map(|(_, max)| max).collect();
        let own = match parts.is_empty() {
            true => Vec::new(),
            false => vec![Tensor::f_stack(&sums, 0)?, Tensor::f_stack(&maxima, 0)?],
        };
        let columns = ranks.gather_columns::<CoreError>(Ok(own))?;
        let [sums, maxima] = <[Tensor; 2]>::try_from(columns).map_err(|_| CoreError::Empty {
            what: "the minibatch",
            help: "give it at least one answer",
        })?;
        let sums = sums.f_sum_dim_intlist([0i64].as_slice(), false, Kind::Double)?;
        let sums = Sums::from_sums(Vec::<f64>::try_from(sums)?)?;
        Ok(Self {
            loss: update.loss,
            policy_loss: sums.policy_loss,
            kl_in_loss: sums.kl_in_loss,
            kl: measured.reference.then_some(sums.kl),
            clipfrac_low: sums.clipped_low,
            clipfrac_high: sums.clipped_high,
            ratio: sums.ratio,
            ratio_var: sums.ratio_deviation - (sums.ratio - 1.0).powi(2),
            approx_kl: sums.approx_kl,
            entropy: sums.entropy,
            mismatch: match measured.sampling {
                true => Some(Mismatch {
                    mean: sums.gap,
                    max: f64::try_from(maxima.f_max()?)?,
                    weight: sums.importance,
                }),
                false => None,
            },
            grad_norm: update.grad_norm,
            lr: update.lr,
            skipped: update.skipped,
            loss_scale: update.loss_scale,
        })
    }
}
