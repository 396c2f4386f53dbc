//! Advantages and losses against TRL 1.16, by hand where it has none, and by finite differences.

use rlhf_ppo::tch::{Device, Kind, Tensor};
use rlhf_ppo::{
    AdvantageScale, Aggregation, Baseline, Clip, GroupAdvantagesInput, GroupLoss, GroupLossInput,
    KlEstimator, KlPenalty, KlWeight, Objective, RatioLevel, TokenWeightsInput, group_advantages,
    group_loss, mixed_rewards, token_weights,
};
use serde_json::Value;

use crate::common::{Golden, assert_close, assert_number, number};

/// The scores of a golden's run, a list for each reward, and their weights.
fn scores(run: &Value) -> (Vec<Vec<f64>>, Vec<f64>) {
    let rows: Vec<Vec<Option<f64>>> = serde_json::from_value(run["rewards"].clone()).unwrap();
    let rewards = rows[0].len();
    let column = |i: usize| rows.iter().map(|row| row[i].unwrap_or(f64::NAN)).collect();
    let weights = serde_json::from_value::<Option<Vec<f64>>>(run["reward_weights"].clone());
    let weights = weights.unwrap().unwrap_or_else(|| vec![1.0; rewards]);
    ((0..rewards).map(column).collect(), weights)
}

fn advantages_of(
    rewards: &[f64],
    counted: &[bool],
    baseline: Baseline,
    scale: AdvantageScale,
) -> Tensor {
    let input = GroupAdvantagesInput {
        rewards,
        counted,
        group_size: 4,
        baseline,
        scale,
    };
    Tensor::from_slice(&group_advantages(&input).unwrap().advantages)
}

#[test]
fn advantages_as_trl_has_them() {
    let golden = Golden::load("grpo/advantages");
    let runs = golden.json["params"]["runs"].as_object().unwrap();
    let mut compared = 0;
    for (name, run) in runs {
        // normalize_then_sum is the trainer's; see trainer.rs.
        let Some(scale) = run["scale_rewards"].as_str() else {
            continue;
        };
        let scale: AdvantageScale = serde_json::from_value(scale.into()).unwrap();
        let (scores, weights) = scores(run);
        let mixed = mixed_rewards(&scores, &weights).unwrap();
        let got = advantages_of(&mixed.rewards, &mixed.counted, Baseline::GroupMean, scale);
        golden.close(name, &got, &golden.tensor(&format!("{name}/advantages")));
        compared += 1;
    }
    assert_eq!(compared, 5);
}

#[test]
fn leave_one_out_as_trl_has_it() {
    let golden = Golden::load("grpo/rloo_advantages");
    let kl = Vec::<f64>::try_from(golden.tensor("sequence_kl")).unwrap();
    for (name, run) in golden.json["params"]["runs"].as_object().unwrap() {
        let (scores, weights) = scores(run);
        let mut mixed = mixed_rewards(&scores, &weights).unwrap();
        if let Some(range) = run["reward_clip_range"].as_array() {
            let (low, high) = (range[0].as_f64().unwrap(), range[1].as_f64().unwrap());
            mixed
                .rewards
                .iter_mut()
                .for_each(|r| *r = r.clamp(low, high));
        }
        let beta = run["beta"].as_f64().unwrap();
        for (reward, kl) in mixed.rewards.iter_mut().zip(&kl) {
            *reward -= beta * kl;
        }
        let scale = match run["normalize_advantages"].as_bool() {
            Some(true) => AdvantageScale::Whitened,
            _ => AdvantageScale::None,
        };
        let got = advantages_of(&mixed.rewards, &mixed.counted, Baseline::LeaveOneOut, scale);
        golden.close(name, &got, &golden.tensor(&format!("{name}/advantages")));
    }
}

/// What a loss reads, from a golden or made up.
struct Case {
    logprobs: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
}

/// How the loss is made.
#[derive(Clone, Copy, Debug)]
struct Method {
    ratio: RatioLevel,
    objective: Objective,
    kl: KlPenalty,
    aggregation: Aggregation,
}

const BUDGET: usize = 12;

impl Case {
    fn weights(&self, aggregation: Aggregation) -> Tensor {
        let tokens = self.mask.sum(Kind::Double).double_value(&[]);
        let input = TokenWeightsInput {
            mask: &self.mask,
            rollout_tokens: tokens,
            minibatches: 1.0,
            max_new_tokens: BUDGET,
        };
        token_weights(aggregation, &input).unwrap()
    }

    /// The loss of these rows, with the weights that they have in the whole.
    fn loss_of(&self, method: Method, rows: std::ops::Range<i64>) -> GroupLoss {
        let cut = |t: &Tensor| t.slice(0, rows.start, rows.end, 1);
        let weights = self
            .weights(method.aggregation)
            .to_kind(self.logprobs.kind());
        group_loss(&GroupLossInput {
            logprobs: &cut(&self.logprobs),
            old_logprobs: &cut(&self.old_logprobs),
            ref_logprobs: Some(&cut(&self.ref_logprobs)),
            advantages: &cut(&self.advantages),
            mask: &cut(&self.mask),
            token_weights: &cut(&weights),
            importance_weights: None,
            ratio: method.ratio,
            objective: method.objective,
            kl: method.kl,
        })
        .unwrap()
    }

