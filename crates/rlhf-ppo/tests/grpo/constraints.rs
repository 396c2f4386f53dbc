//! Constraints on answers that are each other's baseline.

use std::sync::Arc;

use rlhf_ppo::core::{Completions, Sequence, SequenceBatch, Stats, constraint_fn, reward_fn};
use rlhf_ppo::{
    AdvantageScale, Baseline, Constraint, ConstraintRule, Error, GrpoConfig, GrpoTrainer,
    LagrangianConfig, RewardMix,
};

use crate::common::bigram::{Bigram, STOP, TokenValue, letters};

type Trainer = GrpoTrainer<Bigram>;

fn config() -> GrpoConfig {
    let mut config = GrpoConfig {
        seed: 5,
        batch_size: 8,
        baseline: Baseline::GroupMean,
        scale: AdvantageScale::None,
        ..GrpoConfig::default()
    };
    config.generation.samples_per_prompt = 4;
    config.generation.max_new_tokens = 5;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.05;
    config
}

fn letters_of(letter: char) -> impl Fn(&str, &str) -> f64 + 'static {
    move |_, text| text.matches(letter).count() as f64
}

/// The reward likes `c` and `e`.
fn trainer(config: GrpoConfig) -> Trainer {
    let reward = reward_fn(|_, text| text.matches(['c', 'e']).count() as f64);
    GrpoTrainer::new(config, Bigram::new(), reward)
        .unwrap()
        .with_detokenizer(letters)
}

fn no_e(threshold: f64) -> Constraint {
    Constraint::new("no_e", constraint_fn(letters_of('e')), threshold)
}

/// Rewards 2, 2, 1, 0 and 1, 0, 0, 3; costs 0, 2, 1, 0 and 0, 0, 0, 3.
fn written() -> Completions {
    let answers: [&[i64]; 8] = [
        &[2, 2, STOP],
        &[4, 4, STOP],
        &[4, STOP],
        &[STOP],
        &[2, STOP],
        &[STOP],
        &[1, STOP],
        &[4, 4, 4],
    ];
    let sequence = |(i, answer): (usize, &&[i64])| Sequence::new([1 + i as i64 / 4], *answer);
    let batch = SequenceBatch::new(answers.iter().enumerate().map(sequence).collect());
    Completions::written(batch.unwrap())
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..8).map(|i| Arc::from([1 + i % 4])).collect()
}

fn stat(stats: &Stats, name: &str) -> f64 {
    let found = stats.get(&format!("grpo/constraint/no_e/{name}"));
    found.unwrap_or_else(|| panic!("no {name} in {stats:?}"))
}

#[track_caller]
fn close(got: &[f64], want: &[f64]) {
    let near = got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-12);
    assert!(got.len() == want.len() && near, "{got:?} is not {want:?}");
}

#[test]
fn an_answer_that_breaks_a_constraint_is_in_no_baseline() {
    let trainer = trainer(config()).with_constraint(no_e(1.0)).unwrap();
    let rollout = trainer.evaluate(written()).unwrap();
    let used = [true, false, true, true, true, true, true, false];
    assert_eq!(rollout.used, used);
    // Of 2, 1, 0 and of 1, 0, 0.
    let third = 1.0 / 3.0;
    let want = [1.0, 0.0, 0.0, -1.0, 2.0 * third, -third, -third, 0.0];
    close(&rollout.advantages, &want);
    assert_eq!(rollout.costs, [[0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0]]);
    let row_tokens = |row: i64| rollout.mask.get(row).sum(rlhf_ppo::tch::Kind::Int64);
    assert_eq!(i64::try_from(row_tokens(1)).unwrap(), 0);
    assert_eq!(i64::try_from(row_tokens(0)).unwrap(), 3);
}

#[test]
fn too_many_violations_keep_the_whole_batch_out() {
    let skip = |max_violation_rate| {
        let rule = ConstraintRule::SkipBatch { max_violation_rate };
        let mut trainer = trainer(config())
            .with_constraint(no_e(0.5).with_rule(rule))
            .unwrap();
        let rollout = trainer.evaluate(written()).unwrap(); // three of eight
        let stats = trainer.update(&rollout).unwrap();
        assert_eq!(stat(&stats, "violation_rate"), 3.0 / 8.0);
        assert_eq!(stat(&stats, "mean_cost"), 6.0 / 8.0);
        let moved = trainer.policy().0.equal(&Bigram::frozen().0);
        let skipped = stats.get("grpo/update_skipped").unwrap();
        assert_eq!(skipped, stat(&stats, "batch_skipped"));
        assert_eq!(rollout.skipped_by.is_some(), moved);
        skipped
    };
    assert_eq!((skip(0.3), skip(0.4)), (1.0, 0.0));
}

