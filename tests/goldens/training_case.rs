//! Reference runs of training, made by running TRL 1.16 and transformers 5.23: how the numbers
//! are stored and compared. Included by the tests of several crates.

use std::path::PathBuf;

use rlhf_core::{Parameters, Preference, Stats, tch::Tensor};
use rlhf_scale::{AdamWConfig, UpdateConfig};
use serde_json::Value;

/// A model folder that several crates test with.
pub(crate) fn model_dir(name: &str) -> PathBuf {
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../../tests/goldens/models");
    PathBuf::from(root).join(name)
}

/// The comparisons that the reference runs were trained on, in order.
pub(crate) fn preference_pairs() -> Vec<Preference> {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/../../tests/goldens/preference_pairs.json"
    );
    let pairs: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let ids = |pair: &Value, key: &str| -> Vec<i64> {
        let ids = pair[key].as_array().unwrap();
        ids.iter().map(|id| id.as_i64().unwrap()).collect()
    };
    let pair = |p| {
        Preference::new(
            ids(p, "prompt_ids"),
            ids(p, "chosen_ids"),
            ids(p, "rejected_ids"),
        )
    };
    pairs.as_array().unwrap().iter().map(pair).collect()
}

/// One reference run.
pub(crate) struct TrainingCase {
    pub(crate) name: String,
    pub(crate) json: Value,
    tensors: Vec<(String, Tensor)>,
}

impl TrainingCase {
    /// The case in `tests/goldens/{name}` of the crate under test.
    pub(crate) fn read(name: &str) -> Self {
        let dir = format!("{}/tests/goldens/{name}", env!("CARGO_MANIFEST_DIR"));
        let text = std::fs::read_to_string(format!("{dir}/case.json")).unwrap();
        Self {
            name: name.to_string(),
            json: serde_json::from_str(&text).unwrap(),
            tensors: Tensor::read_safetensors(format!("{dir}/tensors.safetensors")).unwrap(),
        }
    }

    pub(crate) fn param(&self, name: &str) -> &Value {
        &self.json["params"][name]
    }

    pub(crate) fn steps(&self) -> &[Value] {
        self.json["expect"]["steps"].as_array().unwrap()
    }

    pub(crate) fn tensor(&self, name: &str) -> &Tensor {
        let found = self.tensors.iter().find(|(n, _)| n == name);
        &found
            .unwrap_or_else(|| panic!("{} has no {name}", self.name))
            .1
    }

    /// The optimiser of the run.
    pub(crate) fn update(&self) -> UpdateConfig {
        let number = |name: &str| self.param(name).as_f64().unwrap();
        UpdateConfig {
            optimizer: AdamWConfig {
                lr: number("learning_rate"),
                beta1: number("adam_beta1"),
                beta2: number("adam_beta2"),
                eps: number("adam_epsilon"),
                weight_decay: number("weight_decay"),
                ..AdamWConfig::default()
            },
            max_grad_norm: Some(number("max_grad_norm")),
            ..UpdateConfig::default()
        }
    }

    /// Compares metrics (ours, theirs) of step `step`.
    pub(crate) fn check_step(&self, step: usize, stats: &Stats, metrics: &[(&str, &str)]) {
        for (ours, theirs) in metrics {
            let got = stats.get(ours).unwrap();
            let want = self.steps()[step][theirs].as_f64().unwrap();
            let tolerance = self.tolerance("loss_and_metrics_rel") * want.abs().max(1.0);
            let tolerance = match theirs.starts_with("logps") {
                true => tolerance.max(self.json["tolerance"]["logps_abs"].as_f64().unwrap_or(0.0)),
                false => tolerance,
            };
            assert!(
                (got - want).abs() <= tolerance,
                "{}, step {step}: {ours} is {got}, {theirs} is {want}",
                self.name
            );
        }
    }

    pub(crate) fn tolerance(&self, name: &str) -> f64 {
        self.json["tolerance"][name].as_f64().unwrap()
    }

    /// Compares the sampled positions of the final weights.
    pub(crate) fn check_final_weights(&self, model: &impl Parameters) {
        let params = model.named_parameters();
        let names = self.json["expect"]["final_weight_names"]
            .as_array()
            .unwrap();
        assert_eq!(params.len(), names.len());
        let (index, value) = (self.tensor("final/flat_index"), self.tensor("final/value"));
        let tolerance = self.tolerance("final_weights_abs");
        let mut checked = 0;
        for (row, name) in names.iter().enumerate() {
            // PEFT wraps the model, and gives its adapters a name.
            let name = name.as_str().unwrap().replace(".default.", ".");
            let name = name.strip_prefix("base_model.model.").unwrap_or(&name);
            let found = params.iter().find(|(n, _)| n == name);
            let weight = &found.unwrap_or_else(|| panic!("no weight {name}")).1;
            let flat = weight.detach().contiguous().view(-1);
            for slot in 0..index.size()[1] {
                let at = [row as i64, slot];
                let position = index.int64_value(&at);
                if position < 0 {
                    continue;
                }
                let (got, want) = (flat.double_value(&[position]), value.double_value(&at));
                assert!(
                    (got - want).abs() <= tolerance,
                    "{}: {name}[{position}] is {got}, not {want}",
                    self.name
                );
                checked += 1;
            }
        }
        assert!(checked > names.len());
    }
}
