//! Answers that the policy writes itself: it comes to write what the judge likes, a resumed run
//! draws what an uninterrupted one does, and what cannot work is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/bigram.rs"]
mod bigram;

use std::ops::ControlFlow;
use std::sync::Arc;

use bigram::{Bigram, VOCAB};
use rlhf_dpo::core::{
    CheckpointConfig, Completions, Detokenize, EpochConfig, Error as CoreError, Event,
    GenerationConfig, Observer, Parameters, Policy, RewardModel,
};
use rlhf_dpo::tch::Tensor;
use rlhf_dpo::{
    Error, Judge, OnlineDpoConfig, OnlineDpoTrainer, Reference, SampleConfig, Verdict,
    sample_answers,
};

const LIKED: i64 = 7;
const STOP: i64 = 0;

/// The more tokens [`LIKED`], the better.
struct Likes;

impl RewardModel for Likes {
    fn score(&self, completions: &Completions) -> rlhf_dpo::core::Result<Tensor> {
        let sequences = completions.batch.sequences();
        let count = |s: &rlhf_dpo::core::Sequence| {
            s.response.iter().filter(|id| **id == LIKED).count() as f32
        };
        Ok(Tensor::from_slice(
            &sequences.iter().map(count).collect::<Vec<_>>(),
        ))
    }
}

/// A letter for each token.
fn letters() -> Option<Box<dyn Detokenize>> {
    let letter = |id: &i64| char::from(b'a' + *id as u8);
    Some(Box::new(move |ids: &[i64]| {
        Ok(ids.iter().map(letter).collect::<String>())
    }))
}

fn compares() -> Judge {
    let count = |text: &str| text.chars().filter(|c| *c == 'h').count();
    Judge::comparing(
        move |_, first, second| match count(first).cmp(&count(second)) {
            std::cmp::Ordering::Greater => Verdict::First,
            std::cmp::Ordering::Less => Verdict::Second,
            std::cmp::Ordering::Equal => Verdict::Tie,
        },
    )
}

fn config(samples: usize) -> OnlineDpoConfig {
    let mut config = OnlineDpoConfig::default();
    config.dpo.update.optimizer.lr = 0.05;
    config.dpo.microbatch_size = 3;
    config.generation = GenerationConfig {
        max_new_tokens: 6,
        samples_per_prompt: samples,
        stop_token_ids: vec![STOP],
        ..GenerationConfig::default()
    };
    config
}

fn trainer(judge: Judge, samples: usize) -> OnlineDpoTrainer<Bigram> {
    let reference = Bigram::new(0.0);
    OnlineDpoTrainer::new(
        Bigram::new(0.0),
        reference,
        judge,
        letters(),
        config(samples),
    )
    .unwrap()
}

fn prompts() -> Vec<Arc<[i64]>> {
    (1..9).map(|i| Arc::from([i % VOCAB])).collect()
}

fn liked(model: &Bigram) -> f32 {
    let config = SampleConfig {
        generation: GenerationConfig {
            samples_per_prompt: 32,
            ..config(2).generation
        },
        seed: 5,
    };
    let answers = sample_answers(model, &prompts(), &config).unwrap();
    let scores = Likes.score(&answers.completions).unwrap();
    Vec::<f32>::try_from(scores).unwrap().iter().sum::<f32>() / 256.0
}

#[test]
fn the_policy_comes_to_write_what_the_judge_likes() {
    let before = liked(&Bigram::new(0.0));
    for (judge, samples) in [
        (Judge::from(Likes), 2),
        (Judge::from(Likes), 4),
        (compares(), 2),
        (compares(), 3),
    ] {
        let mut trainer = trainer(judge, samples);
        let mut last = None;
        for _ in 0..40 {
            last = Some(trainer.step(&prompts()).unwrap());
        }
        let stats = last.unwrap();
        assert!(stats.get("online/scores/chosen") > stats.get("online/scores/rejected"));
        assert_eq!(
            stats.get("online/pairs").unwrap() + stats.get("online/ties").unwrap(),
            8.0
        );
        assert!(stats.get("dpo/loss").unwrap().is_finite());
        let after = liked(trainer.model());
        assert!(
            after > 2.0 * before,
            "{samples} samples: from {before} to {after}"
        );
    }
}

