//! Logits of every type of rotary positions equal those of transformers, past the original context
//! (scripts/make_rope_goldens.py).
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{assert_close, model_dir};
use rlhf_models::core::{PaddingSide, Policy, Sequence, SequenceBatch};
use rlhf_models::tch::{Device, IndexOp, Tensor};
use rlhf_models::{CausalLm, LoadOptions};
use serde_json::Value;

/// Logits of several units, one pass in f32.
const TOLERANCE: f64 = 1e-4;

fn numbers<T: serde::de::DeserializeOwned>(value: &Value) -> Vec<T> {
    serde_json::from_value(value.clone()).unwrap()
}

/// The case's model with the case's fields in its config.
fn folder(case: &Value) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = model_dir(case["model"].as_str().unwrap());
    std::fs::copy(
        source.join("model.safetensors"),
        folder.path().join("model.safetensors"),
    )
    .unwrap();
    let config = std::fs::read(source.join("config.json")).unwrap();
    let mut config: serde_json::Map<String, Value> = serde_json::from_slice(&config).unwrap();
    for field in ["rope_parameters", "rope_scaling", "rope_theta"] {
        config.remove(field);
    }
    config.extend(case["fields"].as_object().unwrap().clone());
    let config = Value::Object(config).to_string();
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    folder
}

#[test]
fn logits_of_every_type() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/rope.json");
    let goldens: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    for case in goldens["cases"].as_array().unwrap() {
        let folder = folder(case);
        let load = |dir| CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap();
        let model = load(folder.path());
        let ids: Vec<i64> = numbers(&case["input_ids"]);
        let length = ids.len() as i64;
        let batch = SequenceBatch::new(vec![Sequence::new(ids, [])]).unwrap();
        let padded = batch.padded(0, PaddingSide::Right, Device::Cpu);
        let logits = model.logits(&padded).unwrap();
        let rows: Vec<Vec<f32>> = numbers(&case["logits"]);
        for (position, row) in [length / 2 - 1, length - 1].into_iter().zip(rows) {
            let want = Tensor::from_slice(&row);
            let got = logits.i((0, position, ..want.size()[0]));
            let what = format!("{}, position {position}", case["name"]);
            assert_close(&what, &got, &want, TOLERANCE);
        }
        // What is written says the same.
        let copy = tempfile::tempdir().unwrap();
        model.save_pretrained(copy.path()).unwrap();
        let again = load(copy.path());
        assert_eq!(again.config(), model.config());
        assert_eq!(again.logits(&padded).unwrap(), logits);
    }
}
