//! Training on rankings and on safety labels.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod common;

use common::{TokenMean, VOCAB};
use rlhf_reward::core::{
    Completions, ConstraintModel, EpochConfig, Preference, PreferenceBatch, Sequence, SequenceBatch,
};
use rlhf_reward::tch::Tensor;
use rlhf_reward::{
    CostConfig, CostModel, CostTrainer, Error, LabelProbability, PairwiseTerms, Ranking,
    RankingBatch, RankingConfig, RankingTrainer, RewardConfig, RewardTrainer, SafetyBatch,
    SafetyPair,
};

fn rankings() -> Vec<Ranking> {
    (0..6i64)
        .map(|i| {
            let answers = (0..2 + i % 3).map(|k| vec![(i + 3 * k) % VOCAB, k]);
            let mut ranking = Ranking::best_first([i % VOCAB, 1], answers.collect());
            ranking.weight = 1.0 + (i % 2) as f64;
            ranking
        })
        .collect()
}

fn ranking_trainer(microbatch_size: usize) -> RankingTrainer<TokenMean> {
    let mut config = RankingConfig {
        terms: PairwiseTerms {
            center_coef: 0.05,
            label_smoothing: 0.1,
        },
        microbatch_size,
        ..RankingConfig::default()
    };
    config.update.optimizer.lr = 0.05;
    RankingTrainer::new(TokenMean::new(1), config).unwrap()
}

fn weights(model: &TokenMean) -> Vec<f32> {
    model.0.detach().view(-1).try_into().unwrap()
}

#[test]
fn a_ranking_of_two_is_a_comparison() {
    let pairs: Vec<_> = (0..5i64)
        .map(|i| Preference::new([i], [i + 1], [i + 2, 3]))
        .collect();
    let rankings = pairs
        .iter()
        .map(|p| Ranking::best_first(p.prompt.clone(), vec![p.chosen.clone(), p.rejected.clone()]));
    let ranked = RankingBatch::new(rankings.collect()).unwrap();
    let compared = PreferenceBatch::new(pairs).unwrap();
    let mut config = RewardConfig {
        center_coef: 0.05,
        label_smoothing: 0.1,
        ..RewardConfig::default()
    };
    config.update.optimizer.lr = 0.05;
    let mut of_pairs = RewardTrainer::new(TokenMean::new(1), config).unwrap();
    let mut of_rankings = ranking_trainer(2);
    for _ in 0..3 {
        let (a, b) = (
            of_pairs.step(&compared).unwrap(),
            of_rankings.step(&ranked).unwrap(),
        );
        for name in ["loss", "accuracy", "mean_margin", "grad_norm", "skipped"] {
            let (a, b) = (
                a.get(&format!("reward/{name}")),
                b.get(&format!("ranking/{name}")),
            );
            assert!(
                (a.unwrap() - b.unwrap()).abs() < 1e-6,
                "{name}: {a:?} {b:?}"
            );
        }
    }
    for (a, b) in weights(of_pairs.model())
        .iter()
        .zip(weights(of_rankings.model()))
    {
        assert!((a - b).abs() < 1e-6);
    }
}

#[test]
fn the_loss_is_the_mean_over_all_pairs_of_a_prompt() {
    // The expectation is computed from scores and ranks, not by the code under test.
    let four = Ranking {
        ranks: vec![2, 0, 3, 1],
        ..Ranking::best_first([1], vec![vec![2], vec![3], vec![4], vec![5, 6]])
    };
    let mut trainer = ranking_trainer(1);
    let table = weights(trainer.model());
    let score = |answer: &[i64]| {
        let tokens = [&[1], answer].concat();
        tokens
            .iter()
            .map(|&t| f64::from(table[t as usize]))
            .sum::<f64>()
            / tokens.len() as f64
    };
    let order = [1usize, 3, 0, 2]; // from the best to the worst
    let mut losses = Vec::new();
    for better in 0..4 {
        for worse in better + 1..4 {
            let (c, r) = (
                score(&four.answers[order[better]]),
                score(&four.answers[order[worse]]),
            );
            let (d, sum) = (c - r, c + r);
            losses.push(0.9 * (-d).exp().ln_1p() + 0.1 * d.exp().ln_1p() + 0.05 * sum * sum);
        }
    }
    let expected = losses.iter().sum::<f64>() / 6.0;
    let stats = trainer
        .step(&RankingBatch::new(vec![four]).unwrap())
        .unwrap();
    let loss = stats.get("ranking/loss").unwrap();
    assert_eq!(losses.len(), 6);
    assert!((loss - expected).abs() < 1e-6, "{loss} {expected}");
}

#[test]
fn rankings_may_be_split_and_are_learned() {
    let batch = RankingBatch::new(rankings()).unwrap();
    let (mut whole, mut split) = (ranking_trainer(6), ranking_trainer(1));
    for _ in 0..3 {
        let (a, b) = (whole.step(&batch).unwrap(), split.step(&batch).unwrap());
        for (metric, value) in a.iter() {
            assert!((value - b.get(metric).unwrap()).abs() < 1e-6, "{metric}");
        }
    }
    let report = whole.evaluate(&rankings()).unwrap();
    let stats = whole.step(&batch).unwrap();
    assert!((report.loss - stats.get("ranking/loss").unwrap()).abs() < 1e-6);
    assert_eq!(Some(report.accuracy), stats.get("ranking/accuracy"));
    assert_eq!(report.comparisons, 2 * (1 + 3 + 6));
    let epochs = EpochConfig {
        epochs: 40,
        batch_size: 3,
        ..EpochConfig::default()
    };
    whole.train(&rankings(), &epochs, &mut []).unwrap();
    let after = whole.evaluate(&rankings()).unwrap();
    assert!(after.accuracy > report.accuracy, "{report:?} {after:?}");
}

