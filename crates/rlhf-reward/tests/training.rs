//! What every trainer of scorers promises: the split into microbatches does not matter, a failed
//! step changes nothing, an interrupted run ends like an uninterrupted one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use std::ops::ControlFlow;
use std::path::Path;

use common::{TokenMean, VOCAB};
use rlhf_reward::core::{
    CheckpointConfig, EpochConfig, Event, Observer, Preference, PreferenceBatch,
};
use rlhf_reward::{
    Error, Heads, Label, LabelConfig, LabelTrainer, Labelled, LabelledBatch, RewardConfig,
    RewardTrainer,
};

fn pairs() -> Vec<Preference> {
    (0..10i64)
        .map(|i| {
            let mut pair = Preference::new([i % VOCAB, 1], [i, (i * 5) % VOCAB], [(i * 7) % VOCAB]);
            pair.margin = (i % 3 == 0).then_some(0.2);
            pair.weight = 1.0 + (i % 4) as f64;
            pair
        })
        .collect()
}

fn config(microbatch_size: usize) -> RewardConfig {
    let mut config = RewardConfig {
        center_coef: 0.05,
        microbatch_size,
        ..RewardConfig::default()
    };
    config.update.optimizer.lr = 0.05;
    config
}

fn trainer(microbatch_size: usize) -> RewardTrainer<TokenMean> {
    RewardTrainer::new(TokenMean::new(1), config(microbatch_size)).unwrap()
}

fn weights(trainer: &RewardTrainer<TokenMean>) -> Vec<f32> {
    trainer.model().0.detach().view(-1).try_into().unwrap()
}

#[test]
fn the_split_into_microbatches_does_not_matter() {
    let batch = PreferenceBatch::new(pairs()).unwrap();
    let (mut whole, mut split) = (trainer(10), trainer(3));
    for _ in 0..3 {
        let (a, b) = (whole.step(&batch).unwrap(), split.step(&batch).unwrap());
        assert_eq!(a.len(), 9);
        for (metric, value) in a.iter() {
            assert!((value - b.get(metric).unwrap()).abs() < 1e-6, "{metric}");
        }
    }
    for (a, b) in weights(&whole).iter().zip(weights(&split)) {
        assert!((a - b).abs() < 1e-6);
    }
}

#[test]
fn a_weight_of_2_is_as_good_as_the_pair_twice() {
    let mut twice = pairs();
    twice.iter_mut().for_each(|p| p.weight = 1.0);
    let mut weighted = twice.clone();
    weighted[4].weight = 2.0;
    twice.push(twice[4].clone());
    let loss = |pairs: Vec<Preference>| {
        let stats = trainer(20)
            .step(&PreferenceBatch::new(pairs).unwrap())
            .unwrap();
        stats.get("reward/loss").unwrap()
    };
    assert!((loss(weighted) - loss(twice)).abs() < 1e-6);
}

#[test]
fn training_teaches_and_evaluation_says_so() {
    let mut trainer = trainer(4);
    let before = trainer.evaluate(&pairs()).unwrap();
    let epochs = EpochConfig {
        epochs: 20,
        batch_size: 5,
        ..EpochConfig::default()
    };
    assert_eq!(trainer.train(&pairs(), &epochs, &mut []).unwrap(), 40);
    let after = trainer.evaluate(&pairs()).unwrap();
    assert!(after.loss < before.loss - 0.1, "{before:?} {after:?}");
    assert!(after.accuracy > before.accuracy && after.mean_margin > before.mean_margin);
    assert_eq!(after.pairs, 10);
}

#[test]
fn evaluation_and_step_agree_on_the_loss() {
    let mut trainer = trainer(3);
    let report = trainer.evaluate(&pairs()).unwrap();
    let stats = trainer
        .step(&PreferenceBatch::new(pairs()).unwrap())
        .unwrap();
    assert!((report.loss - stats.get("reward/loss").unwrap()).abs() < 1e-6);
    assert_eq!(Some(report.accuracy), stats.get("reward/accuracy"));
}

#[test]
fn pairs_that_teach_nothing_are_skipped_and_counted() {
    let mut some = pairs();
    some.insert(3, Preference::new([1], [4, 5], [4, 5]));
    some.push(Preference::new([1], [], [4]));
    let with = PreferenceBatch::new(some.clone()).unwrap();
    let (mut a, mut b) = (trainer(4), trainer(4));
    let stats = a.step(&with).unwrap();
    let without = b.step(&PreferenceBatch::new(pairs()).unwrap()).unwrap();
    assert_eq!(stats.get("reward/skipped"), Some(2.0));
    assert_eq!(without.get("reward/skipped"), Some(0.0));
    assert_eq!(stats.get("reward/loss"), without.get("reward/loss"));
    assert_eq!(weights(&a), weights(&b));
    let report = a.evaluate(&some).unwrap();
    let counts = (report.pairs, report.skipped.equal, report.skipped.empty);
    assert_eq!(counts, (10, 1, 1));

    let before = weights(&a);
    let nothing = PreferenceBatch::new(vec![some[3].clone()]).unwrap();
    assert!(matches!(
        a.step(&nothing),
        Err(Error::NothingToLearn { pairs: 1, .. })
    ));
    assert_eq!(before, weights(&a));
}

