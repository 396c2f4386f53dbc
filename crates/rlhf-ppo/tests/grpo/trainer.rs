//! The trainer on tables of bigrams.

use std::ops::ControlFlow;
use std::sync::Arc;

use rlhf_ppo::core::{
    CheckpointConfig, Completions, Error as CoreError, Event, FinishReason, Observer, Result,
    RewardModel, Sequence, SequenceBatch, Stats, reward_fn,
};
use rlhf_ppo::tch::Tensor;
use rlhf_ppo::{
    DynamicSampling, Error, Excess, GrpoConfig, GrpoTrainer, KlPenalty, LengthPenalty, Objective,
    OffPolicy, OldLogprobs, RewardMix, Truncated, Unscored,
};
use serde_json::Value;

use crate::common::bigram::{Bigram, STOP};
use crate::common::{Golden, assert_close};

type Trainer = GrpoTrainer<Bigram>;

const SOFT_OVERLONG: LengthPenalty = LengthPenalty::SoftOverlong {
    buffer: 2,
    max: 0.5,
};

/// A method, at sizes for these tests.
fn sized(mut config: GrpoConfig) -> GrpoConfig {
    config.seed = 11;
    config.batch_size = 6;
    config.num_iterations = 2;
    config.minibatches = 2;
    config.microbatch_size = 4;
    config.generation.samples_per_prompt = 4;
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.length_penalty = config.length_penalty.map(|_| SOFT_OVERLONG);
    config.update.optimizer.lr = 0.05;
    config
}

fn methods() -> [(&'static str, GrpoConfig); 9] {
    [
        ("trl", GrpoConfig::trl()),
        ("grpo", GrpoConfig::grpo()),
        ("rloo", GrpoConfig::rloo()),
        ("dapo", GrpoConfig::dapo(6)),
        ("dr_grpo", GrpoConfig::dr_grpo()),
        ("bnpo", GrpoConfig::bnpo()),
        // Its own ranges hold almost every ratio.
        (
            "gspo",
            GrpoConfig {
                objective: Objective::symmetric(0.2),
                ..GrpoConfig::gspo()
            },
        ),
        ("cispo", GrpoConfig::cispo()),
        ("reinforce++", GrpoConfig::reinforce_plus_plus_baseline()),
    ]
    .map(|(name, config)| (name, sized(config)))
}

fn letters(ids: &[i64]) -> Result<String> {
    Ok(ids.iter().map(|&id| char::from(b'a' + id as u8)).collect())
}

fn trainer_with(config: GrpoConfig, reward: impl RewardModel + 'static) -> Trainer {
    GrpoTrainer::with_reference(config, Bigram::new(), Bigram::frozen(), reward)
        .unwrap()
        .with_detokenizer(letters)
}

/// Tokens are letters: `a` is 0, which stops; the reward counts the `c`s.
fn trainer(config: GrpoConfig) -> Trainer {
    trainer_with(
        config,
        reward_fn(|_, answer| answer.matches('c').count() as f64),
    )
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..15).map(|i| Arc::from([1 + i % 4, 1 + i / 7])).collect()
}

fn weights(trainer: &Trainer) -> Vec<f32> {
    Vec::try_from(trainer.policy().0.detach().view(-1)).unwrap()
}

fn assert_all_finite(stats: &Stats) {
    for (name, value) in stats.iter() {
        assert!(value.is_finite(), "{name} is {value}");
    }
}

/// Two prompts with four answers each, the last one cut.
fn written() -> Completions {
    let answers: [&[i64]; 8] = [
        &[2, 3, STOP],
        &[4, 4, STOP],
        &[2, 2, STOP],
        &[STOP],
        &[1, STOP],
        &[2, STOP],
        &[3, 2, 2, STOP],
        &[2, 1, 2, 1, 2, 1],
    ];
    let sequence = |(i, answer): (usize, &&[i64])| Sequence::new([1 + i as i64 / 4], *answer);
    let batch = SequenceBatch::new(answers.iter().enumerate().map(sequence).collect()).unwrap();
    let mut completions = Completions::written(batch);
    completions.finish_reasons[7] = FinishReason::Length;
    completions
}

