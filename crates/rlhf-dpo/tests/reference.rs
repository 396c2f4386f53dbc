//! References: scored once and kept on disk, refused where they do not belong, completed after a
//! crash, following the policy, or none.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/bigram.rs"]
mod bigram;

use std::cell::Cell;
use std::fs;
use std::ops::ControlFlow;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bigram::Bigram;
use rlhf_dpo::core::{
    CheckpointConfig, EpochConfig, Error as CoreError, Event, GenerationConfig, Observer,
    PaddedBatch, Parameters, Policy, Preference, PreferenceBatch, Result,
};
use rlhf_dpo::tch::Tensor;
use rlhf_dpo::{
    DpoConfig, DpoLoss, DpoTrainer, Error, Fingerprint, Objective, Reference, ReferenceCache,
    ReferenceSync, RewardShift, SampleConfig, ScoreOptions,
};

fn pairs() -> Vec<Preference> {
    (0..10i64)
        .map(|i| {
            let chosen = vec![(i * 5) % 12; 1 + i as usize % 3];
            Preference::new([i, 1], chosen, [(i * 7 + 3) % 12])
        })
        .collect()
}

/// A policy that counts its forward passes, and may be told to fail.
struct Counted {
    model: Bigram,
    calls: Arc<AtomicUsize>,
    fails_at: usize,
}

impl Counted {
    fn new(fails_at: usize) -> (Self, Arc<AtomicUsize>) {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Self {
            model: Bigram::new(0.4),
            calls: Arc::clone(&calls),
            fails_at,
        };
        (counted, calls)
    }
}

impl Parameters for Counted {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.model.named_parameters()
    }
}

impl Policy for Counted {
    fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
        match self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.fails_at {
            true => Err(CoreError::config("crash", 1, "test")),
            false => self.model.logits(batch),
        }
    }
}

const OPTIONS: ScoreOptions = ScoreOptions {
    batch_size: 3,
    ld_alpha: None,
};

fn print() -> Fingerprint {
    Fingerprint::of_weights(&Bigram::new(0.4)).unwrap()
}

#[test]
fn a_file_is_written_once_and_completed_after_a_crash() {
    let dir = tempfile::tempdir().unwrap();
    let cache = ReferenceCache::new(dir.path().join("pairs.ref"), print());
    let (reference, calls) = Counted::new(0);
    let whole = cache.complete(&reference, &pairs(), &OPTIONS).unwrap();
    assert_eq!(calls.load(Ordering::Relaxed), 4);
    let direct = rlhf_dpo::score_preferences(&Bigram::new(0.4), &pairs(), &OPTIONS).unwrap();
    assert_eq!(whole, direct);
    assert_eq!(
        cache.complete(&reference, &pairs(), &OPTIONS).unwrap(),
        whole
    );
    assert_eq!(calls.load(Ordering::Relaxed), 4); // nothing was computed again
    assert_eq!(cache.read(&pairs(), &OPTIONS).unwrap(), whole);

    // A process dies in the third batch; the next goes on with it.
    let other = ReferenceCache::new(dir.path().join("crash.ref"), print());
    assert!(
        other
            .complete(&Counted::new(3).0, &pairs(), &OPTIONS)
            .is_err()
    );
    assert!(matches!(
        other.read(&pairs(), &OPTIONS),
        Err(Error::CacheIncomplete {
            found: 6,
            expected: 10,
            ..
        })
    ));
    let (reference, calls) = Counted::new(0);
    assert_eq!(
        other.complete(&reference, &pairs(), &OPTIONS).unwrap(),
        whole
    );
    assert_eq!(calls.load(Ordering::Relaxed), 2);

    // What was half written, or written wrong, is not believed.
    let good = fs::read(cache.path()).unwrap();
    for damage in ["short", "wrong"] {
        let mut bytes = good.clone();
        match damage {
            "short" => bytes.truncate(good.len() - 5),
            _ => bytes[good.len() - 20] ^= 1, // in the last pair but one
        }
        fs::write(cache.path(), &bytes).unwrap();
        let found = match damage {
            "short" => 9,
            _ => 8,
        };
        match cache.read(&pairs(), &OPTIONS) {
            Err(Error::CacheIncomplete { found: f, .. }) => assert_eq!(f, found),
            other => panic!("{other:?}"),
        }
        assert_eq!(
            cache.complete(&reference, &pairs(), &OPTIONS).unwrap(),
            whole
        );
        assert_eq!(fs::read(cache.path()).unwrap(), good);
    }
}

