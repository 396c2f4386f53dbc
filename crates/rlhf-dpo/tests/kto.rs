//! Labelled answers: TRL's KTO runs, the losses by hand and by finite differences, and the trainer.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../../../tests/goldens/bigram.rs"]
mod bigram;
#[path = "../../../tests/goldens/training_case.rs"]
mod training_case;

use std::ops::ControlFlow;

use bigram::Bigram;
use rlhf_dpo::core::{
    CheckpointConfig, EpochConfig, Error as CoreError, Event, Observer, Sequence,
};
use rlhf_dpo::tch::{Kind, Tensor};
use rlhf_dpo::{
    Error, KtoConfig, KtoInputs, KtoLoss, KtoObjective, KtoTrainer, LabelledAnswer, Reference,
    RewardShift, ScoredAnswer, kto_loss, mismatched_answers,
};
use rlhf_models::{CausalLm, LoadOptions};
use training_case::{TrainingCase, model_dir, preference_pairs};

const METRICS: [(&str, &str); 7] = [
    ("kto/loss", "loss"),
    ("kto/grad_norm", "grad_norm"),
    ("kto/rewards/chosen", "rewards/chosen"),
    ("kto/rewards/rejected", "rewards/rejected"),
    ("kto/rewards/margin", "rewards/margins"),
    ("kto/logprobs/chosen", "logps/chosen"),
    ("kto/logprobs/rejected", "logps/rejected"),
];

/// The answers of a step; `prefix` is `"KL_"` for those that belong to other prompts.
fn rows(holder: &TrainingCase, batch: usize, prefix: &str) -> Vec<LabelledAnswer> {
    let tensor = |name: &str| holder.tensor(&format!("batch{batch}/{name}"));
    let of_rows = |name: &str| tensor(&format!("{prefix}{name}"));
    let row = |name: &str, i: i64| Vec::<i64>::try_from(of_rows(name).get(i)).unwrap();
    let labels = Vec::<i64>::try_from(tensor("label")).unwrap();
    let answer = |(i, label): (usize, &i64)| {
        let i = i as i64;
        let cells = row("input_ids", i)
            .into_iter()
            .zip(row("attention_mask", i))
            .zip(row("completion_mask", i));
        let (mut prompt, mut response) = (Vec::new(), Vec::new());
        for ((id, _), completion) in cells.filter(|((_, there), _)| *there == 1) {
            if completion == 1 {
                response.push(id);
            } else {
                prompt.push(id);
            }
        }
        LabelledAnswer::new(Sequence::new(prompt, response), *label == 1)
    };
    labels.iter().enumerate().map(answer).collect()
}

fn repeat(name: &str) {
    let case = TrainingCase::read(&format!("kto/{name}"));
    let holder = match case.param("batches").as_str().unwrap() {
        "in this folder" => TrainingCase::read(&case.name),
        other => TrainingCase::read(other),
    };
    let load = |param: &str| {
        let folder = case.param(param).as_str().unwrap();
        let dir = model_dir(folder.strip_prefix("models/").unwrap());
        CausalLm::from_pretrained(dir, &LoadOptions::default()).unwrap()
    };
    let number = |param: &str| case.param(param).as_f64().unwrap();
    let config = KtoConfig {
        update: case.update(),
        objective: KtoObjective {
            loss: serde_json::from_value(case.param("loss_type").clone()).unwrap(),
            beta: number("beta"),
            desirable_weight: number("desirable_weight"),
            undesirable_weight: number("undesirable_weight"),
        },
        microbatch_size: 4,
    };
    let mut trainer = KtoTrainer::new(load("model"), load("ref_model"), config).unwrap();
    for step in 0..2 {
        let answers = rows(&holder, step, "");
        let stats = trainer.step(&answers).unwrap();
        case.check_step(step, &stats, &METRICS);
        if trainer.config().objective.loss == KtoLoss::Kto {
            case.check_step(step, &stats, &[("kto/kl", "kl")]);
            let others: Vec<_> = rows(&holder, step, "KL_");
            let ours = mismatched_answers(&unscored(&answers), None).unwrap();
            assert!(others.iter().map(|o| &o.sequence).eq(&ours));
        }
    }
    assert_eq!(case.steps().len(), 2);
    case.check_final_weights(trainer.model());
}

fn unscored(answers: &[LabelledAnswer]) -> Vec<ScoredAnswer> {
    let scored = |answer: &LabelledAnswer| ScoredAnswer {
        answer: answer.clone(),
        ref_logprob: 0.0,
    };
    answers.iter().map(scored).collect()
}

