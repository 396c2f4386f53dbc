//! The choices of well-known implementations, each by name.

use rlhf_core::{GenerationConfig, SamplingConfig};
use rlhf_scale::{AdamWConfig, Schedule, UpdateConfig};

use super::{KlPlacement, LogprobTemperature, MinibatchUnit, OldLogprobs, PpoConfig};
use crate::{
    KlControl, KlEstimator, MissingEos, PtxConfig, PtxStep, RolloutCorrection, ScorePosition,
    ScoreScaling, UpdateGuards, Whitening,
};

impl PpoConfig {
    /// Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (arXiv 2403.17031,
    /// and its released code): batches of 512 prompts, 53 tokens at temperature 0.7,
    /// score −1 without EOS, population variance in whitening, AdamW with epsilon 1e-5, no
    /// gradient clipping. Its learning rate of 3e-6 falls to 0 in a straight line: see
    /// [`annealed`](Self::annealed), which needs to know the length of the run.
    pub fn n_plus() -> Self {
        Self {
            seed: 1,
            batch_size: 512,
            ppo_epochs: 4,
            minibatches: 1,
            minibatch_unit: MinibatchUnit::Samples,
            microbatch_size: 8,
            microbatch_tokens: None,
            cliprange: 0.2,
            dual_clip: None,
            cliprange_value: 0.2,
            vf_coef: 0.1,
            entropy_coef: 0.0,
            gamma: 1.0,
            lam: 0.95,
            kl_control: KlControl::Fixed { kl_coef: 0.05 },
            kl_estimator: KlEstimator::K1,
            kl_clamp: None,
            kl_placement: KlPlacement::Reward,
            score_position: ScorePosition::AfterLastToken,
            score_scaling: ScoreScaling::Off,
            score_clip: None,
            missing_eos: MissingEos::Replace(-1.0),
            length_penalty: None,
            reward_clip: None,
            whiten_rewards: Whitening::Off,
            whiten_advantages: Whitening::Population,
            old_logprobs: OldLogprobs::Recomputed,
            rollout_correction: RolloutCorrection::Off,
            logprob_temperature: LogprobTemperature::OfSampling,
            guards: UpdateGuards::default(),
            ptx: None,
            critic_lr: None,
            generation: GenerationConfig {
                max_new_tokens: 53,
                sampling: SamplingConfig {
                    temperature: 0.7,
                    ..SamplingConfig::default()
                },
                ..GenerationConfig::default()
            },
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 3e-6,
                    eps: 1e-5,
                    ..AdamWConfig::default()
                },
                schedule: Schedule::constant(),
                max_grad_norm: None,
                ..UpdateConfig::default()
            },
        }
    }

    /// The arithmetic of `PPOTrainer` in TRL 1.12 (`trl/experimental/ppo`) at its defaults, which
    /// this crate's tests hold to its numbers: as [`n_plus`](Self::n_plus), but with the sample
    /// variance in whitening, scores that stand without EOS (`missing_eos_penalty` is
    /// [`MissingEos::Subtract`]), and epsilon 1e-8.
    pub fn trl() -> Self {
        let mut config = Self::n_plus();
        config.missing_eos = MissingEos::Keep;
        config.whiten_advantages = Whitening::Sample;
        config.update.optimizer.eps = 1e-8;
        config
    }

    /// OpenRLHF's PPO at its defaults: score at the last token and within ±10, no decay in
    /// advantage estimation (λ = 1), advantages whitened over the whole rollout with the variance
    /// held above 1e-8, KL coefficient 0.01, learning rates 1e-6 (policy) and 9e-6 (critic),
    /// β₂ = 0.95, gradients clipped to norm 1, samples of the model's own distribution.
    ///
    /// It trains the critic by an optimiser of its own, so its critic's loss has weight 1 here and
    /// a learning rate of its own, and clipping looks at the norm of both together.
    pub fn openrlhf() -> Self {
        Self {
            batch_size: 1024,
            ppo_epochs: 1,
            minibatches: 8,
            vf_coef: 1.0,
            lam: 1.0,
            kl_control: KlControl::Fixed { kl_coef: 0.01 },
            score_position: ScorePosition::LastToken,
            score_clip: Some(10.0),
            missing_eos: MissingEos::Keep,
            whiten_advantages: Whitening::PopulationFloored,
            generation: GenerationConfig {
                max_new_tokens: 1024,
                ..GenerationConfig::default()
            },
            critic_lr: Some(9e-6),
            update: clipped(1e-6),
            ..Self::n_plus()
        }
    }

    /// DeepSpeed-Chat's PPO (`ppo_trainer.py`) at its defaults: score at the last token and within
    /// ±5, no whitening, KL coefficient 0.1, log-probabilities at temperature 1, learning rates
    /// 9.65e-6 (policy) and 5e-6 (critic), β₂ = 0.95, gradients clipped to norm 1. Its pretraining
    /// loss, where there is data for it, is [`PtxConfig::deepspeed_chat`].
    ///
    /// As in [`openrlhf`](Self::openrlhf), its two optimisers are one here.
    pub fn deepspeed_chat() -> Self {
        Self {
            batch_size: 64,
            ppo_epochs: 1,
            vf_coef: 1.0,
            kl_control: KlControl::Fixed { kl_coef: 0.1 },
            score_position: ScorePosition::LastToken,
            score_clip: Some(5.0),
            missing_eos: MissingEos::Keep,
            whiten_advantages: Whitening::Off,
            logprob_temperature: LogprobTemperature::One,
            generation: GenerationConfig {
                max_new_tokens: 256,
                ..GenerationConfig::default()
            },
            critic_lr: Some(5e-6),
            update: clipped(9.65e-6),
            ..Self::n_plus()
        }
    }

    /// PPO-Lagrangian of Safe RLHF (Dai et al. 2023, arXiv 2310.12773) at its defaults: score at
    /// the last token, the reward of a step within ±50, no whitening, KL coefficient 0.02, values
    /// clipped at 5, learning rates 1e-5 (policy) and 5e-6 (critics), pretraining coefficient 16
    /// where there is data. The constraint and its multiplier are a
    /// [`Constraint::lagrangian`](crate::Constraint::lagrangian).
    pub fn safe_rlhf() -> Self {
        Self {
            batch_size: 64,
            ppo_epochs: 1,
            cliprange_value: 5.0,
            vf_coef: 1.0,
            kl_control: KlControl::Fixed { kl_coef: 0.02 },
            score_position: ScorePosition::LastToken,
            missing_eos: MissingEos::Keep,
            reward_clip: Some(50.0),
            whiten_advantages: Whitening::Off,
            logprob_temperature: LogprobTemperature::One,
            generation: GenerationConfig {
                max_new_tokens: 512,
                ..GenerationConfig::default()
            },
            critic_lr: Some(5e-6),
            update: clipped(1e-5),
            ..Self::n_plus()
        }
    }
}

impl PtxConfig {
    /// DeepSpeed-Chat's: coefficient 27.8, an optimiser step of its own.
    pub fn deepspeed_chat() -> Self {
        Self {
            coef: 27.8,
            step: PtxStep::Separate,
            ..Self::default()
        }
    }
}

/// AdamW with the second moment's decay of the large trainers, and clipping to norm 1.
fn clipped(lr: f64) -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr,
            beta2: 0.95,
            ..AdamWConfig::default()
        },
        max_grad_norm: Some(1.0),
        ..UpdateConfig::default()
    }
}
