//! LoRA: what PEFT computes, on frozen weights that are never copied.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod files;
mod heads;
mod reference;
mod refusals;
mod training;

use std::path::PathBuf;

use common::{Case, adapter_dir, assert_close, model_dir};
use rlhf_models::core::{
    LogprobOptions, PaddingSide, Parameters, Policy, Scorer, Sequence, SequenceBatch, ValueModel,
};
use rlhf_models::tch::{self, Device, Kind, Tensor};
use rlhf_models::{
    AdapterProblem, CausalLm, Error, LoadOptions, LoraConfig, Modules, SequenceClassifier,
    ValueHeadModel, WeightProblem,
};

const ADAPTERS: [(&str, &str); 3] = [
    ("llama_qv", "llama"),
    ("llama_all_rslora", "llama"),
    ("gpt2_attn_mlp", "gpt2"),
];

fn load(name: &str) -> CausalLm {
    CausalLm::from_pretrained(model_dir(name), &LoadOptions::default()).unwrap()
}

fn adapted(adapter: &str, model: &str) -> CausalLm {
    let mut model = load(model);
    model.load_adapter(adapter_dir(adapter)).unwrap();
    model
}

fn batch() -> SequenceBatch {
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 8]),
        Sequence::new([7], [1, 1, 4, 20, 6]),
    ])
    .unwrap()
}

fn logprobs(model: &CausalLm) -> Tensor {
    let scores = model.logprobs(&batch(), &LogprobOptions::default());
    scores.unwrap().logprobs
}

fn case_logits(model: &CausalLm, case: &Case) -> Tensor {
    let rows = case.rows("input_ids").into_iter();
    let sequences = rows.map(|row| Sequence::new(row, [])).collect();
    let batch = SequenceBatch::new(sequences).unwrap();
    let padded = batch.padded(0, PaddingSide::Right, Device::Cpu);
    let logits = model.logits(&padded).unwrap();
    logits.narrow(1, logits.size()[1] - 3, 3)
}

/// Moves every trained weight a little.
fn train(model: &impl Parameters) {
    let _guard = tch::no_grad_guard();
    for (_, mut weight) in model.named_parameters() {
        let _ = weight.f_add_scalar_(0.01).unwrap();
    }
}
