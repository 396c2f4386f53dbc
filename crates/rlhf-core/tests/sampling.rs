//! The sampling filters against reference values made by running transformers 5.23
//! (`case.json` says how), within the tolerances stated there.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::collections::HashMap;

use rlhf_core::sampling::{SamplingConfig, ban_tokens, repetition_penalty, top_k};
use rlhf_core::{Kind, Tensor};
use serde_json::Value;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/sampling");

struct Reference {
    case: Value,
    tensors: HashMap<String, Tensor>,
}

impl Reference {
    fn load() -> Self {
        let json = std::fs::read_to_string(format!("{FOLDER}/case.json")).unwrap();
        let tensors = Tensor::read_safetensors(format!("{FOLDER}/tensors.safetensors")).unwrap();
        Self {
            case: serde_json::from_str(&json).unwrap(),
            tensors: tensors.into_iter().collect(),
        }
    }

    fn tensor(&self, name: &str) -> &Tensor {
        self.tensors.get(name).unwrap_or_else(|| panic!("{name}"))
    }

    fn tolerance(&self, name: &str) -> f64 {
        self.case["tolerance"][name].as_f64().unwrap()
    }

    fn check(&self, what: &str, got: &Tensor, want: &str, tolerance: &str) {
        let difference = (got - self.tensor(want)).abs().max().double_value(&[]);
        let tolerance = self.tolerance(tolerance);
        assert!(difference <= tolerance, "{what}: off by {difference}");
    }

    fn check_kept(&self, what: &str, filtered: &Tensor, want: &str) {
        let kept = filtered.isfinite().to_kind(Kind::Int64);
        assert!(kept.equal(self.tensor(want)), "{what}: {kept:?}");
    }
}

fn config(operations: &Value) -> SamplingConfig {
    let mut config = SamplingConfig::default();
    for operation in operations.as_array().unwrap() {
        let value = operation["value"].as_f64().unwrap();
        match operation["op"].as_str().unwrap() {
            "temperature" => config.temperature = value,
            "top_k" => config.top_k = Some(value as usize),
            "top_p" => config.top_p = Some(value),
            "min_p" => config.min_p = Some(value),
            other => panic!("unknown operation {other}"),
        }
    }
    config
}

#[test]
fn filters_agree_with_transformers() {
    let reference = Reference::load();
    let combinations = reference.case["params"]["combos"].as_object().unwrap();
    assert_eq!(combinations.len(), 10);
    for (name, operations) in combinations {
        let filtered = config(operations).warp(reference.tensor("logits")).unwrap();
        reference.check_kept(name, &filtered, &format!("{name}/kept"));
        let probabilities = filtered.softmax(-1, Kind::Float);
        reference.check(name, &probabilities, &format!("{name}/probs"), "probs_abs");
    }
}

#[test]
fn tokens_that_tie_with_the_last_of_top_k_stay() {
    let reference = Reference::load();
    for k in [1, 3] {
        let filtered = top_k(reference.tensor("ties/logits"), k).unwrap();
        reference.check_kept("ties", &filtered, &format!("ties/top_k_{k}/kept"));
        let kept = filtered.isfinite().sum(Kind::Int64).int64_value(&[]);
        assert!(kept > 2 * k as i64, "these rows have ties");
    }
}

#[test]
fn repetition_penalties_agree_with_transformers() {
    let reference = Reference::load();
    let logits = reference.tensor("logits");
    let seen = Vec::<Vec<i64>>::try_from(reference.tensor("input_ids")).unwrap();
    for penalty in [1.3, 0.8] {
        let name = format!("repetition_penalty_{penalty}/logits");
        let penalised = repetition_penalty(logits, &seen, penalty).unwrap();
        reference.check(&name, &penalised, &name, "logits_abs");
    }
}

#[test]
fn banned_stop_tokens_agree_with_transformers() {
    let reference = Reference::load();
    let logits = reference.tensor("logits");
    let rows: Vec<usize> = (0..logits.size()[0] as usize).collect();
    let banned = ban_tokens(logits, &rows, &[2, 7]).unwrap();
    let name = "min_new_tokens_prompt3_min4_eos2_7/probs";
    reference.check(name, &banned.softmax(-1, Kind::Float), name, "probs_abs");
}

#[test]
fn greedy_ignores_the_filters() {
    let reference = Reference::load();
    let config = SamplingConfig {
        top_k: Some(2),
        ..SamplingConfig::greedy()
    };
    let logits = reference.tensor("logits");
    let drawn = config.choose(&config.warp(logits).unwrap(), &[]).unwrap();
    assert!(drawn.tokens.equal(&logits.argmax(-1, false)));
    assert_eq!(drawn.logprobs.abs().max().double_value(&[]), 0.0);
}
