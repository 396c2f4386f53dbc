//! Rows that come and go, stop strings, streams, and the best of several responses.
#![allow(clippy::unwrap_used, clippy::panic)]

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use common::Bigram;
use rlhf_core::{
    Completions, Decoder, Error, FinishReason, GenerationConfig, Generator, PaddedBatch,
    Parameters, Policy, RecomputeDecoder, Result, RngStreams, SamplingConfig, Tensor, generate,
    reward_fn,
};

/// A policy that counts what its decoder is asked.
struct Counted {
    policy: Bigram,
    prefilled: AtomicUsize,
    steps: AtomicUsize,
    most_rows: AtomicUsize,
    most_cells: AtomicUsize,
}

impl Counted {
    fn new(policy: Bigram) -> Self {
        let zero = || AtomicUsize::new(0);
        Self {
            policy,
            prefilled: zero(),
            steps: zero(),
            most_rows: zero(),
            most_cells: zero(),
        }
    }
}

impl Parameters for Counted {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.policy.named_parameters()
    }
}

impl Policy for Counted {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        let rows = batch.rows() as usize;
        self.most_cells
            .fetch_max(rows * batch.width() as usize, Ordering::Relaxed);
        self.policy.logits(batch)
    }

    fn decoder(&self, _: usize) -> Result<Box<dyn Decoder + '_>> {
        let inner = RecomputeDecoder::new(self);
        Ok(Box::new(CountedDecoder { inner, of: self }))
    }
}

struct CountedDecoder<'a> {
    inner: RecomputeDecoder<'a, Counted>,
    of: &'a Counted,
}

impl Decoder for CountedDecoder<'_> {
    fn rows(&self) -> usize {
        self.inner.rows()
    }

    fn prefill(&mut self, prompts: &[Arc<[i64]>]) -> Result<Tensor> {
        self.of
            .prefilled
            .fetch_add(prompts.len(), Ordering::Relaxed);
        self.inner.prefill(prompts)
    }

    fn step(&mut self, tokens: &[i64]) -> Result<Tensor> {
        self.of.steps.fetch_add(1, Ordering::Relaxed);
        self.of.most_rows.fetch_max(tokens.len(), Ordering::Relaxed);
        self.inner.step(tokens)
    }

    fn select(&mut self, rows: &[usize]) -> Result<()> {
        self.inner.select(rows)
    }

    fn rewind(&mut self, row: usize, tokens: usize) -> Result<()> {
        self.inner.rewind(row, tokens)
    }
}

/// Token i is the i-th letter.
fn letters(ids: &[i64]) -> Result<String> {
    Ok(ids.iter().map(|&id| (b'a' + id as u8) as char).collect())
}

/// After token i comes token i + 1, most likely.
fn counter() -> Bigram {
    let mut table = [[0f32; 6]; 6];
    for (i, row) in table.iter_mut().enumerate() {
        row[(i + 1) % 6] = 3.0;
    }
    Bigram::new(table)
}

fn prompts(count: i64) -> Vec<Arc<[i64]>> {
    (0..count)
        .map(|k| (0..1 + (k * 5) % 7).map(|t| (k + t) % 7).collect())
        .collect()
}

fn streams() -> RngStreams {
    RngStreams::new(11)
}

fn check_same(a: &Completions, b: &Completions, what: &str) {
    assert_eq!(a.batch, b.batch, "{what}");
    assert_eq!(a.finish_reasons, b.finish_reasons, "{what}");
    assert_eq!(a.sampling_logprobs, b.sampling_logprobs, "{what}");
    assert_eq!(a.policy_logprobs, b.policy_logprobs, "{what}");
}

