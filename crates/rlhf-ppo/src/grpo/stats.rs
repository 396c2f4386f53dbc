//! What a step reports.

use rlhf_core::Stats;

use super::config::GrpoConfig;
use super::minibatch::GroupMinibatchStats;
use super::rollout::GroupRollout;
use super::trainer::WeightedReward;
use crate::answers::{answer_stats, mean, variance};

/// Statistics of a rollout, over all its answers, used or not.
pub(super) fn rollout_stats(
    rollout: &GroupRollout,
    config: &GrpoConfig,
    rewards: &[WeightedReward],
) -> Stats {
    // What was said of the answers, weighted, before any penalty.
    let sums: Vec<f64> = (0..rollout.len())
        .map(|row| {
            let columns = rollout.scores.iter().zip(rewards);
            columns
                .filter(|(column, _)| !column[row].is_nan())
                .map(|(column, reward)| column[row] * reward.weight)
                .sum()
        })
        .collect();
    let (groups, count) = (rollout.groups() as f64, rollout.len() as f64);
    let zero = rollout.group_std.iter().filter(|std| **std == 0.0).count();
    let used = rollout.used.iter().filter(|used| **used).count();
    let mut stats = answer_stats("grpo", &rollout.completions, &sums);
    stats.extend([
        ("grpo/score/mean", mean(&sums)),
        ("grpo/score/std", variance(&sums).sqrt()),
        ("grpo/reward/mean", mean(&rollout.rewards)),
        ("grpo/reward/group_std", mean(&rollout.group_std)),
        ("grpo/groups/zero_std", zero as f64 / groups),
        ("grpo/groups/sampled", rollout.prompts.sampled as f64),
        ("grpo/groups/dropped", rollout.prompts.dropped as f64),
        ("grpo/groups/rounds", rollout.prompts.rounds as f64),
        ("grpo/samples", count),
        ("grpo/samples_used", used as f64),
        ("grpo/kl_coef", config.kl.kl_coef()),
    ]);
    if rewards.len() > 1 {
        for (column, reward) in rollout.scores.iter().zip(rewards) {
            let present: Vec<f64> = column.iter().copied().filter(|s| !s.is_nan()).collect();
            if !present.is_empty() {
                stats.insert(format!("grpo/score/{}", reward.name), mean(&present));
            }
        }
    }
    stats
}

/// Means over the optimiser steps of an update.
pub(super) fn update_stats(
    rollout: &GroupRollout,
    minibatches: &[GroupMinibatchStats],
    lr: f64,
) -> Stats {
    let mut stats = Stats::new();
    stats.insert("grpo/update_skipped", f64::from(minibatches.is_empty()));
    stats.insert("grpo/lr", lr);
    if let Some(kl) = rollout.kl_per_sequence() {
        stats.insert("grpo/kl", kl);
    }
    if minibatches.is_empty() {
        return stats;
    }
    let mean = |f: fn(&GroupMinibatchStats) -> f64| {
        minibatches.iter().map(f).sum::<f64>() / minibatches.len() as f64
    };
    stats.extend([
        ("grpo/loss", mean(|m| m.loss)),
        ("grpo/policy/loss", mean(|m| m.policy_loss)),
        ("grpo/policy/kl_in_loss", mean(|m| m.kl_in_loss)),
        ("grpo/policy/approx_kl", mean(|m| m.approx_kl)),
        (
            "grpo/policy/clipfrac",
            mean(|m| m.clipfrac_low + m.clipfrac_high),
        ),
        ("grpo/policy/clipfrac_low", mean(|m| m.clipfrac_low)),
        ("grpo/policy/clipfrac_high", mean(|m| m.clipfrac_high)),
        ("grpo/policy/entropy", mean(|m| m.entropy)),
        ("grpo/policy/ratio", mean(|m| m.ratio)),
        ("grpo/policy/ratio_var", mean(|m| m.ratio_var)),
    ]);
    if let (None, true) = (
        stats.get("grpo/kl"),
        minibatches.iter().all(|m| m.kl.is_some()),
    ) {
        stats.insert("grpo/kl", mean(|m| m.kl.unwrap_or(0.0)));
    }
    let mismatches: Vec<_> = minibatches.iter().filter_map(|m| m.mismatch).collect();
    if let Some(first) = mismatches.first() {
        // Later steps have the same tokens.
        stats.insert("grpo/mismatch/mean", first.mean);
        let max = mismatches.iter().map(|m| m.max).fold(0.0, f64::max);
        stats.insert("grpo/mismatch/max", max);
        stats.insert("grpo/mismatch/weight", first.weight);
    }
    if minibatches.iter().any(|m| m.loss_scale.is_some()) {
        stats.insert("grpo/loss_scale", mean(|m| m.loss_scale.unwrap_or(1.0)));
        stats.insert("grpo/skipped", mean(|m| f64::from(m.skipped)));
    }
    // A skipped step has no norm to speak of.
    let norms = minibatches.iter().filter(|m| !m.skipped);
    let (sum, steps) = norms.fold((0.0, 0.0), |(sum, n), m| (sum + m.grad_norm, n + 1.0));
    if steps > 0.0 {
        stats.insert("grpo/grad_norm", sum / steps);
    }
    stats
}
