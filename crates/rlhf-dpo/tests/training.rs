//! A reference scored once is as good as one scored at every step, the split into microbatches
//! does not matter, a failed step changes nothing, an interrupted run ends like an uninterrupted
//! one.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/bigram.rs"]
mod bigram;

use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bigram::Bigram;
use rlhf_dpo::core::{
    CheckpointConfig, DataOrder, EpochConfig, Error as CoreError, Event, LogprobOptions, Observer,
    PaddedBatch, Parameters, Policy, Preference, PreferenceBatch, Result as CoreResult,
    SequenceBatch, TokenLogprobs,
};
use rlhf_dpo::tch::Tensor;
use rlhf_dpo::{
    Divergence, DpoConfig, DpoLoss, DpoTrainer, Error, Objective, PairWeighting, Reference,
};

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

/// Trainers of one objective that differ in nothing but the split.
fn split(objective: &Objective, free: bool) -> [DpoTrainer<Bigram>; 2] {
    [10, 3].map(|microbatch_size| {
        let mut config = DpoConfig {
            microbatch_size,
            objective: objective.clone(),
            ..DpoConfig::default()
        };
        config.update.optimizer.lr = 0.05;
        let reference = match free {
            true => Reference::Free,
            false => Bigram::new(0.4).into(),
        };
        DpoTrainer::new(Bigram::new(0.0), reference, config).unwrap()
    })
}

fn assert_same_steps(name: &str, mut trainers: [DpoTrainer<Bigram>; 2], batch: &PreferenceBatch) {
    for _ in 0..3 {
        let [a, b] = trainers.each_mut().map(|t| t.step(batch).unwrap());
        assert!(a.len() >= 13 && a.len() == b.len(), "{name}: {a}");
        for (metric, value) in a.iter() {
            let other = b.get(metric).unwrap();
            let bound = 2e-5 * value.abs().max(1.0);
            assert!(
                (value - other).abs() < bound,
                "{name}: {metric} {value} {other}"
            );
        }
    }
    let [a, b] = trainers.map(|t| t.into_model().weights());
    let first = Bigram::new(0.0).weights();
    assert!(
        a.iter()
            .zip(&first)
            .any(|(a, first)| (a - first).abs() > 0.01),
        "{name}"
    );
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 2e-5, "{name}");
    }
}

#[test]
fn the_split_into_microbatches_does_not_matter() {
    let mut pairs = pairs();
    pairs[3].chosen.clear(); // an answer without a token
    pairs[7].rejected = pairs[7].chosen.clone();
    let mut alike = pairs.clone();
    alike.iter_mut().for_each(|p| p.weight = 1.0);
    let [pairs, alike] = [pairs, alike].map(|p| PreferenceBatch::new(p).unwrap());
    for (name, loss) in DpoLoss::FAMILY {
        let objective = Objective::new(loss);
        let free = ["simpo", "alphapo", "cpo", "orpo"].contains(&name);
        let batch = match name.starts_with("aot") {
            true => &alike,
            false => &pairs,
        };
        assert_same_steps(name, split(&objective, free), batch);
    }
    let mut weighted = Objective::mpo();
    weighted.weighting = PairWeighting::Wpo;
    assert_same_steps("weighted MPO", split(&weighted, false), &pairs);
    let shared = Objective {
        ld_alpha: Some(0.3),
        ..Objective::default()
    };
    assert_same_steps("LD-DPO", split(&shared, false), &pairs);
    let free = Objective::sum(
        [
            (DpoLoss::default(), 0.5),
            (DpoLoss::named("aot").unwrap(), 2.0),
        ],
        0.3,
    );
    assert_same_steps("AOT without a reference", split(&free, true), &alike);
}

#[test]
fn pairs_that_teach_nothing_are_counted() {
    let mut pairs = pairs();
    pairs[3].chosen.clear();
    pairs[7].rejected = pairs[7].chosen.clone();
    let stats = trainer(4)
        .step(&PreferenceBatch::new(pairs).unwrap())
        .unwrap();
    assert_eq!(stats.get("dpo/data/empty"), Some(1.0));
    assert_eq!(stats.get("dpo/data/equal"), Some(1.0));
    assert!(stats.iter().all(|(_, value)| value.is_finite()));
}

