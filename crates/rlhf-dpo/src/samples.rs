//! What a policy writes: for the KL from its reference, and for people to read.

use std::fmt;
use std::sync::Arc;

use rlhf_core::{
    Completions, Detokenize, Error as CoreError, GenerationConfig, Generator, LogprobOptions,
    Policy, RngStreams,
};
use serde::{Deserialize, Serialize};
use tch::Kind;

use crate::Result;

/// How answers are sampled for an evaluation: the same numbers each time.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct SampleConfig {
    /// How they are written. [`SampledAnswers::kl`] is unbiased at temperature 1 without filters,
    /// which is the default.
    pub generation: GenerationConfig,
    /// Seed of the sampling.
    pub seed: u64,
}

impl SampleConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        Ok(self.generation.validate()?)
    }
}

/// Answers that a policy has written.
#[derive(Debug, Clone)]
pub struct SampledAnswers {
    /// In the order of the prompts.
    pub completions: Completions,
}

/// Samples answers to `prompts`, without gradients.
///
/// # Errors
/// Those of [`Generator`].
pub fn sample_answers(
    policy: &(impl Policy + ?Sized),
    prompts: &[Arc<[i64]>],
    config: &SampleConfig,
) -> Result<SampledAnswers> {
    let generator = Generator::new(policy, &config.generation)?;
    let completions = generator.generate(prompts, &RngStreams::new(config.seed), 0)?;
    Ok(SampledAnswers { completions })
}

impl SampledAnswers {
    /// `KL(π ‖ π_ref)` in nats an answer: the mean over answers of the sum over their tokens of
    /// `log π − log π_ref`, an estimate without bias for answers drawn from `π` itself. It can be
    /// negative by chance.
    ///
    /// # Errors
    /// Those of the reference; answers that were not sampled here.
    pub fn kl(&self, reference: &(impl Policy + ?Sized)) -> Result<f64> {
        let _no_grad = tch::no_grad_guard();
        let Some(logprobs) = &self.completions.policy_logprobs else {
            return Err(CoreError::Empty {
                what: "Completions::policy_logprobs",
                help: "the KL is estimated from answers that the policy has sampled",
            }
            .into());
        };
        let policy: f64 = logprobs.iter().flatten().map(|l| f64::from(*l)).sum();
        let batch = &self.completions.batch;
        let mut under_reference = 0.0;
        for part in batch.split(16)? {
            let scores = reference.logprobs(&part, &LogprobOptions::default())?;
            let sum = scores
                .logprobs
                .f_sum(Kind::Double)
                .map_err(CoreError::from)?;
            under_reference += f64::try_from(sum).map_err(CoreError::from)?;
        }
        Ok((policy - under_reference) / batch.len() as f64)
    }

    /// Mean tokens of an answer.
    pub fn mean_tokens(&self) -> f64 {
        let batch = &self.completions.batch;
        batch.response_tokens() as f64 / batch.len() as f64
    }
}

/// Answers of a model before and after its training, side by side.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerTable {
    /// A row for each prompt.
    pub rows: Vec<AnswerRow>,
}

/// What a model answered.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AnswerRow {
    /// The prompt.
    pub prompt: String,
    /// The answer before.
    pub before: String,
    /// The answer after.
    pub after: String,
}

impl AnswerTable {
    /// The texts of two sets of answers to the same prompts.
    ///
    /// # Errors
    /// Sets of different sizes; those of the detokenizer.
    pub fn new(
        before: &SampledAnswers,
        after: &SampledAnswers,
        detokenizer: &dyn Detokenize,
    ) -> Result<Self> {
        let (before, after) = (&before.completions.batch, &after.completions.batch);
        if before.len() != after.len() {
            return Err(CoreError::LengthMismatch {
                left: "answers before",
                left_len: before.len(),
                right: "answers after",
                right_len: after.len(),
            }
            .into());
        }
        let rows = before.sequences().iter().zip(after.sequences());
        let rows = rows.map(|(before, after)| {
            Ok(AnswerRow {
                prompt: detokenizer.detokenize(&before.prompt)?,
                before: detokenizer.detokenize(&before.response)?,
                after: detokenizer.detokenize(&after.response)?,
            })
        });
        Ok(Self {
            rows: rows.collect::<Result<_>>()?,
        })
    }
}

/// A block for each prompt: line breaks become spaces.
impl fmt::Display for AnswerTable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, row) in self.rows.iter().enumerate() {
            let end = if i == 0 { "" } else { "\n" };
            let flat = |text: &str| text.split_whitespace().collect::<Vec<_>>().join(" ");
            write!(
                f,
                "{end}prompt  {}\nbefore  {}\nafter   {}\n",
                flat(&row.prompt),
                flat(&row.before),
                flat(&row.after)
            )?;
        }
        Ok(())
    }
}
