//! The trainer on models that are small enough to see through.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ops::ControlFlow;
use std::sync::Arc;

use common::bigram::{Bigram, STOP, TokenValue, letters};
use rlhf_ppo::core::{
    CheckpointConfig, Completions, Error as CoreError, Event, FinishReason, Observer, RewardModel,
    Sequence, SequenceBatch, Stats, constraint_fn, reward_fn,
};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{Constraint, Error, KlControl, MissingEos, OldLogprobs, PpoConfig, PpoTrainer};

type Trainer = PpoTrainer<Bigram, TokenValue>;

fn config() -> PpoConfig {
    let mut config = PpoConfig {
        seed: 11,
        batch_size: 16,
        ppo_epochs: 2,
        minibatches: 2,
        microbatch_size: 3,
        missing_eos: MissingEos::Replace(-1.0),
        kl_control: KlControl::Adaptive {
            init_kl_coef: 0.05,
            target: 1.0,
            horizon: 200.0,
        },
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.05;
    config
}

/// Tokens are letters: `a` is 0, which stops; the reward counts the `c`s.
fn trainer_with(config: PpoConfig, reward: impl RewardModel + 'static) -> Trainer {
    PpoTrainer::new(
        config,
        Bigram::new(),
        TokenValue::new(),
        Bigram::frozen(),
        reward,
    )
    .unwrap()
    .with_detokenizer(letters)
}

fn trainer(config: PpoConfig) -> Trainer {
    let count = |text: &str| text.matches('c').count() as f64;
    trainer_with(config, reward_fn(move |_, response| count(response)))
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..20).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect()
}

fn weights(trainer: &Trainer) -> (Vec<f32>, Vec<f32>) {
    let flat = |t: &Tensor| Vec::try_from(t.detach().view(-1)).unwrap();
    (flat(&trainer.policy().0), flat(&trainer.value_model().0))
}

fn assert_all_finite(stats: &Stats) {
    for (name, value) in stats.iter() {
        assert!(value.is_finite(), "{name} is {value}");
    }
}

#[test]
fn what_the_reward_model_reports_is_in_the_statistics() {
    struct Reporting;
    impl RewardModel for Reporting {
        fn score(&self, completions: &Completions) -> rlhf_ppo::core::Result<Tensor> {
            reward_fn(|_, response| response.len() as f64).score(completions)
        }

        fn take_report(&self) -> Stats {
            Stats::from_iter([("disagreement", 0.25)])
        }
    }
    let stats = trainer_with(config(), Reporting)
        .step(&prompts()[..16])
        .unwrap();
    assert_eq!(stats.get("ppo/judge/disagreement"), Some(0.25));
}

#[test]
fn the_score_rises_and_the_statistics_are_whole() {
    let mut trainer = trainer(config());
    let mut seen: Vec<Stats> = Vec::new();
    let mut observers: Vec<Box<dyn Observer + '_>> = vec![Box::new(|event: &Event<'_>| {
        assert_eq!((event.phase, event.total_steps), ("ppo", Some(25)));
        seen.push(event.stats.clone());
        Ok(ControlFlow::Continue(()))
    })];
    trainer.train(&prompts(), 25, &mut observers).unwrap();
    drop(observers);
    assert_eq!(seen.len(), 25);
    seen.iter().for_each(assert_all_finite);
    let score = |s: &Stats| s.get("ppo/score/mean").unwrap();
    let mean = |s: &[Stats]| s.iter().map(score).sum::<f64>() / s.len() as f64;
    let (before, after) = (mean(&seen[..3]), mean(&seen[22..]));
    assert!(after > before + 1.0, "{before} became {after}");
    assert_eq!(seen[0].get("ppo/kl"), Some(0.0)); // the policy is still its reference
    assert!(seen[24].get("ppo/kl").unwrap() > 0.1);
    assert_ne!(seen[24].get("ppo/kl_coef"), Some(0.05));
    for name in [
        "ppo/policy/loss",
        "ppo/policy/approx_kl",
        "ppo/policy/clipfrac",
        "ppo/policy/entropy",
        "ppo/policy/ratio",
        "ppo/policy/ratio_var",
        "ppo/value/loss",
        "ppo/value/clipfrac",
        "ppo/value/explained_variance",
        "ppo/score/std",
        "ppo/reward/mean",
        "ppo/length",
        "ppo/finished",
        "ppo/lr",
        "ppo/grad_norm",
        "ppo/samples_used",
        "ppo/time/rollout_s",
        "ppo/time/update_s",
    ] {
        assert!(seen[24].get(name).is_some(), "{name} is missing");
    }
}

