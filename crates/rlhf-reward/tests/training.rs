//! What every trainer of scorers promises: the split into microbatches does not matter, a failed
//! step changes nothing, an interrupted run ends like an uninterrupted one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ops::ControlFlow;
use std::path::Path;

use rlhf_reward::core::{
    CheckpointConfig, EpochConfig, Event, Observer, Parameters, Preference, PreferenceBatch,
    Result, Scorer, SequenceBatch,
};
use rlhf_reward::tch::{Device, Kind, Tensor};
use rlhf_reward::{
    Error, Label, LabelConfig, LabelTrainer, Labelled, LabelledBatch, RewardConfig, RewardTrainer,
};

const VOCAB: i64 = 12;

/// The mean of a learned row for each token.
struct TokenMean(Tensor);

impl TokenMean {
    fn new(labels: i64) -> Self {
        let table = Tensor::arange(VOCAB * labels, (Kind::Float, Device::Cpu)).cos() * 0.3;
        Self(table.view([VOCAB, labels]).set_requires_grad(true))
    }
}

impl Parameters for TokenMean {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        vec![("table".into(), self.0.shallow_clone())]
    }
}

impl Scorer for TokenMean {
    fn scores(&self, batch: &SequenceBatch) -> Result<Tensor> {
        batch.check_vocabulary(VOCAB)?;
        let packed = batch.packed(Device::Cpu);
        let rows = self.0.f_index_select(0, &packed.input_ids)?;
        let mean = |segment: &std::ops::Range<i64>| {
            let tokens = rows.narrow(0, segment.start, segment.end - segment.start);
            tokens.mean_dim([0i64].as_slice(), false, Kind::Float)
        };
        Ok(Tensor::stack(
            &packed.segments.iter().map(mean).collect::<Vec<_>>(),
            0,
        ))
    }
}

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
        assert_eq!(a.len(), 8);
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