    fn loss(&self, method: Method) -> GroupLoss {
        self.loss_of(method, 0..self.mask.size()[0])
    }

    fn gradient(&self, loss: &Tensor) -> Tensor {
        loss.backward();
        let gradient = self.logprobs.grad().copy();
        let _ = self.logprobs.grad().zero_();
        gradient
    }
}

fn method_of(run: &Value) -> Method {
    let float = |name: &str| run[name].as_f64();
    let low = float("epsilon").unwrap_or(0.2);
    let beta = float("beta").unwrap_or(0.0);
    Method {
        ratio: match run["importance_sampling_level"].as_str() {
            Some("sequence") => RatioLevel::SequenceMean,
            _ => RatioLevel::Token,
        },
        objective: Objective::Surrogate(Clip {
            low,
            high: float("epsilon_high").unwrap_or(low),
            dual: float("delta"),
        }),
        kl: match beta > 0.0 {
            true => KlPenalty::InLoss {
                kl_coef: beta,
                estimator: KlEstimator::K3,
                weight: match run["use_bias_correction_kl"].as_bool() {
                    Some(false) => KlWeight::Plain,
                    _ => KlWeight::Ratio,
                },
            },
            false => KlPenalty::None,
        },
        aggregation: match run["loss_type"].as_str() {
            Some("grpo") => Aggregation::SequenceMean,
            Some("bnpo") => Aggregation::LocalTokens,
            Some("dr_grpo") => Aggregation::Constant,
            Some("dapo") => Aggregation::GlobalTokens,
            other => panic!("loss type {other:?}"),
        },
    }
}

