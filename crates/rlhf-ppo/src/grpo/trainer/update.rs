//! From a rollout to moved weights: the second half of the algorithm.

use rlhf_core::{Error as CoreError, Policy, RngStreams, Stats};
use tch::{Kind, Tensor};

use super::GrpoTrainer;
use crate::grpo::aggregation::{Aggregation, TokenWeightsInput, token_weights};
use crate::grpo::choices::RatioLevel;
use crate::grpo::minibatch::{Counts, GroupMinibatchStats, Measured, microbatch_loss};
use crate::grpo::rollout::{GroupRollout, RowWeights};
use crate::grpo::stats;
use crate::order::{parts, shuffled};
use crate::{Error, Result};

impl<P: Policy> GrpoTrainer<P> {
    /// Trains on a rollout: `num_iterations` passes, each over the prompts in a new order, cut into
    /// `minibatches`.
    ///
    /// Where no answer takes part, the update is skipped: the statistics say so in
    /// `grpo/update_skipped`, and hold nothing about losses.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, and the models' own. The optimiser step in which
    /// that happens changes nothing; those before it stay.
    pub fn update(&mut self, rollout: &GroupRollout) -> Result<Stats> {
        let rng = RngStreams::new(self.config.seed);
        let mut done = Vec::new();
        for iteration in 0..self.config.num_iterations {
            // 6. Every pass visits the prompts in an order of its own.
            let index = self.steps_done * self.config.num_iterations as u64 + iteration as u64;
            let groups = (0..rollout.groups()).collect();
            let order = shuffled(groups, &mut rng.stream("grpo/minibatches", index));
            for groups in parts(&order, self.config.minibatches) {
                done.extend(self.update_minibatch(rollout, groups)?);
            }
        }
        let lr = done.last().map_or_else(|| self.updater.lr(), |m| m.lr);
        let mut stats = stats::rollout_stats(rollout, &self.config, &self.rewards);
        let skipped_by = rollout.skipped_by.as_deref();
        let (costs, multipliers) = (&rollout.costs, &rollout.multipliers);
        let constraints = &mut self.constraints;
        stats.extend(constraints.stats("grpo", costs, skipped_by, multipliers));
        stats.extend(stats::update_stats(rollout, &done, lr));
        for reward in &self.rewards {
            let report = reward.model.take_report().into_iter();
            stats.extend(report.map(|(name, value)| (format!("grpo/judge/{name}"), value)));
        }
        // 8. The prices of the constraints are those of this rollout.
        constraints.go_on_with(multipliers);
        self.steps_done += 1;
        Ok(stats)
    }

    /// One optimiser step on the answers to the prompts `groups` of a rollout. `None`, and no
    /// step, where none of their tokens takes part.
    ///
    /// # Errors
    /// Those of [`update`](Self::update).
    ///
    /// # Panics
    /// If a group is not below the number of prompts.
    pub fn update_minibatch(
        &mut self,
        rollout: &GroupRollout,
        groups: &[usize],
    ) -> Result<Option<GroupMinibatchStats>> {
        // Answers to one prompt are neighbours: in a microbatch they share its forward pass.
        let rows = rollout.used_rows(groups);
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let mask = rollout.mask.index_select(0, &Tensor::from_slice(&index));
        let tokens = mask.sum(Kind::Double).double_value(&[]);
        if tokens == 0.0 {
            return Ok(None);
        }
        // 7. The clipped loss, and the KL's where it is there, aggregated over the whole
        //    minibatch; one step of the optimiser.
        let weights = self.row_weights(rollout, &mask)?;
        let mut weights = weights.as_slice();
        let mut microbatches = Vec::new();
        let config = &self.config;
        for rows in config
            .microbatching()
            .shared(self.updater.replicas(), rows.len())
            .cut(&rollout.completions.batch, &rows)
        {
            let (own, rest) = weights.split_at(rows.len());
            microbatches.push(rollout.microbatch(rows, own)?);
            weights = rest;
        }
        let counts = Counts {
            tokens,
            answers: rows.len() as f64,
        };
        let measured = Measured {
            reference: rollout.ref_logprobs.is_some(),
            sampling: rollout.sampling_logprobs.is_some(),
        };
        let policy = &self.policy;
        let mut parts = Vec::with_capacity(microbatches.len());
        let update = self.updater.update::<Error>(microbatches.len(), |i| {
            let out = microbatch_loss(policy, config, &microbatches[i], counts)?;
            parts.push((out.sums, out.max));
            Ok(out.loss)
        })?;
        let ranks = self.updater.ranks();
        let stats = GroupMinibatchStats::new(&parts, &update, measured, &ranks)?;
        Ok(Some(stats))
    }

    /// What every token counts in the loss, and in the statistics of ratios; `mask`: of the tokens
    /// that take part in a minibatch, a row an answer.
    fn row_weights(&self, rollout: &GroupRollout, mask: &Tensor) -> Result<Vec<RowWeights>> {
        let config = &self.config;
        let input = TokenWeightsInput {
            mask,
            rollout_tokens: rollout.tokens(),
            minibatches: config.minibatches.min(rollout.groups()) as f64,
            max_new_tokens: config.generation.max_new_tokens,
        };
        let ratios = match config.ratio {
            RatioLevel::Token => Aggregation::LocalTokens,
            RatioLevel::SequenceMean | RatioLevel::SequenceProduct => Aggregation::SequenceMean,
        };
        let numbers = |t: &Tensor| Vec::<f64>::try_from(t).map_err(CoreError::from);
        let loss = numbers(&token_weights(config.aggregation, &input)?)?;
        let stat = numbers(&token_weights(ratios, &input)?)?;
        let rows = loss.into_iter().zip(stat);
        Ok(rows.map(|(loss, stat)| RowWeights { loss, stat }).collect())
    }
}
