//! Generation with a policy that has nothing but `logits`.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::Bigram;
use rlhf_core::{
    Completions, Error, FinishReason, GenerationConfig, LogprobOptions, PaddedBatch, Parameters,
    Policy, Result, RngStreams, SamplingConfig, Tensor, generate,
};

const STREAMS: fn() -> RngStreams = || RngStreams::new(5);

fn prompts(prompts: &[&[i64]]) -> Vec<Arc<[i64]>> {
    prompts.iter().map(|&p| p.into()).collect()
}

fn responses(completions: &Completions) -> Vec<Vec<i64>> {
    let sequences = completions.batch.sequences();
    sequences.iter().map(|s| s.response.clone()).collect()
}

fn sampling(max_new_tokens: usize) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens,
        ..GenerationConfig::default()
    }
}

/// After token i comes token i + 1, most likely.
fn counter() -> Bigram {
    let mut table = [[0f32; 6]; 6];
    for (i, row) in table.iter_mut().enumerate() {
        row[(i + 1) % 6] = 3.0;
    }
    Bigram::new(table)
}

#[test]
fn greedy_responses_end_at_stop_tokens_and_limits() {
    let config = GenerationConfig {
        sampling: SamplingConfig::greedy(),
        stop_token_ids: vec![5],
        ..sampling(3)
    };
    let prompts = prompts(&[&[0], &[1, 1, 3], &[4]]);
    let out = generate(&counter(), &prompts, &config, &STREAMS(), 0).unwrap();
    assert_eq!(responses(&out), [vec![1, 2, 3], vec![4, 5], vec![5]]);
    use FinishReason::{Length, Stop};
    assert_eq!(out.finish_reasons, [Length, Stop, Stop]);
    let lengths: Vec<_> = out
        .sampling_logprobs
        .unwrap()
        .iter()
        .map(Vec::len)
        .collect();
    assert_eq!(lengths, [3, 2, 1]);
}

#[test]
fn stop_tokens_are_banned_until_the_least_length() {
    let config = GenerationConfig {
        sampling: SamplingConfig::greedy(),
        stop_token_ids: vec![5],
        min_new_tokens: 2,
        ..sampling(8)
    };
    let prompts = prompts(&[&[4], &[3]]);
    let out = generate(&counter(), &prompts, &config, &STREAMS(), 0).unwrap();
    // Where 5 is due and banned, the others are all alike and 0 is the first.
    let expected = [vec![0, 1, 2, 3, 4, 5], vec![4, 0, 1, 2, 3, 4, 5]];
    assert_eq!(responses(&out), expected);
}

#[test]
fn the_repetition_penalty_sees_prompt_and_response() {
    let config = GenerationConfig {
        sampling: SamplingConfig {
            repetition_penalty: 100.0,
            ..SamplingConfig::greedy()
        },
        ..sampling(3)
    };
    // Each token likes itself best, and then the next.
    let mut table = [[1f32; 4]; 4];
    for (i, row) in table.iter_mut().enumerate() {
        row[i] = 3.0;
        row[(i + 1) % 4] = 2.0;
    }
    let prompts = prompts(&[&[1, 0], &[2]]);
    let out = generate(&Bigram::new(table), &prompts, &config, &STREAMS(), 0).unwrap();
    assert_eq!(responses(&out), [[2, 3, 3], [3, 0, 1]]);
    // What was seen moves up with its row when another leaves.
    let config = GenerationConfig {
        stop_token_ids: vec![2],
        ..config
    };
    let out = generate(&Bigram::new(table), &prompts, &config, &STREAMS(), 0).unwrap();
    assert_eq!(responses(&out), [vec![2], vec![3, 0, 1]]);
}

