//! Settings of the stages that several examples have.

use std::error::Error;
use std::path::Path;

use rlhf::core::{Device, GenerationConfig, Kind};
use rlhf::models::{CausalLm, LoadOptions, Tokenizer};
use rlhf::ppo::{KlControl, MissingEos, OldLogprobs, PpoConfig};
use rlhf::scale::{AdamWConfig, ParamGroup, Schedule, UpdateConfig};

/// Samples of one text share its forward pass.
pub const SAMPLES_PER_TEXT: usize = 4;

/// A language model in f32 and its tokenizer, which has no token that the model lacks.
pub fn language_model(dir: &Path, device: Device) -> Result<(CausalLm, Tokenizer), Box<dyn Error>> {
    let load = LoadOptions {
        device,
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    };
    let model = CausalLm::from_pretrained(dir, &load)?;
    let tokenizer = Tokenizer::from_dir(dir)?;
    tokenizer.check_fits(model.config())?;
    Ok((model, tokenizer))
}

/// Updates of a classifier on the trunk of a language model, in so many steps: the head starts from
/// nothing, the rest does not.
pub fn classifier_updates(lr: f64, steps: u64) -> UpdateConfig {
    let head = ParamGroup {
        params: vec!["score.*".into()],
        lr: Some(3e-3),
        ..ParamGroup::default()
    };
    UpdateConfig {
        optimizer: AdamWConfig {
            lr,
            groups: vec![head],
            ..AdamWConfig::default()
        },
        schedule: Schedule::linear(steps / 10, steps),
        ..UpdateConfig::default()
    }
}

/// What differs between the runs of PPO on summaries.
pub struct SummaryPpo {
    pub seed: u64,
    pub steps: u64,
    /// Texts of a step, each with [`SAMPLES_PER_TEXT`] summaries.
    pub batch: usize,
    pub lr: f64,
    /// Price of a nat of divergence from the reference.
    pub kl_coef: f64,
    /// What an unfinished summary is worth.
    pub unfinished: f64,
    /// How one summary is sampled.
    pub generation: GenerationConfig,
}

impl SummaryPpo {
    pub fn config(self) -> PpoConfig {
        let base = PpoConfig::n_plus();
        let steps = self.steps;
        PpoConfig {
            seed: self.seed,
            batch_size: self.batch,
            ppo_epochs: 1,
            minibatches: 2,
            microbatch_size: 64,
            kl_control: KlControl::Fixed {
                kl_coef: self.kl_coef,
            },
            missing_eos: MissingEos::Replace(self.unfinished),
            generation: GenerationConfig {
                samples_per_prompt: SAMPLES_PER_TEXT,
                ..self.generation
            },
            // No filter shapes the samples, so their log-probs are the policy's own.
            old_logprobs: OldLogprobs::Sampled,
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: self.lr,
                    ..base.update.optimizer.clone()
                },
                max_grad_norm: Some(1.0),
                ..UpdateConfig::default()
            },
            ..base
        }
        .annealed(steps)
    }
}
