//! A small network and its training, shared by the tests of the update path.
#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "every test file uses some of this, none all"
)]

use rlhf_scale::{AdamWConfig, Error, Schedule, UpdateConfig, UpdateStats, Updater};
use tch::{Device, Kind, Tensor};

pub(crate) const CPU: Device = Device::Cpu;

/// A two-layer network on fixed data.
pub(crate) struct Net {
    pub(crate) params: Vec<(String, Tensor)>,
}

impl Net {
    pub(crate) fn new(kind: Kind) -> Self {
        let ramp = |shape: [i64; 2], scale: f64| {
            let numel = shape[0] * shape[1];
            ((Tensor::arange(numel, (Kind::Float, CPU)) * scale).sin() * 0.5).view(shape)
        };
        let params = [
            ("a.weight", ramp([3, 4], 0.7)),
            ("a.bias", ramp([1, 4], 0.3).view([4])),
            ("b.weight", ramp([4, 2], 1.3)),
        ];
        Self {
            params: params
                .into_iter()
                .map(|(name, tensor)| {
                    (
                        name.to_string(),
                        tensor.to_kind(kind).set_requires_grad(true),
                    )
                })
                .collect(),
        }
    }

    pub(crate) fn get(&self, name: &str) -> &Tensor {
        &self.params.iter().find(|(n, _)| n == name).unwrap().1
    }

    /// Sum of squared errors of rows `start..start + count`, divided by eight.
    pub(crate) fn loss(&self, step: u64, start: i64, count: i64) -> Tensor {
        let kind = self.get("a.weight").kind();
        let inputs = ((Tensor::arange(24, (Kind::Float, CPU)) + 5.0 * step as f64) * 0.9).cos();
        let rows = inputs.view([8, 3]).narrow(0, start, count).to_kind(kind);
        let hidden = (rows.matmul(self.get("a.weight")) + self.get("a.bias")).tanh();
        let output = hidden.matmul(self.get("b.weight"));
        (output.to_kind(Kind::Float) - 1.0)
            .square()
            .sum(Kind::Float)
            / 8.0
    }

    pub(crate) fn aliases(&self) -> Vec<(String, Tensor)> {
        let alias = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
        self.params.iter().map(alias).collect()
    }

    pub(crate) fn bytes(&self) -> Vec<Vec<u8>> {
        self.params
            .iter()
            .map(|(_, tensor)| bytes(tensor))
            .collect()
    }

    pub(crate) fn grads_defined(&self) -> bool {
        self.params
            .iter()
            .any(|(_, tensor)| tensor.grad().defined())
    }
}

/// The exact content of a tensor.
pub(crate) fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

/// AdamW with decay, a short schedule, and a clip that acts.
pub(crate) fn config() -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr: 0.05,
            weight_decay: 0.1,
            ..AdamWConfig::default()
        },
        schedule: Schedule::linear(2, 10),
        max_grad_norm: Some(0.5),
        ..UpdateConfig::default()
    }
}

/// One update on the eight rows of the next step.
pub(crate) fn train(net: &Net, updater: &mut Updater, microbatches: usize) -> UpdateStats {
    let rows = 8 / microbatches as i64;
    let step = updater.step();
    updater
        .update::<Error>(microbatches, |i| Ok(net.loss(step, rows * i as i64, rows)))
        .unwrap()
}

/// Drops the gradients of a network.
pub(crate) fn clear(net: &Net) {
    let params: Vec<Tensor> = net.params.iter().map(|(_, t)| t.shallow_clone()).collect();
    rlhf_scale::clear_grads(&params).unwrap();
}
