//! Reference values made by running transformers 5.23 and TRL 1.12.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code, unreachable_pub)] // every test file uses some of it

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use rlhf_models::core::{LogprobOptions, Policy, Sequence, SequenceBatch};
use rlhf_models::tch::{Kind, Tensor};
use rlhf_models::{CausalLm, Error, LoadOptions};

/// One case: what was run, and the tensors that came out.
pub struct Case {
    pub json: serde_json::Value,
    tensors: HashMap<String, Tensor>,
}

impl Case {
    pub fn read(name: &str) -> Self {
        let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens")).join(name);
        let json = serde_json::from_slice(&std::fs::read(dir.join("case.json")).unwrap()).unwrap();
        let file = dir.join("tensors.safetensors");
        let tensors = match file.exists() {
            true => Tensor::read_safetensors(file)
                .unwrap()
                .into_iter()
                .collect(),
            false => HashMap::new(),
        };
        Self { json, tensors }
    }

    pub fn tensor(&self, name: &str) -> &Tensor {
        let known = || self.tensors.keys().collect::<Vec<_>>();
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("no {name} in {:?}", known()))
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    pub fn rows(&self, name: &str) -> Vec<Vec<i64>> {
        Vec::<Vec<i64>>::try_from(self.tensor(name)).unwrap()
    }

    pub fn tolerance(&self, name: &str) -> f64 {
        self.json["tolerance"][name].as_f64().unwrap()
    }
}

/// A folder's language model, as it is stored.
pub fn load(dir: impl AsRef<Path>) -> Result<CausalLm, Error> {
    CausalLm::from_pretrained(dir, &LoadOptions::default())
}

/// Two answers to one prompt, and one to another.
pub fn three_answers() -> SequenceBatch {
    let prompt: std::sync::Arc<[i64]> = [5, 6, 7].into();
    SequenceBatch::new(vec![
        Sequence::new(prompt.clone(), [8, 9]),
        Sequence::new(prompt, [10]),
        Sequence::new([11], [12, 13, 14]),
    ])
    .unwrap()
}

/// Of [`three_answers`].
pub fn logprobs(model: &CausalLm) -> Tensor {
    let out = model.logprobs(&three_answers(), &LogprobOptions::default());
    out.unwrap().logprobs
}

pub fn model_dir(name: &str) -> PathBuf {
    PathBuf::from(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/goldens/models"
    ))
    .join(name)
}

/// Name and folder of every language model among the fixtures.
pub fn language_models() -> Vec<(String, PathBuf)> {
    let mut models: Vec<_> = std::fs::read_dir(model_dir(""))
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|dir| {
            let config = std::fs::read_to_string(dir.join("config.json")).unwrap();
            let config: serde_json::Value = serde_json::from_str(&config).unwrap();
            let name = config["architectures"][0].as_str().unwrap_or_default();
            name.ends_with("ForCausalLM") || name.ends_with("LMHeadModel")
        })
        .map(|dir| (dir.file_name().unwrap().to_string_lossy().into_owned(), dir))
        .collect();
    models.sort();
    assert!(models.len() > 3, "{models:?}");
    models
}

pub fn adapter_dir(name: &str) -> PathBuf {
    model_dir("..").join("adapters").join(name)
}

/// Prompts and completions of padded rows, whichever side the padding is on.
pub fn batch(ids: &[Vec<i64>], attention: &[Vec<i64>], completion: &[Vec<i64>]) -> SequenceBatch {
    let sequences = (0..ids.len()).map(|row| {
        let pick = |wanted: i64| -> Vec<i64> {
            (0..ids[row].len())
                .filter(|&t| attention[row][t] == 1 && completion[row][t] == wanted)
                .map(|t| ids[row][t])
                .collect()
        };
        Sequence::new(pick(0), pick(1))
    });
    SequenceBatch::new(sequences.collect()).unwrap()
}

pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    assert_eq!(got.size(), want.size(), "{what}");
    let difference = (got.to_kind(Kind::Double) - want.to_kind(Kind::Double))
        .abs()
        .max()
        .double_value(&[]);
    assert!(difference <= tolerance, "{what}: off by {difference:e}");
}
