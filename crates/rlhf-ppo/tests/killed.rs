//! A real process, killed at random moments, with every state that a run may have: it ends with the
//! bytes of one that was left alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/support/child_process.rs"]
mod child_process;
mod common;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use child_process::{folder_of_child, kill_until_done};
use common::bigram::{Bigram, STOP, TokenValue, letters};
use rlhf_ppo::core::{CheckpointConfig, Sequence, constraint_fn, reward_fn};
use rlhf_ppo::scale::Updater;
use rlhf_ppo::tch::Tensor;
use rlhf_ppo::{
    Constraint, ConstraintRule, DynamicSampling, GrpoConfig, GrpoTrainer, KlControl,
    LagrangianConfig, MissingEos, PpoConfig, PpoTrainer, PtxConfig, ScoreScaling,
};

const STEPS: u64 = 40;

/// The bytes that a run in this folder ends with, resumed where one was killed in it.
type Run = fn(&Path) -> Vec<u32>;

fn count(letter: char) -> impl Fn(&str, &str) -> f64 + 'static {
    move |_, text| text.matches(letter).count() as f64
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..20).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect()
}

fn checkpoints(dir: &Path) -> CheckpointConfig {
    CheckpointConfig {
        dir: dir.to_path_buf(),
        every: 1,
        keep: 2,
    }
}

/// All that training leaves behind, to the bit.
fn bytes(updater: &Updater, numbers: &[f64]) -> Vec<u32> {
    let mut bits: Vec<u32> = updater
        .parameters()
        .iter()
        .flat_map(|(_, t)| {
            let flat: Tensor = t.detach().contiguous().view(-1);
            Vec::<f32>::try_from(flat).unwrap()
        })
        .map(f32::to_bits)
        .collect();
    for number in numbers {
        let number = number.to_bits();
        bits.extend([number as u32, (number >> 32) as u32]);
    }
    bits
}

fn ppo(dir: &Path) -> Vec<u32> {
    let mut config = PpoConfig {
        seed: 17,
        batch_size: 12,
        ppo_epochs: 2,
        minibatches: 2,
        microbatch_size: 5,
        missing_eos: MissingEos::Keep,
        kl_control: KlControl::Adaptive {
            init_kl_coef: 0.05,
            target: 1.0,
            horizon: 200.0,
        },
        score_scaling: ScoreScaling::Standardize,
        ptx: Some(PtxConfig {
            coef: 0.1,
            batch_size: 3,
            ..PtxConfig::default()
        }),
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.generation.sampling.top_k = Some(4);
    config.guards.max_mean_ratio = Some(5.0);
    config.update.optimizer.lr = 0.02;
    let config = config.annealed(STEPS);
    let texts = (0..7)
        .map(|i| Sequence::new([1 + i % 4], [4, 1 + i % 3]))
        .collect();
    let lagrangian = LagrangianConfig {
        window: 30,
        ..LagrangianConfig::default()
    };
    let (policy, critic) = (Bigram::new(), TokenValue::new());
    let mut trainer = PpoTrainer::new(
        config,
        policy,
        critic,
        Bigram::frozen(),
        reward_fn(count('c')),
    )
    .unwrap()
    .with_detokenizer(letters)
    .with_constraint(Constraint::lagrangian(
        "e",
        constraint_fn(count('e')),
        0.2,
        lagrangian,
        TokenValue::new(),
    ))
    .unwrap()
    .with_constraint(
        Constraint::new("d", constraint_fn(count('d')), 1.5).with_rule(ConstraintRule::SkipBatch {
            max_violation_rate: 0.3,
        }),
    )
    .unwrap()
    .with_pretraining(texts)
    .unwrap();
    trainer
        .train_with_checkpoints(&prompts(), STEPS, &mut [], &checkpoints(dir))
        .unwrap();
    assert_eq!(trainer.steps_done(), STEPS);
    let numbers = [trainer.kl_coef(), trainer.multiplier("e").unwrap()];
    assert!(numbers[1] != 1.0);
    bytes(trainer.updater(), &numbers)
}

fn grpo(dir: &Path) -> Vec<u32> {
    let mut config = GrpoConfig {
        seed: 23,
        batch_size: 5,
        num_iterations: 2,
        minibatches: 2,
        microbatch_size: 7,
        dynamic_sampling: Some(DynamicSampling { max_rounds: 3 }),
        ..GrpoConfig::grpo()
    };
    config.generation.samples_per_prompt = 4;
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.02;
    let lagrangian = LagrangianConfig {
        window: 30,
        ..LagrangianConfig::default()
    };
    let price = Constraint::new("e", constraint_fn(count('e')), 0.2)
        .with_rule(ConstraintRule::Lagrangian(lagrangian));
    let reward = reward_fn(count('c'));
    let mut trainer = GrpoTrainer::with_reference(config, Bigram::new(), Bigram::frozen(), reward)
        .unwrap()
        .with_detokenizer(letters)
        .with_constraint(price)
        .unwrap();
    trainer
        .train_with_checkpoints(&prompts(), STEPS, &mut [], &checkpoints(dir))
        .unwrap();
    assert_eq!(trainer.steps_done(), STEPS);
    let price = trainer.multiplier("e").unwrap();
    assert!(price != 1.0);
    bytes(trainer.updater(), &[price])
}

/// The child process of a test below, and nothing in this one.
#[test]
fn ppo_child() {
    if let Some(dir) = folder_of_child() {
        ppo(&dir);
    }
}

/// As `ppo_child`.
#[test]
fn grpo_child() {
    if let Some(dir) = folder_of_child() {
        grpo(&dir);
    }
}

#[test]
fn ppo_killed_at_random_moments_ends_with_the_same_bytes() {
    killed_at_random_moments(ppo, "ppo_child");
}

#[test]
fn grpo_killed_at_random_moments_ends_with_the_same_bytes() {
    killed_at_random_moments(grpo, "grpo_child");
}

fn killed_at_random_moments(run: Run, child: &str) {
    let alone = tempfile::tempdir().unwrap();
    let whole = run(alone.path());
    // The moments are the clock's; the test holds for all of them.
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let mut random = now.as_nanos() as u64 | 1;
    let dir = tempfile::tempdir().unwrap();
    let lives = (0..300).map(|attempt| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Longer and longer, so that a slow machine gets done, too.
        Duration::from_millis(30 + random % (200 + 40 * attempt))
    });
    kill_until_done(child, dir.path(), lives);
    assert_eq!(run(dir.path()), whole);
}
