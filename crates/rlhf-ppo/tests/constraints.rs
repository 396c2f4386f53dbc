//! Constraints: skipping, shaping, prices, and the held-out safety test.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::sync::Arc;

use common::bigram::{Bigram, STOP, TokenValue, letters};
use rlhf_ppo::core::{Completions, Sequence, SequenceBatch, Stats, constraint_fn, reward_fn};
use rlhf_ppo::tch::{Kind, Tensor};
use rlhf_ppo::{
    Constraint, ConstraintRule, Error, KlControl, LagrangianConfig, MissingEos, PpoConfig,
    PpoTrainer, ScorePosition, Whitening,
};

type Trainer = PpoTrainer<Bigram, TokenValue>;

fn config() -> PpoConfig {
    let mut config = PpoConfig {
        seed: 5,
        batch_size: 32,
        ppo_epochs: 2,
        minibatches: 2,
        microbatch_size: 16,
        missing_eos: MissingEos::Keep,
        score_position: ScorePosition::LastToken,
        kl_control: KlControl::Fixed { kl_coef: 0.2 },
        ..PpoConfig::default()
    };
    config.generation.max_new_tokens = 6;
    config.generation.stop_token_ids = vec![STOP];
    config.update.optimizer.lr = 0.03;
    config
}

/// `c` (2) and `e` (4) are liked, and `e` is not allowed.
fn trainer(config: PpoConfig, policy: Bigram) -> Trainer {
    let count = |text: &str| text.matches(['c', 'e']).count() as f64;
    let reward = reward_fn(move |_, response| count(response));
    PpoTrainer::new(config, policy, TokenValue::new(), Bigram::frozen(), reward)
        .unwrap()
        .with_detokenizer(letters)
}

fn es(text: &str) -> f64 {
    text.matches('e').count() as f64
}

fn no_e(threshold: f64) -> Constraint {
    Constraint::new("no_e", constraint_fn(|_, response| es(response)), threshold)
}

fn priced(name: &str, threshold: f64, config: LagrangianConfig, critic: TokenValue) -> Constraint {
    let cost = constraint_fn(|_, response| es(response));
    Constraint::lagrangian(name, cost, threshold, config, critic)
}

fn prompts() -> Vec<Arc<[i64]>> {
    (0..32).map(|i| Arc::from([1 + i % 4, 1 + i / 8])).collect()
}

/// Costs 0, 2, 0, 1.
fn written() -> Completions {
    let batch = SequenceBatch::new(vec![
        Sequence::new([1], [2, 3, STOP]),
        Sequence::new([2], [4, 4]),
        Sequence::new([3], [2, STOP]),
        Sequence::new([4], [1, 4, 1]),
    ])
    .unwrap();
    Completions::written(batch)
}

fn stat(stats: &Stats, name: &str) -> f64 {
    stats
        .get(name)
        .unwrap_or_else(|| panic!("{name} is missing"))
}

fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::try_from(t.to_kind(Kind::Double).contiguous().view(-1)).unwrap()
}

fn weights(trainer: &Trainer) -> Vec<f64> {
    [
        numbers(&trainer.policy().0),
        numbers(&trainer.value_model().0),
    ]
    .concat()
}

#[track_caller]
fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (a, b) in got.iter().zip(want) {
        assert!((a - b).abs() <= tolerance, "{got:?} is not {want:?}");
    }
}

#[test]
fn a_batch_is_skipped_above_its_rate() {
    let skip = |max_violation_rate| {
        let rule = ConstraintRule::SkipBatch { max_violation_rate };
        let constraint = no_e(0.5).with_rule(rule);
        let mut trainer = trainer(config(), Bigram::new())
            .with_constraint(constraint)
            .unwrap();
        let before = weights(&trainer);
        let rollout = trainer.evaluate(written()).unwrap();
        let stats = trainer.update(&rollout).unwrap();
        assert_eq!(stat(&stats, "ppo/constraint/no_e/violation_rate"), 0.5);
        assert_eq!(stat(&stats, "ppo/constraint/no_e/mean_cost"), 0.75);
        let skipped = stat(&stats, "ppo/constraint/no_e/batch_skipped");
        assert_eq!(stat(&stats, "ppo/update_skipped"), skipped);
        assert_eq!(rollout.skipped_by.is_some(), skipped == 1.0);
        assert_eq!(weights(&trainer) == before, skipped == 1.0);
        skipped == 1.0
    };
    assert!(skip(0.0));
    assert!(skip(0.49));
    assert!(!skip(0.5));
}