#[test]
fn runs_are_those_of_trl() {
    for model in ["gpt2", "llama"] {
        for run in ["default", "weights", "apo_zero_unpaired"] {
            repeat(&format!("{model}_{run}"));
        }
    }
}

const SHIFTED: KtoLoss = KtoLoss::Bco {
    shift: RewardShift::RunningMean,
};
const LOSSES: [KtoLoss; 4] = [
    KtoLoss::Kto,
    KtoLoss::ApoZeroUnpaired,
    KtoLoss::Bco {
        shift: RewardShift::None,
    },
    SHIFTED,
];

fn run(policy: &Tensor, objective: &KtoObjective) -> Tensor {
    let reference = Tensor::from_slice(&[-3.6f64, -8.1, -6.4, -2.5]);
    let desirable = Tensor::from_slice(&[true, false, true, false]);
    let inputs = KtoInputs {
        policy,
        reference: &reference,
        desirable: &desirable,
        kl: 0.3,
        reward_shift: -0.2,
    };
    kto_loss(inputs, objective).unwrap().losses
}

#[test]
fn losses_are_what_their_equations_say_and_so_are_their_gradients() {
    let values = [-3.1f64, -9.0, -5.5, -2.2];
    for loss in LOSSES {
        let objective = KtoObjective {
            loss,
            beta: 0.4,
            desirable_weight: 1.3,
            undesirable_weight: 0.7,
        };
        let policy = Tensor::from_slice(&values).set_requires_grad(true);
        let losses = run(&policy, &objective);
        let sigma = |x: f64| 1.0 / (1.0 + (-x).exp());
        // The first is desirable with x = 0.5, the second undesirable with x = -0.9.
        let (good, bad) = match loss {
            KtoLoss::Kto => (1.0 - sigma(0.4 * 0.2), 1.0 - sigma(0.4 * 1.2)),
            KtoLoss::ApoZeroUnpaired => (1.0 - sigma(0.4 * 0.5), 1.0 - sigma(0.4 * 0.9)),
            _ => (-sigma(0.2 + 0.2).ln(), -sigma(0.36 - 0.2).ln()),
        };
        assert!(
            (losses.double_value(&[0]) - 1.3 * good).abs() < 1e-9,
            "{loss:?}"
        );
        assert!(
            (losses.double_value(&[1]) - 0.7 * bad).abs() < 1e-9,
            "{loss:?}"
        );
        losses.sum(Kind::Double).backward();
        for i in 0..4 {
            let at = |delta: f64| {
                let mut moved = values;
                moved[i] += delta;
                let sum = run(&Tensor::from_slice(&moved), &objective).sum(Kind::Double);
                sum.double_value(&[])
            };
            let want = (at(1e-5) - at(-1e-5)) / 2e-5;
            let got = policy.grad().double_value(&[i as i64]);
            assert!(
                (got - want).abs() < 1e-8 && got.abs() > 1e-4,
                "{loss:?}: {got} {want}"
            );
        }
    }
}

fn answers() -> Vec<LabelledAnswer> {
    (0..10i64)
        .map(|i| {
            let response = vec![(i * 5) % 12; 1 + i as usize % 3];
            LabelledAnswer::new(Sequence::new([i, 1], response), i % 3 != 0)
        })
        .collect()
}

fn trainer(loss: KtoLoss, microbatch_size: usize) -> KtoTrainer<Bigram> {
    let mut config = KtoConfig {
        microbatch_size,
        ..KtoConfig::of(loss)
    };
    config.objective.beta = 0.5;
    config.update.optimizer.lr = 0.05;
    KtoTrainer::new(Bigram::new(0.0), Bigram::new(0.4), config).unwrap()
}

#[test]
fn the_split_into_microbatches_does_not_matter() {
    let mut answers = answers();
    answers[4].sequence.response.clear();
    for loss in LOSSES {
        let mut trainers = [10, 3].map(|size| trainer(loss, size));
        for _ in 0..3 {
            let [a, b] = trainers.each_mut().map(|t| t.step(&answers).unwrap());
            assert_eq!(a.get("kto/data/empty"), Some(1.0));
            assert!(a.len() >= 9 && a.len() == b.len(), "{a}");
            for (metric, value) in a.iter() {
                let other = b.get(metric).unwrap();
                assert!((value - other).abs() < 1e-5, "{loss:?} {metric}");
            }
        }
        let [a, b] = trainers.map(|t| t.into_model().weights());
        assert!(
            a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-5),
            "{loss:?}"
        );
    }
}

