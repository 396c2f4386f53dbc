//! How a policy does on comparisons that it has not learned from.

use std::fmt;

use rlhf_core::{Error as CoreError, Policy, Preference, Stats};
use serde::{Deserialize, Serialize};
use tch::Tensor;

use crate::metrics::means;
use crate::pair_scores::{PairScores, PairTargets};
use crate::summary::Judged;
use crate::trainer::means_of;
use crate::{
    DpoTrainer, Reference, Result, SampleConfig, ScoredPreference, reward_metrics, sample_answers,
};

/// How a policy's implicit rewards agree with comparisons.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DpoEvaluation {
    /// Weighted mean of the loss that is trained on. Losses that sort do so over all pairs here.
    pub loss: f64,
    /// Share of pairs whose chosen implicit reward is strictly above the rejected one.
    pub accuracy: f64,
    /// Mean of chosen minus rejected implicit reward.
    pub margin: f64,
    /// Mean implicit reward of the chosen answers.
    pub chosen: f64,
    /// Mean implicit reward of the rejected answers.
    pub rejected: f64,
    /// Mean log-probability of the chosen answers.
    pub chosen_logprob: f64,
    /// Mean log-probability of the rejected answers.
    pub rejected_logprob: f64,
    /// Number of pairs.
    pub pairs: usize,
}

impl DpoEvaluation {
    /// The numbers under `prefix`, named as those of [`DpoTrainer::step`].
    pub fn metrics(&self, prefix: &str) -> Stats {
        [
            ("loss", self.loss),
            ("rewards/accuracy", self.accuracy),
            ("rewards/margin", self.margin),
            ("rewards/chosen", self.chosen),
            ("rewards/rejected", self.rejected),
            ("logprobs/chosen", self.chosen_logprob),
            ("logprobs/rejected", self.rejected_logprob),
        ]
        .into_iter()
        .map(|(name, value)| (format!("{prefix}/{name}"), value))
        .collect()
    }
}

impl fmt::Display for DpoEvaluation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "loss {:.4}, accuracy {:.1}%, margin {:.3} (rewards {:.3} and {:.3}) over {} pairs",
            self.loss,
            100.0 * self.accuracy,
            self.margin,
            self.chosen,
            self.rejected,
            self.pairs
        )
    }
}

/// What training is interrupted for now and then.
pub(crate) struct Heldout {
    pairs: Vec<Preference>,
    /// The same under a reference that does not change.
    scored: Option<Vec<ScoredPreference>>,
    every: u64,
    samples: Option<SampleConfig>,
}

impl<P: Policy> DpoTrainer<P> {
    /// Loss and implicit rewards of `pairs`.
    ///
    /// # Errors
    /// No pairs; a log-probability that is not finite; those of both models.
    pub fn evaluate(&self, pairs: &[Preference]) -> Result<DpoEvaluation> {
        self.evaluate_scored(&self.score(pairs, "evaluate_scored")?)
    }

    /// [`evaluate`](Self::evaluate) on pairs that the reference has scored already.
    ///
    /// # Errors
    /// Those of [`evaluate`](Self::evaluate).
    pub fn evaluate_scored(&self, pairs: &[ScoredPreference]) -> Result<DpoEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let weights = pairs.iter().map(|p| p.pair.weight);
        let total = self.config.check_weights(weights)?;
        let scores = PairScores::cat(&self.scores_without_gradients(pairs)?)?;
        check_finite(&scores.chosen, &scores.rejected)?;
        let device = scores.chosen.device();
        let targets = PairTargets::new(pairs, self.reference.is_there(), device);
        let (objective, means_of_pairs) = (&self.config.objective, means_of(pairs, total));
        let seen = (self.shift, false);
        let judged = Judged::new(&scores, &targets, objective, means_of_pairs, seen)?;
        let loss = f64::try_from(judged.total(total)?).map_err(CoreError::from)?;
        let rewards = reward_metrics(&judged.chosen_rewards, &judged.rejected_rewards)?;
        let [chosen, rejected] = means([&judged.chosen_logprobs, &judged.rejected_logprobs])?;
        Ok(DpoEvaluation {
            loss,
            accuracy: rewards.accuracy,
            margin: rewards.margin,
            chosen: rewards.chosen,
            rejected: rewards.rejected,
            chosen_logprob: chosen,
            rejected_logprob: rejected,
            pairs: pairs.len(),
        })
    }

    /// Evaluates on `pairs` after every `every` steps of [`train`](Self::train): `dpo/eval/..` in
    /// the stats of those steps. With `samples` the policy also answers their prompts, and
    /// `dpo/eval/kl` estimates how far it has gone from the reference, in nats an answer.
    /// Training goes on as it would without.
    ///
    /// # Errors
    /// `every` of 0; no pairs; [`Error::NotScored`](crate::Error::NotScored) for
    /// [`Reference::Scored`]; an invalid configuration; samples without a reference; those of the
    /// reference.
    pub fn hold_out(
        &mut self,
        pairs: &[Preference],
        every: u64,
        samples: Option<SampleConfig>,
    ) -> Result<()> {
        if every == 0 {
            return Err(CoreError::config("every", 0, "must be at least 1").into());
        }
        if let Some(samples) = &samples {
            samples.validate()?;
            if matches!(self.reference, Reference::Free) {
                let reason = "a KL needs a reference; give none, or train with one";
                return Err(CoreError::config("samples", "given", reason).into());
            }
        }
        let scored = self.score(pairs, "evaluate_scored")?;
        self.heldout = Some(Heldout {
            pairs: pairs.to_vec(),
            scored: self.config.sync.is_none().then_some(scored),
            every,
            samples,
        });
        Ok(())
    }

    pub(crate) fn add_heldout(&self, stats: &mut Stats) -> Result<()> {
        let Some(heldout) = &self.heldout else {
            return Ok(());
        };
        let step = self.updater.step();
        if !step.is_multiple_of(heldout.every) {
            return Ok(());
        }
        let evaluation = match &heldout.scored {
            Some(scored) => self.evaluate_scored(scored)?,
            None => self.evaluate(&heldout.pairs)?,
        };
        stats.extend(evaluation.metrics("dpo/eval"));
        if let Some(config) = &heldout.samples {
            let prompts: Vec<_> = heldout.pairs.iter().map(|p| p.prompt.clone()).collect();
            let answers = sample_answers(&self.model, &prompts, config)?;
            if let Some(reference) = self.reference.model() {
                stats.insert("dpo/eval/kl", answers.kl(reference)?);
            }
            stats.insert("dpo/eval/answer_tokens", answers.mean_tokens());
        }
        Ok(())
    }
}

fn check_finite(chosen: &Tensor, rejected: &Tensor) -> Result<()> {
    crate::reference::host(chosen, "log-probability of the chosen response", 0, 1)?;
    crate::reference::host(rejected, "log-probability of the rejected response", 0, 1)?;
    Ok(())
}