#[test]
fn a_cost_above_the_threshold_is_taken_off_the_score() {
    let shaping = no_e(0.5).with_rule(ConstraintRule::Shaping { coef: 3.0 });
    let trainer = trainer(config(), Bigram::new())
        .with_constraint(shaping)
        .unwrap();
    let rollout = trainer.evaluate(written()).unwrap();
    assert_eq!(numbers(&rollout.scores), [1.0, 2.0, 1.0, 1.0]);
    assert_close(
        &numbers(&rollout.final_scores),
        &[1.0, 2.0 - 4.5, 1.0, 1.0 - 1.5],
        1e-6,
    );
    assert_eq!(rollout.used, [true; 4]);
}

/// Episodes of one token, so that everything is a line: `A_R = −β kl + R − V`, `A_C = β kl + C − V_C`.
#[test]
fn the_advantages_of_two_prices_by_hand() {
    let plain = PpoConfig {
        whiten_advantages: Whitening::Off,
        ..config()
    };
    let table = Bigram::new().0.detach();
    let moved = Bigram((&table + table.cos()).set_requires_grad(true));
    let critic = |value: f64| {
        let table = TokenValue::new().0.detach() + value;
        TokenValue(table.set_requires_grad(true))
    };
    let lagrangian = |init| LagrangianConfig {
        init,
        ..LagrangianConfig::default()
    };
    let mut trainer = trainer(plain, moved)
        .with_constraint(priced("a", 0.2, lagrangian(1.0), critic(0.25)))
        .unwrap()
        .with_constraint(no_e(9.0))
        .unwrap()
        .with_constraint(priced("b", 0.9, lagrangian(0.5), critic(-0.5)))
        .unwrap();
    let one = |prompt: i64, token: i64| Sequence::new([prompt], [token]);
    let batch = SequenceBatch::new(vec![one(1, 4), one(2, 2), one(3, 4)]).unwrap();
    let rollout = trainer.evaluate(Completions::written(batch)).unwrap();
    // The mean cost is 2/3.
    let a = 1.0 * (0.1 * 1.0 * (2.0f64 / 3.0 - 0.2)).exp();
    let b = 0.5 * (0.1 * 0.5 * (2.0f64 / 3.0 - 0.9)).exp();
    let multipliers: Vec<f64> = rollout
        .cost_estimates
        .iter()
        .map(|e| e.multiplier.value())
        .collect();
    assert_close(&multipliers, &[a, b], 1e-12);
    assert_eq!(trainer.multiplier("a"), Some(1.0)); // until the update
    let kl = numbers(&rollout.kl);
    assert!(kl.iter().any(|kl| kl.abs() > 0.1));
    let want: Vec<f64> = [(1.0, 1.0), (1.0, 0.0), (1.0, 1.0)]
        .iter()
        .zip(&kl)
        .map(|((reward, cost), kl)| {
            let of_reward = reward - 0.2 * kl;
            let of_cost = |value: f64| cost + 0.2 * kl - value;
            (of_reward - a * of_cost(0.25) - b * of_cost(-0.5)) / (1.0 + a + b)
        })
        .collect();
    assert_close(&numbers(&rollout.advantages), &want, 1e-6);
    let returns = numbers(&rollout.cost_estimates[1].returns.narrow(1, 0, 1));
    let want: Vec<f64> = [1.0, 0.0, 1.0]
        .iter()
        .zip(&kl)
        .map(|(c, kl)| c + 0.2 * kl)
        .collect();
    assert_close(&returns, &want, 1e-6);

    // Both critics learn: ½ mean of squares, the values being within the clip range.
    let rows = [0, 1, 2];
    let out = trainer.update_minibatch(&rollout, &rows).unwrap().unwrap();
    let loss = |value: f64| want.iter().map(|r| (value - r).powi(2)).sum::<f64>() / 6.0;
    let both = loss(0.25) + loss(-0.5);
    assert!(
        (out.cost_value_loss - both).abs() < 1e-6,
        "{}",
        out.cost_value_loss
    );
    let joined = out.policy_loss + 0.1 * (out.value_loss + both);
    assert!((out.loss - joined).abs() < 1e-6);
    trainer.update(&rollout).unwrap();
    assert_close(
        &[
            trainer.multiplier("a").unwrap(),
            trainer.multiplier("b").unwrap(),
        ],
        &[a, b],
        1e-12,
    );
    assert_eq!(trainer.multiplier("no_e"), None);
}

fn lagrangian_trainer() -> Trainer {
    let lagrangian = LagrangianConfig {
        lr: 0.3,
        window: 64,
        ..LagrangianConfig::default()
    };
    trainer(config(), Bigram::new())
        .with_constraint(priced("no_e", 0.1, lagrangian, TokenValue::new()))
        .unwrap()
}

