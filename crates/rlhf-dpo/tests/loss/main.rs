//! The losses against reference values made by running TRL, against finite differences, and
//! against their definitions where TRL has none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod definitions;
mod finite_differences;
mod goldens;
mod refusals;

use std::collections::HashMap;

use rlhf_dpo::tch::{Device, Kind, Tensor};
use rlhf_dpo::{
    BatchMeans, Divergence, DpoConfig, DpoInputs, DpoLoss, Error, Objective, PairWeighting,
    PromptLogprobs, ReferenceLogprobs, RewardShift, dpo_loss,
};

const CASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/loss_pairs");

struct Pairs(HashMap<String, Tensor>);

impl Pairs {
    fn read() -> Self {
        let tensors = Tensor::read_safetensors(format!("{CASE}/tensors.safetensors")).unwrap();
        Self(tensors.into_iter().collect())
    }

    /// Losses, and the gradients of their sum in both policy log-probs.
    fn run(&self, loss: DpoLoss, divergence: Divergence, beta: f64) -> [Tensor; 3] {
        let leaf = |name: &str| self.0[name].copy().set_requires_grad(true);
        let (chosen, rejected) = (leaf("policy_chosen_logps"), leaf("policy_rejected_logps"));
        let inputs = DpoInputs {
            policy_chosen: &chosen,
            policy_rejected: &rejected,
            reference: Some(ReferenceLogprobs {
                chosen: &self.0["ref_chosen_logps"],
                rejected: &self.0["ref_rejected_logps"],
            }),
            chosen_lengths: &self.0["chosen_lengths"],
            rejected_lengths: &self.0["rejected_lengths"],
            prompt: None,
            pair_weights: None,
            means: None,
        };
        let out = dpo_loss(inputs, loss, divergence, beta).unwrap();
        out.losses.sum(Kind::Float).backward();
        [out.losses.detach(), chosen.grad(), rejected.grad()]
    }
}

fn one(x: f64) -> Tensor {
    Tensor::from_slice(&[x as f32])
}

/// One pair: `log π` and `log π_ref` of both answers, and their lengths.
struct OnePair([Tensor; 2], [Tensor; 2], [Tensor; 2]);

impl OnePair {
    fn new(policy: [f64; 2], reference: [f64; 2], lengths: [f64; 2]) -> Self {
        Self(policy.map(one), reference.map(one), lengths.map(one))
    }

    fn inputs(&self, referenced: bool) -> DpoInputs<'_> {
        DpoInputs {
            policy_chosen: &self.0[0],
            policy_rejected: &self.0[1],
            reference: referenced.then_some(ReferenceLogprobs {
                chosen: &self.1[0],
                rejected: &self.1[1],
            }),
            chosen_lengths: &self.2[0],
            rejected_lengths: &self.2[1],
            prompt: None,
            pair_weights: None,
            means: None,
        }
    }

    fn loss(&self, loss: DpoLoss, beta: f64, referenced: bool) -> f64 {
        let out = dpo_loss(self.inputs(referenced), loss, Divergence::ReverseKl, beta).unwrap();
        out.losses.double_value(&[0])
    }
}
