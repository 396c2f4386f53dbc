//! Values and gradients of TRL.

use super::*;

fn assert_close(what: &str, got: &Tensor, want: &Tensor, tolerance: f64) {
    let bound = want.abs().clamp_min(1.0) * tolerance;
    let excess = ((got - want).abs() - bound).max().double_value(&[]);
    assert!(excess <= 0.0, "{what}: {got:?} is not {want:?}");
}

fn configured(run: &serde_json::Value) -> (DpoLoss, Divergence) {
    let label_smoothing = run["label_smoothing"].as_f64().unwrap_or(0.0);
    let loss = match run["loss_type"].as_str().unwrap() {
        "sigmoid" => DpoLoss::default(),
        "robust" => DpoLoss::Robust { label_smoothing },
        "exo_pair" => DpoLoss::ExoPair { label_smoothing },
        "aot" => DpoLoss::Aot { label_smoothing },
        "aot_unpaired" => DpoLoss::AotUnpaired { label_smoothing },
        "discopop" => DpoLoss::Discopop { temperature: 0.05 },
        "bco_pair" => DpoLoss::BcoPair {
            shift: RewardShift::None,
        },
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
    assert_eq!(checked, 18);
}
