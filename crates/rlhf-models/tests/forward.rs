//! Logits, log-probs and entropies equal those of transformers.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{Case, assert_close, batch, model_dir};
use rlhf_models::core::{LogprobOptions, PaddingSide, Policy};
use rlhf_models::tch::{Device, IndexOp, Kind};
use rlhf_models::{CausalLm, LoadOptions};

fn check(name: &str) {
    let case = Case::read(&format!("forward/{name}"));
    // Expectations are those of f32, whatever the weights are stored in.
    let options = LoadOptions {
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    };
    let model = CausalLm::from_pretrained(model_dir(name), &options).unwrap();
    for (key, side) in [("right", PaddingSide::Right), ("left", PaddingSide::Left)] {
        let rows = |part: &str| case.rows(&format!("{key}/{part}"));
        let (ids, attention) = (rows("input_ids"), rows("attention_mask"));
        let batch = batch(&ids, &attention, &rows("completion_mask"));
        let padded = batch.padded(model.pad_token_id(), side, Device::Cpu);
        let logits = model.logits(&padded).unwrap();
        let tolerance = case.tolerance("logits_abs");
        for (row, (&offset, &length)) in padded.offsets.iter().zip(&padded.lengths).enumerate() {
            let (row, offset, length) = (row as i64, offset as i64, length as i64);
            let last = logits.i((row, offset + length - 1));
            let want = case.tensor("right/logits_last").i(row);
            assert_close("last logits", &last, &want, tolerance);
            if row == 0 {
                let got = logits.i((row, offset..offset + length));
                let want = case.tensor("right/logits_row0");
                assert_close("row 0", &got, want, tolerance);
            }
        }
        for temperature in ["1.0", "0.7"] {
            let options = LogprobOptions {
                temperature: temperature.parse().unwrap(),
                entropy: true,
            };
            let out = model.logprobs(&batch, &options).unwrap();
            let want = case.tensor(&format!("{key}/logprobs_t{temperature}"));
            let want_entropy = case.tensor(&format!("{key}/entropy_t{temperature}"));
            let entropy = out.entropy.unwrap();
            for (row, sequence) in batch.sequences().iter().enumerate() {
                let responses = sequence.response.len() as i64;
                let start = (padded.offsets[row] + sequence.prompt.len() - 1) as i64;
                let row = row as i64;
                let mine = |t: &rlhf_models::tch::Tensor| t.i((row, ..responses));
                let theirs = |t: &rlhf_models::tch::Tensor| t.i((row, start..start + responses));
                let tolerance = case.tolerance("logprobs_abs");
                assert_close("log-probs", &mine(&out.logprobs), &theirs(want), tolerance);
                let tolerance = case.tolerance("entropy_abs");
                assert_close("entropy", &mine(&entropy), &theirs(want_entropy), tolerance);
                assert_eq!(
                    out.logprobs
                        .i((row, responses..))
                        .abs()
                        .sum(rlhf_models::tch::Kind::Float)
                        .double_value(&[]),
                    0.0
                );
            }
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
fn llama_with_scaled_rope_and_its_own_head() {
    check("llama_rope3");
}

#[test]
fn llama_in_shards() {
    check("llama_sharded");
}

#[test]
fn gpt_neox_with_partial_rotary_positions() {
    check("gpt_neox");
}

#[test]
fn mistral_with_a_window() {
    check("mistral");
}

#[test]
fn qwen2_with_biases() {
    check("qwen2");
}

#[test]
fn qwen2_of_a_bf16_file() {
    check("qwen2_bf16");
    let case = Case::read("forward/qwen2_bf16");
    let dir = model_dir("qwen2_bf16");
    let model = CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap();
    assert_eq!(model.kind(), Kind::BFloat16);
    let rows = |part: &str| case.rows(&format!("right/{part}"));
    let batch = batch(
        &rows("input_ids"),
        &rows("attention_mask"),
        &rows("completion_mask"),
    );
    let padded = batch.padded(model.pad_token_id(), PaddingSide::Left, Device::Cpu);
    let logits = model.logits(&padded).unwrap();
    let last = logits.i((.., padded.width() - 1));
    let want = case.tensor("right/logits_last_bf16_compute");
    let tolerance = case.tolerance("logits_bf16_compute_abs");
    assert_close("last logits in bf16", &last, want, tolerance);
}

#[test]
fn qwen3_with_head_norms() {
    check("qwen3");
}

#[test]
fn gemma2_with_soft_caps_and_alternating_windows() {
    check("gemma2");
}