#[test]
fn a_file_of_something_else_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("pairs.ref");
    let cache = ReferenceCache::new(&path, print());
    cache
        .complete(&Bigram::new(0.4), &pairs(), &OPTIONS)
        .unwrap();
    let refused = |cache: &ReferenceCache, pairs: &[Preference], options: &ScoreOptions| match cache
        .complete(&Bigram::new(0.4), pairs, options)
    {
        Err(Error::CacheMismatch {
            what,
            found,
            expected,
            ..
        }) => {
            assert_ne!(found, expected);
            what
        }
        other => panic!("{other:?}"),
    };
    let changed = Bigram::new(0.4);
    {
        let _no_grad = rlhf_dpo::tch::no_grad_guard();
        let _ = changed.0.get(11).get(11).g_add_scalar_(1e-6);
    }
    let of_changed = Fingerprint::of_weights(&changed).unwrap();
    assert_eq!(
        refused(&ReferenceCache::new(&path, of_changed), &pairs(), &OPTIONS),
        "model"
    );
    let mut other = pairs();
    other[9].rejected.push(2);
    assert_eq!(refused(&cache, &other, &OPTIONS), "dataset");
    assert_eq!(refused(&cache, &pairs()[..9], &OPTIONS), "dataset");
    let options = ScoreOptions {
        ld_alpha: Some(0.5),
        ..OPTIONS
    };
    assert_eq!(refused(&cache, &pairs(), &options), "ld_alpha");
    let before = fs::read(&path).unwrap();
    fs::write(&path, "{}\n").unwrap();
    let corrupt = cache.read(&pairs(), &OPTIONS);
    assert!(matches!(
        corrupt,
        Err(Error::Core(CoreError::Corrupt { .. }))
    ));
    fs::write(&path, before).unwrap();
    cache.read(&pairs(), &OPTIONS).unwrap();

    struct Frozen;
    impl Parameters for Frozen {
        fn named_parameters(&self) -> Vec<(String, Tensor)> {
            Vec::new()
        }
    }
    assert!(Fingerprint::of_weights(&Frozen).is_err());
    let files = Fingerprint::of_files([&path]).unwrap();
    assert_eq!(files, Fingerprint::of_files([&path]).unwrap());
    assert_ne!(files, Fingerprint::of_files([&path, &path]).unwrap());
}

fn config(sync: Option<ReferenceSync>) -> DpoConfig {
    let mut config = DpoConfig {
        sync,
        microbatch_size: 4,
        ..DpoConfig::default()
    };
    config.update.optimizer.lr = 0.05;
    config
}

#[test]
fn scored_pairs_need_no_model() {
    let epochs = EpochConfig {
        batch_size: 4,
        epochs: 2,
        ..EpochConfig::default()
    };
    let mut with = DpoTrainer::new(Bigram::new(0.0), Bigram::new(0.4), config(None)).unwrap();
    with.train(&pairs(), &epochs, &mut []).unwrap();
    let scored = rlhf_dpo::score_preferences(&Bigram::new(0.4), &pairs(), &OPTIONS).unwrap();
    let mut without = DpoTrainer::new(Bigram::new(0.0), Reference::Scored, config(None)).unwrap();
    without.train_scored(&scored, &epochs, &mut []).unwrap();
    assert_eq!(with.model().bits(), without.model().bits());
    assert_eq!(
        with.evaluate(&pairs()).unwrap(),
        without.evaluate_scored(&scored).unwrap()
    );
    let batch = PreferenceBatch::new(pairs()).unwrap();
    assert!(matches!(
        without.step(&batch),
        Err(Error::NotScored {
            instead: "step_scored"
        })
    ));
    let error = without.train(&pairs(), &epochs, &mut []).unwrap_err();
    assert!(error.to_string().contains("train_scored"), "{error}");
}

#[test]
fn a_reference_follows_the_policy() {
    let sync = ReferenceSync {
        every: 2,
        alpha: 0.25,
    };
    let reference = Bigram::new(0.4);
    let live = Bigram(reference.0.shallow_clone());
    let mut trainer = DpoTrainer::new(Bigram::new(0.0), reference, config(Some(sync))).unwrap();
    let batch = PreferenceBatch::new(pairs()).unwrap();
    let first = live.weights();
    trainer.step(&batch).unwrap();
    assert_eq!(live.weights(), first);
    trainer.step(&batch).unwrap();
    let policy = trainer.model().weights();
    for ((now, then), policy) in live.weights().iter().zip(&first).zip(policy) {
        assert!((now - (0.25 * policy + 0.75 * then)).abs() < 1e-6);
    }
    let scored = rlhf_dpo::score_preferences(&live, &pairs(), &OPTIONS).unwrap();
    let refused = trainer.train_scored(&scored, &EpochConfig::default(), &mut []);
    assert!(matches!(refused, Err(Error::Unusable { .. })));
}

