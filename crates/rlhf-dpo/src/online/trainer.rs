//! Rolling out, ranking, learning.

use std::fs;
use std::path::Path;
use std::sync::Arc;

use rlhf_core::{
    Completions, Detokenize, EpochConfig, EpochTrainer, Error as CoreError, FinishReason,
    GenerationConfig, Generator, Observer, Policy, Preference, PreferenceBatch, Replicas,
    RngStreams, Stats, train_epochs,
};
use serde::{Deserialize, Serialize};

use super::judge::{Judge, Judgement};
use crate::{DpoConfig, DpoTrainer, Error, Reference, Result};

const STATE_FILE: &str = "online.json";

/// How an [`OnlineDpoTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct OnlineDpoConfig {
    /// How the policy learns from a ranking.
    pub dpo: DpoConfig,
    /// How answers are written: at least two to a prompt, of which the best and the worst are
    /// learned from.
    pub generation: GenerationConfig,
    /// Taken from the score of an answer that reached its limit before it ended. Of no use to a
    /// judge that compares, and refused there.
    pub missing_eos_penalty: Option<f64>,
    /// Seed of the sampling.
    pub seed: u64,
}

impl Default for OnlineDpoConfig {
    /// TRL's `OnlineDPOConfig`: learning rate 5e-7, β 0.1, two answers of at most 64 tokens at
    /// temperature 0.9, no penalty.
    fn default() -> Self {
        let mut dpo = DpoConfig::default();
        dpo.update.optimizer.lr = 5e-7;
        let mut generation = GenerationConfig {
            max_new_tokens: 64,
            samples_per_prompt: 2,
            ..GenerationConfig::default()
        };
        generation.sampling.temperature = 0.9;
        Self {
            dpo,
            generation,
            missing_eos_penalty: None,
            seed: 0,
        }
    }
}

impl OnlineDpoConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field; an option that a loss cannot use.
    pub fn validate(&self) -> Result<()> {
        self.dpo.validate()?;
        self.generation.validate()?;
        if self.generation.samples_per_prompt < 2 {
            let (field, value) = ("generation.samples_per_prompt", 1);
            let reason = "at least 2 are needed: one to prefer to the other";
            return Err(CoreError::config(field, value, reason).into());
        }
        match self.missing_eos_penalty {
            Some(penalty) if !penalty.is_finite() => {
                let reason = "a finite number is needed";
                Err(CoreError::config("missing_eos_penalty", penalty, reason).into())
            }
            _ => Ok(()),
        }
    }
}

/// Trains a policy on rankings of its own answers (OAIF, Guo et al. 2024, arXiv 2402.04792): each
/// step samples answers to its prompts, asks a [`Judge`], and makes a step of DPO on the best and
/// the worst of each prompt.
///
/// A resumed run draws the answers that an uninterrupted one does.
pub struct OnlineDpoTrainer<P> {
    trainer: DpoTrainer<P>,
    judge: Judge,
    detokenizer: Option<Box<dyn Detokenize>>,
    config: OnlineDpoConfig,
    /// Answers that were asked for.
    drawn: u64,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    drawn: u64,
}

impl<P: Policy> OnlineDpoTrainer<P> {
    /// A trainer of `model`. A judge that reads texts needs a detokenizer, as do stop strings.
    ///
    /// # Errors
    /// Those of [`OnlineDpoConfig::validate`] and [`DpoTrainer::new`]; [`Error::Unusable`] for a
    /// reference that is not here; a judge that compares without a detokenizer, or with a penalty.
    pub fn new(
        model: P,
        reference: impl Into<Reference>,
        judge: impl Into<Judge>,
        detokenizer: Option<Box<dyn Detokenize>>,
        config: OnlineDpoConfig,
    ) -> Result<Self> {
        config.validate()?;
        let (reference, judge) = (reference.into(), judge.into());
        if matches!(reference, Reference::Scored) {
            return Err(Error::Unusable {
                loss: "online DPO".into(),
                option: "reference (scored in advance)",
                reason: "answers are new at each step, and a reference model must score them",
            });
        }
        if judge.needs_texts() && detokenizer.is_none() {
            let reason = "a judge that compares texts needs one";
            return Err(CoreError::config("detokenizer", "none", reason).into());
        }
        if let (true, Some(penalty)) = (judge.needs_texts(), config.missing_eos_penalty) {
            let reason = "a judge that compares gives no scores to subtract it from";
            return Err(CoreError::config("missing_eos_penalty", penalty, reason).into());
        }
        Ok(Self {
            trainer: DpoTrainer::new(model, reference, config.dpo.clone())?,
            judge,
            detokenizer,
            config,
            drawn: 0,
        })
    }

