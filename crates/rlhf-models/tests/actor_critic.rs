//! The value head on a language model's trunk, and log-probabilities within kept sets.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use rlhf_core::{
    ActorCritic, Error, KeptSet, KeptTokens, LogprobOptions, PaddingSide, Parameters, Policy,
    Sequence, SequenceBatch, ValueModel, response_logprobs_within,
};
use rlhf_models::{CausalLm, CausalLmWithValueHead, LoadOptions, ValueHeadInit, ValueHeadModel};
use tch::{Device, Kind, Tensor};

fn model(name: &str) -> CausalLm {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models");
    CausalLm::from_pretrained(format!("{root}/{name}"), &LoadOptions::default()).unwrap()
}

/// Two answers to one prompt, an empty one, another prompt.
fn batch() -> SequenceBatch {
    let prompt: std::sync::Arc<[i64]> = [5, 6, 7].into();
    SequenceBatch::new(vec![
        Sequence::new(prompt.clone(), [8, 9, 10, 11]),
        Sequence::new([3], []),
        Sequence::new(prompt, [12, 13]),
        Sequence::new([20, 21], [22, 23, 24]),
    ])
    .unwrap()
}

/// Every form of a set; each holds its token.
fn kept(batch: &SequenceBatch, vocab: i64) -> Vec<KeptTokens> {
    let of = |(row, s): (usize, &Sequence)| -> KeptTokens {
        let set = |(t, &id): (usize, &i64)| {
            let keeps = |other: i64| match (row + t) % 4 {
                0 => true,
                1 => other == id || other % 97 == 1,
                2 => other == id || other != 40,
                _ => other == id || (other * 7) % 5 < 2,
            };
            KeptSet::of(&(0..vocab).map(keeps).collect::<Vec<bool>>())
        };
        s.response.iter().enumerate().map(set).collect()
    };
    batch.sequences().iter().enumerate().map(of).collect()
}

fn options() -> LogprobOptions {
    LogprobOptions {
        temperature: 0.7,
        entropy: true,
    }
}

#[track_caller]
fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    assert_eq!(a.size(), b.size(), "{what}");
    let gap = f64::try_from((a - b).abs().max()).unwrap();
    assert!(gap < tolerance, "{what} is off by {gap}");
}

/// The packed path in chunks against all logits of the padded batch, gradients included.
#[test]
fn kept_logprobs_and_gradients_are_those_of_all_logits() {
    for name in ["llama", "gpt2", "gemma2"] {
        let batch = batch();
        let run = |chunk: Option<usize>| {
            let mut model = model(name);
            model.set_logprob_chunk_rows(chunk).unwrap();
            let kept = kept(&batch, model.config().vocab_size());
            let out = match chunk {
                Some(_) => model.logprobs_within(&batch, &kept, &options()).unwrap(),
                None => {
                    let padded = batch.padded(0, PaddingSide::Right, Device::Cpu);
                    let logits = model.logits(&padded).unwrap();
                    response_logprobs_within(&logits, &batch, &kept, &options()).unwrap()
                }
            };
            let entropy = out.entropy.unwrap();
            let loss = (&out.logprobs * out.logprobs.cos()).sum(Kind::Float)
                + entropy.square().sum(Kind::Float);
            loss.backward();
            let mut grads = model.named_parameters();
            for (_, parameter) in &mut grads {
                *parameter = parameter.grad();
            }
            (out.logprobs.detach(), entropy.detach(), grads)
        };
        let (want, want_entropy, want_grads) = run(None);
        let (got, entropy, grads) = run(Some(4));
        assert_close(name, &got, &want, 1e-4);
        assert_close(name, &entropy, &want_entropy, 1e-4);
        for ((parameter, got), (_, want)) in grads.iter().zip(&want_grads) {
            let scale = f64::try_from(want.abs().max()).unwrap().max(1e-3);
            assert_close(parameter, got, want, 2e-4 * scale.max(1.0));
        }
        // Within all tokens it is the plain log-probability.
        let model = model(name);
        let all: Vec<KeptTokens> = batch
            .sequences()
            .iter()
            .map(|s| vec![KeptSet::All; s.response.len()].into())
            .collect();
        let plain = model.logprobs(&batch, &options()).unwrap();
        let within = model.logprobs_within(&batch, &all, &options()).unwrap();
        assert_close(name, &within.logprobs, &plain.logprobs, 1e-5);
        let gap = (&got - &plain.logprobs).abs().max();
        assert!(
            f64::try_from(gap).unwrap() > 0.1,
            "the sets dropped nothing"
        );
        let error = model
            .logprobs_within(&batch, &all[1..], &options())
            .unwrap_err();
        assert!(matches!(error, Error::LengthMismatch { .. }));
    }
}

