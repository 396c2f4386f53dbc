//! One JSON object a line.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use serde::de::DeserializeOwned;

use crate::{Error, Result};

/// Longest line, in bytes: some four million tokens.
const LINE_LIMIT: usize = 16 << 20;

/// The lines of a file that are not empty, one at a time.
pub(super) struct Lines {
    path: PathBuf,
    reader: BufReader<File>,
    line: Vec<u8>,
    number: usize,
}

impl Lines {
    pub(super) fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io("opening", path))?;
        Ok(Self {
            path: path.into(),
            reader: BufReader::with_capacity(1 << 20, file),
            line: Vec::new(),
            number: 0,
        })
    }

    /// The next record and the number of its line, from 1.
    pub(super) fn next_record<T: DeserializeOwned>(&mut self) -> Result<Option<(usize, T)>> {
        loop {
            self.line.clear();
            self.number += 1;
            let read = (&mut self.reader)
                .take(LINE_LIMIT as u64 + 1)
                .read_until(b'\n', &mut self.line)
                .map_err(Error::io("reading", &self.path))?;
            if read > LINE_LIMIT {
                return Err(Error::LineTooLong {
                    path: self.path.clone(),
                    line: self.number,
                    limit: LINE_LIMIT,
                });
            }
            let line = match self.number {
                1 => self
                    .line
                    .strip_prefix(b"\xef\xbb\xbf")
                    .unwrap_or(&self.line),
                _ => &self.line,
            };
            if read == 0 {
                return Ok(None);
            }
            if line.trim_ascii().is_empty() {
                continue;
            }
            let record = parse(line).map_err(|(field, source)| Error::JsonLine {
                path: self.path.clone(),
                line: self.number,
                field,
                source,
            })?;
            return Ok(Some((self.number, record)));
        }
    }
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
/// [`Error::Io`]; [`Error::LineTooLong`]; [`Error::JsonLine`], which names file, line and field, for a line that is not
/// JSON, lacks a field or has another type in one; [`Error::NoRecords`].
pub fn read_jsonl<T: DeserializeOwned>(path: impl AsRef<Path>) -> Result<Vec<T>> {
    let path = path.as_ref();
    let mut lines = Lines::open(path)?;
    let mut records = Vec::new();
    while let Some((_, record)) = lines.next_record()? {
        records.push(record);
    }
    if records.is_empty() {
        return Err(Error::NoRecords { path: path.into() });
    }
    Ok(records)
}

/// The record, or the field at fault (where there is one) and the parser's error.
pub(super) fn parse<T: DeserializeOwned>(
    line: &[u8],
) -> Result<T, (Option<String>, serde_json::Error)> {
    let mut parser = serde_json::Deserializer::from_slice(line);
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
    use crate::data::{PreferencePair, PromptCompletion};

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
