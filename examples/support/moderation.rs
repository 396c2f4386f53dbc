//! A house style for summaries, and people who say where it is broken.
#![allow(unreachable_pub)]

use std::collections::HashSet;

use rlhf::core::{Completions, ConstraintModel, Result, Scorer, Sequence, SequenceBatch, Tensor};
use rlhf::reward::LabelProbability;

use crate::support::task::{CUE, INSTRUCTION};

/// Words that advertise. The moderators of this example go by them; the cost model never sees the
/// list, only their verdicts.
const ADVERTISING: [&str; 46] = [
    "advanced",
    "beautiful",
    "best",
    "better",
    "clean",
    "complete",
    "comprehensive",
    "convenient",
    "easily",
    "easy",
    "efficient",
    "elegant",
    "extensible",
    "extensive",
    "fast",
    "faster",
    "flexible",
    "free",
    "friendly",
    "full",
    "great",
    "high",
    "intuitive",
    "light",
    "lightweight",
    "minimalist",
    "modern",
    "nice",
    "performance",
    "popular",
    "portable",
    "powerful",
    "pretty",
    "quick",
    "quickly",
    "rich",
    "robust",
    "scalable",
    "simple",
    "simply",
    "small",
    "smart",
    "sophisticated",
    "tiny",
    "versatile",
    "well",
];

/// What a moderator says of a text: whether it advertises.
pub fn advertises(text: &str) -> bool {
    words(text).any(|word| ADVERTISING.contains(&word.as_str()))
}

/// The reward: how many different words of four letters or more the summary takes from its text,
/// at most eight. It is blind to what kind of words they are.
pub fn informative(prompt: &str, summary: &str) -> f64 {
    let text = prompt
        .strip_prefix(INSTRUCTION)
        .and_then(|p| p.strip_suffix(CUE))
        .unwrap_or(prompt);
    let known: HashSet<String> = words(text).filter(|word| word.len() >= 4).collect();
    let said: HashSet<String> = words(summary).filter(|word| known.contains(word)).collect();
    said.len().min(8) as f64
}

fn words(text: &str) -> impl Iterator<Item = String> + '_ {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
}

/// The learnt cost: the probability that a moderator would object. It reads the summary alone, not
/// the text before it, which may advertise as it likes.
pub struct Moderator<S> {
    pub classifier: LabelProbability<S>,
    /// What stands in the prompt's place.
    pub cue: Vec<i64>,
}

impl<S: Scorer> ConstraintModel for Moderator<S> {
    fn cost(&self, completions: &Completions) -> Result<Tensor> {
        let alone =
            |sequence: &Sequence| Sequence::new(self.cue.as_slice(), sequence.response.clone());
        let sequences = completions.batch.sequences().iter().map(alone).collect();
        let batch = SequenceBatch::new(sequences)?;
        self.classifier.cost(&Completions::written(batch))
    }
}

/// A text as the moderator's classifier reads it.
pub fn as_summary(cue: &[i64], tokens: &[i64], stop: i64) -> Sequence {
    Sequence::new(cue, [tokens, &[stop]].concat())
}