#[test]
fn what_is_written_does_not_depend_on_who_else_is_there() {
    let prompts = prompts(9);
    let config = |samples_per_prompt, batch_size, max_cached_tokens| GenerationConfig {
        max_new_tokens: 11,
        min_new_tokens: 2,
        stop_token_ids: vec![5, 6],
        samples_per_prompt,
        batch_size,
        max_cached_tokens,
        sampling: SamplingConfig {
            temperature: 0.9,
            top_p: Some(0.95),
            repetition_penalty: 1.2,
            ..SamplingConfig::default()
        },
        ..GenerationConfig::default()
    };
    for samples in [1, 4] {
        let policy = Counted::new(Bigram::arbitrary::<7>());
        let run = |config: &GenerationConfig, prompts: &[Arc<[i64]>], first| {
            generate(&policy, prompts, config, &streams(), first).unwrap()
        };
        let all = run(&config(samples, 64, None), &prompts, 40);
        for (k, prompt) in prompts.iter().enumerate() {
            let first = 40 + (k * samples) as u64;
            let alone = run(
                &config(samples, 1, None),
                std::slice::from_ref(prompt),
                first,
            );
            let among: Vec<usize> = (k * samples..(k + 1) * samples).collect();
            check_same(&alone, &all.select(&among).unwrap(), &format!("prompt {k}"));
        }
        for batch_size in [1, 2, 3, 5, 7] {
            policy.prefilled.store(0, Ordering::Relaxed);
            policy.most_rows.store(0, Ordering::Relaxed);
            let again = run(&config(samples, batch_size, None), &prompts, 40);
            check_same(&again, &all, &format!("{batch_size} side by side"));
            // Prompts are computed once, however their samples are spread over time.
            assert_eq!(policy.prefilled.load(Ordering::Relaxed), prompts.len());
            // The batch is full while there is somebody to fill it.
            assert_eq!(policy.most_rows.load(Ordering::Relaxed), batch_size);
        }
        for cached in [1, 25, 60] {
            policy.most_cells.store(0, Ordering::Relaxed);
            let again = run(&config(samples, 64, Some(cached)), &prompts, 40);
            check_same(&again, &all, &format!("{cached} tokens in the cache"));
            let longest = prompts.iter().map(|p| p.len()).max().unwrap() + 11;
            let cells = policy.most_cells.load(Ordering::Relaxed);
            assert!(cells <= cached.max(longest), "{cells} of {cached}");
        }
    }
}

#[test]
fn rows_that_end_make_room_at_once() {
    // Row k ends after 5 - k tokens: 15 in all, five of them from the prompts. Ten are left for
    // two rows side by side, whose places are never empty.
    let policy = Counted::new(counter());
    let prompts: Vec<Arc<[i64]>> = (0..5).map(|k| [k].into()).collect();
    let config = GenerationConfig {
        sampling: SamplingConfig::greedy(),
        stop_token_ids: vec![5],
        batch_size: 2,
        ..GenerationConfig::default()
    };
    let out = generate(&policy, &prompts, &config, &streams(), 0).unwrap();
    let lengths: Vec<usize> = out
        .batch
        .sequences()
        .iter()
        .map(|s| s.response.len())
        .collect();
    assert_eq!(lengths, [5, 4, 3, 2, 1]);
    assert_eq!(policy.steps.load(Ordering::Relaxed), 5);
}

#[test]
fn policy_logprobs_are_those_before_filters() {
    let policy = Bigram::arbitrary::<7>();
    let prompts = prompts(3);
    let config = GenerationConfig {
        max_new_tokens: 6,
        sampling: SamplingConfig {
            temperature: 0.5,
            top_k: Some(3),
            repetition_penalty: 1.5,
            ..SamplingConfig::default()
        },
        ..GenerationConfig::default()
    };
    for config in [
        config.clone(),
        GenerationConfig {
            sampling: SamplingConfig::greedy(),
            ..config.clone()
        },
        GenerationConfig {
            sampling: SamplingConfig::default(),
            ..config
        },
    ] {
        let out = generate(&policy, &prompts, &config, &streams(), 0).unwrap();
        let own = policy
            .logprobs(&out.batch, &rlhf_core::LogprobOptions::default())
            .unwrap()
            .logprobs;
        for (i, row) in out.policy_logprobs.unwrap().iter().enumerate() {
            for (t, &logprob) in row.iter().enumerate() {
                let expected = own.double_value(&[i as i64, t as i64]);
                assert!((f64::from(logprob) - expected).abs() < 1e-6);
            }
        }
    }
}

