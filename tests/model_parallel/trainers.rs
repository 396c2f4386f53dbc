//! What is trained, and how.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rlhf_core::{
    Completions, GenerationConfig, Policy, Preference, PreferenceBatch, RewardModel, Sequence,
    SequenceBatch, Stats,
};
use rlhf_dpo::{DpoConfig, DpoTrainer, OnlineDpoConfig, OnlineDpoTrainer};
use rlhf_models::{
    CausalLm, CheckpointPolicy, LoadOptions, LoraConfig, Modules, Placement, ValueHeadModel,
};
use rlhf_ppo::{GrpoConfig, GrpoTrainer, MissingEos, PpoConfig, PpoTrainer};
use rlhf_scale::{AdamWConfig, UpdateConfig};
use rlhf_sft::{SftConfig, SftTrainer};
use tch::Tensor;

use rlhf_scale::tch;

const STEPS: usize = 5;

pub(crate) fn update() -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr: 1e-3,
            // Gradients that are 0 but for rounding must not make steps of full length.
            eps: 1e-4,
            ..AdamWConfig::default()
        },
        max_grad_norm: Some(1.0),
        ..UpdateConfig::default()
    }
}

fn model_dir(architecture: &str) -> PathBuf {
    Path::new("tests/goldens/models").join(architecture)
}

/// How a model is trained.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Variant {
    pub(crate) architecture: &'static str,
    /// LoRA on all linear layers.
    pub(crate) adapters: bool,
    /// What a stage drops does not depend on those before it, as it does on one rank; and copies of
    /// a model make smaller microbatches.
    pub(crate) dropout: f64,
    pub(crate) checkpointed: bool,
}

impl Variant {
    fn lora(self) -> LoraConfig {
        LoraConfig {
            rank: 4,
            dropout: self.dropout,
            target_modules: Modules::AllLinear,
            ..LoraConfig::default()
        }
    }

    pub(crate) fn load(self, placement: &Placement) -> CausalLm {
        let policy = match self.checkpointed {
            true => CheckpointPolicy::EveryBlock,
            false => CheckpointPolicy::None,
        };
        let options = LoadOptions {
            gradient_checkpointing: policy.into(),
            ..LoadOptions::default()
        };
        let dir = model_dir(self.architecture);
        let mut model = CausalLm::from_pretrained_parallel(dir, &options, placement).unwrap();
        if self.adapters {
            model.add_adapter(&self.lora(), 5).unwrap();
        }
        model
    }

    /// A model that is not trained, and one that is.
    fn with_reference(self, placement: &Placement) -> (CausalLm, CausalLm) {
        let model = self.load(placement);
        let reference = match self.adapters {
            true => model.reference().unwrap(),
            false => model.try_clone().unwrap(),
        };
        (reference, model)
    }
}

/// Ragged.
pub(crate) fn sequences() -> SequenceBatch {
    SequenceBatch::new(vec![
        Sequence::new([5, 9, 2, 14], [3, 767]),
        Sequence::new([7, 700, 4], [1, 1, 400, 20, 6]),
        Sequence::new([7, 700, 4], [384, 383]),
        Sequence::new([11], [9]),
        Sequence::new([12, 13], [9, 4, 5, 3, 3, 3]),
    ])
    .unwrap()
}

fn steps<E: Debug>(mut step: impl FnMut() -> Result<Stats, E>) -> Vec<Stats> {
    (0..STEPS).map(|_| step().unwrap()).collect()
}

fn save(model: &CausalLm, dir: &Path) {
    model.save_pretrained(dir.join("model")).unwrap();
}

fn fine_tuned(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let config = SftConfig {
        update: update(),
        microbatch_size: 2,
        ..SftConfig::default()
    };
    let mut trainer = SftTrainer::new(variant.load(placement), config).unwrap();
    let stats = steps(|| trainer.step(&sequences()));
    save(&trainer.into_model(), dir);
    stats
}

