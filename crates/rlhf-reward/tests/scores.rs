//! Scores: what they do not depend on, their scale in a model's folder, ensembles, sums.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;
#[path = "../../../tests/goldens/training_case.rs"]
#[allow(dead_code)]
mod training_case;

use std::sync::Arc;

use common::TokenMean;
use rand::Rng;
use rlhf_models::{LoadOptions, SequenceClassifier};
use rlhf_reward::core::{
    Completions, Error as CoreError, Parameters, Preference, PreferenceBatch, RewardModel,
    RngStreams, Scorer, Sequence, SequenceBatch, Text, reward_fn,
};
use rlhf_reward::tch::Tensor;
use rlhf_reward::{
    Combination, Component, Ensemble, HeadEnsemble, Normalized, RewardConfig, RewardSum,
    RewardTrainer,
};
use training_case::model_dir;

fn classifier(name: &str) -> SequenceClassifier {
    SequenceClassifier::from_pretrained(model_dir(name), &LoadOptions::default()).unwrap()
}

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(
        tensor
            .detach()
            .to_kind(rlhf_reward::tch::Kind::Double)
            .reshape([-1]),
    )
    .unwrap()
}

/// Lengths from one token up, prompts that are shared and prompts that are not, ids that include
/// those of padding and end.
fn random_batch(rng: &mut impl Rng, vocabulary: i64) -> Vec<Sequence> {
    let mut tokens = |min: usize, max: usize| -> Vec<i64> {
        let length = rng.random_range(min..=max);
        (0..length)
            .map(|_| rng.random_range(0..vocabulary))
            .collect()
    };
    let prompts: Vec<Arc<[i64]>> = (0..3).map(|_| tokens(1, 12).into()).collect();
    let mut sequences: Vec<_> = (0..6)
        .map(|i| Sequence {
            prompt: Arc::clone(&prompts[i % 3]),
            response: tokens(0, 14),
        })
        .collect();
    sequences.push(Sequence::new(tokens(1, 1), []));
    sequences
}

#[test]
fn a_score_does_not_depend_on_the_rest_of_the_batch() {
    let _no_grad = rlhf_reward::tch::no_grad_guard();
    for name in ["gpt2_rm", "llama_rm", "qwen2_rm"] {
        let model = classifier(name);
        let vocabulary = model.config().vocab_size();
        for case in 0..12 {
            let mut rng = RngStreams::new(5).stream("pooling", case);
            let sequences = random_batch(&mut rng, vocabulary);
            let together = SequenceBatch::new(sequences.clone()).unwrap();
            let together = numbers(&model.scores(&together).unwrap());
            for (row, sequence) in sequences.iter().enumerate() {
                // Alone, and with prompt and response cut elsewhere.
                let whole: Vec<i64> = sequence.tokens().collect();
                for alone in [
                    Sequence::new(sequence.prompt.to_vec(), sequence.response.clone()),
                    Sequence::new(whole, []),
                ] {
                    let alone = SequenceBatch::new(vec![alone]).unwrap();
                    let alone = numbers(&model.scores(&alone).unwrap())[0];
                    let off = (alone - together[row]).abs();
                    assert!(off <= 1e-5, "{name} {case} {row}: off by {off:e}");
                }
            }
        }
    }
}

#[test]
fn the_scale_of_the_scores_is_kept_in_the_model_s_folder() {
    let batch = |ids: &[i64]| {
        let sequences = ids.iter().map(|&i| Sequence::new([i, 2], [3, i])).collect();
        Completions::written(SequenceBatch::new(sequences).unwrap())
    };
    let (calibration, others) = (batch(&[1, 5, 9, 11, 20]), batch(&[4, 8]));
    let model = Normalized::fit(classifier("gpt2_rm"), [&calibration]).unwrap();
    let expected = numbers(&model.score(&others).unwrap());
    let raw = numbers(&model.model().score(&others).unwrap());
    assert_ne!(expected, raw);

    let dir = tempfile::tempdir().unwrap();
    model.model().save_pretrained(dir.path()).unwrap();
    model.normalizer().save(dir.path()).unwrap();
    let loaded = SequenceClassifier::from_pretrained(dir.path(), &LoadOptions::default()).unwrap();
    let loaded = Normalized::from_dir(loaded, dir.path()).unwrap();
    assert_eq!(numbers(&loaded.score(&others).unwrap()), expected);
    // A folder without a scale leaves the scores alone.
    let plain = Normalized::from_dir(classifier("gpt2_rm"), model_dir("gpt2_rm")).unwrap();
    assert_eq!(numbers(&plain.score(&others).unwrap()), raw);
    // The config is as transformers wrote and reads it: the scale is in a file of its own.
    let mut files: Vec<_> = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let expected = ["config.json", "model.safetensors", "score_normalizer.json"];
    assert_eq!(files, expected);
}