#[test]
fn the_score_rises_with_every_method_and_the_statistics_are_whole() {
    for (name, config) in methods() {
        let mut trainer = trainer(config);
        let mut seen: Vec<Stats> = Vec::new();
        let mut observers: Vec<Box<dyn Observer + '_>> = vec![Box::new(|event: &Event<'_>| {
            assert_eq!((event.phase, event.total_steps), ("grpo", Some(25)));
            seen.push(event.stats.clone());
            Ok(ControlFlow::Continue(()))
        })];
        trainer.train(&prompts(), 25, &mut observers).unwrap();
        drop(observers);
        seen.iter().for_each(assert_all_finite);
        let score = |s: &Stats| s.get("grpo/score/mean").unwrap();
        let mean = |s: &[Stats]| s.iter().map(score).sum::<f64>() / s.len() as f64;
        let (before, after) = (mean(&seen[..3]), mean(&seen[22..]));
        assert!(after > before + 0.8, "{name}: {before} became {after}");
        let kl = |s: &Stats| s.get("grpo/kl").unwrap();
        let (start, end) = (kl(&seen[0]), kl(&seen[24]));
        assert!(start.abs() < 1e-6 && end > 0.1, "{name}: {start}, {end}");
        for key in [
            "grpo/score/std",
            "grpo/score/length_correlation",
            "grpo/reward/mean",
            "grpo/reward/group_std",
            "grpo/groups/zero_std",
            "grpo/length",
            "grpo/finished",
            "grpo/distinct_2",
            "grpo/distinct_2_across",
            "grpo/policy/clipfrac",
            "grpo/policy/entropy",
            "grpo/policy/ratio_var",
            "grpo/mismatch/mean",
            "grpo/grad_norm",
            "grpo/lr",
            "grpo/time/rollout_s",
        ] {
            assert!(seen[24].get(key).is_some(), "{name}: {key} is missing");
        }
    }
}

#[test]
fn statistics_by_hand() {
    let mut config = sized(GrpoConfig::trl());
    config.length_penalty = Some(SOFT_OVERLONG);
    let mut trainer = trainer(config);
    let rollout = trainer.evaluate(written()).unwrap();
    assert_eq!(rollout.scores, [[1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 2.0, 3.0]]);
    // The last has all of its six tokens: the whole penalty.
    assert_eq!(rollout.rewards[7], 2.5);
    let stats = trainer.update(&rollout).unwrap();
    assert_all_finite(&stats);
    for (name, want) in [
        ("grpo/score/mean", 9.0 / 8.0),
        ("grpo/reward/mean", 8.5 / 8.0),
        ("grpo/length", 3.0),
        ("grpo/finished", 7.0 / 8.0),
        ("grpo/groups/zero_std", 0.0),
        ("grpo/samples", 8.0),
        ("grpo/samples_used", 8.0),
        ("grpo/lr", 0.05),
        ("grpo/update_skipped", 0.0),
    ] {
        let got = stats.get(name).unwrap();
        assert!((got - want).abs() < 1e-6, "{name} is {got}, not {want}");
    }
}

#[test]
fn equal_seeds_give_equal_bytes_and_others_do_not() {
    for (name, config) in methods() {
        let run = |seed| {
            let mut trainer = trainer(GrpoConfig {
                seed,
                ..config.clone()
            });
            trainer.train(&prompts(), 3, &mut []).unwrap();
            weights(&trainer)
        };
        assert_eq!(run(1), run(1), "{name}");
        assert_ne!(run(1), run(2), "{name}");
    }
}

/// The update that these options make of a fixed batch.
fn update_of(mut config: GrpoConfig) -> Vec<f64> {
    // Adam's step is the gradient's sign where epsilon is small, and the sign of rounding noise
    // where the gradient is 0: a larger one makes the update a smooth function of the gradient.
    config.update.optimizer.eps = 1e-3;
    let mut trainer = trainer(config);
    let rollout = trainer.evaluate(written()).unwrap();
    trainer.update(&rollout).unwrap();
    let start = Vec::<f32>::try_from(Bigram::frozen().0.view(-1)).unwrap();
    let moved = weights(&trainer).into_iter().zip(start);
    moved.map(|(a, b)| f64::from(a) - f64::from(b)).collect()
}

