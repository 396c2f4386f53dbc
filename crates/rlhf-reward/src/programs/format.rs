//! What an answer must look like.

use regex::Regex;
use rlhf_core::Error as CoreError;
use serde_json::Value;

use super::TextReward;
use crate::Result;

/// 1 for an answer that a regular expression matches, 0 for any other.
#[derive(Debug, Clone)]
pub struct Format(Regex);

impl Format {
    /// The expression must match the whole answer, from its first character to its last. `.`
    /// matches no line break unless the expression begins with `(?s)`.
    ///
    /// # Errors
    /// An invalid configuration: not a regular expression.
    pub fn whole(pattern: &str) -> Result<Self> {
        // Compiled alone first: a stray parenthesis must not pair with those around it.
        compile(pattern)?;
        Ok(Self(compile(&format!(r"\A(?:{pattern})\z"))?))
    }

    /// The expression must match somewhere in the answer.
    ///
    /// # Errors
    /// An invalid configuration: not a regular expression.
    pub fn anywhere(pattern: &str) -> Result<Self> {
        Ok(Self(compile(pattern)?))
    }
}

impl TextReward for Format {
    fn reward(&self, _prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        Ok(f64::from(self.0.is_match(answer)))
    }
}

/// 1 for an answer that is one JSON value and nothing else but white space (an object with
/// certain keys, where any are asked for); 0 for any other.
#[derive(Debug, Clone, Default)]
pub struct ValidJson {
    keys: Vec<String>,
}

impl ValidJson {
    /// Any JSON value.
    pub fn new() -> Self {
        Self::default()
    }

    /// An object that has at least these keys.
    pub fn with_keys<K: Into<String>>(keys: impl IntoIterator<Item = K>) -> Self {
        Self {
            keys: keys.into_iter().map(Into::into).collect(),
        }
    }
}

impl TextReward for ValidJson {
    fn reward(&self, _prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        let Ok(value) = serde_json::from_str::<Value>(answer) else {
            return Ok(0.0);
        };
        let valid = match (&value, self.keys.as_slice()) {
            (_, []) => true,
            (Value::Object(fields), keys) => keys.iter().all(|key| fields.contains_key(key)),
            _ => false,
        };
        Ok(f64::from(valid))
    }
}

/// −1 for each time that an answer says what it must not, 0 if it never does.
///
/// Case does not matter. A term that begins or ends with a letter, digit or `_` is found only
/// where a word begins or ends: "ass" is not in "class".
#[derive(Debug, Clone)]
pub struct ForbiddenTerms(Regex);

impl ForbiddenTerms {
    /// At least one term, none of them empty.
    ///
    /// # Errors
    /// An invalid configuration.
    pub fn new<T: AsRef<str>>(terms: impl IntoIterator<Item = T>) -> Result<Self> {
        let mut patterns = Vec::new();
        for term in terms {
            let term = term.as_ref();
            let word = |c: Option<char>| c.is_some_and(|c| c.is_alphanumeric() || c == '_');
            if term.is_empty() {
                let reason = "an empty term is everywhere";
                return Err(CoreError::config("terms", "\"\"", reason).into());
            }
            let boundary = |at_word: bool| if at_word { r"\b" } else { "" };
            patterns.push(format!(
                "{}{}{}",
                boundary(word(term.chars().next())),
                regex::escape(term),
                boundary(word(term.chars().next_back()))
            ));
        }
        if patterns.is_empty() {
            return Err(CoreError::config("terms", "[]", "at least one is needed").into());
        }
        // Longest first, so that "bad word" is one term and not "bad" alone.
        patterns.sort_by_key(|pattern| std::cmp::Reverse(pattern.len()));
        Ok(Self(compile(&format!("(?i)(?:{})", patterns.join("|")))?))
    }
}

impl TextReward for ForbiddenTerms {
    fn reward(&self, _prompt: &str, answer: &str) -> rlhf_core::Result<f64> {
        Ok(0.0 - self.0.find_iter(answer).count() as f64)
    }
}

pub(super) fn compile(pattern: &str) -> Result<Regex> {
    let reason = "not a regular expression that the crate regex knows";
    Ok(Regex::new(pattern).map_err(|_| CoreError::config("pattern", pattern, reason))?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn all(reward: &impl TextReward, answers: &[(&str, f64)]) {
        for (answer, want) in answers {
            assert_eq!(reward.reward("", answer).unwrap(), *want, "{answer:?}");
        }
    }

    #[test]
    fn formats() {
        let whole = Format::whole("a|b+").unwrap();
        all(
            &whole,
            &[("a", 1.0), ("bb", 1.0), ("ab", 0.0), ("a\n", 0.0)],
        );
        let tags = Format::whole(r"(?s)<think>.*</think>\s*\S.*").unwrap();
        all(
            &tags,
            &[("<think>x\ny</think>\n42", 1.0), ("<think>x</think>", 0.0)],
        );
        all(&Format::anywhere("a").unwrap(), &[("cab", 1.0), ("", 0.0)]);
        for bad in ["(", "a)(b", "[", r"\A(?:x"] {
            assert!(Format::whole(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn json() {
        let any = ValidJson::new();
        all(
            &any,
            &[
                ("{\"a\": [1, 2]}\n", 1.0),
                ("3", 1.0),
                ("{\"a\": 1", 0.0),
                ("{} {}", 0.0),
                ("", 0.0),
                ("NaN", 0.0),
            ],
        );
        let keys = ValidJson::with_keys(["a", "b"]);
        all(
            &keys,
            &[
                (r#"{"b": null, "a": 1, "c": 2}"#, 1.0),
                (r#"{"a": 1}"#, 0.0),
                (r#"["a", "b"]"#, 0.0),
            ],
        );
        // Nesting without end must not overflow the stack.
        all(&any, &[(&"[".repeat(100_000), 0.0)]);
    }

    #[test]
    fn terms() {
        let terms = ForbiddenTerms::new(["ass", "bad word", "bad", "c++", "über"]).unwrap();
        all(
            &terms,
            &[
                ("Class and mass", 0.0),
                ("an ASS, a bad word", -2.0),
                ("Bad, bad.", -2.0),
                ("c++ or C++", -2.0),
                ("ÜBER", -1.0),
                ("", 0.0),
            ],
        );
        assert!(ForbiddenTerms::new([""]).is_err());
        assert!(ForbiddenTerms::new(Vec::<String>::new()).is_err());
    }
}