#[test]
fn samples_follow_the_distribution() {
    let policy = Bigram::arbitrary::<6>();
    let config = GenerationConfig {
        samples_per_prompt: 6000,
        batch_size: 1000,
        sampling: SamplingConfig {
            temperature: 0.8,
            ..SamplingConfig::default()
        },
        ..sampling(2)
    };
    let out = generate(&policy, &prompts(&[&[2]]), &config, &STREAMS(), 0).unwrap();
    let probabilities = (&policy.table / 0.8).softmax(-1, rlhf_core::Kind::Double);
    let first = probabilities.get(2);
    let second = first.unsqueeze(0).matmul(&probabilities).squeeze();
    for (position, expected) in [first, second].into_iter().enumerate() {
        let mut counts = [0f64; 6];
        for response in responses(&out) {
            counts[response[position] as usize] += 1.0;
        }
        let chi_square: f64 = (0..6)
            .map(|v| {
                let expected = 6000.0 * expected.double_value(&[v]);
                (counts[v as usize] - expected).powi(2) / expected
            })
            .sum();
        // Five degrees of freedom: one sampler in a thousand is as far off by chance.
        assert!(chi_square < 20.5, "{counts:?}: chi-square {chi_square}");
    }
}

#[test]
fn filtered_tokens_are_never_sampled() {
    let policy = Bigram::arbitrary::<6>();
    let config = GenerationConfig {
        samples_per_prompt: 500,
        sampling: SamplingConfig {
            top_k: Some(2),
            ..SamplingConfig::default()
        },
        ..sampling(1)
    };
    let out = generate(&policy, &prompts(&[&[3]]), &config, &STREAMS(), 0).unwrap();
    let (_, best) = policy.table.get(3).topk(2, -1, true, true);
    let best = Vec::<i64>::try_from(best).unwrap();
    let mut drawn: Vec<i64> = responses(&out).concat();
    // The log-probs are those of the two that are left.
    let (a, b) = (
        policy.table.double_value(&[3, best[0]]),
        policy.table.double_value(&[3, best[1]]),
    );
    let likeliest = a - (a.exp() + b.exp()).ln();
    let at = drawn.iter().position(|&t| t == best[0]).unwrap();
    let logprob = out.sampling_logprobs.unwrap()[at][0];
    assert!((f64::from(logprob) - likeliest).abs() < 1e-6);
    drawn.sort_unstable();
    drawn.dedup();
    let mut best = best;
    best.sort_unstable();
    assert_eq!(drawn, best);
}

#[test]
fn samples_depend_on_their_index_and_nothing_else() {
    let policy = Bigram::arbitrary::<7>();
    let prompts = prompts(&[&[0], &[1, 2, 3], &[4, 4], &[5, 6, 1, 2], &[3]]);
    let config = |batch_size| GenerationConfig {
        samples_per_prompt: 3,
        stop_token_ids: vec![6],
        batch_size,
        ..sampling(9)
    };
    let all = generate(&policy, &prompts, &config(64), &STREAMS(), 100).unwrap();
    assert_eq!(all.batch.len(), 15);
    for batch_size in [1, 4] {
        let again = generate(&policy, &prompts, &config(batch_size), &STREAMS(), 100).unwrap();
        assert_eq!(again.batch, all.batch);
        assert_eq!(again.sampling_logprobs, all.sampling_logprobs);
        assert_eq!(again.finish_reasons, all.finish_reasons);
    }
    let third = generate(&policy, &prompts[2..3], &config(64), &STREAMS(), 106).unwrap();
    assert_eq!(responses(&third), responses(&all)[6..9]);
    let other_seed = generate(&policy, &prompts, &config(64), &RngStreams::new(6), 100).unwrap();
    assert_ne!(other_seed.batch, all.batch);
    // Samples of one prompt share it, and differ.
    let sequences = all.batch.sequences();
    for rows in sequences.chunks(3) {
        assert!(rows.iter().all(|s| Arc::ptr_eq(&s.prompt, &rows[0].prompt)));
    }
    assert!(sequences.chunks(3).any(|r| r[0].response != r[1].response));
}