#[test]
fn any_split_into_microbatches_makes_the_same_update() {
    let length = |v: &[f64]| v.iter().map(|x| x * x).sum::<f64>().sqrt();
    for (name, config) in methods() {
        let of = |microbatch_size| {
            update_of(GrpoConfig {
                microbatch_size,
                ..config.clone()
            })
        };
        let whole = of(64);
        assert!(length(&whole) > 1e-3, "{name} moved nothing");
        for size in 1..8 {
            let split = of(size);
            let gap: Vec<f64> = split.iter().zip(&whole).map(|(a, b)| a - b).collect();
            let relative = length(&gap) / length(&whole);
            assert!(
                relative < 1e-5,
                "{name} in microbatches of {size}: {relative}"
            );
        }
    }
}

#[test]
fn a_killed_run_ends_like_one_left_alone() {
    const STEPS: u64 = 5;
    for (name, config) in methods() {
        let mut alone = trainer(config.clone());
        alone.train(&prompts(), STEPS, &mut []).unwrap();
        for killed_at in 1..STEPS {
            let dir = tempfile::tempdir().unwrap();
            let checkpoints = CheckpointConfig {
                dir: dir.path().to_path_buf(),
                every: 2,
                keep: 2,
            };
            let mut first = trainer(config.clone());
            let mut kill: Vec<Box<dyn Observer>> = vec![Box::new(move |event: &Event<'_>| {
                match event.step == killed_at {
                    true => Err(CoreError::config("killed", killed_at, "here")),
                    false => Ok(ControlFlow::Continue(())),
                }
            })];
            first
                .train_with_checkpoints(&prompts(), STEPS, &mut kill, &checkpoints)
                .unwrap_err();
            let mut second = trainer(config.clone());
            second
                .train_with_checkpoints(&prompts(), STEPS, &mut [], &checkpoints)
                .unwrap();
            assert_eq!(
                weights(&second),
                weights(&alone),
                "{name} killed at {killed_at}"
            );
            assert_eq!(second.steps_done(), STEPS);
        }
    }
}

#[test]
fn a_checkpoint_is_refused_by_another_run() {
    let dir = tempfile::tempdir().unwrap();
    let mut first = trainer(sized(GrpoConfig::trl()));
    first.train(&prompts(), 1, &mut []).unwrap();
    first.save(dir.path()).unwrap();

    let mut other = trainer(sized(GrpoConfig::dr_grpo()));
    let before = weights(&other);
    let error = other.load(dir.path()).unwrap_err();
    assert!(
        matches!(&error, Error::ConfigMismatch { field, .. } if ["aggregation", "scale"].contains(&field.as_str()))
    );
    let mut other = trainer(sized(GrpoConfig::trl()))
        .with_reward(
            "brevity",
            0.5,
            reward_fn(|_, answer| -(answer.len() as f64)),
        )
        .unwrap();
    let error = other.load(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::ConfigMismatch { field, .. } if field == "rewards"));
    assert_eq!(weights(&other), before);
}

#[test]
fn one_step_needs_no_log_probabilities_before_it() {
    let run = |old_logprobs| {
        let mut config = sized(GrpoConfig::grpo());
        (config.num_iterations, config.minibatches) = (1, 1);
        config.old_logprobs = old_logprobs;
        let mut trainer = trainer(config);
        let rollout = trainer.rollout(&prompts()).unwrap();
        let known = rollout.old_logprobs.is_some();
        let stats = trainer.update(&rollout).unwrap();
        (known, stats, weights(&trainer))
    };
    let (known, stats, lazy) = run(OldLogprobs::Recomputed);
    assert!(!known);
    assert!((stats.get("grpo/policy/ratio").unwrap() - 1.0).abs() < 1e-6);
    assert!(stats.get("grpo/mismatch/max").unwrap() < 1e-5);
    let (known, _, sampled) = run(OldLogprobs::Sampled);
    assert!(known);
    for (a, b) in lazy.iter().zip(&sampled) {
        assert!((a - b).abs() < 1e-4, "{a} is not {b}");
    }
}

#[test]
fn what_filters_left_is_replayed() {
    let mut config = sized(GrpoConfig::grpo());
    config.generation.sampling.top_k = Some(3);
    config.generation.min_new_tokens = 2;
    // Several rounds are joined.
    config.dynamic_sampling = Some(DynamicSampling { max_rounds: 6 });
    let mut observers: Vec<Box<dyn Observer>> = vec![Box::new(|event: &Event<'_>| {
        // The sampler's log-probabilities are the trainer's, within the kept sets.
        let gap = event.stats.get("grpo/mismatch/max").unwrap();
        assert!(gap < 1e-5, "{gap}");
        Ok(ControlFlow::Continue(()))
    })];
    trainer(config)
        .train(&prompts(), 4, &mut observers)
        .unwrap();
}

