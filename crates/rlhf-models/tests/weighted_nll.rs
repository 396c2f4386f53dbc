//! The loss of SFT as the models compute it, against its definition by log-probabilities.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::model_dir;
use rlhf_core::{
    LogprobOptions, PaddedBatch, Parameters, Policy, Result, Sequence, SequenceBatch, TokenLogprobs,
};
use rlhf_models::{CausalLm, LoadOptions};
use tch::{Device, Kind, Tensor};

/// A model that has no way of its own.
struct ByDefinition(CausalLm);

impl Parameters for ByDefinition {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.0.named_parameters()
    }
}

impl Policy for ByDefinition {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        self.0.logits(batch)
    }
    fn logprobs(&self, batch: &SequenceBatch, options: &LogprobOptions) -> Result<TokenLogprobs> {
        self.0.logprobs(batch, options)
    }
}

fn load(architecture: &str) -> CausalLm {
    CausalLm::from_pretrained(model_dir(architecture), &LoadOptions::default()).unwrap()
}

/// `rows` sequences of different lengths, the prompts of some shared.
fn batch(rows: i64) -> SequenceBatch {
    let prompt: std::sync::Arc<[i64]> = vec![3, 1, 4].into();
    let sequence = |row: i64| {
        let response: Vec<i64> = (0..2 + row % 5).map(|i| (7 * row + 3 * i) % 40).collect();
        match row % 2 {
            0 => Sequence::new(std::sync::Arc::clone(&prompt), response),
            _ => Sequence::new(vec![5; 1 + row as usize % 3], response),
        }
    };
    SequenceBatch::new((0..rows).map(sequence).collect()).unwrap()
}

fn weights(batch: &SequenceBatch) -> Tensor {
    let shape = [batch.len() as i64, batch.max_response_len() as i64];
    let count = shape[0] * shape[1];
    (Tensor::arange(count, (Kind::Float, Device::Cpu)) * 0.7)
        .sin()
        .view(shape)
}

fn grads(model: &CausalLm, loss: &Tensor) -> Vec<Tensor> {
    let parameters: Vec<Tensor> = model.named_parameters().into_iter().map(|p| p.1).collect();
    Tensor::f_run_backward(&[loss], &parameters, false, false).unwrap()
}

fn assert_close(got: &[Tensor], expected: &[Tensor], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        let scale = expected.abs().max().double_value(&[]).max(1e-6);
        let error = (got - expected).abs().max().double_value(&[]) / scale;
        assert!(error < tolerance, "off by {error}");
    }
}

#[test]
fn it_is_the_sum_over_log_probabilities() {
    for architecture in ["gpt2", "llama", "gemma2"] {
        let defined = ByDefinition(load(architecture));
        let model = &defined.0;
        // More rows than the hidden states are wide, twice over, and fewer.
        for rows in [5, 60] {
            let batch = batch(rows);
            for weights in [None, Some(weights(&batch))] {
                let weights = weights.as_ref();
                let got = model.weighted_nll(&batch, weights).unwrap();
                let expected = defined.weighted_nll(&batch, weights).unwrap();
                assert!((got.double_value(&[]) / expected.double_value(&[]) - 1.0).abs() < 1e-5);
                assert_close(&grads(model, &got), &grads(model, &expected), 2e-5);
            }
        }
    }
}

#[test]
fn parts_add_up_to_the_whole() {
    let model = load("gpt2");
    let batch = batch(12);
    let whole = model.weighted_nll(&batch, None).unwrap();
    let parts = batch.split(5).unwrap();
    let sum = parts
        .iter()
        .map(|part| model.weighted_nll(part, None).unwrap())
        .reduce(|a, b| a + b)
        .unwrap();
    assert_close(&grads(&model, &sum), &grads(&model, &whole), 2e-5);
}

#[test]
fn weights_of_another_shape_are_refused() {
    let defined = ByDefinition(load("gpt2"));
    let batch = batch(3);
    let narrow = weights(&batch).narrow(1, 0, 1);
    let error = defined.0.weighted_nll(&batch, Some(&narrow)).unwrap_err();
    assert!(error.to_string().contains("weights"), "{error}");
    let error = defined.weighted_nll(&batch, Some(&narrow)).unwrap_err();
    assert!(error.to_string().contains("weights"), "{error}");
}