#[test]
fn shaping_and_prices_by_hand() {
    let rule = ConstraintRule::Shaping { coef: 0.5 };
    let shaped = trainer(config())
        .with_constraint(no_e(1.0).with_rule(rule))
        .unwrap();
    let rollout = shaped.evaluate(written()).unwrap();
    close(&rollout.rewards, &[2.0, 1.5, 1.0, 0.0, 1.0, 0.0, 0.0, 2.0]);

    // log λ ← log 2 + 0.1 · 2 · (6/8 − 1/2).
    let lagrangian = LagrangianConfig {
        init: 2.0,
        lr: 0.1,
        ..LagrangianConfig::default()
    };
    let rule = ConstraintRule::Lagrangian(lagrangian);
    let mut priced = trainer(config())
        .with_constraint(no_e(0.5).with_rule(rule))
        .unwrap();
    assert_eq!(priced.multiplier("no_e").map(|m| m.round()), Some(2.0));
    let rollout = priced.evaluate(written()).unwrap();
    let price = 2.0 * 0.05f64.exp();
    let scores = [2.0, 2.0, 1.0, 0.0, 1.0, 0.0, 0.0, 3.0];
    let costs = [0.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 3.0];
    let want: Vec<f64> = (0..8)
        .map(|i| (scores[i] - price * costs[i]) / (1.0 + price))
        .collect();
    close(&rollout.rewards, &want);
    assert!((priced.multiplier("no_e").unwrap() - 2.0).abs() < 1e-12);
    let stats = priced.update(&rollout).unwrap();
    assert!((stat(&stats, "multiplier") - price).abs() < 1e-12);
    assert!((priced.multiplier("no_e").unwrap() - price).abs() < 1e-12);
}

fn lagrangian_trainer() -> Trainer {
    let rule = ConstraintRule::Lagrangian(LagrangianConfig {
        lr: 0.3,
        window: 64,
        ..LagrangianConfig::default()
    });
    trainer(config())
        .with_constraint(no_e(0.1).with_rule(rule))
        .unwrap()
}

#[test]
fn a_price_brings_the_cost_down_while_the_reward_rises() {
    let run = |mut trainer: Trainer| {
        let stats: Vec<Stats> = (0..80).map(|_| trainer.step(&prompts()).unwrap()).collect();
        let mean = |name: &str, part: &[Stats]| {
            part.iter().map(|s| s.get(name).unwrap()).sum::<f64>() / part.len() as f64
        };
        let (score, cost) = ("grpo/score/mean", "grpo/constraint/no_e/mean_cost");
        let gain = mean(score, &stats[70..]) - mean(score, &stats[..3]);
        (mean(cost, &stats[70..]), gain, trainer)
    };
    let (held, gain, priced) = run(lagrangian_trainer());
    let (loose, ..) = run(trainer(config()).with_constraint(no_e(1e9)).unwrap());
    assert!(held < 0.2 && loose > 0.5, "{held} against {loose}");
    assert!(gain > 0.5, "the reward rose by {gain}");

    let held_out: Vec<Arc<[i64]>> = (0..300).map(|i| Arc::from([1 + i % 4, 3])).collect();
    let of =
        |trainer: &Trainer| trainer.safety_test(&held_out, 9).unwrap().constraints[0].violations;
    assert!(of(&priced) * 2 < of(&lagrangian_trainer()));
}

#[test]
fn prices_are_saved_and_other_constraints_refused() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = lagrangian_trainer();
    whole.train(&prompts(), 3, &mut []).unwrap();
    whole.save(dir.path()).unwrap();
    let mut resumed = lagrangian_trainer();
    resumed.load(dir.path()).unwrap();
    assert_eq!(resumed.multiplier("no_e"), whole.multiplier("no_e"));
    whole.train(&prompts(), 5, &mut []).unwrap();
    resumed.train(&prompts(), 5, &mut []).unwrap();
    assert_eq!(resumed.multiplier("no_e"), whole.multiplier("no_e"));
    assert!(resumed.policy().0.equal(&whole.policy().0));

    let mut other = trainer(config()).with_constraint(no_e(0.1)).unwrap();
    let error = other.load(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::ConfigMismatch { field, .. } if field == "constraints"));
}

#[test]
fn constraints_are_checked_where_they_enter() {
    let refused = |trainer: Trainer, constraint: Constraint, field: &str| {
        let error = trainer.with_constraint(constraint).map(|_| ());
        let error = error.unwrap_err().to_string();
        assert!(error.contains(field), "{error} does not name {field}");
    };
    refused(trainer(config()), no_e(f64::NAN), "threshold");
    let lagrangian = LagrangianConfig::default();
    let model = constraint_fn(letters_of('e'));
    let with_critic = Constraint::lagrangian("e", model, 0.0, lagrangian, TokenValue::new());
    refused(trainer(config()), with_critic, "critic");
    let twice = trainer(config()).with_constraint(no_e(1.0)).unwrap();
    refused(twice, no_e(2.0), "name");
    let normalized = GrpoConfig {
        mix: RewardMix::NormalizeThenSum,
        ..config()
    };
    let rule = ConstraintRule::Shaping { coef: 1.0 };
    refused(trainer(normalized), no_e(0.0).with_rule(rule), "rule");
    let mut late = trainer(config());
    late.step(&prompts()).unwrap();
    refused(late, no_e(0.0), "too late");
    assert!(trainer(config()).safety_test(&prompts(), 1).is_err());
}
