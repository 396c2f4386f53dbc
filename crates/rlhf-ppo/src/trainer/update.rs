//! From a rollout to moved weights: the second half of the algorithm.

use std::cell::RefCell;
use std::fmt;

use rlhf_core::{Policy, Ranks, RngStreams, SequenceBatch, Stats};
use tch::{Kind, Tensor};

use crate::first_pass::FirstPass;
use crate::learners::Learners;
use crate::minibatch::{Counts, Parts};
use crate::order::{parts, parts_by_weight, shuffled};
use crate::pretraining::ptx_loss;
use crate::rollout::Microbatch;
use crate::{
    Critic, Error, Guarded, KlControl, MinibatchStats, MinibatchUnit, PpoTrainer, PtxStep, Result,
    Rollout, stats,
};

impl<P: Policy, V: Critic<P>> PpoTrainer<P, V> {
    /// Trains on a rollout: `ppo_epochs` passes, each in a new order, cut into `minibatches`.
    ///
    /// Where no sample may be learnt from, the update is skipped: the statistics say so in
    /// `ppo/update_skipped`, and hold nothing about losses.
    ///
    /// # Errors
    /// A loss or gradient that is not finite, and the models' own. The optimiser step in which
    /// that happens changes nothing; those before it stay.
    pub fn update(&mut self, rollout: &Rollout) -> Result<Stats> {
        let rng = RngStreams::new(self.config.seed);
        let mut done: Vec<MinibatchStats> = Vec::new();
        'epochs: for epoch in 0..self.config.ppo_epochs {
            // 6. Every epoch visits the samples that may be learnt from in an order of its own.
            let index = self.steps_done * self.config.ppo_epochs as u64 + epoch as u64;
            let order = shuffled(
                rollout.used_rows(),
                &mut rng.stream("ppo/minibatches", index),
            );
            for rows in self.minibatches(rollout, &order) {
                let Some(minibatch) = self.update_minibatch(rollout, rows)? else {
                    continue;
                };
                done.push(minibatch);
                let ends = |guarded| self.config.guards.ends_update(guarded);
                if minibatch.guarded.is_some_and(ends) {
                    break 'epochs;
                }
            }
        }
        let lr = done.last().map_or_else(|| self.updater.lr(), |m| m.lr);
        let mut stats = stats::rollout_stats(rollout, &self.constraints);
        stats.extend(stats::update_stats(&done, lr));
        if self.config.guards.any() {
            stats.extend(stats::guard_stats(&done, &self.config.guards));
        }
        if let KlControl::Adaptive { target, .. } = self.config.kl_control {
            stats.insert("ppo/kl_target", target);
        }
        let report = self.reward.take_report().into_iter();
        stats.extend(report.map(|(name, value)| (format!("ppo/judge/{name}"), value)));

