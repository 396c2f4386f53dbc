//! Losses by hand.

use super::*;

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
