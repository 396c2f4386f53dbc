//! What a step reports.

use rlhf_core::Stats;
use tch::{Kind, Tensor};

use crate::answers::answer_stats;
use crate::constraints::Constraints;
use crate::{Guarded, MinibatchStats, Rollout, UpdateGuards};

/// Statistics of a rollout, over all its samples, used or not.
pub(crate) fn rollout_stats(rollout: &Rollout, constraints: &Constraints) -> Stats {
    let count = rollout.len() as f64;
    let kl = rollout.kl_per_sequence();
    let tokens = rollout.completions.batch.response_tokens() as f64;
    let final_score = mean(&rollout.final_scores);
    let penalty = match rollout.kl_in_reward {
        true => rollout.kl_coef * kl,
        false => 0.0,
    };
    let mut stats: Stats = [
        ("ppo/kl", kl),
        ("ppo/kl_per_token", kl * count / tokens.max(1.0)),
        ("ppo/kl_coef", rollout.kl_coef),
        ("ppo/score/mean", mean(&rollout.scores)),
        ("ppo/score/std", variance(&rollout.scores).sqrt()),
        ("ppo/reward/mean", final_score - penalty),
        ("ppo/samples", count),
        ("ppo/samples_used", rollout.used_rows().len() as f64),
    ]
    .into_iter()
    .collect();
    let scores = numbers(&rollout.scores);
    stats.extend(answer_stats("ppo", &rollout.completions, &scores));
    if let Some(explained) = explained_variance(rollout) {
        stats.insert("ppo/value/explained_variance", explained);
    }
    if let Some(mismatch) = &rollout.mismatch {
        stats.insert("ppo/mismatch/mean", mismatch.mean);
        stats.insert("ppo/mismatch/max", mismatch.max);
        stats.insert("ppo/mismatch/kl", mismatch.kl);
    }
    if let Some(weights) = &rollout.weights {
        let inside = weights.masked_select(&rollout.mask);
        if inside.numel() > 0 {
            stats.insert("ppo/mismatch/weight", mean(&inside));
        }
    }
    let mut multipliers = vec![None; rollout.costs.len()];
    for estimate in &rollout.cost_estimates {
        multipliers[estimate.constraint] = Some(estimate.multiplier.clone());
    }
    let skipped_by = rollout.skipped_by.as_deref();
    stats.extend(constraints.stats("ppo", &rollout.costs, skipped_by, &multipliers));
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
    let of_some = |f: fn(&MinibatchStats) -> Option<f64>| {
        let values: Vec<f64> = minibatches.iter().filter_map(f).collect();
        (!values.is_empty()).then(|| values.iter().sum::<f64>() / values.len() as f64)
    };
    let nonzero = |x: f64| (x != 0.0).then_some(x);
    stats.extend(
        [
            (
                "ppo/policy/dual_clipfrac",
                nonzero(mean(|m| m.dual_clipfrac)),
            ),
            ("ppo/policy/kl_loss", nonzero(mean(|m| m.kl_loss))),
            ("ppo/value/cost_loss", nonzero(mean(|m| m.cost_value_loss))),
            ("ppo/ptx/loss", of_some(|m| m.ptx_loss)),
        ]
        .into_iter()
        .filter_map(|(name, value)| Some((name, value?))),
    );
    if minibatches.iter().any(|m| m.loss_scale.is_some()) {
        stats.insert("ppo/loss_scale", mean(|m| m.loss_scale.unwrap_or(1.0)));
        stats.insert("ppo/skipped", mean(|m| f64::from(m.skipped)));
    }
    // A skipped step has no norm to speak of.
    let norms = minibatches.iter().filter(|m| m.was_taken());
    let (sum, steps) = norms.fold((0.0, 0.0), |(sum, n), m| (sum + m.grad_norm, n + 1.0));
    if steps > 0.0 {
        stats.insert("ppo/grad_norm", sum / steps);
    }
    stats
}

/// What the guards did.
pub(crate) fn guard_stats(minibatches: &[MinibatchStats], guards: &UpdateGuards) -> Stats {
    let share = |guarded: Guarded| {
        let count = minibatches.iter().filter(|m| m.guarded == Some(guarded));
        count.count() as f64 / minibatches.len().max(1) as f64
    };
    let ends = |m: &MinibatchStats| m.guarded.is_some_and(|g| guards.ends_update(g));
    [
        ("ppo/guard/kl", share(Guarded::Kl)),
        ("ppo/guard/ratio", share(Guarded::Ratio)),
        ("ppo/guard/ended", f64::from(minibatches.iter().any(ends))),
    ]
    .into_iter()
    .collect()
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

/// A vector on the CPU.
fn numbers(t: &Tensor) -> Vec<f64> {
    Vec::<f64>::try_from(t.to_kind(Kind::Double)).unwrap_or_default()
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
    use crate::minibatch::Parts;
    use rlhf_scale::UpdateStats;

    #[test]
    fn a_skipped_step_is_counted_and_leaves_the_norm_alone() {
        let step = |grad_norm: f64, loss_scale: Option<f64>| {
            let update = UpdateStats {
                grad_norm,
                skipped: grad_norm.is_infinite(),
                loss_scale,
                ..UpdateStats::default()
            };
            MinibatchStats::new(Parts::default(), &update)
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
