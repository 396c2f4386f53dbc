//! Whether an answer is the right one.

use regex::Regex;

use super::format::compile;
use super::{References, TextReward};
use crate::Result;

/// 1 for an answer that is the reference, or one of several, but for case and white space; else 0.
#[derive(Debug, Clone)]
pub struct ExactAnswer {
    references: References,
    extract: Option<Regex>,
}

impl ExactAnswer {
    /// The whole answer is compared.
    pub fn new(references: References) -> Self {
        Self {
            references,
            extract: None,
        }
    }

    /// What the first group of `pattern` matches is compared, at its last match; an answer without
    /// a match is wrong. The group of `#### (.+)` is what GSM8K asks for.
    ///
    /// # Errors
    /// An invalid configuration: not a regular expression, or one without a group.
    pub fn extracting(references: References, pattern: &str) -> Result<Self> {
        Ok(Self {
            references,
            extract: Some(grouped(pattern)?),
        })
    }
}

impl TextReward for ExactAnswer {
    fn reward(&self, prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        let references = self.references.of(prompt)?;
        let given = extracted(answer, self.extract.as_ref());
        let right = |given: &str| references.iter().any(|r| canonical(r) == canonical(given));
        Ok(f64::from(given.is_some_and(right)))
    }
}

/// 1 for an answer whose last number is that of the reference, or of one of several, within
/// `tolerance` (relative to the larger of 1 and the reference); else 0.
#[derive(Debug, Clone)]
pub struct NumericAnswer {
    references: References,
    tolerance: f64,
    extract: Option<Regex>,
}

impl NumericAnswer {
    /// The last number of the answer is compared ([`last_number`]).
    ///
    /// # Errors
    /// An invalid configuration: a tolerance that is negative or not finite.
    pub fn new(references: References, tolerance: f64) -> Result<Self> {
        if !(tolerance.is_finite() && tolerance >= 0.0) {
            let reason = "a finite number that is not negative is needed";
            return Err(rlhf_core::Error::config("tolerance", tolerance, reason).into());
        }
        Ok(Self {
            references,
            tolerance,
            extract: None,
        })
    }

    /// Looks for the number in what the first group of `pattern` matches, at its last match.
    ///
    /// # Errors
    /// An invalid configuration: not a regular expression, or one without a group.
    pub fn extracting(mut self, pattern: &str) -> Result<Self> {
        self.extract = Some(grouped(pattern)?);
        Ok(self)
    }
}

impl TextReward for NumericAnswer {
    fn reward(&self, prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        let references = self.references.of(prompt)?;
        let given = extracted(answer, self.extract.as_ref()).and_then(last_number);
        let right = |given: f64| {
            references
                .iter()
                .filter_map(|r| last_number(r))
                .any(|want| (given - want).abs() <= self.tolerance * want.abs().max(1.0))
        };
        Ok(f64::from(given.is_some_and(right)))
    }
}

/// The last number that a text writes in decimal digits: `-3`, `1,234.5`, `.5`, `2e-3`. Commas
/// are those between groups of three digits. `None` where there is no number, or where it is
/// beyond what `f64` holds.
pub fn last_number(text: &str) -> Option<f64> {
    let bytes = text.as_bytes();
    let end = bytes.iter().rposition(u8::is_ascii_digit)? + 1;
    let digits = |from: usize| {
        bytes[..from]
            .iter()
            .rev()
            .take_while(|b| {
                b.is_ascii_digit() || matches!(b, b',' | b'.' | b'e' | b'E' | b'+' | b'-')
            })
            .count()
    };
    let start = end - digits(end);
    // The longest tail that is a number: "3-4" ends with -4, "v1.2.3" with 2.3.
    (start..end)
        .map(|from| &text[from..end])
        .find_map(parse_number)
        .filter(|number| number.is_finite())
}

fn parse_number(text: &str) -> Option<f64> {
    let unsigned = text.strip_prefix(['-', '+']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return None;
    }
    let (whole, rest) = match unsigned.find(['.', 'e', 'E']) {
        Some(at) => unsigned.split_at(at),
        None => (unsigned, ""),
    };
    let mut groups = whole.split(',');
    let first = groups.next().unwrap_or_default().len();
    let grouped = whole.contains(',');
    if rest.contains(',') || (grouped && !(1..=3).contains(&first)) || groups.any(|g| g.len() != 3)
    {
        return None;
    }
    text.replace(',', "").parse().ok()
}

fn extracted<'a>(answer: &'a str, pattern: Option<&Regex>) -> Option<&'a str> {
    match pattern {
        None => Some(answer),
        Some(pattern) => pattern
            .captures_iter(answer)
            .last()
            .and_then(|found| found.get(1))
            .map(|group| group.as_str()),
    }
}

fn grouped(pattern: &str) -> Result<Regex> {
    let regex = compile(pattern)?;
    if regex.captures_len() < 2 {
        let reason = "needs a group (in parentheses) around the answer";
        return Err(rlhf_core::Error::config("pattern", pattern, reason).into());
    }
    Ok(regex)
}

/// Lower case, words apart by one space.
fn canonical(text: &str) -> String {
    let lower = text.to_lowercase();
    lower.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers() {
        for (text, number) in [
            ("The answer is 42.", Some(42.0)),
            ("-3", Some(-3.0)),
            ("costs $1,234.50 in all", Some(1234.5)),
            ("1,234,567", Some(1_234_567.0)),
            ("2, 3, 4", Some(4.0)),
            ("12,34", Some(34.0)),
            ("x = .5", Some(0.5)),
            ("2e-3", Some(0.002)),
            ("3-4", Some(-4.0)),
            ("v1.2.3", Some(2.3)),
            ("5 apples, no pears", Some(5.0)),
            ("none", None),
            ("", None),
            ("1e999", None),
            ("e ≈ 2.75 …", Some(2.75)),
        ] {
            assert_eq!(last_number(text), number, "{text}");
        }
    }

    #[test]
    fn right_and_wrong_answers() {
        let references = || References::new([("2+2?", "#### 4"), ("2+2?", "four")]);
        let numeric = NumericAnswer::new(references(), 1e-6).unwrap();
        let strict = NumericAnswer::new(references(), 0.0)
            .unwrap()
            .extracting("#### (.+)")
            .unwrap();
        let exact = ExactAnswer::new(references());
        let tagged = ExactAnswer::extracting(references(), "<a>(.*?)</a>").unwrap();
        for (answer, rewards) in [
            ("It is 4.0", [1.0, 0.0, 0.0, 0.0]),
            ("3 + 1\n#### 4", [1.0, 1.0, 0.0, 0.0]),
            (" FOUR\n", [0.0, 0.0, 1.0, 0.0]),
            ("<a>five</a> no <a>Four</a>", [0.0, 0.0, 0.0, 1.0]),
            ("", [0.0; 4]),
        ] {
            let all: [&dyn TextReward; 4] = [&numeric, &strict, &exact, &tagged];
            for (i, reward) in all.into_iter().enumerate() {
                assert_eq!(
                    reward.reward("2+2?", answer).unwrap(),
                    rewards[i],
                    "{i} {answer}"
                );
            }
        }
        assert!(numeric.reward("1+1?", "2").is_err());
        assert!(ExactAnswer::extracting(references(), "no group").is_err());
        assert!(NumericAnswer::new(references(), -1.0).is_err());
    }
}