#[test]
fn the_kl_grows_with_the_distance() {
    let mut trainer = trainer(KtoLoss::Kto, 4);
    let other_prompts = |stats: &rlhf_dpo::core::Stats| stats.get("kto/kl").unwrap();
    let single = trainer.step(&answers()[..1]).unwrap();
    assert_eq!(other_prompts(&single), 0.0); // there is no other answer
    let evaluation = trainer.evaluate(&answers()).unwrap();
    assert!(evaluation.kl.unwrap() >= 0.0 && evaluation.auc.unwrap() < 1.0);
    let epochs = EpochConfig {
        epochs: 30,
        ..EpochConfig::default()
    };
    trainer.train(&answers(), &epochs, &mut []).unwrap();
    let after = trainer.evaluate(&answers()).unwrap();
    assert!(after.loss < evaluation.loss && after.auc.unwrap() > evaluation.auc.unwrap());
    assert!(after.desirable.unwrap() > after.undesirable.unwrap());
}

#[test]
fn other_answers_fit_behind_their_new_prompts() {
    let answer = |prompt: &[i64], response: &[i64]| {
        LabelledAnswer::new(Sequence::new(prompt, response), true)
    };
    let answers = unscored(&[answer(&[1, 2, 3], &[4]), answer(&[5], &[6, 7, 8])]);
    let others = mismatched_answers(&answers, Some(5)).unwrap();
    assert_eq!(others[0], Sequence::new([1, 2, 3], [6, 7]));
    assert_eq!(others[1], Sequence::new([5], [4]));
}

#[test]
fn balanced_weights_lift_the_rarer_kind() {
    let weights = |good, bad| {
        let o = KtoObjective::default().balanced(good, bad);
        (o.desirable_weight, o.undesirable_weight)
    };
    assert_eq!(weights(10, 30), (3.0, 1.0));
    assert_eq!(weights(30, 20), (1.0, 1.5));
}

#[test]
fn what_a_loss_cannot_use_is_refused() {
    let refused = |loss, reference: Reference| {
        let made = KtoTrainer::new(Bigram::new(0.0), reference, KtoConfig::of(loss));
        matches!(made, Err(Error::Unusable { .. }))
    };
    assert!(LOSSES.iter().all(|loss| refused(*loss, Reference::Free)));
    assert!(refused(KtoLoss::Kto, Reference::Scored));
    assert!(!refused(SHIFTED, Reference::Scored));
    let config = KtoConfig::of(KtoLoss::ApoZeroUnpaired);
    let mut scored = KtoTrainer::new(Bigram::new(0.0), Reference::Scored, config).unwrap();
    assert!(matches!(
        scored.step(&answers()),
        Err(Error::NotScored { .. })
    ));
    scored.step_scored(&unscored(&answers())).unwrap();
    assert!(scored.step_scored(&[]).is_err());
}

#[test]
fn an_interrupted_run_ends_with_the_same_bytes() {
    for loss in [KtoLoss::Kto, SHIFTED] {
        let dir = tempfile::tempdir().unwrap();
        let mut epochs = EpochConfig {
            epochs: 3,
            batch_size: 4,
            ..EpochConfig::default()
        };
        let mut whole = trainer(loss, 2);
        whole.train(&answers(), &epochs, &mut []).unwrap();
        epochs.checkpoints = Some(CheckpointConfig {
            dir: dir.path().into(),
            every: 2,
            keep: 2,
        });
        let mut kill: Vec<Box<dyn Observer>> =
            vec![Box::new(|event: &Event<'_>| match event.step {
                5 => Err(CoreError::config("kill", 5, "test")),
                _ => Ok(ControlFlow::Continue(())),
            })];
        assert!(
            trainer(loss, 2)
                .train(&answers(), &epochs, &mut kill)
                .is_err()
        );
        let mut resumed = trainer(loss, 2);
        assert_eq!(resumed.train(&answers(), &epochs, &mut []).unwrap(), 9);
        assert_eq!(whole.model().bits(), resumed.model().bits());
    }
}

#[test]
fn comparisons_become_labelled_answers() {
    let pairs = preference_pairs();
    let answers = LabelledAnswer::from_pairs(&pairs);
    assert_eq!(answers.len(), 2 * pairs.len());
    assert!(
        answers
            .chunks(2)
            .all(|two| two[0].desirable && !two[1].desirable)
    );
}