#[test]
fn label_smoothing_bounds_what_is_learned() {
    let pairs = [Preference::new([0], [1], [2])];
    let epochs = EpochConfig {
        epochs: 300,
        ..EpochConfig::default()
    };
    let margin = |label_smoothing: f64| {
        let mut plain = config(1);
        plain.center_coef = 0.0;
        plain.label_smoothing = label_smoothing;
        let mut trainer = RewardTrainer::new(TokenMean::new(1), plain).unwrap();
        trainer.train(&pairs, &epochs, &mut []).unwrap();
        trainer.evaluate(&pairs).unwrap().mean_margin
    };
    let best = (0.8f64 / 0.2).ln(); // where the smoothed loss is least
    assert!((margin(0.2) - best).abs() < 0.05, "{}", margin(0.2));
    assert!(margin(0.0) > 2.0 * best);
    let half = RewardConfig {
        label_smoothing: 0.5,
        ..config(1)
    };
    assert!(RewardTrainer::new(TokenMean::new(1), half).is_err());
}

#[test]
fn heads_learn_from_weights_of_their_own() {
    let of = |bootstrap| {
        // All heads start alike.
        let model = TokenMean::alike(3);
        let heads = Heads {
            count: 3,
            bootstrap,
        };
        RewardTrainer::new(model, config(3))
            .unwrap()
            .with_heads(heads)
            .unwrap()
    };
    let batch = PreferenceBatch::new(pairs()).unwrap();
    let (mut same, mut apart) = (of(None), of(Some(1)));
    for _ in 0..5 {
        assert!(
            same.step(&batch)
                .unwrap()
                .get("reward/disagreement")
                .unwrap()
                < 1e-6
        );
        apart.step(&batch).unwrap();
    }
    let stats = apart.step(&batch).unwrap();
    assert!(stats.get("reward/disagreement").unwrap() > 1e-3, "{stats}");
    // Three heads that see the same are one: their mean loss is its loss.
    let mut one = RewardTrainer::new(TokenMean::alike(1), config(3)).unwrap();
    let mut three = of(None);
    for _ in 0..3 {
        let (a, b) = (one.step(&batch).unwrap(), three.step(&batch).unwrap());
        assert!((a.get("reward/loss").unwrap() - b.get("reward/loss").unwrap()).abs() < 1e-6);
    }
    // The split does not matter with weights of their own, either.
    let mut whole = of(Some(1));
    whole.step(&batch).unwrap();
    let mut split = RewardTrainer::new(TokenMean::alike(3), config(10))
        .unwrap()
        .with_heads(Heads {
            count: 3,
            bootstrap: Some(1),
        })
        .unwrap();
    split.step(&batch).unwrap();
    for (a, b) in weights(&whole).iter().zip(weights(&split)) {
        assert!((a - b).abs() < 1e-6);
    }
    let two = Heads {
        count: 2,
        bootstrap: None,
    };
    let wrong = trainer(1).with_heads(two).unwrap();
    assert!(matches!(
        wrong.evaluate(&pairs()),
        Err(Error::NotHeads { heads: 2, .. })
    ));
    let none = Heads { count: 0, ..two };
    assert!(trainer(1).with_heads(none).is_err());
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let epochs = |dir: Option<&Path>| EpochConfig {
        epochs: 3,
        batch_size: 4,
        seed: 11,
        checkpoints: dir.map(|dir| CheckpointConfig {
            dir: dir.into(),
            every: 2,
            keep: 2,
        }),
        ..EpochConfig::default()
    };
    let mut whole = trainer(2);
    assert_eq!(whole.train(&pairs(), &epochs(None), &mut []).unwrap(), 9);

    // Killed between two checkpoints, as a process would be: an observer's error, and the steps
    // since the last checkpoint are lost.
    let epochs = epochs(Some(dir.path()));
    let mut kill: Vec<Box<dyn Observer>> = vec![Box::new(|event: &Event<'_>| match event.step {
        5 => Err(rlhf_reward::core::Error::config("kill", 5, "test")),
        _ => Ok(ControlFlow::Continue(())),
    })];
    assert!(trainer(2).train(&pairs(), &epochs, &mut kill).is_err());
    assert_eq!(epochs.resumed_step().unwrap(), 4);
    let mut resumed = trainer(2);
    assert_eq!(resumed.train(&pairs(), &epochs, &mut []).unwrap(), 9);
    assert_eq!(weights(&whole), weights(&resumed));
}

