//! What holds of every loss.

use super::*;

/// Five answers of one to four tokens, away from the kinks of clipping.
fn random() -> Case {
    let noise = |seed: i64| {
        let i = Tensor::arange(20, (Kind::Double, Device::Cpu)).view([5, 4]);
        ((i + 1.0) * (seed as f64 * 12.9898)).sin() * 0.45
    };
    let lengths = Tensor::from_slice(&[4i64, 1, 3, 2, 4]).unsqueeze(1);
    let mask = Tensor::arange(4, (Kind::Int64, Device::Cpu))
        .unsqueeze(0)
        .lt_tensor(&lengths);
    Case {
        logprobs: (noise(1) - 2.0).set_requires_grad(true),
        old_logprobs: noise(2) - 2.0,
        ref_logprobs: noise(3) - 2.0,
        advantages: Tensor::from_slice(&[0.7, -1.1, 0.4, -0.3, 1.9]),
        mask,
    }
}

fn all_methods() -> Vec<Method> {
    let in_loss = |estimator, weight| KlPenalty::InLoss {
        kl_coef: 0.3,
        estimator,
        weight,
    };
    let penalties = [
        KlPenalty::None,
        in_loss(KlEstimator::K1, KlWeight::Plain),
        in_loss(KlEstimator::K2, KlWeight::Plain),
        in_loss(KlEstimator::K3, KlWeight::Plain),
        in_loss(KlEstimator::K3, KlWeight::Ratio),
    ];
    let objectives = [
        Objective::asymmetric(0.2, 0.28),
        Objective::Surrogate(Clip {
            dual: Some(1.4),
            ..Clip::symmetric(0.2)
        }),
    ];
    let ratios = [
        RatioLevel::Token,
        RatioLevel::SequenceMean,
        RatioLevel::SequenceProduct,
    ];
    let aggregations = [
        Aggregation::SequenceMean,
        Aggregation::LocalTokens,
        Aggregation::GlobalTokens,
        Aggregation::Constant,
    ];
    let mut all = Vec::new();
    for kl in penalties {
        for objective in objectives {
            for ratio in ratios {
                for aggregation in aggregations {
                    all.push(Method {
                        ratio,
                        objective,
                        kl,
                        aggregation,
                    });
                }
            }
        }
    }
    all
}

#[test]
fn gradients_are_those_of_finite_differences() {
    const STEP: f64 = 1e-6;
    for method in all_methods() {
        let mut case = random();
        let gradient = case.gradient(&case.loss(method).loss);
        let start = case.logprobs.detach().copy();
        for i in 0..5 {
            for j in 0..4 {
                let mut loss_at = |shift: f64| {
                    case.logprobs = start.copy();
                    let _ = case.logprobs.get(i).get(j).g_add_scalar_(shift);
                    number(&case.loss(method).loss)
                };
                let slope = (loss_at(STEP) - loss_at(-STEP)) / (2.0 * STEP);
                let got = gradient.double_value(&[i, j]);
                assert!(
                    (got - slope).abs() < 1e-8,
                    "{method:?} at {i}, {j}: {got}, {slope}"
                );
            }
        }
    }
}

#[test]
fn any_split_adds_up_to_the_whole() {
    for method in all_methods() {
        let case = random();
        let whole = case.gradient(&case.loss(method).loss);
        for split in [vec![1, 2, 3, 4], vec![2], vec![3, 4], vec![1, 4]] {
            let ends: Vec<i64> = split.iter().copied().chain([5]).collect();
            let starts = [0].into_iter().chain(split);
            let losses: Vec<Tensor> = starts
                .zip(&ends)
                .map(|(start, end)| case.loss_of(method, start..*end).loss)
                .collect();
            let sum: Tensor = losses.iter().sum();
            let gradient = case.gradient(&sum);
            assert_close("gradient", &gradient, &whole, 1e-12, 1e-12);
        }
    }
}

#[test]
fn what_is_masked_may_be_anything() {
    for method in all_methods() {
        let case = random();
        let outside = case.mask.logical_not();
        let plain = case.gradient(&case.loss(method).loss);
        let fill = |t: &Tensor| t.detach().masked_fill(&outside, f64::NAN);
        let other = Case {
            logprobs: fill(&case.logprobs).set_requires_grad(true),
            old_logprobs: fill(&case.old_logprobs),
            ref_logprobs: fill(&case.ref_logprobs),
            advantages: case.advantages.copy(),
            mask: case.mask.copy(),
        };
        let gradient = other.gradient(&other.loss(method).loss);
        assert_eq!(gradient, plain);
    }
}

#[test]
fn wrong_shapes_and_a_missing_reference_are_errors() {
    let case = random();
    let weights = case.weights(Aggregation::LocalTokens);
    let short = case.advantages.narrow(0, 0, 4);
    let with = |advantages: &Tensor, reference, kl| {
        group_loss(&GroupLossInput {
            logprobs: &case.logprobs,
            old_logprobs: &case.old_logprobs,
            ref_logprobs: reference,
            advantages,
            mask: &case.mask,
            token_weights: &weights,
            importance_weights: None,
            ratio: RatioLevel::Token,
            objective: Objective::symmetric(0.2),
            kl,
        })
        .unwrap_err()
        .to_string()
    };
    let message = with(&short, None, KlPenalty::None);
    assert!(message.contains("advantages is [4]"), "{message}");
    let penalty = KlPenalty::InLoss {
        kl_coef: 0.1,
        estimator: KlEstimator::K3,
        weight: KlWeight::Plain,
    };
    let message = with(&case.advantages, None, penalty);
    assert!(message.contains("reference"), "{message}");
}