#[test]
fn equal_seeds_give_equal_bytes_and_others_do_not() {
    let run = |seed| {
        let mut trainer = trainer(PpoConfig { seed, ..config() });
        trainer.train(&prompts(), 4, &mut []).unwrap();
        weights(&trainer)
    };
    assert_eq!(run(1), run(1));
    assert_ne!(run(1), run(2));
}

#[test]
fn no_random_number_is_used_twice() {
    let mut trainer = trainer(config());
    let first = trainer.rollout(&prompts()).unwrap();
    let second = trainer.rollout(&prompts()).unwrap();
    assert_ne!(first.completions.batch, second.completions.batch);
}

#[test]
fn the_split_into_microbatches_changes_nothing() {
    let run = |microbatch_size| {
        let mut trainer = trainer(PpoConfig {
            microbatch_size,
            ..config()
        });
        trainer.train(&prompts(), 3, &mut []).unwrap();
        weights(&trainer)
    };
    let (whole, split) = (run(64), run(1));
    for (a, b) in whole.0.iter().zip(&split.0) {
        assert!((a - b).abs() < 1e-5, "{a} is not {b}");
    }
}

#[test]
fn a_killed_run_ends_like_one_left_alone() {
    const STEPS: u64 = 7;
    let mut alone = trainer(config());
    alone.train(&prompts(), STEPS, &mut []).unwrap();
    for killed_at in 1..STEPS {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = CheckpointConfig {
            dir: dir.path().to_path_buf(),
            every: 2,
            keep: 2,
        };
        let mut first = trainer(config());
        let mut kill: Vec<Box<dyn Observer>> = vec![Box::new(move |event: &Event<'_>| {
            match event.step == killed_at {
                true => Err(CoreError::config("killed", killed_at, "here")),
                false => Ok(ControlFlow::Continue(())),
            }
        })];
        first
            .train_with_checkpoints(&prompts(), STEPS, &mut kill, &checkpoints)
            .unwrap_err();
        let mut second = trainer(config());
        second
            .train_with_checkpoints(&prompts(), STEPS, &mut [], &checkpoints)
            .unwrap();
        assert_eq!(weights(&second), weights(&alone), "killed at {killed_at}");
        assert_eq!(second.kl_coef(), alone.kl_coef());
        assert_eq!(second.steps_done(), STEPS);
    }
}

#[test]
fn a_checkpoint_is_refused_by_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = trainer(config());
    first.train(&prompts(), 1, &mut []).unwrap();
    first.save(dir.path()).unwrap();

    let mut other = trainer(PpoConfig {
        gamma: 0.9,
        ..config()
    });
    let before = weights(&other);
    let error = other.load(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::ConfigMismatch { field, .. } if field == "gamma"));
    assert_eq!(weights(&other), before);

    let mut resumed = trainer(config());
    resumed.load(dir.path()).unwrap();
    let error = resumed.train(&prompts()[1..], 2, &mut []).unwrap_err();
    assert!(
        matches!(error, Error::Core(CoreError::LengthMismatch { .. })),
        "{error}"
    );

    std::fs::write(dir.path().join("ppo.json"), "{").unwrap();
    let mut third = trainer(config());
    let error = third.load(dir.path()).unwrap_err();
    assert!(
        matches!(error, Error::Core(CoreError::Corrupt { .. })),
        "{error}"
    );
    assert_eq!(weights(&third), before);
}

#[test]
fn an_observer_may_end_the_run() {
    let mut trainer = trainer(config());
    let mut observers: Vec<Box<dyn Observer>> = vec![Box::new(|event: &Event<'_>| {
        Ok(match event.step {
            2 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        })
    })];
    trainer.train(&prompts(), 9, &mut observers).unwrap();
    assert_eq!(trainer.steps_done(), 2);
}

