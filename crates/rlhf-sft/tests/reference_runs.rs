//! Whole runs of supervised fine-tuning: TRL's DPO trainer with its `sft` loss, which is the
//! token mean of the cross-entropy of the chosen responses.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/training_case.rs"]
mod training_case;

use rlhf_models::{CausalLm, LoadOptions};
use rlhf_sft::core::{Sequence, SequenceBatch};
use rlhf_sft::{SftConfig, SftTrainer};
use training_case::{TrainingCase, model_dir, preference_pairs};

const METRICS: [(&str, &str); 2] = [("sft/loss", "loss"), ("sft/grad_norm", "grad_norm")];

fn repeat(name: &str, model: &str, microbatch_size: usize) {
    let case = TrainingCase::read(name);
    let model = CausalLm::from_pretrained(model_dir(model), &LoadOptions::default()).unwrap();
    let config = SftConfig {
        update: case.update(),
        microbatch_size,
        ..SftConfig::default()
    };
    let mut trainer = SftTrainer::new(model, config).unwrap();
    let data: Vec<Sequence> = preference_pairs()
        .into_iter()
        .map(|pair| Sequence {
            prompt: pair.prompt,
            response: pair.chosen,
        })
        .collect();
    for (step, rows) in data.chunks(4).enumerate() {
        let batch = SequenceBatch::new(rows.to_vec()).unwrap();
        let report = trainer.evaluate(rows).unwrap();
        let stats = trainer.step(&batch).unwrap();
        case.check_step(step, &stats, &METRICS);
        assert!((report.loss - stats.get("sft/loss").unwrap()).abs() < 1e-5);
    }
    assert_eq!(case.steps().len(), 3);
    case.check_final_weights(trainer.model());
}

#[test]
fn gpt2() {
    repeat("gpt2_sft", "gpt2", 4);
}

/// Responses of different lengths count token by token, however the batch is split.
#[test]
fn gpt2_in_microbatches() {
    repeat("gpt2_sft", "gpt2", 3);
}

#[test]
fn llama() {
    repeat("llama_sft", "llama", 2);
}