#[test]
fn a_reference_that_a_loss_cannot_use_is_refused() {
    let refused = |objective: Objective, reference: Reference| {
        let config = DpoConfig::of(objective);
        match DpoTrainer::new(Bigram::new(0.0), reference, config) {
            Err(Error::Unusable { option, .. }) => Some(option),
            Err(other) => panic!("{other}"),
            Ok(_) => None,
        }
    };
    let family = |with_model: bool| -> Vec<&str> {
        let names = DpoLoss::FAMILY.iter().filter(|(_, loss)| {
            let reference = match with_model {
                true => Bigram::new(0.4).into(),
                false => Reference::Free,
            };
            refused(Objective::new(*loss), reference) == Some("reference")
        });
        names.map(|(name, _)| *name).collect()
    };
    assert_eq!(family(true), ["simpo", "alphapo", "cpo", "orpo"]);
    assert_eq!(
        family(false),
        [
            "nca_pair",
            "bco_pair",
            "bco_pair_shift",
            "sppo_hard",
            "apo_zero",
            "apo_down"
        ]
    );
    let diverging = Objective {
        divergence: Divergence::ForwardKl,
        ..Objective::default()
    };
    assert_eq!(refused(diverging, Reference::Free), Some("divergence"));
    let both = Objective::sum(
        [
            (DpoLoss::default(), 1.0),
            (DpoLoss::named("simpo").unwrap(), 1.0),
        ],
        0.1,
    );
    assert_eq!(refused(both, Bigram::new(0.4).into()), None);

    // AOT has no place for the weights of pairs.
    let [mut aot, _] = split(&Objective::new(DpoLoss::named("aot").unwrap()), false);
    let batch = PreferenceBatch::new(pairs()).unwrap();
    assert!(matches!(aot.step(&batch), Err(Error::Unusable { .. })));
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

/// Counts the tokens that a packing model computes.
struct Spy {
    model: Bigram,
    tokens: Arc<AtomicUsize>,
}

impl Parameters for Spy {
    fn named_parameters(&self) -> Vec<(String, Tensor)> {
        self.model.named_parameters()
    }
}

impl Policy for Spy {
    fn logits(&self, batch: &PaddedBatch) -> CoreResult<Tensor> {
        self.model.logits(batch)
    }

    fn logprobs(
        &self,
        batch: &SequenceBatch,
        options: &LogprobOptions,
    ) -> CoreResult<TokenLogprobs> {
        let packed = batch.packed(self.device()).input_ids.numel();
        self.tokens.fetch_add(packed, Ordering::Relaxed);
        self.model.logprobs(batch, options)
    }
}

#[test]
fn a_prompt_is_computed_once_for_both_answers() {
    let pairs = [
        Preference::new(vec![1; 50], [2, 3], [4]),
        Preference::new(vec![5; 20], [6], [7, 8, 9]),
    ];
    let batch = PreferenceBatch::new(pairs.to_vec()).unwrap();
    let once = 50 + 3 + 20 + 4;
    let tokens = || Arc::new(AtomicUsize::new(0));
    let spy = |tokens: &Arc<AtomicUsize>| Spy {
        model: Bigram::new(0.0),
        tokens: Arc::clone(tokens),
    };
    let [policy, reference] = [tokens(), tokens()];
    let (model, like) = (spy(&policy), spy(&reference));
    let mut trainer = DpoTrainer::new(model, like, DpoConfig::default()).unwrap();
    trainer.step(&batch).unwrap();
    for count in [&policy, &reference] {
        assert_eq!(count.load(Ordering::Relaxed), once);
    }
    // ORPO learns the prompts too, which it computes apart.
    let orpo = tokens();
    let config = DpoConfig::of(DpoLoss::Orpo);
    let mut trainer = DpoTrainer::new(spy(&orpo), Reference::Free, config).unwrap();
    trainer.step(&batch).unwrap();
    assert_eq!(orpo.load(Ordering::Relaxed), once + 50 + 20);
}
