//! A reference scored once is as good as one scored at every step, the split into microbatches
//! does not matter, a failed step changes nothing, an interrupted run ends like an uninterrupted
//! one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/bigram.rs"]
mod bigram;

use std::ops::ControlFlow;

use bigram::Bigram;
use rlhf_dpo::core::{
    CheckpointConfig, DataOrder, EpochConfig, Error as CoreError, Event, Observer, Preference,
    PreferenceBatch,
};
use rlhf_dpo::{DpoConfig, DpoTrainer, Error};

fn pairs() -> Vec<Preference> {
    (0..10i64)
        .map(|i| {
            let chosen = vec![(i * 5) % 12; 1 + i as usize % 3];
            let mut pair = Preference::new([i, 1], chosen, [(i * 7 + 3) % 12]);
            pair.weight = 1.0 + (i % 3) as f64;
            pair
        })
        .collect()
}

fn trainer(microbatch_size: usize) -> DpoTrainer<Bigram> {
    let mut config = DpoConfig {
        microbatch_size,
        ..DpoConfig::default()
    };
    config.update.optimizer.lr = 0.05;
    DpoTrainer::new(Bigram::new(0.0), Box::new(Bigram::new(0.4)), config).unwrap()
}

#[test]
fn the_split_into_microbatches_does_not_matter() {
    let batch = PreferenceBatch::new(pairs()).unwrap();
    let (mut whole, mut split) = (trainer(10), trainer(3));
    for _ in 0..3 {
        let (a, b) = (whole.step(&batch).unwrap(), split.step(&batch).unwrap());
        assert_eq!(a.len(), 9);
        for (metric, value) in a.iter() {
            assert!((value - b.get(metric).unwrap()).abs() < 1e-5, "{metric}");
        }
    }
    for (a, b) in whole.model().weights().iter().zip(split.model().weights()) {
        assert!((a - b).abs() < 1e-5);
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
        let stats = trainer(20).step(&PreferenceBatch::new(pairs).unwrap());
        stats.unwrap().get("dpo/loss").unwrap()
    };
    assert!((loss(weighted) - loss(twice)).abs() < 1e-6);
}

#[test]
fn a_dataset_is_scored_once() {
    let mut live = trainer(4);
    for pairs in pairs().chunks(4) {
        live.step(&PreferenceBatch::new(pairs.to_vec()).unwrap())
            .unwrap();
    }
    let mut cached = trainer(4);
    let epochs = EpochConfig {
        batch_size: 4,
        order: DataOrder::Given,
        ..EpochConfig::default()
    };
    assert_eq!(cached.train(&pairs(), &epochs, &mut []).unwrap(), 3);
    assert_eq!(live.model().bits(), cached.model().bits());
}

#[test]
fn training_teaches_and_evaluation_says_so() {
    // Each pair has a context of its own, so all of them can be satisfied.
    let pairs: Vec<_> = (0..10i64)
        .map(|i| Preference::new([i], [(i + 3) % 12], [(i + 5) % 12]))
        .collect();
    let mut trainer = trainer(4);
    let before = trainer.evaluate(&pairs).unwrap();
    let epochs = EpochConfig {
        epochs: 10,
        ..EpochConfig::default()
    };
    trainer.train(&pairs, &epochs, &mut []).unwrap();
    let after = trainer.evaluate(&pairs).unwrap();
    assert!(before.accuracy < 1.0 && after.loss < before.loss && after.margin > before.margin);
    assert_eq!((after.accuracy, after.pairs), (1.0, 10));
    let stats = trainer.step(&PreferenceBatch::new(pairs).unwrap()).unwrap();
    assert!((stats.get("dpo/loss").unwrap() - after.loss).abs() < 1e-6);
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut epochs = EpochConfig {
        epochs: 3,
        batch_size: 4,
        ..EpochConfig::default()
    };
    let mut whole = trainer(2);
    whole.train(&pairs(), &epochs, &mut []).unwrap();

    epochs.checkpoints = Some(CheckpointConfig {
        dir: dir.path().into(),
        every: 2,
        keep: 2,
    });
    let mut kill: Vec<Box<dyn Observer>> = vec![Box::new(|event: &Event<'_>| match event.step {
        5 => Err(CoreError::config("kill", 5, "test")),
        _ => Ok(ControlFlow::Continue(())),
    })];
    assert!(trainer(2).train(&pairs(), &epochs, &mut kill).is_err());
    let mut resumed = trainer(2);
    assert_eq!(resumed.train(&pairs(), &epochs, &mut []).unwrap(), 9);
    assert_eq!(whole.model().bits(), resumed.model().bits());
}

#[test]
fn a_failed_step_changes_nothing() {
    let mut trainer = trainer(2);
    let good = PreferenceBatch::new(pairs()).unwrap();
    trainer.step(&good).unwrap();
    let before = trainer.model().bits();
    let unknown = PreferenceBatch::new(vec![Preference::new([1], [2], [99])]).unwrap();
    assert!(trainer.step(&unknown).is_err());
    let mut weightless = pairs();
    weightless.iter_mut().for_each(|p| p.weight = 0.0);
    let weightless = PreferenceBatch::new(weightless).unwrap();
    assert!(matches!(
        trainer.step(&weightless),
        Err(Error::Core(CoreError::InvalidConfig { .. }))
    ));
    assert_eq!(before, trainer.model().bits());

    {
        let _no_grad = rlhf_dpo::tch::no_grad_guard();
        let _ = trainer.model().0.get(1).fill_(f64::NAN);
    }
    let before = trainer.model().bits();
    assert!(matches!(trainer.step(&good), Err(Error::Scale(_))));
    assert_eq!(before, trainer.model().bits());
    let rows = [2, 2, 1].map(|prompt| Preference::new([prompt], [3], [4]));
    assert!(matches!(
        trainer.evaluate(&rows),
        Err(Error::Core(CoreError::NonFinite { row: 2, .. }))
    ));
}

#[test]
fn a_reference_that_gives_nan_is_named() {
    let broken = Bigram::new(0.0);
    {
        let _no_grad = rlhf_dpo::tch::no_grad_guard();
        let _ = broken.0.get(1).fill_(f64::NAN);
    }
    let mut trainer =
        DpoTrainer::new(Bigram::new(0.0), Box::new(broken), DpoConfig::default()).unwrap();
    let error = trainer
        .step(&PreferenceBatch::new(pairs()).unwrap())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "reference log-probability of row 0 is NaN, not a finite number"
    );
    assert!(
        trainer
            .train(&[], &EpochConfig::default(), &mut [])
            .is_err()
    );
}
