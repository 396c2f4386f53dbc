//! Greedy decoding with the cache writes what transformers writes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::{Case, assert_close, model_dir};
use rlhf_models::core::{
    Decoder, Error, GenerationConfig, PaddingSide, Policy, RngStreams, SamplingConfig, Sequence,
    SequenceBatch, generate,
};
use rlhf_models::tch::{Device, IndexOp, Kind, Tensor};
use rlhf_models::{CausalLm, LoadOptions};

/// In f32, whatever the weights are stored in, as the reference values are.
fn load(name: &str) -> CausalLm {
    let options = LoadOptions {
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    };
    CausalLm::from_pretrained(model_dir(name), &options).unwrap()
}

fn prompts(case: &Case) -> Vec<Arc<[i64]>> {
    let (ids, mask) = (
        case.rows("prompt/input_ids"),
        case.rows("prompt/attention_mask"),
    );
    ids.iter()
        .zip(&mask)
        .map(|(ids, mask)| {
            let kept = ids.iter().zip(mask).filter(|(_, m)| **m == 1);
            kept.map(|(id, _)| *id).collect()
        })
        .collect()
}

fn check(name: &str) {
    let case = Case::read(&format!("generate/{name}"));
    let model = load(name);
    let prompts = prompts(&case);
    let width = prompts.iter().map(|p| p.len()).max().unwrap();
    for (run, settings) in case.json["params"]["runs"].as_object().unwrap() {
        // The reference's penalty also sees its padding ids, which ragged prompts do not have.
        if settings.get("repetition_penalty").is_some() {
            continue;
        }
        let stop_token_ids: Vec<i64> = match &settings["eos_token_id"] {
            serde_json::Value::Array(ids) => ids.iter().map(|id| id.as_i64().unwrap()).collect(),
            id => id.as_i64().into_iter().collect(),
        };
        let config = GenerationConfig {
            max_new_tokens: 16,
            min_new_tokens: settings["min_new_tokens"].as_u64().unwrap_or(0) as usize,
            sampling: SamplingConfig::greedy(),
            stop_token_ids,
            ..GenerationConfig::default()
        };
        let written = generate(&model, &prompts, &config, &RngStreams::new(0), 0).unwrap();
        let expected = case.rows(&format!("{run}/sequences"));
        let lengths = &case.json["expect"]["new_lengths"][run];
        for (row, sequence) in written.batch.sequences().iter().enumerate() {
            let length = lengths[row].as_u64().unwrap() as usize;
            let want = &expected[row][width..width + length];
            assert_eq!(sequence.response, want, "{name}, {run}, row {row}");
        }
    }
}

#[test]
fn gpt2() {
    check("gpt2");
}

#[test]
fn llama() {
    check("llama");
}

#[test]
fn llama_with_scaled_rope() {
    check("llama_rope3");
}

#[test]
fn llama_in_shards() {
    check("llama_sharded");
}

#[test]
fn gpt_neox() {
    check("gpt_neox");
}

#[test]
fn mistral_past_its_window() {
    check("mistral");
}

#[test]
fn qwen2() {
    check("qwen2");
    check("qwen2_bf16");
}

#[test]
fn qwen3() {
    check("qwen3");
}

#[test]
fn gemma2_past_its_windows() {
    check("gemma2");
}

/// Next-token logits by the forward pass over whole sequences.
fn recomputed(model: &CausalLm, rows: &[Vec<i64>]) -> Tensor {
    let sequences = rows.iter().map(|r| Sequence::new(r.as_slice(), []));
    let batch = SequenceBatch::new(sequences.collect()).unwrap();
    let padded = batch.padded(0, PaddingSide::Left, Device::Cpu);
    let logits = model.logits(&padded).unwrap();
    logits.i((.., padded.width() - 1))
}

/// What the rows of a decoder hold, kept in step with it.
struct Checked<'a> {
    model: &'a CausalLm,
    decoder: Box<dyn Decoder + 'a>,
    rows: Vec<Vec<i64>>,
}

impl<'a> Checked<'a> {
    fn new(model: &'a CausalLm) -> Self {
        Self {
            model,
            decoder: model.decoder(8).unwrap(),
            rows: Vec::new(),
        }
    }

    fn check(&self, when: &str, rows: &[Vec<i64>], logits: &Tensor) {
        assert_eq!(logits.kind(), Kind::Float);
        assert_eq!(self.decoder.rows(), self.rows.len());
        assert_close(when, logits, &recomputed(self.model, rows), 1e-5);
    }

    fn prefill(&mut self, prompts: &[Vec<i64>]) {
        let shared: Vec<Arc<[i64]>> = prompts.iter().map(|p| p.as_slice().into()).collect();
        let logits = self.decoder.prefill(&shared).unwrap();
        self.rows.extend_from_slice(prompts);
        self.check("prefill", prompts, &logits);
    }

    fn step(&mut self, tokens: &[i64]) {
        self.rows
            .iter_mut()
            .zip(tokens)
            .for_each(|(row, id)| row.push(*id));
        let logits = self.decoder.step(tokens).unwrap();
        self.check("step", &self.rows, &logits);
    }

    fn select(&mut self, rows: &[usize]) {
        self.decoder.select(rows).unwrap();
        self.rows = rows.iter().map(|&row| self.rows[row].clone()).collect();
    }