        // 8. The KL coefficient follows what was measured, per sequence; the scale of the scores
        //    and the prices of the constraints are those of this rollout.
        self.kl.observe(rollout.kl_per_sequence(), rollout.len());
        self.moments = rollout.moments;
        for estimate in &rollout.cost_estimates {
            self.constraints
                .set_multiplier(estimate.constraint, &estimate.multiplier);
        }
        self.steps_done += 1;
        Ok(stats)
    }

    /// Cuts an epoch's samples into those of each optimiser step.
    fn minibatches<'a>(&self, rollout: &Rollout, order: &'a [usize]) -> Vec<&'a [usize]> {
        let count = self.config.minibatches;
        let sequences = rollout.completions.batch.sequences();
        match self.config.minibatch_unit {
            MinibatchUnit::Samples => parts(order, count).collect(),
            MinibatchUnit::Tokens => {
                parts_by_weight(order, count, |row| sequences[row].response.len())
            }
        }
    }

    /// One optimiser step on the samples `rows` of a rollout. `None`, and no step, where they
    /// have no token.
    ///
    /// # Errors
    /// Those of [`update`](Self::update).
    ///
    /// # Panics
    /// If a row is not below the number of samples.
    pub fn update_minibatch(
        &mut self,
        rollout: &Rollout,
        rows: &[usize],
    ) -> Result<Option<MinibatchStats>> {
        // Samples of one prompt are neighbours in the rollout; in a microbatch they share its
        // forward pass.
        let mut rows = rows.to_vec();
        rows.sort_unstable();
        let batch = &rollout.completions.batch;
        let microbatches = self
            .config
            .microbatching()
            .shared(self.updater.replicas(), rows.len())
            .cut(batch, &rows)
            .into_iter()
            .map(|rows| rollout.microbatch(rows))
            .collect::<Result<Vec<_>, _>>()?;
        let counts = Counts::of(&microbatches);
        if counts.tokens == 0.0 {
            return Ok(None);
        }
        let texts = self.pretraining_texts()?;
        let joint = texts.as_ref().filter(|texts| texts.step == PtxStep::Joint);
        // 7. Clipped policy and value losses, as means over the whole minibatch; one step of the
        //    optimiser for all models.
        let mut minibatch = self.take_step(rollout, &microbatches, counts, joint)?;
        if let Some(texts) = texts
            && minibatch.guarded.is_none()
        {
            if texts.step == PtxStep::Separate {
                minibatch.ptx_loss = Some(self.pretraining_step(&texts)?);
            }
            if let Some(pretraining) = &mut self.pretraining {
                pretraining.cursor = texts.after;
            }
        }
        Ok(Some(minibatch))
    }

    fn take_step(
        &mut self,
        rollout: &Rollout,
        microbatches: &[Microbatch],
        counts: Counts,
        texts: Option<&Texts>,
    ) -> Result<MinibatchStats> {
        let config = &self.config;
        let critics = rollout.cost_estimates.iter().filter_map(|estimate| {
            self.constraints.all()[estimate.constraint]
                .critic
                .as_deref()
        });
        let learners = Learners {
            policy: &self.policy,
            critic: &self.value_model,
            cost_critics: critics.collect(),
            config,
            kl_coef: rollout.kl_coef,
            first_pass: FirstPass::take(&rollout.first_pass, rollout.len(), microbatches).into(),
        };
        let lr = self.updater.lr();
        let ranks = self.updater.ranks();
        let parts = RefCell::new(Vec::with_capacity(microbatches.len()));
        let mut ptx = PtxSum::default();
        // Of all processes.
        let mut sum = Parts::default();
        let graphs = learners.graphs();
        let own = graphs.len() * microbatches.len();
        let all = own + texts.map_or(0, |texts| texts.parts.len());
        let loss = |i: usize| -> Result<Tensor, Halt> {
            let Some(microbatch) = microbatches.get(i / graphs.len()) else {
                let part = texts.and_then(|texts| Some((texts, texts.parts.get(i - own)?)));
                let (texts, part) = part.ok_or(Halt::Error(no_microbatch()))?;
                return Ok(ptx.add(&self.policy, texts, part)?);
            };
            let out = learners.loss(microbatch, graphs[i % graphs.len()].clone(), counts)?;
            parts.borrow_mut().push(out.parts);
            Ok(out.loss)
        };
        let update = self.updater.update_if(all, loss, || {
            sum = Parts::sum(&parts.borrow(), &ranks)?;
            match config.guards.look(sum.moved, sum.ratio) {
                Some(guarded) if config.guards.any() => Err(Halt::Guarded(guarded)),
                _ => Ok(()),
            }
        });
        match update {
            Ok(update) => {
                let mut stats = MinibatchStats::new(sum, &update);
                stats.ptx_loss = match texts {
                    Some(_) => ptx.mean(&ranks)?,
                    None => None,
                };
                Ok(stats)
            }
            Err(Halt::Guarded(guarded)) => Ok(MinibatchStats::guarded(sum, lr, guarded)),
            Err(Halt::Error(error)) => Err(error),
        }
    }

    /// The pretraining texts of this step, where the configuration asks for some.
    fn pretraining_texts(&self) -> Result<Option<Texts>> {
        let Some(ptx) = self.config.ptx else {
            return Ok(None);
        };
        let Some(pretraining) = &self.pretraining else {
            let reason = "needs texts: see PpoTrainer::with_pretraining";
            return Err(rlhf_core::Error::config("ptx.coef", ptx.coef, reason).into());
        };
        let (batch, after) = pretraining.next(ptx.batch_size)?;
        let rows: Vec<usize> = (0..batch.len()).collect();
        let microbatching = self.config.microbatching();
        let microbatching = microbatching.shared(self.updater.replicas(), rows.len());
        let cut = microbatching.cut(&batch, &rows);
        let parts = cut.into_iter().map(|rows| batch.select(rows));
        Ok(Some(Texts {
            tokens: batch.response_tokens(),
            parts: parts.collect::<Result<_, _>>()?,
            coef: ptx.coef,
            step: ptx.step,
            after,
        }))
    }

    /// An optimiser step on pretraining texts alone. Returns their cross-entropy.
    fn pretraining_step(&mut self, texts: &Texts) -> Result<f64> {
        let mut ptx = PtxSum::default();
        let policy = &self.policy;
        self.updater.update::<Error>(texts.parts.len(), |i| {
            ptx.add(policy, texts, &texts.parts[i])
        })?;
        Ok(ptx.mean(&self.updater.ranks())?.unwrap_or(0.0))
    }
}

/// Why a step is not taken.
enum Halt {
    Error(Error),
    Guarded(Guarded),
}

impl fmt::Display for Halt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Error(error) => error.fmt(f),
            Self::Guarded(guarded) => write!(f, "guarded: {guarded:?}"),
        }
    }
}

impl<E: Into<Error>> From<E> for Halt {
    fn from(error: E) -> Self {
        Self::Error(error.into())
    }
}

/// Pretraining texts for one step.
struct Texts {
    parts: Vec<SequenceBatch>,
    tokens: usize,
    coef: f64,
    step: PtxStep,
    after: rlhf_core::DataCursor,
}

/// Adds up the cross-entropy of microbatches.
#[derive(Default)]
struct PtxSum(Vec<Tensor>);

impl PtxSum {
    /// The weighted loss of a microbatch.
    fn add(&mut self, policy: &dyn Policy, texts: &Texts, part: &SequenceBatch) -> Result<Tensor> {
        let loss = ptx_loss(policy, part, texts.tokens)?;
        self.0.push(loss.detach().to_kind(Kind::Double));
        Ok(loss * texts.coef)
    }

    /// Of the texts of all processes.
    fn mean(&self, ranks: &Ranks) -> Result<Option<f64>> {
        let own = match self.0.is_empty() {
            true => 0.0,
            false => {
                let sum = Tensor::f_stack(&self.0, 0)?.f_sum(Kind::Double)?;
                f64::try_from(sum).map_err(rlhf_core::Error::from)?
            }
        };
        let sums = ranks.sum::<Error>(Ok(vec![own, self.0.len() as f64]))?;
        Ok((sums[1] > 0.0).then_some(sums[0]))
    }
}

fn no_microbatch() -> Error {
    rlhf_core::Error::Empty {
        what: "the microbatch",
        help: "the updater asked for more than there are",
    }
    .into()
}