    /// Answers `prompts`, ranks the answers, and makes one optimiser step.
    ///
    /// Beside the stats of [`DpoTrainer::step`]: `online/scores/mean`, `online/scores/chosen`,
    /// `online/scores/rejected`, `online/pairs`, `online/ties` (prompts whose answers the judge
    /// does not tell apart, which are left out), `online/answer_tokens`, `online/finished` (share
    /// of answers that ended by themselves). A batch of nothing but ties makes no step of DPO, and
    /// has no stats of one.
    ///
    /// # Errors
    /// Those of generation, of the judge and of [`DpoTrainer::step`]. Nothing has changed then.
    pub fn step(&mut self, prompts: &[Arc<[i64]>]) -> Result<Stats> {
        let each = self.config.generation.samples_per_prompt;
        let completions = self.roll_out(prompts)?;
        let penalty = self.config.missing_eos_penalty.unwrap_or(0.0);
        let judgement = self.judge.judge(&completions, each, penalty)?;
        let pairs = preferences(&completions, &judgement);
        let mut stats = match pairs.is_empty() {
            true => Stats::new(),
            false => self.trainer.step(&PreferenceBatch::new(pairs)?)?,
        };
        self.drawn += (prompts.len() * each) as u64;
        add_stats(&mut stats, &completions, &judgement);
        Ok(stats)
    }

    fn roll_out(&self, prompts: &[Arc<[i64]>]) -> Result<Completions> {
        let mut generator = Generator::new(self.trainer.model(), &self.config.generation)?;
        if let Some(detokenizer) = &self.detokenizer {
            generator = generator.with_detokenizer(detokenizer.as_ref());
        }
        let rng = RngStreams::new(self.config.seed);
        let replicas = Replicas::current();
        Ok(generator.generate_shared(&replicas, prompts, &rng, self.drawn)?)
    }

    /// Epochs over `prompts`; see [`train_epochs`] for order, checkpoints, resumption and
    /// observers. Returns the steps done.
    ///
    /// # Errors
    /// Those of [`train_epochs`] and [`step`](Self::step).
    pub fn train(
        &mut self,
        prompts: &[Arc<[i64]>],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        train_epochs(self, prompts, epochs, observers)
    }

    /// What learns from the rankings.
    pub fn trainer(&self) -> &DpoTrainer<P> {
        &self.trainer
    }

    /// The model in training.
    pub fn model(&self) -> &P {
        self.trainer.model()
    }

    /// The model, trained.
    pub fn into_model(self) -> P {
        self.trainer.into_model()
    }

    /// The options this trainer was made with.
    pub fn config(&self) -> &OnlineDpoConfig {
        &self.config
    }

    /// Writes what [`DpoTrainer::save`] does, and how many answers were drawn, into the folder
    /// `dir`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.trainer.save(dir)?;
        let path = dir.join(STATE_FILE);
        let json = serde_json::to_vec(&State { drawn: self.drawn })
            .map_err(|error| CoreError::io("writing", &path)(error.into()))?;
        fs::write(&path, json).map_err(CoreError::io("writing", &path))?;
        Ok(())
    }

    /// Restores bit for bit what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// A missing or damaged file; a file of another model or configuration. Nothing has changed
    /// then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let path = dir.join(STATE_FILE);
        let text = fs::read_to_string(&path).map_err(CoreError::io("reading", &path))?;
        let state: State = serde_json::from_str(&text).map_err(|error| CoreError::Corrupt {
            path: path.clone(),
            reason: error.to_string(),
        })?;
        self.trainer.load(dir)?;
        self.drawn = state.drawn;
        Ok(())
    }
}

impl<P: Policy> EpochTrainer for OnlineDpoTrainer<P> {
    type Item = Arc<[i64]>;
    type Error = Error;
    const PHASE: &'static str = "online_dpo";

    fn step_on(&mut self, prompts: Vec<Arc<[i64]>>) -> Result<Stats> {
        self.step(&prompts)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

fn preferences(completions: &Completions, judgement: &Judgement) -> Vec<Preference> {
    let sequences = completions.batch.sequences();
    let pairs = judgement.extremes.iter().flatten().map(|&[best, worst]| {
        let prompt = sequences[best].prompt.clone();
        let response = |row: usize| sequences[row].response.clone();
        Preference::new(prompt, response(best), response(worst))
    });
    pairs.collect()
}

fn add_stats(stats: &mut Stats, completions: &Completions, judgement: &Judgement) {
    let answers = completions.batch.len() as f64;
    let pairs: Vec<_> = judgement.extremes.iter().flatten().collect();
    let side = |i: usize| {
        pairs
            .iter()
            .map(|pair| judgement.scores[pair[i]])
            .sum::<f64>()
    };
    let stopped = |reason: &&FinishReason| **reason == FinishReason::Stop;
    let finished = completions.finish_reasons.iter().filter(stopped).count();
    let ties = judgement.extremes.len() - pairs.len();
    stats.extend([
        (
            "online/scores/mean",
            judgement.scores.iter().sum::<f64>() / answers,
        ),
        ("online/pairs", pairs.len() as f64),
        ("online/ties", ties as f64),
        (
            "online/answer_tokens",
            completions.batch.response_tokens() as f64 / answers,
        ),
        ("online/finished", finished as f64 / answers),
    ]);
    if !pairs.is_empty() {
        let count = pairs.len() as f64;
        stats.insert("online/scores/chosen", side(0) / count);
        stats.insert("online/scores/rejected", side(1) / count);
    }
}