#[test]
fn a_failed_step_changes_nothing() {
    let mut trainer = trainer(2);
    let good = PreferenceBatch::new(pairs()).unwrap();
    trainer.step(&good).unwrap();
    let before = weights(&trainer);
    let unknown = PreferenceBatch::new(vec![
        Preference::new([1], [2], [3]),
        Preference::new([1], [2], [3]),
        Preference::new([1], [2], [99]),
    ]);
    assert!(matches!(
        trainer.step(&unknown.unwrap()),
        Err(Error::Core(_))
    ));
    let mut weightless = pairs();
    weightless.iter_mut().for_each(|p| p.weight = 0.0);
    assert!(
        trainer
            .step(&PreferenceBatch::new(weightless).unwrap())
            .is_err()
    );
    assert_eq!(before, weights(&trainer));

    // A NaN anywhere in the scores.
    {
        let _no_grad = rlhf_reward::tch::no_grad_guard();
        let _ = trainer.model().0.get(9).fill_(f64::NAN);
    }
    let before: Vec<u32> = weights(&trainer).iter().map(|w| w.to_bits()).collect();
    assert!(matches!(trainer.step(&good), Err(Error::Scale(_))));
    let after: Vec<u32> = weights(&trainer).iter().map(|w| w.to_bits()).collect();
    assert_eq!(before, after);
    assert!(matches!(
        trainer.evaluate(&pairs()),
        Err(Error::Core(rlhf_reward::core::Error::NonFinite {
            what: "score",
            ..
        }))
    ));
}

#[test]
fn wrong_models_data_and_configs_are_errors() {
    let two = RewardTrainer::new(TokenMean::new(2), config(4)).unwrap();
    assert!(matches!(
        two.evaluate(&pairs()),
        Err(Error::NotAReward { sequences: 8, .. })
    ));
    let mut one = trainer(4);
    assert!(one.evaluate(&[]).is_err());
    assert!(one.train(&[], &EpochConfig::default(), &mut []).is_err());
    for config in [
        config(0),
        RewardConfig {
            center_coef: f64::NAN,
            ..config(1)
        },
    ] {
        assert!(RewardTrainer::new(TokenMean::new(1), config).is_err());
    }
}

fn labelled(label: impl Fn(i64) -> Label) -> Vec<Labelled> {
    (0..9i64).map(|i| Labelled::text([i], label(i))).collect()
}

fn label_trainer(labels: i64, microbatch_size: usize) -> LabelTrainer<TokenMean> {
    let mut config = LabelConfig {
        microbatch_size,
        ..LabelConfig::default()
    };
    config.update.optimizer.lr = 0.1;
    LabelTrainer::new(TokenMean::new(labels), config).unwrap()
}

#[test]
fn classes_and_scores_are_learned() {
    let epochs = EpochConfig {
        epochs: 60,
        batch_size: 4,
        ..EpochConfig::default()
    };
    let classes = labelled(|i| Label::Class(i % 3));
    let mut classifier = label_trainer(3, 2);
    classifier.train(&classes, &epochs, &mut []).unwrap();
    assert_eq!(classifier.evaluate(&classes).unwrap().accuracy, Some(1.0));

    let scores = labelled(|i| Label::Score(i as f64 / 4.0 - 1.0));
    let mut regression = label_trainer(1, 2);
    let before = regression.evaluate(&scores).unwrap();
    regression.train(&scores, &epochs, &mut []).unwrap();
    let after = regression.evaluate(&scores).unwrap();
    assert_eq!(after.accuracy, None);
    assert!(after.loss < 0.05 * before.loss, "{before:?} {after:?}");
}

#[test]
fn labels_may_be_split_and_must_fit_the_model() {
    let batch = LabelledBatch::new(labelled(|i| Label::Class(i % 3))).unwrap();
    let mut whole = label_trainer(3, 9);
    let (a, b) = (
        whole.step(&batch).unwrap(),
        label_trainer(3, 2).step(&batch).unwrap(),
    );
    for (metric, value) in a.iter() {
        assert!((value - b.get(metric).unwrap()).abs() < 1e-6, "{metric}");
    }
    let unknown = LabelledBatch::new(labelled(Label::Class)).unwrap();
    assert!(matches!(
        whole.step(&unknown),
        Err(Error::LabelOutOfRange { label: 3, .. })
    ));
    let scores = LabelledBatch::new(labelled(|_| Label::Score(0.0))).unwrap();
    assert!(matches!(whole.step(&scores), Err(Error::NotAReward { .. })));
}

#[test]
fn a_text_without_a_finite_score_is_named() {
    let trainer = label_trainer(3, 2);
    {
        let _no_grad = rlhf_reward::tch::no_grad_guard();
        let _ = trainer.model().0.get(4).fill_(f64::NAN);
    }
    assert!(matches!(
        trainer.evaluate(&labelled(|i| Label::Class(i % 3))),
        Err(Error::Core(rlhf_reward::core::Error::NonFinite {
            row: 4,
            ..
        }))
    ));
}