#[test]
fn prompts_without_differing_answers_are_dropped_and_others_sampled() {
    // Only prompts that begin with 2 have answers that differ in score.
    let reward = || {
        reward_fn(|prompt, answer| match prompt.starts_with('c') {
            true => answer.matches('c').count() as f64,
            false => 1.0,
        })
    };
    let mut config = sized(GrpoConfig::trl());
    config.batch_size = 4;
    config.dynamic_sampling = Some(DynamicSampling { max_rounds: 20 });
    let mut seen = Vec::new();
    let mut observers: Vec<Box<dyn Observer + '_>> = vec![Box::new(|event: &Event<'_>| {
        seen.push(event.stats.clone());
        Ok(ControlFlow::Continue(()))
    })];
    let mut full = trainer_with(config.clone(), reward());
    full.train(&prompts(), 3, &mut observers).unwrap();
    drop(observers);
    for stats in &seen {
        assert_eq!(stats.get("grpo/samples"), Some(16.0));
        assert_eq!(stats.get("grpo/groups/zero_std"), Some(0.0));
        let [sampled, dropped] =
            ["sampled", "dropped"].map(|name| stats.get(&format!("grpo/groups/{name}")).unwrap());
        assert!(
            sampled - dropped >= 4.0 && dropped > 0.0,
            "{sampled}, {dropped}"
        );
        assert!(stats.get("grpo/groups/rounds").unwrap() > 1.0);
    }
    // Where no prompt has them, nothing is learnt, and no failure is made of it.
    config.dynamic_sampling = Some(DynamicSampling { max_rounds: 3 });
    let mut none = trainer_with(config, reward_fn(|_, _| 1.0));
    let before = weights(&none);
    let stats = none.step(&prompts()[..4]).unwrap();
    assert_eq!(stats.get("grpo/update_skipped"), Some(1.0));
    assert_eq!(stats.get("grpo/samples_used"), Some(0.0));
    assert_all_finite(&stats);
    assert_eq!(weights(&none), before);
    assert!(none.step(&[]).is_err());
}

#[test]
fn cut_answers_count_in_the_baseline_and_not_in_the_loss() {
    let with = |truncated| {
        let config = GrpoConfig {
            truncated,
            ..sized(GrpoConfig::trl())
        };
        trainer(config).evaluate(written()).unwrap()
    };
    let (learnt, masked) = (with(Truncated::Learn), with(Truncated::Mask));
    assert_eq!(learnt.advantages, masked.advantages);
    assert_eq!(learnt.tokens() - masked.tokens(), 6.0);
    assert_eq!(
        masked.used,
        [true, true, true, true, true, true, true, false]
    );
    assert_eq!(masked.used_rows(&[1]), [4, 5, 6]);
}

#[test]
fn several_rewards_are_mixed_as_trl_does() {
    struct Column(Vec<f64>);
    impl RewardModel for Column {
        fn score(&self, _: &Completions) -> Result<Tensor> {
            Ok(Tensor::from_slice(&self.0))
        }
    }
    let golden = Golden::load("grpo/advantages");
    let batch = (0..12)
        .map(|i| Sequence::new([1 + i / 4], [2, STOP]))
        .collect();
    let completions = Completions::written(SequenceBatch::new(batch).unwrap());
    for name in ["two_rewards_normalize_then_sum", "missing_rewards_group"] {
        let run: &Value = &golden.json["params"]["runs"][name];
        let rows: Vec<Vec<Option<f64>>> = serde_json::from_value(run["rewards"].clone()).unwrap();
        let column = |i: usize| Column(rows.iter().map(|row| row[i].unwrap_or(f64::NAN)).collect());
        let mix = match name {
            "missing_rewards_group" => RewardMix::Sum,
            _ => RewardMix::NormalizeThenSum,
        };
        let config = GrpoConfig {
            mix,
            unscored: Unscored::LeaveOut,
            ..sized(GrpoConfig::trl())
        };
        let mut trainer = trainer_with(config, column(0))
            .with_reward("second", 0.5, column(1))
            .unwrap();
        let rollout = trainer.evaluate(completions.clone()).unwrap();
        let got = Tensor::from_slice(&rollout.advantages);
        let want = golden.tensor(&format!("{name}/advantages"));
        assert_close(name, &got, &want, 1e-5, 0.0);
        let used = rows.iter().map(|row| row.iter().any(Option::is_some));
        assert_eq!(rollout.used, used.collect::<Vec<_>>());
        let stats = trainer.update(&rollout).unwrap();
        assert!(stats.get("grpo/score/second").is_some());
        assert_all_finite(&stats);
    }
}

