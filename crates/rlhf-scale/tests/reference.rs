//! Optimiser, clipping and schedules against reference values made by running PyTorch 2.11 and
//! transformers 5.23.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use rlhf_scale::{
    AdamW, AdamWConfig, Norm, Schedule, ScheduleKind, clip_grad_norm_of, io, set_grad,
};
use serde_json::Value;
use tch::{Kind, Tensor};

struct Case {
    json: Value,
    tensors: BTreeMap<String, Tensor>,
}

impl Case {
    fn open(name: &str) -> Self {
        let dir = PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/optim"));
        let text = std::fs::read_to_string(dir.join(name).join("case.json")).unwrap();
        let path = dir.join(name).join("tensors.safetensors");
        Self {
            json: serde_json::from_str(&text).unwrap(),
            tensors: read(&path),
        }
    }

    fn runs(&self) -> impl Iterator<Item = (&String, &Value)> {
        self.json["params"]["runs"].as_object().unwrap().iter()
    }

    fn tolerance(&self, field: &str) -> f64 {
        number(&self.json["tolerance"][field])
    }

    /// Within the case's absolute tolerance, or the relative one (of `max(1, |expected|)`).
    fn close(&self, actual: f64, expected: f64) -> bool {
        let difference = (actual - expected).abs();
        difference <= self.tolerance("abs")
            || difference <= self.tolerance("rel") * expected.abs().max(1.0)
    }

    #[track_caller]
    fn assert_tensor(&self, name: &str, actual: &Tensor) {
        let expected = &self.tensors[name];
        assert_eq!(actual.size(), expected.size(), "{name}");
        let values = |tensor: &Tensor| {
            Vec::<f64>::try_from(tensor.to_kind(Kind::Double).contiguous().view([-1])).unwrap()
        };
        for (actual, expected) in values(actual).into_iter().zip(values(expected)) {
            assert!(
                self.close(actual, expected),
                "{name}: {actual} != {expected}"
            );
        }
    }
}

fn read(path: &Path) -> BTreeMap<String, Tensor> {
    if path.exists() {
        io::read_tensors(path).unwrap().into_iter().collect()
    } else {
        BTreeMap::new()
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap()
}

#[test]
fn adamw() {
    let case = Case::open("adamw");
    assert_eq!(case.runs().count(), 2);
    for (run, params) in case.runs() {
        let config = AdamWConfig {
            lr: number(&params["lr"]),
            beta1: number(&params["betas"][0]),
            beta2: number(&params["betas"][1]),
            eps: number(&params["eps"]),
            weight_decay: number(&params["weight_decay"]),
            ..AdamWConfig::default() // 'b', the only vector, is the group without decay
        };
        let weights: BTreeMap<&str, Tensor> = ["w", "b", "e"]
            .map(|name| {
                let weight = case.tensors[&format!("init/{name}")].copy();
                (name, weight.set_requires_grad(true))
            })
            .into();
        let named = weights
            .iter()
            .map(|(name, weight)| (name.to_string(), weight.shallow_clone()))
            .collect();
        let mut optimizer = AdamW::new(named, &config).unwrap();
        for step in 1..=5 {
            for (name, weight) in &weights {
                let grad = &case.tensors[&format!("grad{}/{name}", step - 1)];
                set_grad(weight, Some(grad)).unwrap();
            }
            optimizer.step(1.0).unwrap();
            for (name, weight) in &weights {
                case.assert_tensor(&format!("{run}/step{step}/{name}"), weight);
            }
        }
        let state: BTreeMap<_, _> = optimizer.state().into_iter().collect();
        for name in weights.keys() {
            for moment in ["exp_avg", "exp_avg_sq"] {
                let actual = &state[&format!("{moment}.{name}")];
                case.assert_tensor(&format!("{run}/final_{moment}/{name}"), actual);
            }
        }
    }
}

#[test]
fn clip_grad_norm() {
    let case = Case::open("clip_grad_norm");
    assert_eq!(case.runs().count(), 3);
    for (run, params) in case.runs() {
        let norm = match &params["norm_type"] {
            Value::String(name) if name == "inf" => Norm::Max,
            order if order.as_f64() == Some(2.0) => Norm::L2,
            other => panic!("{other}"),
        };
        let weights = ["a", "b", "c"].map(|name| {
            let grad = case.tensors[&format!("grad/{name}")].copy();
            let weight = grad.zeros_like().set_requires_grad(true);
            set_grad(&weight, Some(&grad)).unwrap();
            weight
        });
        let total = clip_grad_norm_of(&weights, number(&params["max_norm"]), norm).unwrap();
        let expected = number(&case.json["expect"][run]["total_norm"]);
        assert!(case.close(total, expected), "{run}: {total} != {expected}");
        for (name, weight) in ["a", "b", "c"].iter().zip(&weights) {
            case.assert_tensor(&format!("{run}/{name}"), &weight.grad());
        }
    }
}

#[test]
fn lr_schedules() {
    let case = Case::open("lr_schedules");
    let base_lr = number(&case.json["params"]["base_lr"]);
    assert_eq!(case.runs().count(), 16);
    for (run, params) in case.runs() {
        let integer = |value: &Value| value.as_u64().unwrap();
        let name = params["schedule"].as_str().unwrap();
        let schedule = Schedule {
            kind: match name {
                "constant" | "constant_with_warmup" => ScheduleKind::Constant,
                "linear" => ScheduleKind::Linear,
                "cosine" => ScheduleKind::Cosine { min_factor: 0.0 },
                "cosine_with_min_lr" => ScheduleKind::Cosine {
                    min_factor: number(&params["min_lr_rate"]),
                },
                "cosine_with_restarts" => ScheduleKind::CosineWithRestarts {
                    cycles: integer(&params["num_cycles"]) as u32,
                },
                "polynomial" => ScheduleKind::Polynomial {
                    power: number(&params["power"]),
                    end_factor: number(&params["lr_end"]) / base_lr,
                },
                "inverse_sqrt" => ScheduleKind::InverseSqrt,
                other => panic!("{other}"),
            },
            warmup_steps: match name {
                "constant" => 0, // which ignores the number
                _ => integer(&params["num_warmup_steps"]),
            },
            total_steps: integer(&case.json["params"]["num_training_steps"]),
        };
        schedule.validate().unwrap();
        let rates = case.json["expect"][run].as_array().unwrap();
        assert_eq!(rates.len(), 34, "{run}");
        for (step, expected) in rates.iter().enumerate() {
            let (actual, expected) = (base_lr * schedule.factor(step as u64), number(expected));
            // Relative to the rate itself: against 1, any rate this small would pass.
            let difference = (actual - expected).abs();
            assert!(
                difference <= case.tolerance("abs")
                    || difference <= case.tolerance("rel") * expected.abs(),
                "{run}, step {step}: {actual} != {expected}"
            );
        }
    }
}
