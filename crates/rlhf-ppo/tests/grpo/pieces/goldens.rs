//! Losses and gradients of TRL.

use super::*;

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