/// The reward likes `e` as much as `c`; only the price of `e` tells them apart.
#[test]
fn a_price_brings_the_cost_under_its_threshold_while_the_reward_rises() {
    let mut priced = lagrangian_trainer();
    let mut free = trainer(config(), Bigram::new())
        .with_constraint(no_e(1e9))
        .unwrap();
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..60 {
        with.push(priced.step(&prompts()).unwrap());
        without.push(free.step(&prompts()).unwrap());
    }
    let mean = |stats: &[Stats], name: &str| {
        stats.iter().map(|s| stat(s, name)).sum::<f64>() / stats.len() as f64
    };
    let cost = "ppo/constraint/no_e/mean_cost";
    let (held, loose) = (mean(&with[50..], cost), mean(&without[50..], cost));
    assert!(held < 0.15 && loose > 0.5, "{held} against {loose}");
    let score = "ppo/score/mean";
    let (before, after) = (mean(&with[..3], score), mean(&with[50..], score));
    assert!(after > before + 0.5, "{before} became {after}");
    assert!(with.iter().all(|s| s.get("ppo/value/cost_loss").is_some()));
    let price = |s: &Stats| stat(s, "ppo/constraint/no_e/multiplier");
    assert!(with.iter().map(price).fold(0.0, f64::max) > 1.1);

    // On other prompts, with a bound.
    let held_out: Vec<Arc<[i64]>> = (0..400)
        .map(|i| Arc::from([1 + i % 4, 1 + (i / 4) % 4, 3]))
        .collect();
    let report = priced.safety_test(&held_out, 99).unwrap();
    assert_eq!(report.samples, 400);
    let safe = &report.constraints[0];
    // The test counts costs above the threshold, here any `e`.
    let rate = safe.violations as f64 / 400.0;
    assert!(report.passes(rate + 0.05, 0.95).unwrap());
    assert!(!report.passes(rate, 0.95).unwrap());
    let before = lagrangian_trainer().safety_test(&held_out, 99).unwrap();
    assert!(!before.passes(rate + 0.05, 0.95).unwrap(), "{before:?}");
    assert_eq!(priced.safety_test(&held_out, 99).unwrap(), report);
    let none = trainer(config(), Bigram::new());
    assert!(none.safety_test(&held_out, 99).is_err());
}

#[test]
fn multipliers_critics_and_windows_are_resumed() {
    let dir = tempfile::tempdir().unwrap();
    let mut whole = lagrangian_trainer();
    for _ in 0..3 {
        whole.step(&prompts()).unwrap();
    }
    whole.save(dir.path()).unwrap();
    let mut resumed = lagrangian_trainer();
    resumed.load(dir.path()).unwrap();
    assert_eq!(resumed.multiplier("no_e"), whole.multiplier("no_e"));
    for _ in 0..2 {
        let (a, b) = (
            whole.step(&prompts()).unwrap(),
            resumed.step(&prompts()).unwrap(),
        );
        for (name, value) in a.iter().filter(|(name, _)| !name.contains("time")) {
            assert_eq!(Some(value), b.get(name), "{name}");
        }
    }
    assert_eq!(weights(&whole), weights(&resumed));

    let mut other = trainer(config(), Bigram::new())
        .with_constraint(no_e(0.1))
        .unwrap();
    let error = other.load(dir.path()).unwrap_err();
    assert!(matches!(&error, Error::ConfigMismatch { field, .. } if field == "constraints"));
}

#[test]
fn constraints_are_checked_where_they_enter() {
    let refused = |constraint: Constraint, field: &str| {
        let error = trainer(config(), Bigram::new()).with_constraint(constraint);
        let error = error.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(field), "{error} does not name {field}");
    };
    refused(no_e(f64::NAN), "threshold");
    let lagrangian = ConstraintRule::Lagrangian(LagrangianConfig::default());
    refused(no_e(0.0).with_rule(lagrangian), "critic");
    let rule = ConstraintRule::SkipBatch {
        max_violation_rate: 1.0,
    };
    refused(no_e(0.0).with_rule(rule), "max_violation_rate");
    let rule = ConstraintRule::Shaping { coef: -1.0 };
    refused(no_e(0.0).with_rule(rule), "coef");
    let window = LagrangianConfig {
        window: 0,
        ..LagrangianConfig::default()
    };
    refused(priced("x", 0.0, window, TokenValue::new()), "window");

    let twice = trainer(config(), Bigram::new())
        .with_constraint(no_e(0.0))
        .unwrap();
    let error = twice
        .with_constraint(no_e(1.0))
        .map(|_| ())
        .unwrap_err()
        .to_string();
    assert!(error.contains("name"), "{error}");
    let mut late = trainer(config(), Bigram::new());
    late.step(&prompts()).unwrap();
    assert!(late.with_constraint(no_e(0.0)).is_err());
}
