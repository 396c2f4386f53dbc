//! A prompt that several sequences share is computed once, and nothing else changes: values and
//! gradients are those of sequences that each have a prompt of their own.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::language_models;
use rlhf_core::{LogprobOptions, Parameters, Policy, Scorer, Sequence, SequenceBatch, ValueModel};
use rlhf_models::{CausalLm, CheckpointPolicy, LoadOptions, SequenceClassifier, ValueHeadModel};
use rlhf_scale::clear_grads;
use tch::{Device, Kind, Tensor};

/// Of the largest number of its kind: f32 sums of a few hundred terms in another order.
const TOLERANCE: f64 = 1e-5;

/// Prompts that are shared by neighbours and others, one of a single token, one whose first
/// response is empty, and two that are not shared; responses of all lengths from none.
fn shared() -> SequenceBatch {
    let long: Arc<[i64]> = [5, 9, 2, 14, 7, 3, 3, 8, 16].into();
    let short: Arc<[i64]> = [7].into();
    let bare: Arc<[i64]> = [12, 1, 6].into();
    let of = |prompt: &Arc<[i64]>, response: &[i64]| Sequence::new(Arc::clone(prompt), response);
    SequenceBatch::new(vec![
        of(&long, &[3, 8]),
        of(&short, &[2, 5, 5]),
        of(&long, &[1, 1, 4, 20, 6, 9, 13, 2]),
        Sequence::new([11, 3, 3, 2], [9, 2]),
        of(&long, &[]),
        of(&bare, &[]),
        of(&long, &[6]),
        of(&long, &[4, 17]),
        of(&long, &[17, 4]),
        of(&short, &[]),
        Sequence::new([4, 4], []),
        of(&bare, &[2, 3]),
        of(&short, &[8]),
    ])
    .unwrap()
}

/// The same sequences, each with an `Arc` of its own.
fn apart(batch: &SequenceBatch) -> SequenceBatch {
    let copy = |s: &Sequence| Sequence::new(s.prompt.to_vec(), s.response.clone());
    SequenceBatch::new(batch.sequences().iter().map(copy).collect()).unwrap()
}

/// The gradients of a model's weights by name, which are cleared.
fn take_grads(model: &dyn Parameters) -> Vec<(String, Tensor)> {
    let parameters = model.named_parameters();
    let leaves: Vec<Tensor> = parameters.iter().map(|(_, p)| p.shallow_clone()).collect();
    let grads = parameters
        .into_iter()
        .map(|(name, parameter)| (name, parameter.grad().copy()))
        .collect();
    clear_grads(&leaves).unwrap();
    grads
}

fn largest(tensor: &Tensor) -> f64 {
    tensor.abs().max().double_value(&[])
}

fn assert_same(what: &str, got: &Tensor, want: &Tensor, scale: f64) {
    assert_eq!(got.size(), want.size(), "{what}");
    let off = largest(&(got - want));
    assert!(
        off <= TOLERANCE * scale,
        "{what}: off by {off:e} of {scale:e}"
    );
}

/// Runs `numbers` on both forms of the batch, and backward through a sum that weighs each number
/// differently.
fn assert_sharing_changes_nothing<M: Parameters>(
    what: &str,
    model: &M,
    numbers: impl Fn(&M, &SequenceBatch) -> Tensor,
) {
    let run = |batch: &SequenceBatch| {
        let numbers = numbers(model, batch);
        let weights = (Tensor::arange(numbers.numel() as i64, (Kind::Float, Device::Cpu)) * 0.7)
            .sin()
            .view_as(&numbers);
        (&numbers * weights).sum(Kind::Float).backward();
        (numbers.detach(), take_grads(model))
    };
    let batch = shared();
    let (got, got_grads) = run(&batch);
    let (want, want_grads) = run(&apart(&batch));
    assert_same(what, &got, &want, largest(&want));
    // Some gradients are 0 but for rounding, as those of the keys' biases: nothing is relative to
    // them alone.
    let floor = 1e-3
        * want_grads
            .iter()
            .map(|(_, g)| largest(g))
            .fold(0.0, f64::max);
    for ((name, got), (_, want)) in got_grads.iter().zip(&want_grads) {
        let scale = largest(want).max(floor);
        assert_same(&format!("{what}: {name}"), got, want, scale);
    }
}

fn logprobs(model: &CausalLm, batch: &SequenceBatch) -> Tensor {
    let options = LogprobOptions {
        temperature: 0.9,
        entropy: true,
    };
    let scored = model.logprobs(batch, &options).unwrap();
    Tensor::stack(&[scored.logprobs, scored.entropy.unwrap()], 0)
}

const POLICIES: [CheckpointPolicy; 2] = [CheckpointPolicy::None, CheckpointPolicy::EveryBlock];

#[test]
fn language_models_of_every_architecture() {
    for (name, dir) in language_models() {
        let options = LoadOptions {
            kind: Some(Kind::Float),
            ..LoadOptions::default()
        };
        let mut model = CausalLm::from_pretrained(dir, &options).unwrap();
        let batch = shared();
        let rows = |packed| model.hidden_states(&packed).unwrap().size()[0];
        let (once, each) = (
            rows(batch.packed(Device::Cpu)),
            rows(batch.packed_apart(Device::Cpu)),
        );
        assert_eq!(each - once, 5 * 9 + 2 + 3, "{name}");
        for policy in POLICIES {
            model.set_gradient_checkpointing(policy.into()).unwrap();
            let what = format!("{name}, {policy:?}");
            assert_sharing_changes_nothing(&what, &model, logprobs);
        }
    }
}

#[test]
fn critics_and_classifiers_of_every_architecture() {
    for (name, dir) in language_models() {
        let options = LoadOptions {
            kind: Some(Kind::Float),
            ..LoadOptions::default()
        };
        let model = CausalLm::from_pretrained(dir, &options).unwrap();
        let mut critic = ValueHeadModel::from_causal_lm(&model, 1).unwrap();
        let mut classifier = SequenceClassifier::from_causal_lm(&model, 2, 1).unwrap();
        for policy in POLICIES {
            critic.set_gradient_checkpointing(policy.into()).unwrap();
            classifier
                .set_gradient_checkpointing(policy.into())
                .unwrap();
            let what = format!("{name}, {policy:?}");
            assert_sharing_changes_nothing(&what, &critic, |model, batch| {
                model.values(batch).unwrap()
            });
            assert_sharing_changes_nothing(&what, &classifier, |model, batch| {
                model.scores(batch).unwrap()
            });
        }
    }
}
