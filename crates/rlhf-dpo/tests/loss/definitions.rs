//! Losses by their definitions, and at their edges.

use super::*;

/// TRL has no cDPO; by its definition it is DPO's expected loss over labels that are flipped
/// with probability ε.
#[test]
fn conservative_dpo_mixes_both_labels() {
    let pairs = Pairs::read();
    let (e, beta) = (0.2, 0.4);
    let smoothed = DpoLoss::Sigmoid { label_smoothing: e };
    let [losses, chosen, rejected] = pairs.run(smoothed, Divergence::ReverseKl, beta);
    let logratio = |side: &str| {
        let policy = &pairs.0[&format!("policy_{side}_logps")];
        Vec::<f64>::try_from(policy - &pairs.0[&format!("ref_{side}_logps")]).unwrap()
    };
    for (i, (c, r)) in logratio("chosen")
        .iter()
        .zip(logratio("rejected"))
        .enumerate()
    {
        let u = beta * (c - r);
        let want = (1.0 - e) * (-u).exp().ln_1p() + e * u.exp().ln_1p();
        let slope = beta * (1.0 / (1.0 + (-u).exp()) - (1.0 - e));
        let at = |t: &Tensor| t.double_value(&[i as i64]);
        assert!((at(&losses) - want).abs() < 1e-5);
        assert!((at(&chosen) - slope).abs() < 1e-5);
        assert!((at(&rejected) + slope).abs() < 1e-5);
    }
}

fn softplus(x: f64) -> f64 {
    x.exp().ln_1p()
}

#[test]
fn what_trl_does_not_have_is_by_definition() {
    // c = 1, r = -2, Δ = 3; 4 tokens and 2.
    let pair = OnePair::new([-2.0, -7.0], [-3.0, -5.0], [4.0, 2.0]);
    let beta = 0.5;
    let close = |got: f64, want: f64| assert!((got - want).abs() < 1e-6, "{got} is not {want}");
    let longer = DpoLoss::RDpo { alpha: 0.25 };
    close(pair.loss(longer, beta, true), softplus(-(1.5 + 0.25 * 2.0)));
    let rpo = DpoLoss::Rpo { alpha: 2.0 };
    close(pair.loss(rpo, beta, true), softplus(-1.5) + 2.0 * 2.0 / 4.0);
    // A shift of 0.3 lowers both rewards, 0.5 and -1.
    let bco = DpoLoss::named("bco_pair_shift").unwrap();
    let mut inputs = pair.inputs(true);
    inputs.means = Some(BatchMeans {
        chosen_tokens: 4.0,
        prompt_and_chosen_tokens: 4.0,
        reward_shift: 0.3,
    });
    let out = dpo_loss(inputs, bco, Divergence::ReverseKl, beta).unwrap();
    close(
        out.losses.double_value(&[0]),
        softplus(-0.2) + softplus(-1.3),
    );
    // Without a reference: averages -0.5 and -3.5.
    let simpo = DpoLoss::SimPo {
        gamma: 0.4,
        label_smoothing: 0.0,
    };
    close(pair.loss(simpo, beta, false), softplus(-(1.5 - 0.4)));
    close(pair.loss(DpoLoss::default(), beta, false), softplus(-2.5));
}

/// A policy that is its reference, or no longer likes what was chosen, has the loss it should.
#[test]
fn equal_and_empty_answers_are_finite() {
    let equal = OnePair::new([-6.0, -6.0], [-4.0, -4.0], [3.0, 3.0]);
    let empty = OnePair::new([0.0, -6.0], [0.0, -4.0], [0.0, 3.0]);
    let nothing = OnePair::new([0.0, 0.0], [0.0, 0.0], [0.0, 0.0]);
    for pair in [equal, empty, nothing] {
        for (name, loss) in DpoLoss::FAMILY {
            let policy = pair.0.each_ref().map(|t| t.copy().set_requires_grad(true));
            let zero = one(0.0);
            let mut inputs = pair.inputs(true);
            inputs.policy_chosen = &policy[0];
            inputs.policy_rejected = &policy[1];
            inputs.prompt = Some(PromptLogprobs {
                logprobs: &zero,
                lengths: &zero,
            });
            let out = dpo_loss(inputs, loss, Divergence::ReverseKl, 0.1).unwrap();
            out.losses.sum(Kind::Float).backward();
            let mut numbers = vec![&out.losses, &out.chosen_rewards, &out.rejected_rewards];
            let gradients = policy.map(|t| t.grad());
            numbers.extend(gradients.iter().filter(|g| g.defined()));
            for number in numbers {
                assert!(number.double_value(&[0]).is_finite(), "{name}");
            }
        }
    }
}

#[test]
fn rewards_carry_no_gradient_and_are_scaled_logratios() {
    let pair = OnePair::new([-2.0, -7.0], [-3.0, -5.0], [2.0, 2.0]);
    let chosen = pair.0[0].copy().set_requires_grad(true);
    let mut inputs = pair.inputs(true);
    inputs.policy_chosen = &chosen;
    let out = dpo_loss(inputs, DpoLoss::Hinge, Divergence::ForwardKl, 0.5).unwrap();
    assert!(!out.chosen_rewards.requires_grad());
    assert_eq!(out.chosen_rewards.double_value(&[0]), 0.5);
    assert_eq!(out.rejected_rewards.double_value(&[0]), -1.0);
}
