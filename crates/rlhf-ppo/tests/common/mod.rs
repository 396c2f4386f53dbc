//! Reading the reference values, which were made by running TRL 1.12 and transformers 5.23.

#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic
)]

pub mod bigram;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rlhf_ppo::tch::{Kind, Tensor};
use serde_json::Value;

/// A folder of reference values.
pub struct Golden {
    pub json: Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Golden {
    pub fn load(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("tests/goldens")
            .join(name);
        let text = std::fs::read_to_string(dir.join("case.json")).unwrap();
        let file = dir.join("tensors.safetensors");
        let tensors = match file.exists() {
            true => Tensor::read_safetensors(file).unwrap(),
            false => Vec::new(),
        };
        Self {
            json: serde_json::from_str(&text).unwrap(),
            tensors: tensors.into_iter().collect(),
        }
    }

    pub fn tensor(&self, name: &str) -> Tensor {
        self.tensors
            .get(name)
            .unwrap_or_else(|| panic!("no tensor {name}"))
            .copy()
    }

    /// A stored 0/1 mask of what is *left out*, turned into one of what takes part.
    pub fn inside(&self, padding_mask: &str) -> Tensor {
        self.tensor(padding_mask).eq(0)
    }

    pub fn tolerance(&self, name: &str) -> f64 {
        self.json["tolerance"][name].as_f64().unwrap_or(0.0)
    }

    pub fn close(&self, what: &str, got: &Tensor, want: &Tensor) {
        let (abs, rel) = (self.tolerance("abs"), self.tolerance("rel"));
        assert_close(what, got, want, abs, rel);
    }
}

/// Within `abs`, or within `rel` of `max(1, |want|)`.
pub fn assert_close(what: &str, got: &Tensor, want: &Tensor, abs: f64, rel: f64) {
    assert_eq!(got.size(), want.size(), "{what}");
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let allowed = (want.abs().clamp_min(1.0) * rel).clamp_min(abs);
    let excess = ((&got - &want).abs() - allowed).max();
    let excess = f64::try_from(excess).unwrap();
    assert!(
        excess <= 0.0,
        "{what} is off by {excess} more than allowed:\n{got}\n{want}"
    );
}

pub fn assert_number(what: &str, got: f64, want: f64, abs: f64, rel: f64) {
    let allowed = abs.max(rel * want.abs().max(1.0));
    assert!((got - want).abs() <= allowed, "{what}: {got} is not {want}");
}

pub fn number(t: &Tensor) -> f64 {
    f64::try_from(t).unwrap()
}

/// A folder of the models that several crates' tests share.
pub fn model_dir(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens")
        .join(name)
}
