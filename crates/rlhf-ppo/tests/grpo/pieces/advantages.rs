//! Advantages against reference values.

use super::*;

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
