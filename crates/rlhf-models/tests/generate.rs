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

#[test]
fn cached_logits_equal_recomputed_ones_for_ragged_prompts() {
    for name in ["gpt2", "gpt_neox", "llama", "mistral", "qwen3", "gemma2"] {
        let model = load(name);
        let mut rows = vec![vec![5, 6, 7, 8, 9], vec![40], vec![11, 12, 13]];
        let prompts: Vec<Arc<[i64]>> = rows.iter().map(|r| r.as_slice().into()).collect();
        let mut decoder = model.decoder(8).unwrap();
        let check = |rows: &[Vec<i64>], logits: &Tensor, when: &str| {
            assert_eq!(logits.kind(), Kind::Float);
            assert_close(when, logits, &recomputed(&model, rows), 1e-5);
        };
        let step = |decoder: &mut Box<dyn Decoder + '_>, rows: &mut Vec<Vec<i64>>, t: &[i64]| {
            rows.iter_mut().zip(t).for_each(|(row, id)| row.push(*id));
            decoder.step(&Tensor::from_slice(t)).unwrap()
        };
        check(&rows, &decoder.prefill(&prompts).unwrap(), "prefill");
        let logits = step(&mut decoder, &mut rows, &[100, 200, 300]);
        check(&rows, &logits, "step");
        // Repeat a row and drop the longest: the columns that only it used go away.
        decoder.select(&[2, 1, 2]).unwrap();
        rows = vec![rows[2].clone(), rows[1].clone(), rows[2].clone()];
        let logits = step(&mut decoder, &mut rows, &[400, 500, 600]);
        check(&rows, &logits, "step after select");
        decoder.select(&[1]).unwrap();
        rows = vec![rows[1].clone()];
        let logits = step(&mut decoder, &mut rows, &[700]);
        check(&rows, &logits, "step of one row");
    }
}

#[test]
fn rows_that_outgrow_the_context_are_an_error() {
    let model = load("gpt2"); // 64 positions
    let long: Arc<[i64]> = vec![3; 63].into();
    let mut decoder = model.decoder(8).unwrap();
    let _ = decoder.prefill(&[[3].into(), long]).unwrap();
    let tokens = Tensor::from_slice(&[4i64, 4]);
    let _ = decoder.step(&tokens).unwrap();
    let error = decoder.step(&tokens).unwrap_err();
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
    let _ = decoder.step(&Tensor::from_slice(&[4i64])).unwrap();
    let full: Arc<[i64]> = vec![3; 64].into();
    assert!(matches!(
        decoder.prefill(&[full]),
        Err(Error::TooLong { .. })
    ));
    assert!(matches!(decoder.prefill(&[]), Err(Error::Empty { .. })));
}
