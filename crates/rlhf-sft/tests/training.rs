//! The split into microbatches does not matter, prompts count as told, a failed step changes
//! nothing, an interrupted run ends like an uninterrupted one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/bigram.rs"]
mod bigram;

use std::ops::ControlFlow;

use bigram::Bigram;
use rlhf_sft::core::{
    CheckpointConfig, EpochConfig, Error as CoreError, Event, Observer, Sequence, SequenceBatch,
};
use rlhf_sft::{Error, SftConfig, SftTrainer};

fn data() -> Vec<Sequence> {
    (0..10i64)
        .map(|i| Sequence::new([i, 1, (i * 3) % 12], vec![(i * 5) % 12; 1 + i as usize % 4]))
        .collect()
}

fn trainer(prompt_weight: f64, microbatch_size: usize) -> SftTrainer<Bigram> {
    let mut config = SftConfig {
        prompt_weight,
        microbatch_size,
        ..SftConfig::default()
    };
    config.update.optimizer.lr = 0.05;
    SftTrainer::new(Bigram::new(0.0), config).unwrap()
}

fn loss(trainer: &mut SftTrainer<Bigram>, data: Vec<Sequence>) -> f64 {
    let stats = trainer.step(&SequenceBatch::new(data).unwrap()).unwrap();
    stats.get("sft/loss").unwrap()
}

#[test]
fn the_split_into_microbatches_does_not_matter() {
    for prompt_weight in [0.0, 0.3] {
        let (mut whole, mut split) = (trainer(prompt_weight, 10), trainer(prompt_weight, 3));
        for _ in 0..3 {
            assert!((loss(&mut whole, data()) - loss(&mut split, data())).abs() < 1e-6);
        }
        for (a, b) in whole.model().weights().iter().zip(split.model().weights()) {
            assert!((a - b).abs() < 1e-6);
        }
    }
}

#[test]
fn prompts_count_as_much_as_told() {
    // The same tokens, all but the first as the response.
    let whole = |s: Sequence| {
        let tokens: Vec<i64> = s.tokens().collect();
        Sequence::new(&tokens[..1], &tokens[1..])
    };
    let unprompted: Vec<Sequence> = data().into_iter().map(whole).collect();
    let everything = loss(&mut trainer(0.0, 4), unprompted);
    let responses = loss(&mut trainer(0.0, 4), data());
    assert!((loss(&mut trainer(1.0, 4), data()) - everything).abs() < 1e-6);

    let response_tokens: usize = data().iter().map(|s| s.response.len()).sum();
    let (r, p) = (response_tokens as f64, 20.0);
    let prompts = (everything * (r + p) - responses * r) / p;
    let want = (responses * r + 0.25 * prompts * p) / (r + 0.25 * p);
    assert!((loss(&mut trainer(0.25, 4), data()) - want).abs() < 1e-5);
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut epochs = EpochConfig {
        epochs: 3,
        batch_size: 4,
        ..EpochConfig::default()
    };
    let mut whole = trainer(0.1, 2);
    whole.train(&data(), &epochs, &mut []).unwrap();

    epochs.checkpoints = Some(CheckpointConfig {
        dir: dir.path().into(),
        every: 2,
        keep: 2,
    });
    let mut kill: Vec<Box<dyn Observer>> = vec![Box::new(|event: &Event<'_>| match event.step {
        5 => Err(CoreError::config("kill", 5, "test")),
        _ => Ok(ControlFlow::Continue(())),
    })];
    assert!(trainer(0.1, 2).train(&data(), &epochs, &mut kill).is_err());
    let mut resumed = trainer(0.1, 2);
    assert_eq!(resumed.train(&data(), &epochs, &mut []).unwrap(), 9);
    assert_eq!(whole.model().bits(), resumed.model().bits());
    assert!(
        whole.evaluate(&data()).unwrap().loss < trainer(0.1, 2).evaluate(&data()).unwrap().loss
    );
}

#[test]
fn a_failed_step_changes_nothing() {
    let mut trainer = trainer(0.0, 2);
    loss(&mut trainer, data());
    let before = trainer.model().bits();
    let unknown = vec![Sequence::new([1], [1]); 2]
        .into_iter()
        .chain([Sequence::new([99], [1])])
        .collect();
    assert!(trainer.step(&SequenceBatch::new(unknown).unwrap()).is_err());
    let nothing = SequenceBatch::new(vec![Sequence::new([1, 2], [])]).unwrap();
    assert!(matches!(
        trainer.step(&nothing),
        Err(Error::Core(CoreError::Empty { .. }))
    ));
    assert_eq!(before, trainer.model().bits());

    {
        let _no_grad = rlhf_sft::tch::no_grad_guard();
        let _ = trainer.model().0.get(1).fill_(f64::NAN);
    }
    let before = trainer.model().bits();
    let batch = SequenceBatch::new(data()).unwrap();
    assert!(matches!(trainer.step(&batch), Err(Error::Scale(_))));
    assert_eq!(before, trainer.model().bits());
    let rows = [[2, 3], [2, 3], [1, 3]].map(|[p, r]| Sequence::new([p], [r]));
    assert!(matches!(
        trainer.evaluate(&rows),
        Err(Error::Core(CoreError::NonFinite { row: 2, .. }))
    ));
}

#[test]
fn no_data_and_wrong_configs_are_errors() {
    let mut trainer = trainer(0.0, 2);
    assert!(
        trainer
            .train(&[], &EpochConfig::default(), &mut [])
            .is_err()
    );
    assert!(trainer.evaluate(&[]).is_err());
    for (prompt_weight, microbatch_size) in [(-1.0, 1), (f64::NAN, 1), (0.0, 0)] {
        let config = SftConfig {
            prompt_weight,
            microbatch_size,
            ..SftConfig::default()
        };
        assert!(SftTrainer::new(Bigram::new(0.0), config).is_err());
    }
}