#[test]
fn sampling_logprobs_are_the_policys_own() {
    let policy = Bigram::arbitrary::<7>();
    let prompts = prompts(&[&[0], &[1, 2, 3], &[4, 4]]);
    let config = GenerationConfig {
        samples_per_prompt: 2,
        stop_token_ids: vec![2],
        sampling: SamplingConfig {
            temperature: 0.7,
            ..SamplingConfig::default()
        },
        ..sampling(8)
    };
    let out = generate(&policy, &prompts, &config, &STREAMS(), 0).unwrap();
    let options = LogprobOptions {
        temperature: 0.7,
        entropy: false,
    };
    let scored = policy.logprobs(&out.batch, &options).unwrap().logprobs;
    for (i, row) in out.sampling_logprobs.unwrap().iter().enumerate() {
        for (t, &logprob) in row.iter().enumerate() {
            let expected = scored.double_value(&[i as i64, t as i64]);
            let difference = (f64::from(logprob) - expected).abs();
            assert!(difference < 1e-6, "row {i}, token {t}: off by {difference}");
        }
    }
}

#[test]
fn responses_end_where_the_context_window_does() {
    let mut policy = counter();
    policy.max_length = Some(4);
    let config = GenerationConfig {
        sampling: SamplingConfig::greedy(),
        ..sampling(8)
    };
    let fitting = prompts(&[&[0, 1, 2], &[0]]);
    let out = generate(&policy, &fitting, &config, &STREAMS(), 0).unwrap();
    assert_eq!(responses(&out), [vec![3], vec![1, 2, 3]]);
    assert_eq!(out.finish_reasons, [FinishReason::Length; 2]);
    let full = prompts(&[&[0], &[0, 1, 2, 3]]);
    let error = generate(&policy, &full, &config, &STREAMS(), 0).unwrap_err();
    assert!(matches!(
        error,
        Error::TooLong {
            row: 1,
            length: 5,
            max_length: 4
        }
    ));
}

#[test]
fn what_cannot_be_sampled_is_an_error() {
    let run = |policy: &Bigram, prompts: &[Arc<[i64]>], config: &GenerationConfig| {
        generate(policy, prompts, config, &STREAMS(), 0).unwrap_err()
    };
    let (policy, one, config) = (counter(), prompts(&[&[0]]), sampling(2));
    assert!(matches!(run(&policy, &[], &config), Error::Empty { .. }));
    let empty = prompts(&[&[0], &[]]);
    assert!(matches!(
        run(&policy, &empty, &config),
        Error::EmptyPrompt { row: 1 }
    ));
    let zero = sampling(0);
    assert!(matches!(
        run(&policy, &one, &zero),
        Error::InvalidConfig { .. }
    ));
    let beyond = GenerationConfig {
        stop_token_ids: vec![6],
        ..config.clone()
    };
    assert!(matches!(
        run(&policy, &one, &beyond),
        Error::InvalidConfig { .. }
    ));
    let two = prompts(&[&[1], &[0]]);
    let _ = policy.table.get(0).fill_(f64::NAN);
    assert!(matches!(
        run(&policy, &two, &config),
        Error::NonFinite { row: 1, .. }
    ));
}

/// A policy that cannot be run with gradients.
struct WithoutGradients(Bigram);

impl Parameters for WithoutGradients {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.0.named_parameters()
    }
}

impl Policy for WithoutGradients {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        let logits = self.0.logits(batch)?;
        assert!(!logits.requires_grad());
        Ok(logits)
    }
}

#[test]
fn no_gradients_are_recorded() {
    let mut policy = counter();
    policy.table = policy.table.set_requires_grad(true);
    let policy = WithoutGradients(policy);
    generate(&policy, &prompts(&[&[0]]), &sampling(2), &STREAMS(), 0).unwrap();
    assert!((&policy.0.table * 2).requires_grad(), "switched on again");
}
