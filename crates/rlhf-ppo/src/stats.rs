//! What a step reports.

use rlhf_core::Stats;
use tch::{Kind, Tensor};

use crate::answers::answer_stats;
use crate::{Constraint, MinibatchStats, Rollout};

/// Statistics of a rollout, over all its samples, used or not.
pub(crate) fn rollout_stats(rollout: &Rollout, constraints: &[Constraint]) -> Stats {
    let count = rollout.len() as f64;
    let kl = rollout.kl_per_sequence();
    let final_score = mean(&rollout.final_scores);
    let mut stats: Stats = [
        ("ppo/kl", kl),
        ("ppo/kl_coef", rollout.kl_coef),
        ("ppo/score/mean", mean(&rollout.scores)),
        ("ppo/score/std", variance(&rollout.scores).sqrt()),
        ("ppo/reward/mean", final_score - rollout.kl_coef * kl),
        ("ppo/samples", count),
        ("ppo/samples_used", rollout.used_rows().len() as f64),
    ]
    .into_iter()
    .collect();
    let scores = rollout
        .scores
        .iter::<f64>()
        .map(Iterator::collect::<Vec<f64>>);
    stats.extend(answer_stats(
        "ppo",
        &rollout.completions,
        &scores.unwrap_or_default(),
    ));
    if let Some(explained) = explained_variance(rollout) {
        stats.insert("ppo/value/explained_variance", explained);
    }
    for (constraint, costs) in constraints.iter().zip(&rollout.costs) {
        let over = costs.gt(constraint.threshold).to_kind(Kind::Float);
        let key = |what: &str| format!("ppo/constraint/{}/{what}", constraint.name);
        stats.insert(key("violation_rate"), mean(&over));
        stats.insert(key("mean_cost"), mean(costs));
    }
    stats
}

/// Means over the optimiser steps of an update.
pub(crate) fn update_stats(minibatches: &[MinibatchStats], lr: f64) -> Stats {
    let mut stats = Stats::new();
    stats.insert("ppo/update_skipped", f64::from(minibatches.is_empty()));
    stats.insert("ppo/lr", lr);
    if minibatches.is_empty() {
        return stats;
    }
    let mean = |f: fn(&MinibatchStats) -> f64| {
        minibatches.iter().map(f).sum::<f64>() / minibatches.len() as f64
    };
    stats.extend([
        ("ppo/loss", mean(|m| m.loss)),
        ("ppo/policy/loss", mean(|m| m.policy_loss)),
        ("ppo/policy/approx_kl", mean(|m| m.approx_kl)),
        ("ppo/policy/clipfrac", mean(|m| m.policy_clipfrac)),
        ("ppo/policy/entropy", mean(|m| m.entropy)),
        ("ppo/policy/ratio", mean(|m| m.ratio)),
        ("ppo/policy/ratio_var", mean(|m| m.ratio_var)),
        ("ppo/value/loss", mean(|m| m.value_loss)),
        ("ppo/value/clipfrac", mean(|m| m.value_clipfrac)),
    ]);
    if minibatches.iter().any(|m| m.loss_scale.is_some()) {
        stats.insert("ppo/loss_scale", mean(|m| m.loss_scale.unwrap_or(1.0)));
        stats.insert("ppo/skipped", mean(|m| f64::from(m.skipped)));
    }
    // A skipped step has no norm to speak of.
    let norms = minibatches.iter().filter(|m| !m.skipped);
    let (sum, steps) = norms.fold((0.0, 0.0), |(sum, n), m| (sum + m.grad_norm, n + 1.0));
    if steps > 0.0 {
        stats.insert("ppo/grad_norm", sum / steps);
    }
    stats
}

/// `1 − Var(R − V) / Var(R)` over the states that are learnt from; `None` where all returns are
/// the same, and there is nothing to explain.
fn explained_variance(rollout: &Rollout) -> Option<f64> {
    let used = Tensor::from_slice(&rollout.used).unsqueeze(1);
    let mask = rollout.value_mask.logical_and(&used);
    let returns = rollout.returns.masked_select(&mask);
    let errors = &returns - rollout.values.masked_select(&mask);
    let total = variance(&returns);
    (total > 0.0).then(|| 1.0 - variance(&errors) / total)
}

fn mean(t: &Tensor) -> f64 {
    t.mean(Kind::Double).double_value(&[])
}

/// Population variance; 0 of nothing.
fn variance(t: &Tensor) -> f64 {
    if t.numel() == 0 {
        return 0.0;
    }
    let t = t.to_kind(Kind::Double);
    mean(&(&t - t.mean(Kind::Double)).square())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rlhf_scale::UpdateStats;

    #[test]
    fn a_skipped_step_is_counted_and_leaves_the_norm_alone() {
        let parts = [Tensor::zeros([8], (Kind::Double, tch::Device::Cpu))];
        let step = |grad_norm: f64, loss_scale: Option<f64>| {
            let update = UpdateStats {
                grad_norm,
                skipped: grad_norm.is_infinite(),
                loss_scale,
                ..UpdateStats::default()
            };
            MinibatchStats::new(&parts, &update).unwrap()
        };
        let scale = Some(8.0);
        let steps = [
            step(3.0, scale),
            step(f64::INFINITY, scale),
            step(5.0, Some(4.0)),
        ];
        let stats = update_stats(&steps, 0.1);
        assert_eq!(stats.get("ppo/grad_norm"), Some(4.0));
        assert_eq!(stats.get("ppo/skipped"), Some(1.0 / 3.0));
        assert_eq!(stats.get("ppo/loss_scale"), Some(20.0 / 3.0));
        assert_eq!(update_stats(&steps[1..2], 0.1).get("ppo/grad_norm"), None);
        assert_eq!(
            update_stats(&[step(1.0, None)], 0.1).get("ppo/skipped"),
            None
        );
    }
}