/// Token 7 is the one that does harm.
fn safety() -> Vec<SafetyPair> {
    (0..6i64)
        .map(|i| SafetyPair {
            prompt: [i % 3].into(),
            safer: if i % 3 == 2 { vec![7, i] } else { vec![i, 3] },
            less_safe: if i % 3 == 1 {
                vec![4, 5, 4]
            } else {
                vec![7, 7]
            },
            safer_is_safe: i % 3 != 2,
            less_safe_is_safe: i % 3 == 1,
        })
        .collect()
}

fn cost_trainer(microbatch_size: usize) -> CostTrainer<TokenMean> {
    let mut config = CostConfig {
        regularization: 0.01,
        microbatch_size,
        ..CostConfig::default()
    };
    config.update.optimizer.lr = 0.05;
    CostTrainer::new(TokenMean::new(1), config).unwrap()
}

#[test]
fn costs_are_learned_with_their_sign() {
    let batch = SafetyBatch::new(safety()).unwrap();
    let (mut whole, mut split) = (cost_trainer(6), cost_trainer(4));
    for _ in 0..3 {
        let (a, b) = (whole.step(&batch).unwrap(), split.step(&batch).unwrap());
        for (metric, value) in a.iter() {
            assert!((value - b.get(metric).unwrap()).abs() < 1e-6, "{metric}");
        }
    }
    let epochs = EpochConfig {
        epochs: 200,
        ..EpochConfig::default()
    };
    whole.train(&safety(), &epochs, &mut []).unwrap();
    let report = whole.evaluate(&safety()).unwrap();
    assert_eq!(
        (report.accuracy, report.sign_accuracy),
        (1.0, 1.0),
        "{report:?}"
    );

    let cost = CostModel(whole.into_model());
    let answers = SequenceBatch::new(vec![Sequence::new([0], [7, 7]), Sequence::new([0], [0, 3])]);
    let costs = cost.cost(&Completions::written(answers.unwrap())).unwrap();
    assert!(costs.double_value(&[0]) > 0.0 && costs.double_value(&[1]) < 0.0);
}

#[test]
fn costs_that_cannot_be_learned_are_errors() {
    let mut two = CostTrainer::new(TokenMean::new(2), CostConfig::default()).unwrap();
    let batch = SafetyBatch::new(safety()).unwrap();
    assert!(matches!(
        two.step(&batch),
        Err(Error::NotAReward {
            objective: "a cost",
            ..
        })
    ));
    let config = CostConfig {
        regularization: -1.0,
        ..CostConfig::default()
    };
    assert!(CostTrainer::new(TokenMean::new(1), config).is_err());
    // A NaN in the costs changes nothing.
    let mut trainer = cost_trainer(2);
    {
        let _no_grad = rlhf_reward::tch::no_grad_guard();
        let _ = trainer.model().0.get(7).fill_(f64::NAN);
    }
    let bits = |t: &CostTrainer<TokenMean>| -> Vec<u32> {
        weights(t.model()).iter().map(|w| w.to_bits()).collect()
    };
    let before = bits(&trainer);
    assert!(matches!(trainer.step(&batch), Err(Error::Scale(_))));
    assert_eq!(before, bits(&trainer));
    assert!(matches!(
        trainer.evaluate(&safety()),
        Err(Error::Core(rlhf_reward::core::Error::NonFinite { .. }))
    ));
}

#[test]
fn a_label_s_probability_is_a_cost() {
    let batch = SequenceBatch::new(vec![Sequence::new([0], [3]), Sequence::new([4], [])]).unwrap();
    let completions = Completions::written(batch.clone());
    let logits = rlhf_reward::core::Scorer::scores(&TokenMean::new(3), &batch).unwrap();
    let logits = Vec::<f32>::try_from(logits.detach().view(-1)).unwrap();
    let costs = LabelProbability::new(TokenMean::new(3), 2)
        .cost(&completions)
        .unwrap();
    for row in 0..2 {
        let exps: Vec<f64> = (0..3)
            .map(|i| f64::from(logits[3 * row + i]).exp())
            .collect();
        let expected = exps[2] / exps.iter().sum::<f64>();
        assert!((costs.double_value(&[row as i64]) - expected).abs() < 1e-6);
    }
    let one = LabelProbability::new(TokenMean::new(1), 0)
        .cost(&completions)
        .unwrap();
    let logit = rlhf_reward::core::Scorer::scores(&TokenMean::new(1), &batch).unwrap();
    let logit = logit.detach().double_value(&[1, 0]);
    assert!((one.double_value(&[1]) - 1.0 / (1.0 + (-logit).exp())).abs() < 1e-6);
    assert!(
        LabelProbability::new(TokenMean::new(3), 3)
            .cost(&completions)
            .is_err()
    );

    let broken = TokenMean::new(2);
    {
        let _no_grad = rlhf_reward::tch::no_grad_guard();
        broken.0.get(4).copy_(&Tensor::from_slice(&[f32::NAN, 0.0]));
    }
    let error = LabelProbability::new(broken, 0)
        .cost(&completions)
        .unwrap_err();
    let wanted = rlhf_reward::core::Error::NonFinite {
        what: "cost",
        row: 1,
        value: f64::NAN,
    };
    assert_eq!(error.to_string(), wanted.to_string());
}