#[test]
fn a_frozen_trunk_stays_as_it_is() {
    let mut model = classifier("gpt2_rm");
    let all = model.named_parameters();
    model.train_head_only();
    let head: Vec<_> = model
        .named_parameters()
        .into_iter()
        .map(|(n, _)| n)
        .collect();
    assert_eq!(head, ["score.weight"]);
    let before: Vec<_> = all.iter().map(|(name, t)| (name, t.copy())).collect();
    let mut config = RewardConfig::default();
    config.update.optimizer.lr = 0.01;
    let mut trainer = RewardTrainer::new(model, config).unwrap();
    let pairs = (0..4).map(|i| Preference::new([i, 1], [i, 3], [5, i]));
    let batch = PreferenceBatch::new(pairs.collect()).unwrap();
    let first = trainer.step(&batch).unwrap().get("reward/loss").unwrap();
    for _ in 0..20 {
        trainer.step(&batch).unwrap();
    }
    let last = trainer.step(&batch).unwrap().get("reward/loss").unwrap();
    assert!(last < first - 0.01, "{first} {last}");
    for ((name, before), (_, after)) in before.iter().zip(&all) {
        assert_eq!(before.equal(after), *name != "score.weight", "{name}");
    }
    let mut model = trainer.into_model();
    model.set_trainable(true);
    assert_eq!(model.named_parameters().len(), all.len());
}

fn texts() -> Completions {
    let sequences = (0..3).map(|i| Sequence::new([i], [i])).collect();
    let text = |response: &str| Text {
        prompt: "p".into(),
        response: response.into(),
    };
    Completions::written(SequenceBatch::new(sequences).unwrap())
        .with_texts(vec![text("a"), text("bb"), text("cccc")])
        .unwrap()
}

fn members() -> Vec<Box<dyn RewardModel>> {
    vec![
        Box::new(reward_fn(|_, a| a.len() as f64)),
        Box::new(reward_fn(|_, a| 4.0 - a.len() as f64)),
        Box::new(reward_fn(|_, _| 1.0)),
    ]
}

#[test]
fn ensembles_combine_and_disagree() {
    // Members: 1 2 4 | 3 2 0 | 1 1 1.
    let deviations = [8.0f64 / 9.0, 2.0 / 9.0, 26.0 / 9.0].map(f64::sqrt);
    let means = [5.0 / 3.0, 5.0 / 3.0, 5.0 / 3.0];
    for (combination, expected) in [
        (Combination::Mean, means),
        (Combination::Minimum, [1.0, 1.0, 0.0]),
        (
            Combination::MeanMinusDeviations(2.0),
            [0, 1, 2].map(|i| means[i] - 2.0 * deviations[i]),
        ),
    ] {
        let ensemble = Ensemble::new(members(), combination).unwrap();
        let judged = ensemble.score_with_disagreement(&texts()).unwrap();
        assert_eq!(judged.members.size(), [3, 3]);
        for (got, want) in numbers(&judged.scores).iter().zip(expected) {
            assert!((got - want).abs() < 1e-6, "{combination:?}: {got} {want}");
        }
        for (got, want) in numbers(&judged.disagreement).iter().zip(deviations) {
            assert!((got - want).abs() < 1e-6, "{got} {want}");
        }
        assert!(ensemble.take_report().is_empty());
        let scores = ensemble.score(&texts()).unwrap();
        assert_eq!(numbers(&scores), numbers(&judged.scores));
        let noted = ensemble.take_report().get("disagreement").unwrap();
        assert!((noted - deviations.iter().sum::<f64>() / 3.0).abs() < 1e-6);
        assert!(ensemble.take_report().is_empty());
    }
}

