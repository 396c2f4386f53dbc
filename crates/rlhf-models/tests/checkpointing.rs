//! Gradient checkpointing of every architecture: the gradients are those of a plain run, bit for
//! bit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{adapter_dir, model_dir};
use rlhf_core::{LogprobOptions, Parameters, Policy, Scorer, Sequence, SequenceBatch, ValueModel};
use rlhf_models::{
    CausalLm, CheckpointPolicy, GradientCheckpointing, LoadOptions, SequenceClassifier,
    ValueHeadModel,
};
use rlhf_scale::clear_grads;
use tch::{Kind, Tensor};

const POLICIES: [CheckpointPolicy; 4] = [
    CheckpointPolicy::None,
    CheckpointPolicy::EveryBlock,
    CheckpointPolicy::EveryKth(2),
    CheckpointPolicy::SquareRoot,
];

fn batch() -> SequenceBatch {
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 8]),
        Sequence::new([7], [1, 1, 4, 20, 6]),
        Sequence::new([11, 3, 3, 2], [9, 2]),
    ])
    .unwrap()
}

/// The gradients of a model's weights by name, which are cleared.
fn take_grads(model: &dyn Parameters) -> Vec<(String, Tensor)> {
    let parameters = model.named_parameters();
    let leaves: Vec<Tensor> = parameters.iter().map(|(_, p)| p.shallow_clone()).collect();
    let grads = parameters
        .into_iter()
        .filter(|(_, parameter)| parameter.grad().defined())
        .map(|(name, parameter)| (name, parameter.grad().copy()))
        .collect();
    clear_grads(&leaves).unwrap();
    grads
}

/// Runs `loss` under every policy.
fn assert_equal_under_every_policy<M: Parameters>(
    model: &mut M,
    set: fn(&mut M, GradientCheckpointing),
    loss: impl Fn(&M) -> Tensor,
) {
    let mut expected: Option<(Tensor, Vec<(String, Tensor)>)> = None;
    for policy in POLICIES {
        for offload in [false, true] {
            set(model, GradientCheckpointing { policy, offload });
            let loss = loss(model);
            loss.backward();
            let grads = take_grads(model);
            let Some((expected_loss, expected_grads)) = &expected else {
                assert!(grads.len() > 10, "{} gradients", grads.len());
                expected = Some((loss.detach(), grads));
                continue;
            };
            assert!(loss.equal(expected_loss), "{policy:?}");
            assert_eq!(grads.len(), expected_grads.len());
            for ((name, grad), (_, expected)) in grads.iter().zip(expected_grads) {
                assert!(grad.equal(expected), "{name} differs under {policy:?}");
            }
        }
    }
}

const ARCHITECTURES: [&str; 7] = [
    "gemma2", "gpt2", "gpt_neox", "llama", "mistral", "qwen2", "qwen3",
];

#[test]
fn a_language_model() {
    for architecture in ARCHITECTURES {
        let dir = model_dir(architecture);
        let mut model = CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap();
        let set = |model: &mut CausalLm, checkpointing| {
            model.set_gradient_checkpointing(checkpointing).unwrap();
        };
        assert_equal_under_every_policy(&mut model, set, |model| {
            let options = LogprobOptions {
                temperature: 0.9,
                entropy: true,
            };
            let scores = model.logprobs(&batch(), &options).unwrap();
            scores.logprobs.sum(Kind::Float) + scores.entropy.unwrap().square().sum(Kind::Float)
        });
    }
}

#[test]
fn lora_adapters() {
    for (architecture, adapter) in [("gpt2", "gpt2_attn_mlp"), ("llama", "llama_all_rslora")] {
        let dir = model_dir(architecture);
        let mut model = CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap();
        model.load_adapter(adapter_dir(adapter)).unwrap();
        let set = |model: &mut CausalLm, checkpointing| {
            model.set_gradient_checkpointing(checkpointing).unwrap();
        };
        assert_equal_under_every_policy(&mut model, set, |model| {
            let scores = model.logprobs(&batch(), &LogprobOptions::default());
            scores.unwrap().logprobs.sum(Kind::Float)
        });
        let mut critic = ValueHeadModel::on_base_of(&model, model.adapter().unwrap(), 1).unwrap();
        let set = |model: &mut ValueHeadModel, checkpointing| {
            model.set_gradient_checkpointing(checkpointing).unwrap();
        };
        assert_equal_under_every_policy(&mut critic, set, |model| {
            model.values(&batch()).unwrap().square().sum(Kind::Float)
        });
    }
}

#[test]
fn a_classifier_and_a_value_model() {
    for architecture in ARCHITECTURES {
        let dir = model_dir(architecture);
        let model = CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap();
        let mut classifier = SequenceClassifier::from_causal_lm(&model, 2, 1).unwrap();
        let set = |model: &mut SequenceClassifier, checkpointing| {
            model.set_gradient_checkpointing(checkpointing).unwrap();
        };
        assert_equal_under_every_policy(&mut classifier, set, |model| {
            model.scores(&batch()).unwrap().square().sum(Kind::Float)
        });
        let mut critic = ValueHeadModel::from_causal_lm(&model, 1).unwrap();
        let set = |model: &mut ValueHeadModel, checkpointing| {
            model.set_gradient_checkpointing(checkpointing).unwrap();
        };
        assert_equal_under_every_policy(&mut critic, set, |model| {
            model.values(&batch()).unwrap().square().sum(Kind::Float)
        });
    }
}

#[test]
fn the_switch_is_in_the_options_and_goes_with_copies() {
    let options = LoadOptions {
        gradient_checkpointing: CheckpointPolicy::EveryBlock.into(),
        ..LoadOptions::default()
    };
    let model = CausalLm::from_pretrained(model_dir("gpt2"), &options).unwrap();
    let copy = model.try_clone().unwrap();
    assert_eq!(
        copy.gradient_checkpointing(),
        options.gradient_checkpointing
    );
    let classifier = SequenceClassifier::from_causal_lm(&model, 1, 0).unwrap();
    assert_eq!(
        classifier.gradient_checkpointing(),
        options.gradient_checkpointing
    );

    let no_blocks = GradientCheckpointing::from(CheckpointPolicy::EveryKth(0));
    let options = LoadOptions {
        gradient_checkpointing: no_blocks,
        ..options
    };
    let error = CausalLm::from_pretrained(model_dir("gpt2"), &options)
        .err()
        .unwrap();
    assert!(error.to_string().contains("every_kth = 0"), "{error}");
}