#[test]
fn the_kl_of_samples_grows_from_0() {
    let config = SampleConfig {
        generation: config(2).generation,
        seed: 3,
    };
    let kl = |policy: &Bigram, reference: &Bigram| {
        let answers = sample_answers(policy, &prompts(), &config).unwrap();
        answers.kl(reference).unwrap()
    };
    let start = Bigram::new(0.0);
    assert!(kl(&start, &Bigram::new(0.0)).abs() < 1e-6);
    let mut trainer = trainer(Likes.into(), 2);
    for _ in 0..40 {
        trainer.step(&prompts()).unwrap();
    }
    assert!(kl(trainer.model(), &start) > 0.5);
}

#[test]
fn a_judge_that_likes_all_alike_teaches_nothing() {
    let mut trainer = trainer(Judge::comparing(|_, _, _| Verdict::Tie), 2);
    let stats = trainer.step(&prompts()).unwrap();
    assert_eq!(stats.get("online/ties"), Some(8.0));
    assert_eq!(stats.get("dpo/loss"), None);
    assert_eq!(trainer.model().bits(), Bigram::new(0.0).bits());
    // The next step draws other answers all the same.
    let again = trainer.step(&prompts()).unwrap();
    assert_ne!(
        stats.get("online/answer_tokens"),
        again.get("online/answer_tokens")
    );
}

#[test]
fn unfinished_answers_pay() {
    let mut config = config(2);
    config.missing_eos_penalty = Some(100.0);
    let made = |config| {
        let (policy, reference) = (Bigram::new(0.0), Bigram::new(0.0));
        OnlineDpoTrainer::new(policy, reference, Likes, letters(), config)
    };
    let mut trainer = made(config.clone()).unwrap();
    let finished = |trainer: &mut OnlineDpoTrainer<Bigram>| {
        let stats = trainer.step(&prompts()).unwrap();
        stats.get("online/finished").unwrap()
    };
    let before: f64 = (0..10).map(|_| finished(&mut trainer)).sum();
    for _ in 0..40 {
        trainer.step(&prompts()).unwrap();
    }
    let after: f64 = (0..10).map(|_| finished(&mut trainer)).sum();
    assert!(after > before + 1.0, "from {before} to {after} in ten");
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let mut epochs = EpochConfig {
        epochs: 4,
        batch_size: 4,
        ..EpochConfig::default()
    };
    let mut whole = trainer(Likes.into(), 2);
    whole.train(&prompts(), &epochs, &mut []).unwrap();
    epochs.checkpoints = Some(CheckpointConfig {
        dir: dir.path().into(),
        every: 2,
        keep: 2,
    });
    let mut kill: Vec<Box<dyn Observer>> = vec![Box::new(|event: &Event<'_>| match event.step {
        5 => Err(CoreError::config("kill", 5, "test")),
        _ => Ok(ControlFlow::Continue(())),
    })];
    let killed = trainer(Likes.into(), 2).train(&prompts(), &epochs, &mut kill);
    assert!(killed.is_err());
    let mut resumed = trainer(Likes.into(), 2);
    assert_eq!(resumed.train(&prompts(), &epochs, &mut []).unwrap(), 8);
    assert_eq!(whole.model().bits(), resumed.model().bits());
}

/// Its scores are not numbers.
struct Broken;

impl RewardModel for Broken {
    fn score(&self, completions: &Completions) -> rlhf_dpo::core::Result<Tensor> {
        Ok(Tensor::full(
            [completions.batch.len() as i64],
            f64::NAN,
            (rlhf_dpo::tch::Kind::Float, rlhf_dpo::tch::Device::Cpu),
        ))
    }
}

#[test]
fn what_cannot_work_is_refused_and_a_failed_step_changes_nothing() {
    let made = |reference: Reference, judge: Judge, texts, config| {
        OnlineDpoTrainer::new(Bigram::new(0.0), reference, judge, texts, config).map(|_| ())
    };
    let own = || Reference::from(Bigram::new(0.0));
    assert!(matches!(
        made(Reference::Scored, Likes.into(), None, config(2)),
        Err(Error::Unusable { .. })
    ));
    assert!(made(own(), compares(), None, config(2)).is_err());
    assert!(made(own(), Likes.into(), None, config(1)).is_err());
    let mut penalty = config(2);
    penalty.missing_eos_penalty = Some(1.0);
    assert!(made(own(), compares(), letters(), penalty.clone()).is_err());
    made(own(), Likes.into(), None, penalty).unwrap();

    let mut broken = trainer(Broken.into(), 2);
    assert!(matches!(
        broken.step(&prompts()),
        Err(Error::Core(CoreError::NonFinite { row: 0, .. }))
    ));
    assert_eq!(broken.model().bits(), Bigram::new(0.0).bits());
    assert!(broken.model().device() == broken.model().named_parameters()[0].1.device());
}
