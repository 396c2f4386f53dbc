//! ROUGE against values of the `rouge-score` package, version 0.1.2.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use rlhf_reward::rouge::{Rouge, rouge_l, rouge_n};
use serde_json::Value;

#[test]
fn equals_rouge_score() {
    let case: Value = serde_json::from_str(include_str!("goldens/rouge/case.json")).unwrap();
    let tolerance = case["tolerance"]["abs"].as_f64().unwrap();
    let pairs = case["expect"]["pairs"].as_array().unwrap();
    assert!(!pairs.is_empty());
    for pair in pairs {
        let (target, prediction) = (
            pair["target"].as_str().unwrap(),
            pair["prediction"].as_str().unwrap(),
        );
        for (name, got) in [
            ("rouge1", rouge_n(target, prediction, 1)),
            ("rouge2", rouge_n(target, prediction, 2)),
            ("rougeL", rouge_l(target, prediction)),
        ] {
            let Rouge {
                precision,
                recall,
                f1,
            } = got;
            for (i, value) in [precision, recall, f1].into_iter().enumerate() {
                let want = pair["plain"][name][i].as_f64().unwrap();
                assert!(
                    (value - want).abs() <= tolerance,
                    "{name}[{i}] of {prediction:?} is {value}, not {want}"
                );
            }
        }
    }
}