/// Responses of one to three tokens, the second of which breaks the rule against `e`.
fn written() -> Completions {
    let batch = SequenceBatch::new(vec![
        Sequence::new([1], [2, 3, STOP]),
        Sequence::new([2], [4, 4]),
        Sequence::new([3], [2, STOP]),
        Sequence::new([4], [1, 2, 1]),
    ])
    .unwrap();
    let mut completions = Completions::written(batch);
    completions.finish_reasons[3] = FinishReason::Length;
    completions
}

fn no_e(threshold: f64) -> Constraint {
    let count = constraint_fn(|_, response| response.matches('e').count() as f64);
    Constraint::new("no_e", count, threshold)
}

#[test]
fn statistics_by_hand() {
    let mut trainer = trainer(config());
    let rollout = trainer.evaluate(written()).unwrap();
    let stats = trainer.update(&rollout).unwrap();
    for (name, want) in [
        ("ppo/score/mean", 0.75), // 1, 0, 1, 1
        ("ppo/score/std", (3.0f64 / 16.0).sqrt()),
        ("ppo/reward/mean", 0.25), // the last one is unfinished: −1; no KL yet
        ("ppo/kl", 0.0),
        ("ppo/kl_coef", 0.05),
        ("ppo/length", 2.5),
        ("ppo/finished", 0.75),
        ("ppo/samples", 4.0),
        ("ppo/samples_used", 4.0),
        ("ppo/value/explained_variance", 0.0), // all values are 0
        ("ppo/lr", 0.05),
        ("ppo/update_skipped", 0.0),
    ] {
        let got = stats.get(name).unwrap();
        assert!((got - want).abs() < 1e-6, "{name} is {got}, not {want}");
    }
    let moved = trainer.evaluate(written()).unwrap();
    let moved = trainer.update(&moved).unwrap();
    let [reward, kl, kl_coef] =
        ["ppo/reward/mean", "ppo/kl", "ppo/kl_coef"].map(|name| moved.get(name).unwrap());
    assert!(kl.abs() > 1e-3);
    assert!((reward - (0.25 - kl_coef * kl)).abs() < 1e-6);
}

#[test]
fn a_sample_that_breaks_a_constraint_takes_no_part() {
    let one_batch = || PpoConfig {
        minibatches: 1,
        whiten_rewards: rlhf_ppo::Whitening::Population,
        ..config()
    };
    let mut constrained = trainer(one_batch()).with_constraint(no_e(1.0)).unwrap();
    let rollout = constrained.evaluate(written()).unwrap();
    assert_eq!(rollout.used, [true, false, true, true]);
    let stats = constrained.update(&rollout).unwrap();
    assert_all_finite(&stats);
    assert_eq!(stats.get("ppo/samples_used"), Some(3.0));
    assert_eq!(stats.get("ppo/constraint/no_e/violation_rate"), Some(0.25));
    assert_eq!(stats.get("ppo/constraint/no_e/mean_cost"), Some(0.5));

    // The same weights come of a batch in which that sample never was.
    let mut without = trainer(one_batch());
    let rest = written().select(&[0, 2, 3]).unwrap();
    let rollout = without.evaluate(rest).unwrap();
    without.update(&rollout).unwrap();
    let (a, b) = (weights(&constrained), weights(&without));
    for (a, b) in a.0.iter().chain(&a.1).zip(b.0.iter().chain(&b.1)) {
        assert!((a - b).abs() < 1e-6, "{a} is not {b}");
    }
    // A cost at the threshold is still allowed.
    let lax = trainer(one_batch()).with_constraint(no_e(2.0)).unwrap();
    assert_eq!(lax.evaluate(written()).unwrap().used, [true; 4]);
}

#[test]
fn without_a_sample_left_the_update_is_skipped() {
    let mut trainer = trainer(config()).with_constraint(no_e(-1.0)).unwrap();
    let before = weights(&trainer);
    let rollout = trainer.evaluate(written()).unwrap();
    let stats = trainer.update(&rollout).unwrap();
    assert_all_finite(&stats);
    assert_eq!(stats.get("ppo/update_skipped"), Some(1.0));
    assert_eq!(stats.get("ppo/policy/loss"), None);
    assert_eq!(weights(&trainer), before);
    assert_eq!(trainer.steps_done(), 1);
}

