//! Dropout of adapters. libtorch's generator is one for the process, so this file has one test.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{adapter_dir, model_dir};
use rlhf_models::core::{LogprobOptions, Parameters, Policy, Sequence, SequenceBatch};
use rlhf_models::tch::{self, Kind, Tensor};
use rlhf_models::{CausalLm, CheckpointPolicy, GradientCheckpointing, LoadOptions};
use rlhf_scale::clear_grads;

fn logprobs(model: &CausalLm) -> Tensor {
    let sequences = vec![
        Sequence::new([5, 9, 2, 14], [3, 8]),
        Sequence::new([7], [1, 1, 4, 20, 6]),
    ];
    let batch = SequenceBatch::new(sequences).unwrap();
    let scores = model.logprobs(&batch, &LogprobOptions::default());
    scores.unwrap().logprobs
}

fn step(model: &CausalLm, seed: i64) -> (Tensor, Vec<(String, Tensor)>) {
    tch::manual_seed(seed);
    let loss = logprobs(model).sum(Kind::Float);
    loss.backward();
    let parameters = model.named_parameters();
    let gradients = parameters
        .iter()
        .map(|(name, weight)| (name.clone(), weight.grad().copy()))
        .collect();
    let leaves: Vec<_> = parameters.into_iter().map(|(_, w)| w).collect();
    clear_grads(&leaves).unwrap();
    (loss.detach(), gradients)
}

/// Equal but for rounding: without gradients other kernels run.
fn close(left: &Tensor, right: &Tensor) -> bool {
    left.allclose(right, 1e-5, 1e-5, false)
}

#[test]
fn dropout_acts_in_training_alone_and_is_computed_again_as_it_was() {
    for (name, adapter) in [("llama", "llama_all_rslora"), ("gpt2", "gpt2_attn_mlp")] {
        let mut plain =
            CausalLm::from_pretrained(model_dir(name), &LoadOptions::default()).unwrap();
        plain.load_adapter(adapter_dir(adapter)).unwrap();
        // The same weights with dropout.
        let dir = tempfile::tempdir().unwrap();
        plain.save_adapter(dir.path()).unwrap();
        let path = dir.path().join("adapter_config.json");
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.replace("\"lora_dropout\": 0.0", "\"lora_dropout\": 0.25");
        std::fs::write(path, text).unwrap();
        let mut model =
            CausalLm::from_pretrained(model_dir(name), &LoadOptions::default()).unwrap();
        model.load_adapter(dir.path()).unwrap();
        assert_eq!(model.adapter().unwrap().dropout, 0.25);
        assert!(model.is_dropout_active());

        // Without gradients, as a snapshot and switched off it is the model without dropout.
        let expected = logprobs(&plain).detach();
        {
            let _guard = tch::no_grad_guard();
            assert!(close(&logprobs(&model), &expected));
        }
        assert!(close(&logprobs(&model.snapshot().unwrap()), &expected));
        model.set_trainable(false);
        assert!(close(&logprobs(&model), &expected));
        model.set_trainable(true);
        model.set_dropout_active(false);
        assert!(close(&logprobs(&model), &expected));
        assert!(!model.try_clone().unwrap().is_dropout_active());
        model.set_dropout_active(true);

        // In training it acts, and depends on the generator alone.
        let (loss, gradients) = step(&model, 1);
        assert!(!close(&loss, &expected.sum(Kind::Float)));
        assert!(!close(&loss, &step(&model, 2).0));
        assert!(loss.equal(&step(&model, 1).0));

        for policy in [
            CheckpointPolicy::EveryBlock,
            CheckpointPolicy::EveryKth(2),
            CheckpointPolicy::SquareRoot,
        ] {
            let checkpointing = GradientCheckpointing {
                policy,
                offload: false,
            };
            model.set_gradient_checkpointing(checkpointing).unwrap();
            let (again, recomputed) = step(&model, 1);
            assert!(again.equal(&loss), "{name} under {policy:?}");
            for ((parameter, gradient), (_, expected)) in recomputed.iter().zip(&gradients) {
                assert!(gradient.equal(expected), "{parameter} under {policy:?}");
            }
        }
    }
}
