//! Answers to compare with.

use std::collections::HashMap;

use rlhf_core::Error as CoreError;

use super::TextReward;
use crate::rouge::{rouge_l, rouge_n};

/// Reference answers by prompt, one or more each.
///
/// A prompt is looked up as the model under training sees it, decoded from its tokens; white space
/// around it does not matter.
#[derive(Debug, Clone, Default)]
pub struct References(HashMap<String, Vec<String>>);

impl References {
    /// Pairs of prompt and reference answer. A prompt that comes again has several.
    pub fn new<P: AsRef<str>, A: Into<String>>(pairs: impl IntoIterator<Item = (P, A)>) -> Self {
        let mut references: HashMap<String, Vec<String>> = HashMap::new();
        for (prompt, answer) in pairs {
            let of_prompt = references.entry(prompt.as_ref().trim().to_string());
            of_prompt.or_default().push(answer.into());
        }
        Self(references)
    }

    /// The references of a prompt.
    ///
    /// # Errors
    /// A prompt without any.
    pub fn of(&self, prompt: &str) -> rlhf_core::Result<&[String]> {
        let found = self.0.get(prompt.trim()).map(Vec::as_slice);
        found.ok_or_else(|| {
            let start: String = prompt.trim().chars().take(60).collect();
            CoreError::model(format!("no reference answer for the prompt {start:?}…"))
        })
    }
}

/// Which overlap is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RougeKind {
    /// Runs of so many words.
    N(usize),
    /// The longest common subsequence.
    L,
}

/// The F1 of ROUGE with the reference answer, in `0..=1`; the best of several.
#[derive(Debug, Clone)]
pub struct RougeTo {
    references: References,
    kind: RougeKind,
}

impl RougeTo {
    /// ROUGE of this kind with these answers.
    pub fn new(references: References, kind: RougeKind) -> Self {
        Self { references, kind }
    }
}

impl TextReward for RougeTo {
    fn reward(&self, prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        let f1 = |reference: &String| match self.kind {
            RougeKind::N(n) => rouge_n(reference, answer, n).f1,
            RougeKind::L => rouge_l(reference, answer).f1,
        };
        let all = self.references.of(prompt)?.iter().map(f1);
        Ok(all.fold(0.0, f64::max))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_best_of_the_references_counts() {
        let references = References::new([("Who? ", "a b c d"), ("Who?", "x y")]);
        let l = RougeTo::new(references.clone(), RougeKind::L);
        let two = RougeTo::new(references, RougeKind::N(2));
        for (rouge, answer, f1) in [
            (&l, "x y", 1.0),
            (&l, "d a b", 2.0 * 2.0 / 7.0),
            (&two, "d a b", 2.0 / 5.0),
        ] {
            assert!((rouge.reward(" Who?", answer).unwrap() - f1).abs() < 1e-12);
        }
        let error = l.reward("What?", "x").unwrap_err().to_string();
        assert!(error.contains("What?"), "{error}");
    }
}
