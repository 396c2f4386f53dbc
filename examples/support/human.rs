//! How near a summary is to the one that a person wrote for its text.

use std::collections::HashMap;
use std::error::Error;
use std::sync::Arc;

use rlhf::core::{Completions, Error as CoreError, Result, RewardModel, Tensor};
use rlhf::reward::rouge::rouge_l;

use super::task::{Pair, SummaryTask};

/// ROUGE-L to the human summary, in percent.
pub struct NearHuman {
    summaries: HashMap<Arc<[i64]>, String>,
}

impl NearHuman {
    /// Knows the summaries of these texts.
    pub fn new<'a>(
        task: &SummaryTask,
        pairs: impl IntoIterator<Item = &'a Pair>,
    ) -> std::result::Result<Self, Box<dyn Error>> {
        let known = |pair: &Pair| Ok((task.prompt(&pair.text)?, pair.summary.clone()));
        let summaries = pairs.into_iter().map(known);
        Ok(Self {
            summaries: summaries.collect::<std::result::Result<_, Box<dyn Error>>>()?,
        })
    }
}

impl RewardModel for NearHuman {
    fn score(&self, completions: &Completions) -> Result<Tensor> {
        let sequences = completions.batch.sequences().iter();
        let scores = sequences.zip(completions.texts()?).map(|(sequence, text)| {
            let human = self
                .summaries
                .get(&sequence.prompt)
                .ok_or(CoreError::Empty {
                    what: "the human summary of a prompt",
                    help: "NearHuman judges texts that it was made with",
                })?;
            Ok(100.0 * rouge_l(human, text.response.trim()).f1)
        });
        Ok(Tensor::from_slice(&scores.collect::<Result<Vec<f64>>>()?))
    }
}