#[test]
fn one_pass_gives_logprobs_and_values() {
    let batch = batch();
    let lm = model("llama");
    let vocab = lm.config().vocab_size();
    let critic = ValueHeadModel::from_causal_lm(&lm, 7).unwrap();
    let score = critic.named_parameters();
    let (_, score) = score
        .iter()
        .find(|(name, _)| name == "score.weight")
        .unwrap();
    let model = CausalLmWithValueHead::new(model("llama"), ValueHeadInit::Zeros, 0).unwrap();
    let head = model.named_parameters();
    let named = |name: &str| {
        head.iter()
            .find(|(n, _)| n == name)
            .unwrap()
            .1
            .shallow_clone()
    };
    {
        let _no_grad = tch::no_grad_guard();
        named("v_head.summary.weight").copy_(score);
        let _ = named("v_head.summary.bias").fill_(0.25);
    }
    for sets in [None, Some(kept(&batch, vocab))] {
        let (scores, values) = model
            .logprobs_and_values(&batch, sets.as_deref(), &options())
            .unwrap();
        let want = match &sets {
            None => lm.logprobs(&batch, &options()).unwrap(),
            Some(sets) => lm.logprobs_within(&batch, sets, &options()).unwrap(),
        };
        assert_close("logprobs", &scores.logprobs, &want.logprobs, 1e-5);
        assert_close(
            "entropy",
            &scores.entropy.unwrap(),
            &want.entropy.unwrap(),
            1e-5,
        );
        let of_critic = critic.values(&batch).unwrap();
        let exists = of_critic.ne(0.0);
        assert_close("values", &values, &(of_critic + exists * 0.25), 1e-5);
        assert_close(
            "state values",
            &model.state_values(&batch).unwrap(),
            &values,
            1e-6,
        );
    }
    let (_, values) = model.logprobs_and_values(&batch, None, &options()).unwrap();
    values.sum(Kind::Float).backward();
    let trunk = model.language_model().named_parameters();
    let reached = trunk.iter().filter(|(_, p)| p.grad().defined());
    assert!(reached.count() > 10);
    // The bias is there once for every state: 5 + 1 + 3 + 4.
    assert_eq!(named("v_head.summary.bias").grad().double_value(&[0]), 13.0);
}

#[test]
fn heads_begin_as_they_say() {
    let lm = model("llama");
    let width = lm.config().hidden_size() as f64;
    let deviation = |init| {
        let critic = ValueHeadModel::from_causal_lm_with(&lm, init, 3).unwrap();
        let score = critic.named_parameters();
        let (_, score) = score
            .iter()
            .find(|(name, _)| name == "score.weight")
            .unwrap();
        f64::try_from(score.detach().square().mean(Kind::Double).sqrt()).unwrap()
    };
    let near = |got: f64, want: f64| assert!((got / want - 1.0).abs() < 0.35, "{got} {want}");
    near(
        deviation(ValueHeadInit::InverseSqrt),
        1.0 / (width + 1.0).sqrt(),
    );
    near(deviation(ValueHeadInit::Inverse), 1.0 / (width + 1.0));
    assert_eq!(deviation(ValueHeadInit::Zeros), 0.0);
}
