//! Models in several files: written, read back, and replaced.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;

use common::model_dir;
use rlhf_models::core::Parameters;
use rlhf_models::tch::{Kind, Tensor};
use rlhf_models::{CausalLm, Error, LoadOptions, SaveOptions, WeightProblem};
use serde_json::{Value, json};

fn load(dir: impl AsRef<Path>) -> Result<CausalLm, Error> {
    CausalLm::from_pretrained(dir, &LoadOptions::default())
}

fn weights(model: &CausalLm) -> Vec<(String, Tensor)> {
    model.named_parameters()
}

fn files(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

const SMALL: SaveOptions = SaveOptions {
    kind: None,
    max_shard_size: 40_000,
};

#[test]
fn every_architecture_is_written_in_shards() {
    for name in [
        "gpt2",
        "llama",
        "llama_rope3",
        "gpt_neox",
        "mistral",
        "qwen2_bf16",
        "qwen3",
        "gemma2",
    ] {
        let model = load(model_dir(name)).unwrap();
        let dir = tempfile::tempdir().unwrap();
        model.save_pretrained_with(dir.path(), &SMALL).unwrap();
        let index = json(&dir.path().join("model.safetensors.index.json"));
        let map = index["weight_map"].as_object().unwrap();
        let mine = weights(&model);
        assert_eq!(map.len(), mine.len(), "{name}");
        let bytes: usize = mine
            .iter()
            .map(|(_, t)| t.numel() * t.kind().elt_size_in_bytes())
            .sum();
        assert_eq!(index["metadata"]["total_size"], json!(bytes), "{name}");
        // Shards are as full as they may be: two neighbours never fit into one.
        let names = files(dir.path());
        let shards: Vec<&String> = names.iter().filter(|f| f.starts_with("model-")).collect();
        assert!(shards.len() > 2, "{name}: {names:?}");
        assert_eq!(names.len(), shards.len() + 2, "{name}: {names:?}");
        for shard in &shards {
            let path = dir.path().join(shard);
            let tensors = Tensor::read_safetensors(&path).unwrap();
            let size = |t: &Tensor| t.numel() * t.kind().elt_size_in_bytes();
            let bytes: usize = tensors.iter().map(|(_, t)| size(t)).sum();
            assert!(bytes <= 40_000 || tensors.len() == 1, "{name}, {shard}");
            for (tensor, _) in &tensors {
                assert_eq!(map[tensor], json!(shard));
            }
        }
        let again = load(dir.path()).unwrap();
        assert_eq!(again.config(), model.config());
        assert_eq!(weights(&again), mine, "{name}");
    }
}

#[test]
fn a_folder_changes_from_one_file_to_shards_and_back() {
    let (first, second) = (
        load(model_dir("gpt2")).unwrap(),
        load(model_dir("gpt2_ref")).unwrap(),
    );
    assert_ne!(weights(&first), weights(&second));
    let dir = tempfile::tempdir().unwrap();
    let read = || weights(&load(dir.path()).unwrap());
    first.save_pretrained(dir.path()).unwrap();
    second.save_pretrained_with(dir.path(), &SMALL).unwrap();
    assert_eq!(read(), weights(&second));
    assert!(!files(dir.path()).contains(&"model.safetensors".to_string()));
    let many = files(dir.path()).len();
    // Fewer shards than before, under the same kind of name.
    let larger = SaveOptions {
        max_shard_size: 80_000,
        ..SMALL
    };
    first.save_pretrained_with(dir.path(), &larger).unwrap();
    assert_eq!(read(), weights(&first));
    assert!(files(dir.path()).len() < many);
    second.save_pretrained(dir.path()).unwrap();
    assert_eq!(read(), weights(&second));
    assert_eq!(files(dir.path()), ["config.json", "model.safetensors"]);
    let halves = SaveOptions {
        kind: Some(Kind::Half),
        ..SMALL
    };
    second.save_pretrained_with(dir.path(), &halves).unwrap();
    assert_eq!(load(dir.path()).unwrap().kind(), Kind::Half);
    assert!(files(dir.path()).iter().all(|name| !name.starts_with('.')));
}

#[test]
fn a_save_that_fails_leaves_what_was_there() {
    let model = load(model_dir("gpt2")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    model.save_pretrained_with(dir.path(), &SMALL).unwrap();
    let before = files(dir.path());
    // The third shard has no place to be written to.
    let shards = before
        .iter()
        .filter(|name| name.starts_with("model-"))
        .count();
    let blocked = dir
        .path()
        .join(format!(".model-00003-of-{shards:05}.safetensors.partial"));
    std::fs::create_dir(&blocked).unwrap();
    std::fs::write(blocked.join("file"), "").unwrap();
    let other = load(model_dir("gpt2_ref")).unwrap();
    let error = other.save_pretrained_with(dir.path(), &SMALL).unwrap_err();
    assert!(matches!(error, Error::Safetensors { .. }), "{error}");
    std::fs::remove_dir_all(&blocked).unwrap();
    assert_eq!(files(dir.path()), before);
    assert_eq!(weights(&load(dir.path()).unwrap()), weights(&model));
}

/// A sharded folder whose index has been changed.
fn indexed(change: impl Fn(&Path, &mut Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let model = load(model_dir("gpt2")).unwrap();
    model.save_pretrained_with(dir.path(), &SMALL).unwrap();
    let path = dir.path().join("model.safetensors.index.json");
    let mut index = json(&path);
    change(dir.path(), &mut index);
    std::fs::write(path, index.to_string()).unwrap();
    dir
}

#[test]
fn an_index_that_leaves_its_folder_is_refused() {
    let outside = tempfile::tempdir().unwrap();
    let source = model_dir("gpt2").join("model.safetensors");
    let target = outside.path().join("model.safetensors");
    std::fs::copy(source, &target).unwrap();
    let relative = format!(
        "../{}/model.safetensors",
        outside.path().file_name().unwrap().to_str().unwrap()
    );
    for name in [
        relative.as_str(),
        target.to_str().unwrap(),
        "..",
        ".",
        "",
        "./model-00001-of-00003.safetensors",
        "below/model.safetensors",
        "..\\model.safetensors",
        "model\0.safetensors",
    ] {
        let dir = indexed(|_, index| index["weight_map"]["transformer.wte.weight"] = json!(name));
        let error = load(dir.path()).err().unwrap();
        assert!(
            matches!(&error, Error::ShardName { name: found, .. } if found == name),
            "{name:?}: {error}"
        );
    }
}

#[test]
fn shards_that_are_missing_or_hold_the_same_tensor() {
    let dir = indexed(|_, index| index["weight_map"]["more"] = json!("model-9.safetensors"));
    let error = load(dir.path()).err().unwrap();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    assert!(error.to_string().contains("model-9.safetensors"), "{error}");

    let dir = indexed(|dir, index| {
        let source = model_dir("gpt2").join("model.safetensors");
        std::fs::copy(source, dir.join("all.safetensors")).unwrap();
        index["weight_map"]["more"] = json!("all.safetensors");
    });
    let Err(Error::Weights { problems, .. }) = load(dir.path()) else {
        panic!("a tensor of two files");
    };
    assert_eq!(problems.len(), 28, "{problems:?}");
    let first = WeightProblem::Duplicate {
        name: "transformer.wte.weight".into(),
    };
    assert!(problems.contains(&first), "{problems:?}");

    for change in [json!(null), json!([]), json!({"a": 1}), json!("all")] {
        let dir = indexed(|_, index| index["weight_map"] = change.clone());
        let error = load(dir.path()).err().unwrap();
        let typed = matches!(
            error,
            Error::MissingField { .. } | Error::InvalidField { .. }
        );
        assert!(typed, "{change}: {error}");
    }
}

/// As a download that stopped half-way leaves it.
#[test]
fn all_missing_shards_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let model = load(model_dir("llama")).unwrap();
    model.save_pretrained_with(dir.path(), &SMALL).unwrap();
    let mut shards = files(dir.path());
    shards.retain(|name| name.starts_with("model-"));
    assert!(shards.len() > 2);
    for name in &shards[1..] {
        std::fs::remove_file(dir.path().join(name)).unwrap();
    }
    let error = load(dir.path()).err().unwrap();
    assert!(
        matches!(&error, Error::MissingShards { missing, .. } if missing.len() == shards.len() - 1),
        "{error}"
    );
    for name in &shards[1..] {
        assert!(error.to_string().contains(name.as_str()), "{error}");
    }
}