    fn rewind(&mut self, row: usize, tokens: usize) {
        self.decoder.rewind(row, tokens).unwrap();
        self.rows[row].truncate(tokens);
    }
}

#[test]
fn cached_logits_equal_recomputed_ones_whoever_comes_and_goes() {
    for name in ["gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2"] {
        let model = load(name);
        let mut rows = Checked::new(&model);
        rows.prefill(&[vec![5, 6, 7, 8, 9], vec![40], vec![11, 12, 13]]);
        rows.step(&[100, 200, 300]);
        // The first is gone, the last takes its place and is there twice.
        rows.select(&[2, 1, 2]);
        rows.step(&[400, 500, 600]);
        rows.select(&[1, 0]); // nothing can be moved before something is lost
        rows.step(&[1, 2]);
        // Two join, one of them longer than anything before.
        rows.prefill(&[(3..30).collect(), vec![9]]);
        rows.step(&[7, 8, 9, 10]);
        rows.rewind(2, 20);
        rows.step(&[11, 12, 13, 14]);
        rows.select(&[3]);
        rows.step(&[15]);
        rows.select(&[]);
        rows.prefill(&[vec![1, 2]]);
        rows.step(&[3]);
    }
}

/// Every path through the decoder gives a row the logits that it would have alone.
#[test]
fn samples_do_not_depend_on_their_neighbours() {
    for name in ["gpt2", "llama"] {
        let model = load(name);
        let prompts: Vec<Arc<[i64]>> = (0..7i64)
            .map(|k| (k * 50..k * 50 + 1 + 4 * (k % 4)).collect())
            .collect();
        let config = |batch_size, max_cached_tokens| GenerationConfig {
            max_new_tokens: 12,
            stop_token_ids: (0..40).collect(),
            samples_per_prompt: 3,
            batch_size,
            max_cached_tokens,
            ..GenerationConfig::default()
        };
        let rng = RngStreams::new(3);
        let all = generate(&model, &prompts, &config(64, None), &rng, 0).unwrap();
        let lengths = all.batch.sequences().iter().map(|s| s.response.len());
        assert!(lengths.clone().min() < lengths.max(), "some leave early");
        for (batch_size, cached) in [(1, None), (2, None), (5, None), (8, Some(100))] {
            let config = config(batch_size, cached);
            let again = generate(&model, &prompts, &config, &rng, 0).unwrap();
            assert_eq!(again.batch, all.batch, "{name}, {batch_size} side by side");
        }
        for (k, prompt) in prompts.iter().enumerate() {
            let first = 3 * k as u64;
            let alone = generate(
                &model,
                std::slice::from_ref(prompt),
                &config(1, None),
                &rng,
                first,
            )
            .unwrap();
            let among = &all.batch.sequences()[3 * k..3 * k + 3];
            assert_eq!(alone.batch.sequences(), among, "{name}, prompt {k}");
        }
    }
}

/// The kernels for few rows, and libtorch for many: bf16 rounds differently in each.
#[test]
fn bf16_decoding_is_near_f32_decoding() {
    let options = LoadOptions {
        kind: Some(Kind::BFloat16),
        ..LoadOptions::default()
    };
    for name in ["gpt2", "llama"] {
        let narrow = CausalLm::from_pretrained(model_dir(name), &options).unwrap();
        let wide = load(name);
        let prompts: [Arc<[i64]>; 2] = [[5, 6, 7].into(), [8].into()];
        let (mut a, mut b) = (wide.decoder(8).unwrap(), narrow.decoder(8).unwrap());
        let _ = a.prefill(&prompts).unwrap();
        let _ = b.prefill(&prompts).unwrap();
        for token in 20..26 {
            let (x, y) = (a.step(&[token; 2]).unwrap(), b.step(&[token; 2]).unwrap());
            let scale = x.abs().max().double_value(&[]);
            assert_close(name, &y, &x, 0.03 * scale);
        }
    }
}

#[test]
fn rows_that_outgrow_the_context_are_an_error() {
    let model = load("gpt2"); // 64 positions
    let long: Arc<[i64]> = vec![3; 63].into();
    let mut decoder = model.decoder(8).unwrap();
    let _ = decoder.prefill(&[[3].into(), long]).unwrap();
    let _ = decoder.step(&[4, 4]).unwrap();
    let error = decoder.step(&[4, 4]).unwrap_err();
    assert!(
        matches!(
            error,
            Error::TooLong {
                row: 1,
                length: 65,
                max_length: 64
            }
        ),
        "{error}"
    );
    // The short row alone goes on.
    decoder.select(&[0]).unwrap();
    let _ = decoder.step(&[4]).unwrap();
    let full: Arc<[i64]> = vec![3; 64].into();
    assert!(matches!(
        decoder.prefill(&[full]),
        Err(Error::TooLong { .. })
    ));
    assert!(matches!(decoder.prefill(&[]), Err(Error::Empty { .. })));
    assert!(matches!(
        decoder.rewind(0, 4),
        Err(Error::LengthMismatch { right_len: 3, .. })
    ));
    assert!(decoder.rewind(1, 0).is_err() && decoder.select(&[1]).is_err());
}