fn with_stops(stops: &[&str], min_new_tokens: usize) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: 9,
        min_new_tokens,
        sampling: SamplingConfig::greedy(),
        stop_strings: stops.iter().map(|s| s.to_string()).collect(),
        ..GenerationConfig::default()
    }
}

#[test]
fn stop_strings_cut_the_text_and_keep_the_tokens() {
    let policy = counter();
    let prompts: [Arc<[i64]>; 2] = [[0].into(), [3].into()];
    let write = |stops: &[&str], min| {
        let config = with_stops(stops, min);
        let generator = Generator::new(&policy, &config).unwrap();
        let generator = generator.with_detokenizer(&letters);
        generator.generate(&prompts, &streams(), 0).unwrap()
    };
    let out = write(&["zz", "cd", "f"], 0);
    let texts = |out: &Completions| -> Vec<String> {
        let texts = out.texts().unwrap().iter();
        texts.map(|t| t.response.clone()).collect()
    };
    assert_eq!(texts(&out), ["b", "e"]);
    let responses = out.batch.sequences().iter().map(|s| s.response.clone());
    assert_eq!(responses.collect::<Vec<_>>(), [vec![1, 2, 3], vec![4, 5]]);
    assert_eq!(out.finish_reasons, [FinishReason::Stop; 2]);
    // Too early for the first "cd", in time for the next.
    let out = write(&["cd"], 4);
    assert_eq!(texts(&out), ["bcdefab", "efab"]);
    let out = write(&["x"], 0);
    assert_eq!(texts(&out), ["bcdefabcd", "efabcdefa"]);
    assert_eq!(out.finish_reasons, [FinishReason::Length; 2]);
}

#[test]
fn stop_strings_and_streams_need_a_detokenizer() {
    let (policy, config) = (counter(), with_stops(&["a"], 0));
    let prompts: [Arc<[i64]>; 1] = [[0].into()];
    let error = generate(&policy, &prompts, &config, &streams(), 0).unwrap_err();
    assert!(matches!(error, Error::InvalidConfig { field, .. } if field.ends_with("stop_strings")));
    let config = with_stops(&[], 0);
    let generator = Generator::new(&policy, &config).unwrap();
    assert!(generator.stream(&prompts, &streams(), 0).is_err());
    assert!(with_stops(&[""], 0).validate().is_err());
}

#[test]
fn a_stream_gives_what_generate_gives_piece_by_piece() {
    let policy = Counted::new(Bigram::arbitrary::<7>());
    let prompts = prompts(5);
    for stops in [&[][..], &["ab", "cab", "eee"]] {
        let config = GenerationConfig {
            max_new_tokens: 20,
            stop_token_ids: vec![6],
            samples_per_prompt: 2,
            batch_size: 3,
            sampling: SamplingConfig::default(),
            ..with_stops(stops, 0)
        };
        let generator = Generator::new(&policy, &config).unwrap();
        let generator = generator.with_detokenizer(&letters);
        let whole = generator.generate(&prompts, &streams(), 0).unwrap();
        let mut texts = vec![String::new(); 10];
        let mut finished = vec![None; 10];
        for piece in generator.stream(&prompts, &streams(), 0).unwrap() {
            let piece = piece.unwrap();
            assert!(finished[piece.index].is_none(), "a piece after the last");
            assert!(!piece.text.is_empty() || piece.finish.is_some());
            texts[piece.index].push_str(&piece.text);
            finished[piece.index] = piece.finish;
        }
        let expected: Vec<_> = whole.texts().unwrap().iter().map(|t| &t.response).collect();
        assert_eq!(texts.iter().collect::<Vec<_>>(), expected);
        let finished: Vec<_> = finished.into_iter().flatten().collect();
        assert_eq!(finished, whole.finish_reasons);
    }
    // Nothing is computed before it is asked for, or after the stream is dropped.
    policy.steps.store(0, Ordering::Relaxed);
    let config = with_stops(&[], 0);
    let generator = Generator::new(&policy, &config).unwrap();
    let generator = generator.with_detokenizer(&letters);
    let mut stream = generator.stream(&prompts[..1], &streams(), 0).unwrap();
    for expected in 0..3 {
        assert_eq!(stream.next().unwrap().unwrap().text.len(), 1);
        assert_eq!(policy.steps.load(Ordering::Relaxed), expected);
    }
    drop(stream);
    assert_eq!(policy.steps.load(Ordering::Relaxed), 2);
}