#[test]
fn a_reference_that_cannot_follow_is_refused() {
    let make = |reference: Reference| {
        DpoTrainer::new(
            Bigram::new(0.0),
            reference,
            config(Some(ReferenceSync::default())),
        )
    };
    let refused = |reference| matches!(make(reference), Err(Error::NotSynchronisable { .. }));
    assert!(refused(Reference::Scored));
    assert!(refused(Reference::Free));
    struct Frozen(Bigram);
    impl Parameters for Frozen {
        fn named_parameters(&self) -> Vec<(String, Tensor)> {
            Vec::new()
        }
    }
    impl Policy for Frozen {
        fn logits(&self, batch: &PaddedBatch) -> Result<Tensor> {
            self.0.logits(batch)
        }
    }
    assert!(refused(Frozen(Bigram::new(0.0)).into()));
    assert!(!refused(Bigram::new(0.4).into()));
    let policy = Bigram::new(0.0);
    let itself = Bigram(policy.0.shallow_clone());
    let made = DpoTrainer::new(policy, itself, config(Some(ReferenceSync::default())));
    assert!(matches!(made, Err(Error::NotSynchronisable { .. })));
    for (every, alpha) in [(0, 0.5), (1, 0.0), (1, 1.1)] {
        assert!(
            config(Some(ReferenceSync { every, alpha }))
                .validate()
                .is_err()
        );
    }
}

/// Killed after five steps and resumed, against left alone.
fn resumes(make: &dyn Fn() -> DpoTrainer<Bigram>) {
    let dir = tempfile::tempdir().unwrap();
    let mut epochs = EpochConfig {
        epochs: 3,
        batch_size: 4,
        ..EpochConfig::default()
    };
    let mut whole = make();
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
    assert!(make().train(&pairs(), &epochs, &mut kill).is_err());
    let mut resumed = make();
    assert_eq!(resumed.train(&pairs(), &epochs, &mut []).unwrap(), 9);
    assert_eq!(whole.model().bits(), resumed.model().bits());
    assert_eq!(
        whole.evaluate(&pairs()).unwrap(),
        resumed.evaluate(&pairs()).unwrap()
    );
}

#[test]
fn what_changes_beside_the_policy_is_resumed_too() {
    let sync = ReferenceSync {
        every: 2,
        alpha: 0.6,
    };
    resumes(&|| DpoTrainer::new(Bigram::new(0.0), Bigram::new(0.4), config(Some(sync))).unwrap());
    resumes(&|| {
        let mut config = config(None);
        config.microbatch_size = 2;
        config.objective = Objective::new(DpoLoss::BcoPair {
            shift: RewardShift::RunningMean,
        });
        DpoTrainer::new(Bigram::new(0.0), Bigram::new(0.4), config).unwrap()
    });
}

#[test]
fn a_checkpoint_of_the_other_kind_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let make = |sync| DpoTrainer::new(Bigram::new(0.0), Bigram::new(0.4), config(sync)).unwrap();
    let fixed = make(None);
    fixed.save(dir.path()).unwrap();
    let mut following = make(Some(ReferenceSync::default()));
    let before = following.model().bits();
    assert!(following.load(dir.path()).is_err());
    assert_eq!(following.model().bits(), before);
}

#[test]
fn held_out_pairs_are_evaluated_on_the_way() {
    let epochs = EpochConfig {
        batch_size: 4,
        epochs: 2,
        ..EpochConfig::default()
    };
    let make = || DpoTrainer::new(Bigram::new(0.0), Bigram::new(0.4), config(None)).unwrap();
    let samples = SampleConfig {
        generation: GenerationConfig {
            max_new_tokens: 4,
            ..GenerationConfig::default()
        },
        seed: 1,
    };
    let seen = Rc::new(Cell::new(0));
    let mut watched = make();
    watched
        .hold_out(&pairs()[..3], 2, Some(samples.clone()))
        .unwrap();
    let count = Rc::clone(&seen);
    let mut observers: Vec<Box<dyn Observer>> = vec![Box::new(move |event: &Event<'_>| {
        let names = [
            "loss",
            "rewards/accuracy",
            "rewards/margin",
            "rewards/chosen",
            "kl",
        ];
        let there = names.iter().filter(|name| {
            event
                .stats
                .get(&format!("dpo/eval/{name}"))
                .is_some_and(f64::is_finite)
        });
        let there = there.count();
        assert_eq!(
            there,
            if event.step.is_multiple_of(2) {
                names.len()
            } else {
                0
            }
        );
        count.set(count.get() + there);
        Ok(ControlFlow::Continue(()))
    })];
    assert_eq!(watched.train(&pairs(), &epochs, &mut observers).unwrap(), 6);
    assert_eq!(seen.get(), 3 * 5);
    let mut alone = make();
    alone.train(&pairs(), &epochs, &mut []).unwrap();
    assert_eq!(alone.model().bits(), watched.model().bits());

    assert!(alone.hold_out(&pairs(), 0, None).is_err());
    let free = Objective::new(DpoLoss::named("simpo").unwrap());
    let mut free = DpoTrainer::new(Bigram::new(0.0), Reference::Free, DpoConfig::of(free)).unwrap();
    assert!(free.hold_out(&pairs(), 1, Some(samples)).is_err());
    free.hold_out(&pairs(), 1, None).unwrap();
}
