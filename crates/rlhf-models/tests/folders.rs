//! Model folders: what is written is read back, what is damaged is a typed error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::{assert_close, load, logprobs, model_dir, three_answers};
use rlhf_models::tch::{Device, Kind, Tensor};
use rlhf_models::{CausalLm, Error, LoadOptions, SequenceClassifier, WeightProblem};
use serde_json::{Value, json};

/// A copy of a model's folder whose config has been changed.
fn folder(
    name: &str,
    change: impl FnOnce(&mut serde_json::Map<String, Value>),
) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let source = model_dir(name);
    for file in ["config.json", "model.safetensors"] {
        std::fs::write(
            folder.path().join(file),
            std::fs::read(source.join(file)).unwrap(),
        )
        .unwrap();
    }
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    change(config.as_object_mut().unwrap());
    std::fs::write(path, config.to_string()).unwrap();
    folder
}

/// Writes a folder's weights again, changed.
fn rewrite(dir: &Path, change: impl Fn(String, Tensor) -> Option<(String, Tensor)>) {
    let file = dir.join("model.safetensors");
    let tensors = Tensor::read_safetensors(&file).unwrap();
    let changed: Vec<_> = tensors
        .into_iter()
        .filter_map(|(n, t)| change(n, t))
        .collect();
    Tensor::write_safetensors(&changed, file).unwrap();
}

