//! The losses against reference values made by running TRL, and cDPO against its definition.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::HashMap;

use rlhf_dpo::tch::{Kind, Tensor};
use rlhf_dpo::{Divergence, DpoInputs, DpoLoss, dpo_loss};

const CASE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/loss_pairs");

/// Losses over the whole batch rather than over a pair, which [`DpoLoss`] does not have yet.
const BATCHWISE: [&str; 3] = ["aot", "aot_ls0.1", "aot_unpaired"];

struct Pairs(HashMap<String, Tensor>);

impl Pairs {
    fn read() -> Self {
        let tensors = Tensor::read_safetensors(format!("{CASE}/tensors.safetensors")).unwrap();
        Self(tensors.into_iter().collect())
    }

    /// Losses, and the gradients of their sum in both policy log-probs.
    fn run(&self, loss: DpoLoss, divergence: Divergence, beta: f64) -> [Tensor; 3] {
        let leaf = |name: &str| self.0[name].copy().set_requires_grad(true);
        let (chosen, rejected) = (leaf("policy_chosen_logps"), leaf("policy_rejected_logps"));
        let inputs = DpoInputs {
            policy_chosen: &chosen,
            policy_rejected: &rejected,
            ref_chosen: &self.0["ref_chosen_logps"],
            ref_rejected: &self.0["ref_rejected_logps"],
            chosen_lengths: &self.0["chosen_lengths"],
            rejected_lengths: &self.0["rejected_lengths"],
        };
        let out = dpo_loss(inputs, loss, divergence, beta).unwrap();
        out.losses.sum(Kind::Float).backward();
        [out.losses.detach(), chosen.grad(), rejected.grad()]
    }
}

fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let bound = want.abs().clamp_min(1.0) * tolerance;
    let excess = ((got - want).abs() - bound).max().double_value(&[]);
    assert!(excess <= 0.0, "{what}: {got:?} is not {want:?}");
}

fn configured(run: &serde_json::Value) -> (DpoLoss, Divergence) {
    let smoothing = run["label_smoothing"].as_f64().unwrap_or(0.0);
    let loss = match run["loss_type"].as_str().unwrap() {
        "sigmoid" => DpoLoss::default(),
        "robust" => DpoLoss::Robust {
            label_smoothing: smoothing,
        },
        "exo_pair" => DpoLoss::ExoPair {
            label_smoothing: smoothing,
        },
        "discopop" => DpoLoss::Discopop { temperature: 0.05 },
        simple => serde_json::from_value(simple.into()).unwrap(),
    };
    let divergence = match run["f_divergence_type"].as_str() {
        None => Divergence::ReverseKl,
        Some("forward_kl") => Divergence::ForwardKl,
        Some("js_divergence") => Divergence::JensenShannon,
        Some("alpha_divergence") => Divergence::Alpha {
            alpha: run["f_alpha_divergence_coef"].as_f64().unwrap(),
        },
        Some(other) => panic!("unknown divergence {other}"),
    };
    (loss, divergence)
}

#[test]
fn values_and_gradients_are_those_of_trl() {
    let text = std::fs::read_to_string(format!("{CASE}/case.json")).unwrap();
    let case: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tolerance = case["tolerance"]["rel"].as_f64().unwrap();
    let pairs = Pairs::read();
    let mut checked = 0;
    for run in case["params"]["runs"].as_array().unwrap() {
        let key = run["key"].as_str().unwrap();
        if BATCHWISE.contains(&key) {
            continue;
        }
        let (loss, divergence) = configured(run);
        let [losses, chosen, rejected] = pairs.run(loss, divergence, run["beta"].as_f64().unwrap());
        let want = |name: &str| &pairs.0[&format!("{key}/{name}")];
        let check = |name: &str, got: &Tensor| {
            assert_close(&format!("{key}/{name}"), got, want(name), tolerance);
        };
        check("losses", &losses);
        check("grad_policy_chosen", &chosen);
        check("grad_policy_rejected", &rejected);
        let mean = losses.mean(Kind::Double).double_value(&[]);
        let want = run["mean"].as_f64().unwrap();
        assert!(
            (mean - want).abs() <= tolerance * want.abs().max(1.0),
            "{key}"
        );
        checked += 1;
    }
    assert_eq!(checked, 15);
}

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

#[test]
fn rewards_carry_no_gradient_and_are_scaled_logratios() {
    let one = |x: f32| Tensor::from_slice(&[x]);
    let (chosen, rejected) = (one(-2.0).set_requires_grad(true), one(-7.0));
    let inputs = DpoInputs {
        policy_chosen: &chosen,
        policy_rejected: &rejected,
        ref_chosen: &one(-3.0),
        ref_rejected: &one(-5.0),
        chosen_lengths: &Tensor::from_slice(&[2i64]),
        rejected_lengths: &Tensor::from_slice(&[2i64]),
    };
    let out = dpo_loss(inputs, DpoLoss::Hinge, Divergence::ForwardKl, 0.5).unwrap();
    assert!(!out.chosen_rewards.requires_grad());
    assert_eq!(out.chosen_rewards.double_value(&[0]), 0.5);
    assert_eq!(out.rejected_rewards.double_value(&[0]), -1.0);
}

#[test]
fn wrong_parameters_are_errors() {
    let one = Tensor::from_slice(&[1f32]);
    let inputs = DpoInputs {
        policy_chosen: &one,
        policy_rejected: &one,
        ref_chosen: &one,
        ref_rejected: &one,
        chosen_lengths: &one,
        rejected_lengths: &one,
    };
    let fails = |loss, divergence, beta| dpo_loss(inputs, loss, divergence, beta).is_err();
    let plain = (DpoLoss::default(), Divergence::default());
    assert!(!fails(plain.0, plain.1, 0.1));
    assert!(fails(plain.0, plain.1, 0.0));
    assert!(fails(plain.0, plain.1, f64::NAN));
    assert!(fails(plain.0, Divergence::Alpha { alpha: 1.0 }, 0.1));
    let half = 0.5;
    for loss in [
        DpoLoss::Sigmoid {
            label_smoothing: half,
        },
        DpoLoss::Robust {
            label_smoothing: half,
        },
        DpoLoss::ExoPair {
            label_smoothing: 0.0,
        },
        DpoLoss::Discopop { temperature: 0.0 },
    ] {
        assert!(fails(loss, plain.1, 0.1), "{loss:?}");
    }
    let two = Tensor::from_slice(&[1f32, 2.0]);
    let ragged = DpoInputs {
        ref_chosen: &two,
        ..inputs
    };
    assert!(dpo_loss(ragged, plain.0, plain.1, 0.1).is_err());
}
