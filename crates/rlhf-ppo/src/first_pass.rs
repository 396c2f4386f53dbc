//! The forward pass that an update shares with its rollout.

use std::cell::RefCell;

use rlhf_core::{Completions, LogprobOptions, Policy, Replicas, TokenLogprobs};
use rlhf_scale::Saved;
use tch::{Device, Kind, Tensor};

use crate::measure::{check_finite, check_shape};
use crate::rollout::Microbatch;
use crate::{Critic, PpoConfig, Result};

/// All samples, gone through once with gradients recorded, before any weight has moved. Where an update
/// takes them all in one microbatch its first pass would be the same, so it goes on from this one.
#[derive(Debug)]
pub(crate) struct FirstPass {
    /// The policy's, where the critic is on its trunk.
    pub(crate) scores: Option<TokenLogprobs>,
    /// `[B, R + 1]`
    pub(crate) values: Tensor,
    /// What it was computed with.
    weights: Vec<Saved>,
}

impl FirstPass {
    /// Whether the first microbatch of an update has all samples, in this process, and the critic learns.
    pub(crate) fn is_shared<P: Policy, V: Critic<P>>(
        config: &PpoConfig,
        (policy, critic): (&P, &V),
        completions: &Completions,
        used: &[bool],
        replicas: &Replicas,
    ) -> bool {
        let rows: Vec<usize> = (0..used.len()).collect();
        let microbatching = config.microbatching();
        let whole = config.minibatches == 1
            && replicas.size() == 1
            && !used.contains(&false)
            && microbatching.cut(&completions.batch, &rows).len() == 1;
        let learns = !policy.named_parameters().is_empty()
            && (critic.shares_trunk() || !critic.named_parameters().is_empty());
        let split = policy.parameter_shards().is_some() || critic.parameter_shards().is_some();
        whole && learns && !split && config.ppo_epochs > 0
    }

    /// Values of all samples, and where they come from one trunk their log-probabilities.
    pub(crate) fn record<P: Policy, V: Critic<P>>(
        config: &PpoConfig,
        (policy, critic): (&P, &V),
        completions: &Completions,
    ) -> Result<Self> {
        let batch = &completions.batch;
        let options = LogprobOptions {
            temperature: config.temperature(),
            entropy: true,
        };
        let (scores, values) = tch::with_grad(|| -> rlhf_core::Result<_> {
            match critic.shares_trunk() {
                true => {
                    let kept = completions.kept.as_deref();
                    let (scores, values) = critic.scores_with(policy, batch, kept, &options)?;
                    Ok((Some(scores), values))
                }
                false => Ok((None, critic.values_with(policy, batch)?)),
            }
        })?;
        check_shape("values", &values, batch, 1)?;
        if let Some(scores) = &scores {
            check_shape("logprobs", &scores.logprobs, batch, 0)?;
        }
        let weights = policy.named_parameters().into_iter();
        let weights = weights.chain(critic.named_parameters());
        let weights = weights
            .map(|(_, weight)| Saved::new(&weight))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            scores,
            values,
            weights,
        })
    }

    /// `[B, R + 1]` f32 on the CPU.
    pub(crate) fn values(&self) -> Result<Tensor> {
        on_host(&self.values)
    }

    /// `[B, R]` f32 on the CPU, where the policy was gone through.
    pub(crate) fn logprobs(&self) -> Option<Result<Tensor>> {
        let on_host = |scores: &TokenLogprobs| {
            let logprobs = on_host(&scores.logprobs)?;
            check_finite("the policy's log-probability", &logprobs)?;
            Ok(logprobs)
        };
        self.scores.as_ref().map(on_host)
    }

    /// Takes the pass out of its rollout, for an optimiser step on these microbatches. It is of no use
    /// if a weight has been written to since: by another update, or from a checkpoint.
    pub(crate) fn take(
        kept: &RefCell<Option<Self>>,
        samples: usize,
        microbatches: &[Microbatch],
    ) -> Option<Self> {
        let pass = kept.take()?;
        let whole = microbatches.len() == 1 && microbatches[0].batch.len() == samples;
        let still = pass.weights.iter().all(|weight| weight.get().is_ok());
        (whole && still).then_some(pass)
    }
}

fn on_host(numbers: &Tensor) -> Result<Tensor> {
    let numbers = numbers.f_detach()?.f_to_kind(Kind::Float)?;
    Ok(numbers.f_to_device(Device::Cpu)?)
}
