//! A real process, killed at random moments, with every state that a run may have: it ends with the
//! bytes of one that was left alone.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use common::bigram::{Bigram, STOP, TokenValue, letters};
use rlhf_ppo::core::{CheckpointConfig, Sequence, constraint_fn, reward_fn};
use rlhf_ppo::tch::Tensor;
use rlhf_ppo::{
    Constraint, ConstraintRule, KlControl, LagrangianConfig, MissingEos, PpoConfig, PpoTrainer,
    PtxConfig, ScoreScaling,
};

const STEPS: u64 = 40;
const RUN: &str = "RLHF_PPO_KILLED_RUN";

type Trainer = PpoTrainer<Bigram, TokenValue>;

fn trainer() -> Trainer {
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
    let count = |letter: char| move |_: &str, text: &str| text.matches(letter).count() as f64;
    let texts = (0..7)
        .map(|i| Sequence::new([1 + i % 4], [4, 1 + i % 3]))
        .collect();
    let lagrangian = LagrangianConfig {
        window: 30,
        ..LagrangianConfig::default()
    };
    let (policy, critic) = (Bigram::new(), TokenValue::new());
    PpoTrainer::new(
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
    .unwrap()
}

fn run(dir: &Path) -> Trainer {
    let prompts: Vec<Arc<[i64]>> = (0..20).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect();
    let mut trainer = trainer();
    let checkpoints = CheckpointConfig {
        dir: dir.to_path_buf(),
        every: 1,
        keep: 2,
    };
    trainer
        .train_with_checkpoints(&prompts, STEPS, &mut [], &checkpoints)
        .unwrap();
    trainer
}

/// All that training leaves behind, to the bit.
fn bytes(trainer: &Trainer) -> Vec<u32> {
    let parameters = trainer.updater().parameters().iter();
    let mut bits: Vec<u32> = parameters
        .flat_map(|(_, t)| {
            let flat: Tensor = t.detach().contiguous().view(-1);
            Vec::<f32>::try_from(flat).unwrap()
        })
        .map(f32::to_bits)
        .collect();
    for number in [trainer.kl_coef(), trainer.multiplier("e").unwrap()] {
        let number = number.to_bits();
        bits.extend([number as u32, (number >> 32) as u32]);
    }
    bits
}

/// The child process of the next test: nothing without the variable.
#[test]
fn child() {
    if let Ok(dir) = std::env::var(RUN) {
        run(dir.as_ref());
    }
}

#[test]
fn a_run_killed_at_random_moments_ends_with_the_same_bytes() {
    let alone = tempfile::tempdir().unwrap();
    let whole = run(alone.path());
    assert!(whole.multiplier("e").unwrap() != 1.0);
    // The moments are the clock's; the test holds for all of them.
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap();
    let mut random = now.as_nanos() as u64 | 1;
    let mut kills = 0;
    let dir = tempfile::tempdir().unwrap();
    for attempt in 0.. {
        assert!(attempt < 300, "the run does not get done");
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--test-threads=1"])
            .env(RUN, dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        // Longer and longer, so that a slow machine gets done, too.
        std::thread::sleep(Duration::from_millis(30 + random % (200 + 40 * attempt)));
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "a resumed run failed");
            break;
        }
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        kills += 1;
    }
    assert!(kills > 0, "the run was over before it could be killed");
    let resumed = run(dir.path());
    assert_eq!(resumed.steps_done(), STEPS);
    assert_eq!(bytes(&resumed), bytes(&whole), "after {kills} kills");
}
