//! A scorer without layers.
#![allow(dead_code, unreachable_pub)] // every test file uses some of it

use rlhf_reward::core::{Parameters, Result, Scorer, SequenceBatch};
use rlhf_reward::tch::{Device, Kind, Tensor};

pub const VOCAB: i64 = 12;

/// The mean of a learned row for each token.
pub struct TokenMean(pub Tensor);

impl TokenMean {
    pub fn new(labels: i64) -> Self {
        let table = Tensor::arange(VOCAB * labels, (Kind::Float, Device::Cpu)).cos() * 0.3;
        Self(table.view([VOCAB, labels]).set_requires_grad(true))
    }

    /// The same scores for every label.
    pub fn alike(labels: i64) -> Self {
        let table = Tensor::arange(VOCAB, (Kind::Float, Device::Cpu)).cos() * 0.3;
        let table = table.unsqueeze(1).repeat([1, labels]);
        Self(table.set_requires_grad(true))
    }
}

impl Parameters for TokenMean {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        vec![("table".into(), self.0.shallow_clone())]
    }
}

impl Scorer for TokenMean {
    fn scores(&self, batch: &SequenceBatch) -> Result<Tensor> {
        batch.check_vocabulary(VOCAB)?;
        let packed = batch.packed(Device::Cpu);
        let rows = self.0.f_index_select(0, &packed.input_ids)?;
        let mean = |sequence: usize| {
            let tokens = Tensor::from_slice(&packed.rows(sequence).collect::<Vec<_>>());
            let tokens = rows.index_select(0, &tokens);
            tokens.mean_dim([0i64].as_slice(), false, Kind::Float)
        };
        Ok(Tensor::stack(
            &(0..batch.len()).map(mean).collect::<Vec<_>>(),
            0,
        ))
    }
}