#[test]
fn saved_models_are_read_back() {
    for name in [
        "gpt2",
        "llama",
        "llama_rope3",
        "gpt_neox",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma2",
    ] {
        let model = load(model_dir(name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        model.save_pretrained(dir.path()).unwrap();
        let again = load(dir.path()).unwrap();
        assert_eq!(again.config(), model.config(), "{name}");
        assert_eq!(logprobs(&again), logprobs(&model), "{name}");
        let activation = |dir: &Path| {
            let config = std::fs::read(dir.join("config.json")).unwrap();
            let config: Value = serde_json::from_slice(&config).unwrap();
            ["hidden_act", "hidden_activation", "activation_function"].map(|f| config[f].clone())
        };
        assert_eq!(activation(dir.path()), activation(&model_dir(name)));
        let mut files: Vec<_> = std::fs::read_dir(dir.path())
            .unwrap()
            .map(|f| f.unwrap().file_name().into_string().unwrap())
            .collect();
        files.sort();
        assert_eq!(files, ["config.json", "model.safetensors"]);
        // Over a folder in use: the loaded model keeps the old file.
        let before = logprobs(&again);
        model
            .save_pretrained_as(dir.path(), Kind::BFloat16)
            .unwrap();
        assert_eq!(logprobs(&again), before);
        let rounded = load(dir.path()).unwrap();
        assert_eq!(rounded.kind(), Kind::BFloat16);
        assert_close("bf16", &logprobs(&rounded), &before, 0.1);
        let options = LoadOptions {
            kind: Some(Kind::Float),
            ..LoadOptions::default()
        };
        let widened = CausalLm::from_pretrained(dir.path(), &options).unwrap();
        assert_eq!(widened.kind(), Kind::Float);
    }
}

#[test]
fn saved_classifiers_are_read_back() {
    for name in ["gpt2_rm", "gpt2_cls2", "llama_rm", "qwen2_rm"] {
        let options = LoadOptions::default();
        let model = SequenceClassifier::from_pretrained(model_dir(name), &options).unwrap();
        let dir = tempfile::tempdir().unwrap();
        model.save_pretrained(dir.path()).unwrap();
        let again = SequenceClassifier::from_pretrained(dir.path(), &options).unwrap();
        let scores = |m: &SequenceClassifier| m.logits(&three_answers()).unwrap();
        assert_eq!(scores(&again), scores(&model), "{name}");
        assert_eq!(again.num_labels(), model.num_labels());
        let copy = model.try_clone().unwrap();
        assert_eq!(scores(&copy), scores(&model), "{name}");
    }
}

#[test]
fn trunk_prefixes_buffers_and_tied_heads_are_known() {
    let plain = logprobs(&load(model_dir("gpt2")).unwrap());
    let folder = folder("gpt2", |_| {});
    rewrite(folder.path(), |name, tensor| {
        let bare = name.strip_prefix("transformer.").unwrap_or(&name);
        Some((bare.to_string(), tensor))
    });
    assert_eq!(logprobs(&load(folder.path()).unwrap()), plain);
    let file = folder.path().join("model.safetensors");
    let mut tensors = Tensor::read_safetensors(&file).unwrap();
    let ones = Tensor::ones([1, 1, 64, 64], (Kind::Bool, Device::Cpu));
    tensors.push(("h.0.attn.bias".into(), ones));
    let embedding = tensors
        .iter()
        .find(|(n, _)| n == "wte.weight")
        .unwrap()
        .1
        .copy();
    tensors.push(("lm_head.weight".into(), embedding));
    Tensor::write_safetensors(&tensors, file).unwrap();
    assert_eq!(logprobs(&load(folder.path()).unwrap()), plain);
}

#[test]
fn every_weight_that_does_not_fit_is_named() {
    let folder = folder("gpt2", |config| {
        config["n_positions"] = json!(32);
    });
    rewrite(folder.path(), |name, tensor| match name.as_str() {
        "transformer.ln_f.bias" => Some(("transformer.ln_g.bias".into(), tensor)),
        "transformer.h.1.mlp.c_fc.weight" => None,
        _ => Some((name, tensor)),
    });
    let error = load(folder.path()).err().unwrap();
    let text = error.to_string();
    let Error::Weights { problems, .. } = error else {
        panic!("{text}")
    };
    let missing = |name: &str, shape: &[i64]| WeightProblem::Missing {
        name: name.into(),
        shape: shape.into(),
    };
    assert_eq!(
        problems,
        [
            WeightProblem::Shape {
                name: "transformer.wpe.weight".into(),
                found: vec![64, 32],
                expected: vec![32, 32],
            },
            missing("transformer.h.1.mlp.c_fc.weight", &[32, 128]),
            missing("transformer.ln_f.bias", &[32]),
            WeightProblem::Unexpected {
                name: "transformer.ln_g.bias".into(),
                shape: vec![32],
            },
        ],
        "{text}"
    );
    assert!(text.contains("transformer.ln_g.bias"), "{text}");
}

#[test]
fn damaged_and_absent_files() {
    let error = load("/nowhere/model").err().unwrap();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(error.to_string().contains("/nowhere/model/config.json"));
    let folder = folder("gpt2", |_| {});
    let file = folder.path().join("model.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    for length in [bytes.len() - 1, bytes.len() / 2, 100, 3, 0] {
        std::fs::write(&file, &bytes[..length]).unwrap();
        let error = load(folder.path()).err().unwrap();
        assert!(
            matches!(error, Error::Safetensors { .. } | Error::Io { .. }),
            "{length}: {error}"
        );
        assert!(error.to_string().contains("model.safetensors"), "{error}");
    }
    std::fs::remove_file(&file).unwrap();
    let error = load(folder.path()).err().unwrap();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    std::fs::write(folder.path().join("config.json"), "{").unwrap();
    let error = load(folder.path()).err().unwrap();
    assert!(matches!(error, Error::Json { .. }), "{error}");
}

#[test]
fn configs_that_cannot_be_used() {
    let config = |name, change: &dyn Fn(&mut serde_json::Map<String, Value>)| {
        let folder = folder(name, |map| change(map));
        let error = load(folder.path()).err().unwrap();
        (error.to_string(), error)
    };
    let (text, error) = config("gpt2", &|c| c["model_type"] = json!("mamba"));
    assert!(matches!(error, Error::UnknownArchitecture { .. }), "{text}");
    assert!(
        text.contains("mamba") && text.contains("gpt2, gpt_neox, llama"),
        "{text}"
    );
    for (name, field) in [
        ("gpt2", "n_embd"),
        ("gpt2", "model_type"),
        ("llama", "vocab_size"),
    ] {
        let (text, error) = config(name, &|c| {
            c.remove(field);
        });
        assert!(
            matches!(&error, Error::MissingField { field: f, .. } if f == field),
            "{text}"
        );
    }
    for (name, field, value) in [
        ("gpt2", "n_layer", json!("two")),
        ("gpt2", "n_layer", json!(0)),
        ("gpt2", "n_head", json!(5)),
        ("gpt2", "activation_function", json!("mish")),
        ("gpt2", "add_cross_attention", json!(true)),
        ("llama", "num_key_value_heads", json!(3)),
        ("llama", "head_dim", json!(7)),
        (
            "llama",
            "rope_parameters",
            json!({"rope_type": "longrope", "factor": 2.0}),
        ),
    ] {
        let (text, error) = config(name, &|c| c[field] = value.clone());
        assert!(
            matches!(&error, Error::InvalidField { field: f, .. } if f == field),
            "{text}"
        );
    }
    let (text, error) = config("llama", &|c| {
        c["rope_parameters"] = json!({"rope_type": "linear"});
    });
    assert!(
        matches!(&error, Error::MissingField { field, .. } if field == "rope_parameters.factor"),
        "{text}"
    );
}

#[test]
fn folders_that_cannot_be_written() {
    let folder = folder("gpt2", |_| {});
    let model = load(folder.path()).unwrap();
    let below_a_file = folder.path().join("config.json").join("out");
    let error = model.save_pretrained(below_a_file).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
}
