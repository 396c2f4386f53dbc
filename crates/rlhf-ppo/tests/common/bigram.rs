//! The smallest models that PPO can train: tables indexed by the last token.

#![allow(dead_code, unreachable_pub)]

use rlhf_ppo::core::{PaddedBatch, Parameters, Policy, Result, SequenceBatch, ValueModel};
use rlhf_ppo::tch::{Device, Kind, Tensor};

pub const VOCABULARY: i64 = 5;
/// Ends a response.
pub const STOP: i64 = 0;

/// Logits of the next token, for every last token: `[V, V]`.
pub struct Bigram(pub Tensor);

/// The value of the state, for every last token: `[V]`.
pub struct TokenValue(pub Tensor);

impl Bigram {
    pub fn new() -> Self {
        let size = [VOCABULARY, VOCABULARY];
        let table = Tensor::arange(VOCABULARY * VOCABULARY, (Kind::Float, Device::Cpu));
        Self((table.view(size) * 0.7).sin().set_requires_grad(true))
    }

    pub fn frozen() -> Self {
        Self(Self::new().0.detach().copy())
    }
}

impl TokenValue {
    pub fn new() -> Self {
        let table = Tensor::zeros([VOCABULARY], (Kind::Float, Device::Cpu));
        Self(table.set_requires_grad(true))
    }
}

/// Tokens are letters: `a` is 0, which stops.
pub fn letters(ids: &[i64]) -> Result<String> {
    Ok(ids.iter().map(|&id| char::from(b'a' + id as u8)).collect())
}

impl Parameters for Bigram {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        vec![("table".to_string(), self.0.shallow_clone())]
    }
}

impl Policy for Bigram {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        let rows = self.0.f_index_select(0, &batch.input_ids.view(-1))?;
        let size = batch.input_ids.size();
        Ok(rows.view([size[0], size[1], VOCABULARY]))
    }
}

impl Parameters for TokenValue {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        vec![("table".to_string(), self.0.shallow_clone())]
    }
}

impl ValueModel for TokenValue {
    fn values(&self, batch: &SequenceBatch) -> Result<Tensor> {
        // The state before a token is the token before it; the first one's is the prompt's last.
        let width = batch.max_response_len() + 1;
        let mut ids = Vec::new();
        for sequence in batch.sequences() {
            ids.extend(sequence.prompt.last());
            ids.extend(&sequence.response);
            ids.resize(ids.len() + width - 1 - sequence.response.len(), 0);
        }
        let values = self.0.f_index_select(0, &Tensor::from_slice(&ids))?;
        Ok(values.view([-1, width as i64]))
    }
}
