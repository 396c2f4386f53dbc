//! Training a policy on labelled answers.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Policy, Sequence, Stats, train_epochs,
};
use rlhf_scale::{AdamWConfig, UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use super::examples::{Targets, answer_logprobs, host_logprobs, mismatched_answers};
use super::summary::Summary;
use crate::shift::RunningMean;
use crate::{
    Error, KtoEvaluation, KtoInputs, KtoObjective, KtoOutput, LabelledAnswer, Reference, Result,
    ScoredAnswer, kto_loss, state,
};

/// How a [`KtoTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct KtoConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// What is minimised.
    pub objective: KtoObjective,
    /// Answers that are in memory at once. The result of a step does not depend on it, but for
    /// rounding.
    pub microbatch_size: usize,
}

impl Default for KtoConfig {
    /// TRL's `KTOConfig`: learning rate 1e-6, β 0.1, 8 answers at once. Its schedule is linear; this
    /// one is constant until it is told how many steps there will be.
    fn default() -> Self {
        Self {
            update: UpdateConfig {
                optimizer: AdamWConfig {
                    lr: 1e-6,
                    ..AdamWConfig::default()
                },
                ..UpdateConfig::default()
            },
            objective: KtoObjective::default(),
            microbatch_size: 8,
        }
    }
}

impl KtoConfig {
    /// The default with another objective, or loss.
    pub fn of(objective: impl Into<KtoObjective>) -> Self {
        Self {
            objective: objective.into(),
            ..Self::default()
        }
    }

    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        self.objective.validate()?;
        match self.microbatch_size {
            0 => Err(CoreError::config("microbatch_size", 0, "must be at least 1").into()),
            _ => Ok(()),
        }
    }
}

/// Trains a [`Policy`] on answers that were labelled one by one, held to a [`Reference`].
///
/// What a batch is for KTO's `z` and BCO's running mean is the batch of an optimiser step, however
/// it is split; TRL takes the microbatch.
pub struct KtoTrainer<P> {
    model: P,
    reference: Reference,
    updater: Updater,
    config: KtoConfig,
    shift: RunningMean,
}

impl<P: Policy> KtoTrainer<P> {
    /// A trainer of `model`. The reference is commonly a copy of it, made before the first step,
    /// or the model with its adapters off; it is never changed.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained; [`Error::Unusable`] without a
    /// reference, and for KTO with one that is not here, since `z` needs it at every step.
    pub fn new(model: P, reference: impl Into<Reference>, config: KtoConfig) -> Result<Self> {
        config.validate()?;
        let reference = reference.into();
        let unusable = |reason| {
            Err(Error::Unusable {
                loss: format!("{:?}", config.objective.loss),
                option: "reference",
                reason,
            })
        };
        match reference {
            Reference::Free => {
                return unusable(
                    "it compares log-ratios with fixed numbers, and log-probabilities are far \
                     from all of them; give it a reference model",
                );
            }
            Reference::Scored if config.objective.loss.needs_kl() => {
                return unusable(
                    "its z is estimated on answers that are put together anew for each batch, \
                     which a reference model must score; give it one, or use apo_zero_unpaired",
                );
            }
            _ => {}
        }
        Ok(Self {
            updater: Updater::of(&model, &config.update)?,
            model,
            reference,
            config,
            shift: RunningMean::default(),
        })
    }

    /// One optimiser step on the mean loss of all answers.
    ///
    /// The stats are those of the batch before its update: `kto/loss`, `kto/grad_norm` (before
    /// clipping), `kto/lr`; means over desirable (`chosen`) and undesirable (`rejected`) answers,
    /// `kto/rewards/..` and `kto/logprobs/..`, absent where the batch has none of a kind, and
    /// `kto/rewards/margin` where it has both; `kto/kl` (`z`) and `kto/bco/shift` where the loss
    /// has them; `kto/data/empty`, answers without a token.
    ///
    /// # Errors
    /// No answers; those of both models; a loss or gradient that is not finite. Nothing has
    /// changed then.
    pub fn step(&mut self, answers: &[LabelledAnswer]) -> Result<Stats> {
        let scored = self.score(answers, "step_scored")?;
        self.step_scored(&scored)
    }