#[test]
fn importance_weights_correct_for_another_sampler() {
    let with = |off_policy| {
        let mut config = sized(GrpoConfig::trl());
        (config.num_iterations, config.minibatches) = (1, 1);
        config.off_policy = off_policy;
        let mut completions = written();
        let sequences = completions.batch.sequences();
        // As if they had come from a uniform distribution.
        let uniform = (0.2f32).ln();
        let said = sequences.iter().map(|s| vec![uniform; s.response.len()]);
        completions.sampling_logprobs = Some(said.collect());
        let mut trainer = trainer(config);
        let rollout = trainer.evaluate(completions).unwrap();
        let stats = trainer.update(&rollout).unwrap();
        (stats, weights(&trainer))
    };
    let (plain, uncorrected) = with(OffPolicy::Ignore);
    assert_eq!(plain.get("grpo/mismatch/weight"), Some(1.0));
    assert!(plain.get("grpo/mismatch/mean").unwrap() > 0.1);
    let tokens = OffPolicy::Tokens {
        cap: 2.0,
        excess: Excess::Truncate,
    };
    let (stats, corrected) = with(tokens);
    let weight = stats.get("grpo/mismatch/weight").unwrap();
    assert!(weight > 0.0 && weight < 2.0 && weight != 1.0, "{weight}");
    assert_ne!(uncorrected, corrected);
}

#[test]
fn a_score_that_is_not_a_number_names_its_answer_and_changes_nothing() {
    struct Nan;
    impl RewardModel for Nan {
        fn score(&self, completions: &Completions) -> Result<Tensor> {
            let mut scores = vec![0.0; completions.batch.len()];
            scores[2] = f64::NAN;
            Ok(Tensor::from_slice(&scores))
        }
    }
    let mut broken = trainer_with(sized(GrpoConfig::trl()), Nan);
    let before = weights(&broken);
    let error = broken.step(&prompts()[..4]).unwrap_err();
    assert!(
        matches!(error, Error::Core(CoreError::NonFinite { row: 2, .. })),
        "{error}"
    );
    assert_eq!(weights(&broken), before);
    assert_eq!(broken.steps_done(), 0);

    // The step that failed used up no random numbers either.
    let dir = tempfile::tempdir().unwrap();
    broken.save(dir.path()).unwrap();
    let mut resumed = trainer(sized(GrpoConfig::trl()));
    resumed.load(dir.path()).unwrap();
    resumed.train(&prompts(), 2, &mut []).unwrap();
    let mut fresh = trainer(sized(GrpoConfig::trl()));
    fresh.train(&prompts(), 2, &mut []).unwrap();
    assert_eq!(weights(&resumed), weights(&fresh));
}

#[test]
fn broken_groups_and_a_missing_reference_are_errors() {
    let trainer = trainer(sized(GrpoConfig::trl()));
    let shuffled = written().select(&[0, 4, 1, 2]).unwrap();
    let error = trainer.evaluate(shuffled).unwrap_err();
    assert!(matches!(
        error,
        Error::BrokenGroup {
            row: 0,
            group_size: 4
        }
    ));
    let short = written().select(&[0, 1, 2, 3, 4]).unwrap();
    let error = trainer.evaluate(short).unwrap_err();
    assert!(matches!(error, Error::BrokenGroup { row: 4, .. }));

    let reward = reward_fn(|_, _| 0.0);
    let Err(error) = GrpoTrainer::new(sized(GrpoConfig::grpo()), Bigram::new(), reward) else {
        panic!("a penalty without a reference");
    };
    assert!(error.to_string().contains("with_reference"), "{error}");
    let free = GrpoConfig {
        kl: KlPenalty::None,
        ..sized(GrpoConfig::grpo())
    };
    let reward = reward_fn(|_, answer| answer.len() as f64);
    let mut trainer = GrpoTrainer::new(free, Bigram::new(), reward)
        .unwrap()
        .with_detokenizer(letters);
    let stats = trainer.step(&prompts()[..4]).unwrap();
    assert_eq!(stats.get("grpo/kl"), None);
}