#[test]
fn a_reward_that_is_not_a_number_names_its_sample_and_changes_nothing() {
    struct Nan;
    impl RewardModel for Nan {
        fn score(&self, completions: &Completions) -> rlhf_ppo::core::Result<Tensor> {
            let rows = completions.batch.len() as i64;
            let scores = Tensor::zeros([rows], (Kind::Float, rlhf_ppo::tch::Device::Cpu));
            let _ = scores.get(2).fill_(f64::NAN);
            Ok(scores)
        }
    }
    let mut trainer = trainer_with(config(), Nan);
    let before = weights(&trainer);
    let error = trainer.step(&prompts()[..4]).unwrap_err();
    assert!(
        matches!(error, Error::Core(CoreError::NonFinite { row: 2, .. })),
        "{error}"
    );
    assert_eq!(weights(&trainer), before);
    assert_eq!(trainer.steps_done(), 0);

    // The step that failed used up no random numbers either.
    let dir = tempfile::tempdir().unwrap();
    trainer.save(dir.path()).unwrap();
    let mut resumed = self::trainer(config());
    resumed.load(dir.path()).unwrap();
    resumed.train(&prompts(), 2, &mut []).unwrap();
    let mut fresh = self::trainer(config());
    fresh.train(&prompts(), 2, &mut []).unwrap();
    assert_eq!(weights(&resumed), weights(&fresh));
}

#[test]
fn wrong_judgements_and_empty_batches_are_errors() {
    struct OneScore;
    impl RewardModel for OneScore {
        fn score(&self, _: &Completions) -> rlhf_ppo::core::Result<Tensor> {
            Ok(Tensor::from_slice(&[1f32]))
        }
    }
    let mut wrong = trainer_with(config(), OneScore);
    let error = wrong.step(&prompts()[..4]).unwrap_err();
    assert!(matches!(error, Error::WrongJudgement { expected: 4, .. }));
    let cost = constraint_fn(|_, _| f64::INFINITY);
    let constrained = trainer(config())
        .with_constraint(Constraint::new("inf", cost, 0.0))
        .unwrap();
    assert!(constrained.evaluate(written()).is_err());

    let mut trainer = trainer(config());
    let error = trainer.step(&[]).unwrap_err();
    assert!(
        matches!(error, Error::Core(CoreError::Empty { .. })),
        "{error}"
    );
    assert!(trainer.train(&[], 1, &mut []).is_err());
}

#[test]
fn short_and_empty_responses_are_trained_on() {
    let respond = |responses: &[&[i64]]| {
        let sequences = responses.iter().map(|r| Sequence::new([1], *r)).collect();
        Completions::written(SequenceBatch::new(sequences).unwrap())
    };
    for responses in [
        &[&[STOP][..], &[STOP], &[STOP]][..], // all stop at once
        &[&[STOP][..], &[], &[2, STOP]],
        &[&[STOP][..]], // one token in all
        &[&[][..], &[]],
    ] {
        for mut config in [config(), PpoConfig::trl()] {
            config.generation.stop_token_ids = vec![STOP];
            let mut trainer = trainer(config);
            let rollout = trainer.evaluate(respond(responses)).unwrap();
            let stats = trainer.update(&rollout).unwrap();
            assert_all_finite(&stats);
            let no_token = responses.iter().all(|r| r.is_empty());
            assert_eq!(stats.get("ppo/update_skipped"), Some(f64::from(no_token)));
        }
    }
}

#[test]
fn sampled_logprobs_are_the_recomputed_ones() {
    let rollout = |old_logprobs| {
        let mut trainer = trainer(PpoConfig {
            old_logprobs,
            ..config()
        });
        trainer.rollout(&prompts()).unwrap()
    };
    let sampled = rollout(OldLogprobs::Sampled);
    let recomputed = rollout(OldLogprobs::Recomputed);
    let gap = (&sampled.logprobs - &recomputed.logprobs).abs().max();
    assert!(f64::try_from(gap).unwrap() < 1e-6);
    assert_eq!(recomputed.logprobs, recomputed.ref_logprobs);
}