    /// [`step`](Self::step) on answers that the reference has scored already.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub fn step_scored(&mut self, answers: &[ScoredAnswer]) -> Result<Stats> {
        let kl = self.kl(answers)?;
        let ranks = self.updater.ranks();
        let replicas = self.updater.replicas();
        let size = replicas.microbatch_size(answers.len(), self.config.microbatch_size);
        let learned = match self.config.objective.loss.has_shift() {
            true => Some(self.shift.with(&[&self.rewards_before(answers)?])?),
            false => None,
        };
        let shift = learned.unwrap_or(self.shift).mean;
        let (model, objective) = (&self.model, &self.config.objective);
        let mut seen = Vec::with_capacity(answers.len().div_ceil(size));
        let parts: Vec<_> = answers.chunks(size).collect();
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let logprobs = answer_logprobs(model, sequences(parts[i]))?;
            let out = judge(objective, &logprobs, parts[i], kl, shift)?;
            seen.push([out.rewards, logprobs.detach()]);
            Ok(out.losses.f_sum(Kind::Float).map_err(CoreError::from)? / answers.len() as f64)
        })?;
        if let (Some(learned), false) = (learned, update.skipped) {
            self.shift = learned;
        }
        let column = |i: usize| -> Result<Vec<f32>> {
            let parts: Vec<_> = seen.iter().map(|part| &part[i]).collect();
            let own = match parts.is_empty() {
                true => None,
                false => Some(Tensor::f_cat(&parts, 0).map_err(CoreError::from)?),
            };
            let whole = ranks.gather_rows::<Error>(Ok(own))?;
            Ok(Vec::<f32>::try_from(whole).map_err(CoreError::from)?)
        };
        let (rewards, logprobs) = (column(0)?, column(1)?);
        let mut stats = Stats::from_iter(update.metrics("kto"));
        let summary = Summary {
            answers,
            rewards: &rewards,
            logprobs: &logprobs,
        };
        summary.add_to(&mut stats);
        if objective.loss.needs_kl() {
            stats.insert("kto/kl", kl);
        }
        if let Some(learned) = learned {
            stats.insert("kto/bco/shift", learned.mean);
        }
        Ok(stats)
    }

    /// Epochs over `answers`; see [`train_epochs`] for order, checkpoints, resumption and
    /// observers. Returns the steps done. The answers are scored once.
    ///
    /// # Errors
    /// Those of [`train_epochs`] and [`step`](Self::step).
    pub fn train(
        &mut self,
        answers: &[LabelledAnswer],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        let scored = self.score(answers, "train_scored")?;
        self.train_scored(&scored, epochs, observers)
    }

    /// [`train`](Self::train) on answers that the reference has scored already.
    ///
    /// # Errors
    /// Those of [`train`](Self::train).
    pub fn train_scored(
        &mut self,
        answers: &[ScoredAnswer],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        train_epochs(self, answers, epochs, observers)
    }

    /// Loss and implicit rewards of `answers`, as one batch.
    ///
    /// # Errors
    /// No answers; a log-probability that is not finite; those of both models.
    pub fn evaluate(&self, answers: &[LabelledAnswer]) -> Result<KtoEvaluation> {
        self.evaluate_scored(&self.score(answers, "evaluate_scored")?)
    }

    /// [`evaluate`](Self::evaluate) on answers that the reference has scored already.
    ///
    /// # Errors
    /// Those of [`evaluate`](Self::evaluate).
    pub fn evaluate_scored(&self, scored: &[ScoredAnswer]) -> Result<KtoEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let kl = self.kl(scored)?;
        let size = self.config.microbatch_size;
        let what = "log-probability of the answer";
        let logprobs = host_logprobs(&self.model, &sequences(scored), size, what)?;
        let objective = &self.config.objective;
        let whole = Tensor::from_slice(&logprobs);
        let out = judge(objective, &whole, scored, kl, self.shift.mean)?;
        let loss = f64::try_from(out.losses.mean(Kind::Double)).map_err(CoreError::from)?;
        let rewards = Vec::<f32>::try_from(&out.rewards).map_err(CoreError::from)?;
        let summary = Summary {
            answers: scored,
            rewards: &rewards,
            logprobs: &logprobs,
        };
        let [desirable, undesirable] = summary.rewards();
        Ok(KtoEvaluation {
            loss,
            kl: objective.loss.needs_kl().then_some(kl),
            desirable,
            undesirable,
            auc: summary.auc(),
            answers: scored.len(),
        })
    }

    /// The model in training.
    pub fn model(&self) -> &P {
        &self.model
    }

    /// The model, trained.
    pub fn into_model(self) -> P {
        self.model
    }

    /// The options this trainer was made with.
    pub fn config(&self) -> &KtoConfig {
        &self.config
    }

    /// The update path: its learning rate, loss scale and averaged weights.
    pub fn updater(&self) -> &Updater {
        &self.updater
    }

    /// Writes weights, optimiser state, step and BCO's running mean into the folder `dir`; the
    /// reference is not written, as it never changes.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.updater.save(dir)?;
        state::save(dir, self.shift, None)
    }

    /// Restores bit for bit what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// A missing or damaged file; a file of another model or configuration. Nothing has changed
    /// then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let loaded = state::load(dir, None)?;
        self.updater.load(dir)?;
        self.shift = loaded.apply()?;
        Ok(())
    }

    /// What the reference thinks of answers.
    fn score(
        &self,
        answers: &[LabelledAnswer],
        instead: &'static str,
    ) -> Result<Vec<ScoredAnswer>> {
        let Some(reference) = self.reference.model() else {
            return Err(Error::NotScored { instead });
        };
        let sequences: Vec<_> = answers.iter().map(|a| a.sequence.clone()).collect();
        let (size, what) = (self.config.microbatch_size, "reference log-probability");
        let scores = host_logprobs(reference, &sequences, size, what)?;
        let scored = |(answer, ref_logprob): (&LabelledAnswer, f32)| ScoredAnswer {
            answer: answer.clone(),
            ref_logprob,
        };
        Ok(answers.iter().zip(scores).map(scored).collect())
    }

    /// `z`: an estimate of how far the policy is from the reference, on answers that neither
    /// label nor prompt speaks for.
    fn kl(&self, answers: &[ScoredAnswer]) -> Result<f64> {
        let needed = self.config.objective.loss.needs_kl();
        let (true, Some(reference)) = (needed, self.reference.model()) else {
            return Ok(0.0);
        };
        let Some(others) = mismatched_answers(answers, self.model.max_length()) else {
            return Ok(0.0);
        };
        let size = self.config.microbatch_size;
        let policy = host_logprobs(&self.model, &others, size, "log-probability")?;
        let reference = host_logprobs(reference, &others, size, "reference log-probability")?;
        let ratios = policy.iter().zip(reference);
        let sum: f64 = ratios.map(|(p, r)| f64::from(*p) - f64::from(r)).sum();
        Ok((sum / others.len() as f64).max(0.0))
    }

    /// Implicit rewards of the batch, which BCO's mean includes before they are judged.
    fn rewards_before(&self, answers: &[ScoredAnswer]) -> Result<Tensor> {
        let (size, what) = (self.config.microbatch_size, "log-probability");
        let logprobs = host_logprobs(&self.model, &sequences(answers), size, what)?;
        let rewards = logprobs.iter().zip(answers);
        let rewards = rewards.map(|(l, a)| (l - a.ref_logprob) * self.config.objective.beta as f32);
        Ok(Tensor::from_slice(&rewards.collect::<Vec<f32>>()))
    }
}

fn sequences(answers: &[ScoredAnswer]) -> Vec<Sequence> {
    answers.iter().map(|a| a.answer.sequence.clone()).collect()
}

fn judge(
    objective: &KtoObjective,
    logprobs: &Tensor,
    answers: &[ScoredAnswer],
    kl: f64,
    reward_shift: f64,
) -> Result<KtoOutput> {
    let targets = Targets::new(answers, logprobs.device());
    let inputs = KtoInputs {
        policy: logprobs,
        reference: &targets.reference,
        desirable: &targets.desirable,
        kl,
        reward_shift,
    };
    kto_loss(inputs, objective)
}

impl<P: Policy> EpochTrainer for KtoTrainer<P> {
    type Item = ScoredAnswer;
    type Error = Error;
    const PHASE: &'static str = "kto";

    fn step_on(&mut self, items: Vec<ScoredAnswer>) -> Result<Stats> {
        self.step_scored(&items)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}
