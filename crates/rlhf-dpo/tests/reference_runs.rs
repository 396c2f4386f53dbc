//! Whole runs of TRL's DPO trainer: three steps on twelve pairs.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/training_case.rs"]
mod training_case;

use rlhf_dpo::core::PreferenceBatch;
use rlhf_dpo::{Divergence, DpoConfig, DpoLoss, DpoTrainer};
use rlhf_models::{CausalLm, LoadOptions};
use training_case::{TrainingCase, model_dir, preference_pairs};

const METRICS: [(&str, &str); 8] = [
    ("dpo/loss", "loss"),
    ("dpo/grad_norm", "grad_norm"),
    ("dpo/rewards/chosen", "rewards/chosen"),
    ("dpo/rewards/rejected", "rewards/rejected"),
    ("dpo/rewards/accuracy", "rewards/accuracies"),
    ("dpo/rewards/margin", "rewards/margins"),
    ("dpo/logprobs/chosen", "logps/chosen"),
    ("dpo/logprobs/rejected", "logps/rejected"),
];

fn repeat(name: &str, loss: DpoLoss, divergence: Divergence) {
    let case = TrainingCase::read(name);
    let load = |param: &str| {
        let folder = case.param(param).as_str().unwrap();
        let dir = model_dir(folder.strip_prefix("models/").unwrap());
        CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap()
    };
    let size = |param: &str| case.param(param).as_u64().unwrap() as usize;
    let microbatch_size = size("per_device_train_batch_size");
    let config = DpoConfig {
        update: case.update(),
        loss,
        divergence,
        beta: case.param("beta").as_f64().unwrap(),
        microbatch_size,
    };
    let mut model = load("model");
    let reference = match case.param("adapter").as_str() {
        // TRL takes the policy as it is at the start.
        Some(adapter) => {
            model.load_adapter(model_dir("../").join(adapter)).unwrap();
            model.snapshot().unwrap()
        }
        None => load("ref_model"),
    };
    let mut trainer = DpoTrainer::new(model, Box::new(reference), config).unwrap();
    let batch_size = microbatch_size * size("gradient_accumulation_steps");
    for (step, pairs) in preference_pairs().chunks(batch_size).enumerate() {
        let batch = PreferenceBatch::new(pairs.to_vec()).unwrap();
        case.check_step(step, &trainer.step(&batch).unwrap(), &METRICS);
    }
    assert_eq!(case.steps().len(), 3);
    case.check_final_weights(trainer.model());
}

macro_rules! runs {
    ($($test:ident: $name:literal, $loss:expr, $divergence:expr;)*) => {$(
        #[test]
        fn $test() {
            repeat($name, $loss, $divergence);
        }
    )*};
}

const SIGMOID: DpoLoss = DpoLoss::Sigmoid {
    label_smoothing: 0.0,
};
const ROBUST: DpoLoss = DpoLoss::Robust {
    label_smoothing: 0.1,
};
const DISCOPOP: DpoLoss = DpoLoss::Discopop { temperature: 0.05 };
const KL: Divergence = Divergence::ReverseKl;

runs! {
    gpt2_sigmoid: "gpt2_sigmoid", SIGMOID, KL;
    gpt2_sigmoid_beta: "gpt2_sigmoid_beta0.5", SIGMOID, KL;
    gpt2_ipo: "gpt2_ipo", DpoLoss::Ipo, KL;
    gpt2_robust: "gpt2_robust", ROBUST, KL;
    gpt2_hinge: "gpt2_hinge", DpoLoss::Hinge, KL;
    gpt2_sigmoid_norm: "gpt2_sigmoid_norm", DpoLoss::SigmoidNorm, KL;
    gpt2_discopop: "gpt2_discopop", DISCOPOP, KL;
    gpt2_jensen_shannon: "gpt2_fdiv_js", SIGMOID, Divergence::JensenShannon;
    gpt2_microbatches: "gpt2_grad_accum", SIGMOID, KL;
    gpt2_clipping_and_weight_decay: "gpt2_clip_and_decay", SIGMOID, KL;
    gpt2_reference_is_the_initial_policy: "gpt2_ref_is_initial_policy", SIGMOID, KL;
    llama_sigmoid: "llama_sigmoid", SIGMOID, KL;
    llama_ipo: "llama_ipo", DpoLoss::Ipo, KL;
    llama_nca: "llama_nca_pair", DpoLoss::NcaPair, KL;
    llama_lora: "llama_lora", SIGMOID, KL;
    llama_alpha_divergence: "llama_fdiv_alpha0.5", SIGMOID, Divergence::Alpha { alpha: 0.5 };
}