/// The clip fractions of TRL's log: over tokens, or over answers.
fn clip_ratios(out: &GroupLoss, method: Method, mask: &Tensor) -> [(&'static str, f64); 5] {
    let float = |t: &Tensor| t.to_kind(Kind::Double) * mask;
    let lengths = mask.sum_dim_intlist([1i64].as_slice(), false, Kind::Double);
    let by_answer =
        |t: &Tensor| float(t).sum_dim_intlist([1i64].as_slice(), false, Kind::Double) / &lengths;
    let mean = |t: &Tensor| match method.ratio {
        RatioLevel::Token => number(&(float(t).sum(Kind::Double) / lengths.sum(Kind::Double))),
        _ => number(&by_answer(t).mean(Kind::Double)),
    };
    let region = out.clipped_low.logical_or(&out.clipped_high);
    [
        ("clip_ratio/low_mean", mean(&out.clipped_low)),
        ("clip_ratio/high_mean", mean(&out.clipped_high)),
        ("clip_ratio/region_mean", mean(&region)),
        (
            "clip_ratio/low_min",
            number(&by_answer(&out.clipped_low).min()),
        ),
        (
            "clip_ratio/high_max",
            number(&by_answer(&out.clipped_high).max()),
        ),
    ]
}

#[test]
fn losses_and_gradients_as_trl_has_them() {
    let golden = Golden::load("grpo/loss");
    let case = Case {
        logprobs: golden.tensor("logps").set_requires_grad(true),
        old_logprobs: golden.tensor("old_logps"),
        ref_logprobs: golden.tensor("ref_logps"),
        advantages: golden.tensor("advantages"),
        mask: golden.tensor("completion_mask").eq(1),
    };
    let (abs, rel) = (golden.tolerance("abs"), golden.tolerance("rel"));
    for (name, run) in golden.json["params"]["runs"].as_object().unwrap() {
        let method = method_of(run);
        let out = case.loss(method);
        let want = &golden.json["expect"][name];
        let check = |what: &str, got| {
            let want = want[what].as_f64().unwrap();
            assert_number(&format!("{what} of {name}"), got, want, abs, rel);
        };
        check("loss", number(&out.loss.to_kind(Kind::Double)));
        for (what, got) in clip_ratios(&out, method, &case.mask) {
            check(what, got);
        }
        if let Some(kl) = &out.kl {
            let tokens = case.mask.sum(Kind::Double);
            check("kl", number(&(kl.sum(Kind::Double) / tokens)));
        }
        let gradient = case.gradient(&out.loss);
        golden.close(
            name,
            &gradient,
            &golden.tensor(&format!("{name}/grad_logps")),
        );
    }
}

#[test]
fn the_loss_of_rloo_as_trl_has_it() {
    let golden = Golden::load("grpo/rloo_loss");
    let logprobs = golden.tensor("logps");
    let mask = golden.tensor("completion_mask").eq(1);
    // TRL keeps the old sums only: any split over the tokens gives the same ratio.
    let lengths = mask.sum_dim_intlist([1i64].as_slice(), true, Kind::Float);
    let old = golden.tensor("old_sequence_logps").unsqueeze(1) / lengths;
    let case = Case {
        old_logprobs: old.expand_as(&logprobs),
        ref_logprobs: logprobs.copy(),
        logprobs: logprobs.set_requires_grad(true),
        advantages: golden.tensor("advantages"),
        mask,
    };
    for (name, run) in golden.json["params"]["runs"].as_object().unwrap() {
        let low = run["epsilon"].as_f64().unwrap();
        let method = Method {
            ratio: RatioLevel::SequenceProduct,
            objective: Objective::asymmetric(low, run["epsilon_high"].as_f64().unwrap_or(low)),
            kl: KlPenalty::None,
            aggregation: Aggregation::SequenceMean,
        };
        let out = case.loss(method);
        let want = &golden.json["expect"][name];
        for (what, got) in clip_ratios(&out, method, &case.mask) {
            assert_number(what, got, want[what].as_f64().unwrap(), 1e-6, 0.0);
        }
        let loss = want["loss"].as_f64().unwrap();
        assert_number(name, number(&out.loss), loss, 1e-5, 1e-5);
        let gradient = case.gradient(&out.loss);
        golden.close(
            name,
            &gradient,
            &golden.tensor(&format!("{name}/grad_logps")),
        );
    }
}

/// Two answers, of two tokens and one; what is masked is NaN.
fn by_hand() -> Case {
    let ln = f64::ln;
    Case {
        logprobs: Tensor::from_slice2(&[[-1.0 + ln(2.0), -1.0], [-1.0 + ln(0.5), f64::NAN]])
            .set_requires_grad(true),
        old_logprobs: Tensor::from_slice2(&[[-1.0, -1.0], [-1.0, f64::NAN]]),
        ref_logprobs: Tensor::from_slice2(&[[-1.0, -1.0], [-1.0, f64::NAN]]),
        advantages: Tensor::from_slice(&[1.0, -2.0]),
        mask: Tensor::from_slice2(&[[true, true], [true, false]]),
    }
}

fn check_by_hand(method: Method, loss: f64, gradient: [f64; 4]) {
    let case = by_hand();
    let out = case.loss(method);
    // The weights are f32.
    assert_number("loss", number(&out.loss), loss, 1e-7, 1e-7);
    let got = case.gradient(&out.loss);
    let want = Tensor::from_slice(&gradient).view([2, 2]);
    assert_close("gradient", &got, &want, 1e-7, 1e-7);
}

#[test]
fn dr_grpo_by_hand() {
    // Ratios 2 (A > 0: clipped at 1.2), 1, 0.5 (A < 0: clipped at 0.8), over 2 · 12 tokens.
    let method = Method {
        ratio: RatioLevel::Token,
        objective: Objective::symmetric(0.2),
        kl: KlPenalty::None,
        aggregation: Aggregation::Constant,
    };
    check_by_hand(
        method,
        (-1.2 - 1.0 + 1.6) / 24.0,
        [0.0, -1.0 / 24.0, 0.0, 0.0],
    );
}

#[test]
fn gspo_by_hand() {
    // Geometric means √2 and 0.5; wide ranges, so that neither is clipped. The gradient of an
    // answer's ratio reaches each of its tokens by 1/length.
    let method = Method {
        ratio: RatioLevel::SequenceMean,
        objective: Objective::symmetric(0.9),
        kl: KlPenalty::None,
        aggregation: Aggregation::SequenceMean,
    };
    let root = 2f64.sqrt();
    check_by_hand(
        method,
        (-root + 1.0) / 2.0,
        [-root / 4.0, -root / 4.0, 0.5, 0.0],
    );
    // Both clipped: no gradient.
    let narrow = Method {
        objective: Objective::symmetric(0.2),
        ..method
    };
    check_by_hand(narrow, (-1.2 + 1.6) / 2.0, [0.0; 4]);
}

#[test]
fn cispo_by_hand() {
    // −sg(min(ρ, 1.5))·A·logprob over 3 tokens: every token has a gradient, clipped or not.
    let method = Method {
        ratio: RatioLevel::Token,
        objective: Objective::DetachedWeight {
            low: 1.0,
            high: 0.5,
        },
        kl: KlPenalty::None,
        aggregation: Aggregation::LocalTokens,
    };
    let (two, half) = (-1.0 + 2f64.ln(), -1.0 + 0.5f64.ln());
    let loss = (-1.5 * two + 1.0 + 0.5 * 2.0 * half) / 3.0;
    check_by_hand(method, loss, [-0.5, -1.0 / 3.0, 1.0 / 3.0, 0.0]);
}

#[test]
fn a_dual_clip_bounds_the_loss_of_bad_answers() {
    let mut case = by_hand();
    case.advantages = Tensor::from_slice(&[-1.0, -2.0]);
    let loss = |dual| {
        let clip = Clip {
            dual,
            ..Clip::symmetric(0.2)
        };
        let out = case.loss(Method {
            ratio: RatioLevel::Token,
            objective: Objective::Surrogate(clip),
            kl: KlPenalty::None,
            aggregation: Aggregation::LocalTokens,
        });
        number(&out.loss)
    };
    assert_number("without", loss(None), (2.0 + 1.0 + 1.6) / 3.0, 1e-7, 0.0);
    assert_number("with", loss(Some(1.5)), (1.5 + 1.0 + 1.6) / 3.0, 1e-7, 0.0);
}

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
