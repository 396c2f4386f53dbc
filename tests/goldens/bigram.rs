//! The smallest policy: a row of logits for each token that may come before.

use rlhf_core::tch::{Device, Kind, Tensor};
use rlhf_core::{PaddedBatch, Parameters, Policy, Result};

/// Ids are `0..VOCAB`.
pub(crate) const VOCAB: i64 = 12;

/// `[V, V]` logits.
pub(crate) struct Bigram(pub(crate) Tensor);

impl Bigram {
    /// Fixed weights, which `seed` shifts.
    pub(crate) fn new(seed: f64) -> Self {
        let table = (Tensor::arange(VOCAB * VOCAB, (Kind::Float, Device::Cpu)) + seed).cos();
        Self(table.view([VOCAB, VOCAB]).set_requires_grad(true))
    }

    /// All weights.
    pub(crate) fn weights(&self) -> Vec<f32> {
        self.0.detach().view(-1).try_into().unwrap()
    }

    /// The bits of all weights: unlike the numbers, they can be compared where some are NaN.
    pub(crate) fn bits(&self) -> Vec<u32> {
        self.weights().iter().map(|w| w.to_bits()).collect()
    }
}

impl Parameters for Bigram {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        vec![("table".into(), self.0.shallow_clone())]
    }
}

impl Policy for Bigram {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        let size = batch.input_ids.size();
        let rows = self.0.f_index_select(0, &batch.input_ids.view(-1))?;
        Ok(rows.view([size[0], size[1], VOCAB]))
    }
}
