//! A constraint that needs no model: a summary may name only what its text names.

use std::collections::HashSet;

use super::task::{CUE, INSTRUCTION};

/// How many numbers and capitalised words of the summary the prompt's text does not have. The
/// first word may be capitalised in any case.
pub fn unsupported_names(prompt: &str, summary: &str) -> f64 {
    let text = prompt
        .strip_prefix(INSTRUCTION)
        .and_then(|p| p.strip_suffix(CUE))
        .unwrap_or(prompt);
    let known: HashSet<String> = words(text).map(str::to_lowercase).collect();
    words(summary)
        .enumerate()
        .filter(|(i, word)| {
            let number = word.starts_with(|c: char| c.is_ascii_digit());
            let capitalised = *i > 0 && word.starts_with(char::is_uppercase);
            (number || capitalised) && !known.contains(&word.to_lowercase())
        })
        .count() as f64
}

fn words(text: &str) -> impl Iterator<Item = &str> {
    text.split(|c: char| !c.is_alphanumeric())
        .filter(|word| !word.is_empty())
}