#[test]
fn an_error_ends_the_stream() {
    let policy = counter();
    let _ = policy.table.get(2).fill_(f64::NAN);
    let config = with_stops(&[], 0);
    let generator = Generator::new(&policy, &config).unwrap();
    let generator = generator.with_detokenizer(&letters);
    let mut stream = generator.stream(&[[0].into()], &streams(), 0).unwrap();
    assert_eq!(stream.next().unwrap().unwrap().text, "b");
    assert_eq!(stream.next().unwrap().unwrap().text, "c");
    assert!(matches!(
        stream.next(),
        Some(Err(Error::NonFinite { row: 0, .. }))
    ));
    assert!(stream.next().is_none());
}

#[test]
fn the_best_of_n_is_the_one_with_the_highest_score() {
    let policy = Counted::new(Bigram::arbitrary::<7>());
    let prompts = prompts(4);
    let config = GenerationConfig {
        max_new_tokens: 8,
        stop_token_ids: vec![6],
        batch_size: 3,
        ..GenerationConfig::default()
    };
    let generator = Generator::new(&policy, &config).unwrap();
    let generator = generator.with_detokenizer(&letters);
    let score = |text: &str| text.matches('c').count() as f64;
    let reward = reward_fn(move |_, response: &str| score(response));
    let out = generator
        .best_of_n(&prompts, 6, &reward, &streams(), 0)
        .unwrap();
    assert_eq!(policy.prefilled.load(Ordering::Relaxed), 4);
    assert_eq!((out.best.batch.len(), out.all.batch.len()), (4, 24));
    let config = GenerationConfig {
        samples_per_prompt: 6,
        ..config.clone()
    };
    let all = generate(&policy, &prompts, &config, &streams(), 0).unwrap();
    check_same(&out.all, &all, "all responses");
    for (k, text) in out.best.texts().unwrap().iter().enumerate() {
        let scores = &out.scores[6 * k..6 * k + 6];
        let best = scores.iter().copied().fold(f64::MIN, f64::max);
        let first = scores.iter().position(|&s| s == best).unwrap();
        assert_eq!(out.best_scores[k], best);
        assert_eq!(score(&text.response), best);
        let expected = &out.all.batch.sequences()[6 * k + first];
        assert_eq!(&out.best.batch.sequences()[k], expected);
    }
    assert!(out.best_scores.iter().any(|&s| s > 0.0));
    let nan = reward_fn(|_, _: &str| 0.0);
    assert!(
        generator
            .best_of_n(&prompts, 0, &nan, &streams(), 0)
            .is_err()
    );
    struct Wrong;
    impl rlhf_core::RewardModel for Wrong {
        fn score(&self, _: &Completions) -> Result<Tensor> {
            Ok(Tensor::from_slice(&[0.0, f64::NAN]))
        }
    }
    let one = &prompts[..1];
    assert!(matches!(
        generator.best_of_n(one, 3, &Wrong, &streams(), 0),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        generator.best_of_n(one, 2, &Wrong, &streams(), 0),
        Err(Error::NonFinite { row: 1, .. })
    ));
}