fn preferred(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let (reference, model) = variant.with_reference(placement);
    let config = DpoConfig {
        update: update(),
        microbatch_size: 2,
        ..DpoConfig::default()
    };
    let mut trainer = DpoTrainer::new(model, Box::new(reference), config).unwrap();
    let pair = |i: usize| {
        let (prompt, more) = (vec![5 + i as i64, 9, 700], vec![3; i % 3 + 1]);
        Preference::new(prompt, [vec![8 + i as i64], more.clone()].concat(), more)
    };
    let batch = PreferenceBatch::new((0..5).map(pair).collect()).unwrap();
    let stats = steps(|| trainer.step(&batch));
    save(&trainer.into_model(), dir);
    stats
}

/// A number of the response's tokens.
struct Tokens;

impl RewardModel for Tokens {
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        let sequences = completions.batch.sequences();
        let score = |s: &Sequence| s.response.iter().sum::<i64>() as f32 / 768.0;
        let scores: Vec<f32> = sequences.iter().map(score).collect();
        Ok(Tensor::from_slice(&scores))
    }
}

/// Ragged.
fn prompts() -> Vec<Arc<[i64]>> {
    let prompts: [&[i64]; 4] = [&[5, 6, 7], &[400, 3, 9, 11], &[1], &[9, 8]];
    prompts.map(Arc::from).to_vec()
}

/// Half of the answers end early.
fn generation() -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: 6,
        stop_token_ids: (0..100).collect(),
        ..GenerationConfig::default()
    }
}

fn reinforced(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let (reference, policy) = variant.with_reference(placement);
    let value = match variant.adapters {
        true => ValueHeadModel::on_base_of(&policy, &variant.lora(), 3),
        false => ValueHeadModel::from_causal_lm(&policy, 3),
    };
    let config = PpoConfig {
        batch_size: 4,
        minibatches: 2,
        ppo_epochs: 2,
        microbatch_size: 1,
        missing_eos: MissingEos::Keep,
        generation: generation(),
        update: update(),
        ..PpoConfig::default()
    };
    let trainer = PpoTrainer::new(config, policy, value.unwrap(), reference, Tokens);
    let mut trainer = trainer.unwrap();
    let stats = steps(|| trainer.step(&prompts()));
    let (policy, value) = trainer.into_models();
    save(&policy, dir);
    value.save_pretrained(dir.join("value")).unwrap();
    stats
}

fn grouped(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let (reference, policy) = variant.with_reference(placement);
    let mut config = GrpoConfig {
        batch_size: 4,
        minibatches: 2,
        microbatch_size: 3,
        generation: generation(),
        update: update(),
        ..GrpoConfig::dr_grpo()
    };
    config.generation.samples_per_prompt = 3;
    let mut trainer = GrpoTrainer::with_reference(config, policy, reference, Tokens).unwrap();
    let stats = steps(|| trainer.step(&prompts()));
    save(&trainer.into_policy(), dir);
    stats
}

fn ranked(variant: Variant, placement: &Placement, dir: &Path) -> Vec<Stats> {
    let (reference, model) = variant.with_reference(placement);
    let mut config = OnlineDpoConfig {
        generation: generation(),
        ..OnlineDpoConfig::default()
    };
    config.generation.samples_per_prompt = 3;
    config.dpo.update = update();
    config.dpo.microbatch_size = 2;
    let reference: Box<dyn Policy> = Box::new(reference);
    let trainer = OnlineDpoTrainer::new(model, reference, Tokens, None, config);
    let mut trainer = trainer.unwrap();
    let stats = steps(|| trainer.step(&prompts()));
    save(&trainer.into_model(), dir);
    stats
}

pub(crate) type Train = fn(Variant, &Placement, &Path) -> Vec<Stats>;

pub(crate) const TRAINERS: [(&str, Train); 5] = [
    ("sft", fine_tuned),
    ("dpo", preferred),
    ("ppo", reinforced),
    ("grpo", grouped),
    ("online DPO", ranked),
];