#[test]
fn heads_are_an_ensemble() {
    let completions = texts();
    let heads = HeadEnsemble::new(TokenMean::new(3), Combination::Minimum).unwrap();
    let columns = TokenMean::new(3).scores(&completions.batch).unwrap();
    let judged = heads.score_with_disagreement(&completions).unwrap();
    assert_eq!(numbers(&judged.members), numbers(&columns));
    let least = columns.amin([1i64].as_slice(), false);
    assert_eq!(
        numbers(&heads.score(&completions).unwrap()),
        numbers(&least)
    );
    assert!(!judged.scores.requires_grad());
}

#[test]
fn wrong_ensembles_are_errors() {
    assert!(Ensemble::<Box<dyn RewardModel>>::new(vec![], Combination::Mean).is_err());
    for k in [-1.0, f64::NAN] {
        let combination = Combination::MeanMinusDeviations(k);
        assert!(Ensemble::new(members(), combination).is_err());
        assert!(HeadEnsemble::new(TokenMean::new(2), combination).is_err());
    }
    struct Two;
    impl RewardModel for Two {
        fn score(&self, _: &Completions) -> rlhf_reward::core::Result<Tensor> {
            Ok(Tensor::from_slice(&[1f32, f32::NAN]))
        }
    }
    let wrong = Ensemble::new(vec![Two], Combination::Mean).unwrap();
    assert!(matches!(
        wrong.score(&texts()),
        Err(CoreError::ShapeMismatch { .. })
    ));
    let two = texts().select(&[0, 1]).unwrap();
    assert!(matches!(
        wrong.score(&two),
        Err(CoreError::NonFinite { row: 1, .. })
    ));
}

#[test]
fn sums_weigh_clip_and_report_by_name() {
    let sum = RewardSum::new(vec![
        Component::program("length", |_: &str, a: &str| a.len() as f64).clipped(0.0, 3.0),
        Component::new(
            "panel",
            Ensemble::new(members(), Combination::Minimum).unwrap(),
        )
        .weighted(-2.0),
    ])
    .unwrap();
    let parts = sum.components(&texts()).unwrap();
    assert_eq!((parts[0].0, parts[1].0), ("length", "panel"));
    assert_eq!(numbers(&parts[0].1), [1.0, 2.0, 3.0]);
    assert_eq!(numbers(&sum.score(&texts()).unwrap()), [-1.0, 0.0, 3.0]);
    let report = sum.take_report();
    assert_eq!(report.get("length"), Some(2.0));
    assert!((report.get("panel").unwrap() - 2.0 / 3.0).abs() < 1e-6);
    assert!(report.get("panel/disagreement").unwrap() > 0.0);
    let held = RewardSum::new(vec![Component::program("l", |_: &str, a: &str| {
        a.len() as f64
    })])
    .unwrap()
    .clipped(1.5, 2.5)
    .unwrap();
    assert_eq!(numbers(&held.score(&texts()).unwrap()), [1.5, 2.0, 2.5]);

    let one = || Component::program("x", |_: &str, _: &str| 1.0);
    assert!(RewardSum::new(vec![]).is_err());
    assert!(RewardSum::new(vec![one(), one()]).is_err());
    assert!(RewardSum::new(vec![one().weighted(f64::INFINITY)]).is_err());
    assert!(RewardSum::new(vec![one().clipped(1.0, 0.0)]).is_err());
    let nan = RewardSum::new(vec![Component::program("x", |_: &str, a: &str| {
        if a == "bb" { f64::NAN } else { 0.0 }
    })])
    .unwrap();
    assert!(matches!(
        nan.score(&texts()),
        Err(CoreError::NonFinite { row: 1, .. })
    ));
}
