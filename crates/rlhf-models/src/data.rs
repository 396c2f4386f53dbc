//! Datasets: one JSON object a line.

use std::io::{BufRead, BufReader};
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// A prompt and the answer that a model is to learn: supervised fine-tuning.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PromptCompletion {
    /// What the model is given.
    pub prompt: String,
    /// What it is to write.
    pub completion: String,
}

/// Two answers, one better than the other: reward models and preference optimisation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreferencePair {
    /// What both answer.
    pub prompt: String,
    /// The better answer.
    pub chosen: String,
    /// The worse one.
    pub rejected: String,
    /// By how much, in reward units, where the labellers said so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub margin: Option<f64>,
}

/// A text and what it was labelled with: a class (0, 1, …) or a rating.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LabelledText {
    /// The text.
    pub text: String,
    /// The class, or the rating.
    pub label: f64,
}

/// Reads a file of one JSON object a line; empty lines are skipped, fields that `T` does not
/// have are ignored.
///
/// ```no_run
/// use rlhf_models::data::{PromptCompletion, read_jsonl};
///
/// let pairs: Vec<PromptCompletion> = read_jsonl("train.jsonl")?;
/// # Ok::<(), rlhf_models::Error>(())
/// ```
///
/// # Errors
/// [`Error::Io`]; [`Error::JsonLine`], which names file, line and field, for a line that is not
/// JSON, lacks a field or has another type in one; [`Error::NoRecords`].
pub fn read_jsonl<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Vec<T>> {
    let path = path.as_ref();
    let file = std::fs::File::open(path).map_err(Error::io("opening", path))?;
    let mut records = Vec::new();
    for (index, line) in BufReader::new(file).lines().enumerate() {
        let line = line.map_err(Error::io("reading", path))?;
        if line.trim().is_empty() {
            continue;
        }
        records.push(parse(&line).map_err(|(field, source)| Error::JsonLine {
            path: path.into(),
            line: index + 1,
            field,
            source,
        })?);
    }
    if records.is_empty() {
        return Err(Error::NoRecords { path: path.into() });
    }
    Ok(records)
}

/// The record, or the field at fault (where there is one) and the parser's error.
fn parse<T: DeserializeOwned>(line: &str) -> Result<T, (Option<String>, serde_json::Error)> {
    let mut parser = serde_json::Deserializer::from_str(line);
    let record = serde_path_to_error::deserialize(&mut parser).map_err(|error| {
        let path = error.path().to_string();
        let source = error.into_inner();
        let field = match path.as_str() {
            "." | "?" => missing_field(&source),
            _ => Some(path),
        };
        (field, source)
    })?;
    parser.end().map_err(|source| (None, source))?;
    Ok(record)
}

/// A field that is not there has no path; serde names it in its message.
fn missing_field(error: &serde_json::Error) -> Option<String> {
    let message = error.to_string();
    let rest = message.strip_prefix("missing field `")?;
    Some(rest[..rest.find('`')?].to_string())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Vec<PreferencePair>> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        read_jsonl(file.path())
    }

    const GOOD: &str = r#"{"prompt": "p", "chosen": "c", "rejected": "r", "source": "x"}"#;

    #[test]
    fn records_in_order() {
        let margin = r#"{"prompt": "q", "chosen": "c", "rejected": "r", "margin": 2}"#;
        let pairs = read(&format!("{GOOD}\n\n{margin}\n")).unwrap();
        assert_eq!((pairs[0].prompt.as_str(), pairs[0].margin), ("p", None));
        assert_eq!(
            (pairs[1].prompt.as_str(), pairs[1].margin),
            ("q", Some(2.0))
        );
    }

    #[test]
    fn errors_name_file_line_and_field() {
        let cases = [
            ("{\"prompt\": \"p\", \"chosen\"", None),
            ("not json", None),
            (r#"{"prompt": "p", "chosen": "c"}"#, Some("rejected")),
            (
                r#"{"prompt": 3, "chosen": "c", "rejected": "r"}"#,
                Some("prompt"),
            ),
        ];
        for (bad, expected) in cases {
            let error = read(&format!("{GOOD}\n\n{bad}\n")).unwrap_err();
            let text = error.to_string();
            let Error::JsonLine {
                path, line, field, ..
            } = error
            else {
                panic!("{text}");
            };
            assert_eq!((line, field.as_deref()), (3, expected), "{text}");
            assert!(
                text.starts_with(&format!("{}:3: ", path.display())),
                "{text}"
            );
            assert!(expected.is_none_or(|field| text.contains(field)), "{text}");
        }
    }

    #[test]
    fn a_file_without_records_or_without_a_file() {
        assert!(matches!(read("\n"), Err(Error::NoRecords { .. })));
        let absent = read_jsonl::<PromptCompletion>("/nowhere/train.jsonl");
        assert!(matches!(absent, Err(Error::Io { .. })));
    }
}
