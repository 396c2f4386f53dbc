//! One row of a dataset.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use serde::de::{DeserializeOwned, Error as _, Unexpected};
use serde_json::{Map, Value};

use super::Format;
use super::prompt::{split_messages, split_prompt};
use crate::ChatMessage;

/// A text as it is, or a conversation that a chat template makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Text {
    /// As it is ("standard").
    Plain(String),
    /// Messages ("conversational").
    Chat(Vec<ChatMessage>),
}

impl Text {
    /// Whether nothing is said.
    pub fn is_empty(&self) -> bool {
        match self {
            Self::Plain(text) => text.is_empty(),
            Self::Chat(messages) => messages
                .iter()
                .all(|m| m.text().is_none_or(str::is_empty) && m.get("tool_calls").is_none()),
        }
    }

    /// Bytes of text, about.
    fn bytes(&self) -> usize {
        match self {
            Self::Plain(text) => text.len(),
            Self::Chat(messages) => messages
                .iter()
                .map(|m| 64 + m.text().map_or(0, str::len))
                .sum(),
        }
    }
}

impl From<&str> for Text {
    fn from(text: &str) -> Self {
        Self::Plain(text.into())
    }
}

impl From<Vec<ChatMessage>> for Text {
    fn from(messages: Vec<ChatMessage>) -> Self {
        Self::Chat(messages)
    }
}

/// What a row says, by its format.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Example {
    /// A text that is learned.
    LanguageModelling(Text),
    /// Something to answer.
    PromptOnly(Text),
    /// An answer that is learned.
    PromptCompletion {
        /// What the model is given.
        prompt: Text,
        /// What it is to write.
        completion: Text,
    },
    /// Two answers, one better than the other.
    Preference {
        /// What both answer.
        prompt: Text,
        /// The better answer.
        chosen: Text,
        /// The worse one.
        rejected: Text,
        /// By how much, in reward units.
        margin: Option<f64>,
    },
    /// An answer that somebody found good, or not.
    Unpaired {
        /// What is answered.
        prompt: Text,
        /// The answer.
        completion: Text,
        /// Whether it is good.
        label: bool,
    },
    /// A text and what it was labelled with.
    Labelled {
        /// The text.
        text: Text,
        /// A class (0, 1, …) or a rating.
        label: f64,
    },
}

impl Example {
    /// Which format this is a row of.
    pub fn format(&self) -> Format {
        match self {
            Self::LanguageModelling(_) => Format::LanguageModelling,
            Self::PromptOnly(_) => Format::PromptOnly,
            Self::PromptCompletion { .. } => Format::PromptCompletion,
            Self::Preference { .. } => Format::Preference,
            Self::Unpaired { .. } => Format::Unpaired,
            Self::Labelled { .. } => Format::Labelled,
        }
    }

    fn texts(&self) -> Vec<&Text> {
        match self {
            Self::LanguageModelling(text) | Self::PromptOnly(text) => vec![text],
            Self::Labelled { text, .. } => vec![text],
            Self::PromptCompletion { prompt, completion }
            | Self::Unpaired {
                prompt, completion, ..
            } => vec![prompt, completion],
            Self::Preference {
                prompt,
                chosen,
                rejected,
                ..
            } => vec![prompt, chosen, rejected],
        }
    }
}

/// Where a row comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// The file.
    pub path: Arc<Path>,
    /// Number of the line, or of the row of a Parquet file, from 1.
    pub line: usize,
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.path.display(), self.line)
    }
}

/// One row of a dataset.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What it says.
    pub example: Example,
    /// Functions that a conversation may call, for the chat template (column `tools`).
    pub tools: Vec<Value>,
    /// Where it comes from, if it comes from a file.
    pub location: Option<Location>,
}

/// The column at fault, where there is one, and what is wrong.
pub(super) type ColumnError = (Option<String>, serde_json::Error);

impl Row {
    /// A row of a dataset that is no file.
    pub fn new(example: Example) -> Self {
        Self {
            example,
            tools: Vec::new(),
            location: None,
        }
    }

    /// A row of a format from its columns, none of which is null.
    pub(super) fn from_columns(
        format: Format,
        mut columns: Map<String, Value>,
        location: Location,
    ) -> Result<Self, ColumnError> {
        let tools = match columns.shift_remove("tools") {
            None => Vec::new(),
            // Parquet files hold them as JSON, because schemas differ.
            Some(Value::String(json)) => {
                serde_json::from_str(&json).map_err(|source| (Some("tools".to_string()), source))?
            }
            Some(value) => typed("tools", value)?,
        };
        let mut columns = Columns(columns);
        let example = match format {
            Format::LanguageModelling => Example::LanguageModelling(columns.any_text(&[
                "messages",
                "conversations",
                "text",
            ])?),
            Format::PromptOnly => Example::PromptOnly(columns.text("prompt")?),
            Format::PromptCompletion => Example::PromptCompletion {
                prompt: columns.text("prompt")?,
                completion: columns.text("completion")?,
            },
            Format::Preference => columns.preference()?,
            Format::Unpaired => Example::Unpaired {
                prompt: columns.text("prompt")?,
                completion: columns.text("completion")?,
                label: columns.typed("label")?,
            },
            Format::Labelled => Example::Labelled {
                text: columns.text("text")?,
                label: columns.typed("label")?,
            },
        };
        Ok(Self {
            example,
            tools,
            location: Some(location),
        })
    }

    /// Bytes of text, about.
    pub(super) fn bytes(&self) -> usize {
        self.example.texts().iter().map(|text| text.bytes()).sum()
    }
}

/// The columns that are left of a row.
struct Columns(Map<String, Value>);

impl Columns {
    fn take(&mut self, name: &'static str) -> Result<Value, ColumnError> {
        self.0
            .swap_remove(name)
            .ok_or_else(|| (Some(name.into()), serde_json::Error::missing_field(name)))
    }

    fn typed<T: DeserializeOwned>(&mut self, name: &'static str) -> Result<T, ColumnError> {
        typed(name, self.take(name)?)
    }

    fn text(&mut self, name: &'static str) -> Result<Text, ColumnError> {
        match self.take(name)? {
            Value::String(text) => Ok(Text::Plain(text)),
            messages @ Value::Array(_) => typed(name, messages).map(Text::Chat),
            other => {
                let found = match &other {
                    Value::Bool(value) => Unexpected::Bool(*value),
                    Value::Number(number) => Unexpected::Float(number.as_f64().unwrap_or(0.0)),
                    _ => Unexpected::Map,
                };
                let error = serde_json::Error::invalid_type(found, &"a string or messages");
                Err((Some(name.into()), error))
            }
        }
    }

    /// The first of several columns that is there.
    fn any_text(&mut self, names: &[&'static str]) -> Result<Text, ColumnError> {
        let there = |name: &&&'static str| self.0.contains_key(**name);
        let name = names.iter().find(there).or(names.last()).copied();
        self.text(name.unwrap_or("text"))
    }

    /// As TRL: answers that begin with their prompt are split where they begin to differ, unless
    /// there is a prompt of the same kind.
    fn preference(&mut self) -> Result<Example, ColumnError> {
        let (chosen, rejected) = (self.text("chosen")?, self.text("rejected")?);
        let margin = match self.0.contains_key("margin") {
            true => Some(self.typed("margin")?),
            false => None,
        };
        let prompt = match self.0.contains_key("prompt") {
            true => Some(self.text("prompt")?),
            false => None,
        };
        let (prompt, chosen, rejected) = match (prompt, chosen, rejected) {
            (None, Text::Plain(chosen), Text::Plain(rejected)) => {
                let (prompt, chosen, rejected) = split_prompt(&chosen, &rejected);
                (prompt.into(), chosen.into(), rejected.into())
            }
            (None | Some(Text::Plain(_)), Text::Chat(chosen), Text::Chat(rejected)) => {
                let (prompt, chosen, rejected) = split_messages(chosen, rejected);
                (prompt.into(), chosen.into(), rejected.into())
            }
            (Some(prompt), chosen, rejected) => (prompt, chosen, rejected),
            (None, _, _) => {
                let message = "one of `chosen` and `rejected` is a text, the other messages";
                return Err((Some("rejected".into()), serde_json::Error::custom(message)));
            }
        };
        Ok(Example::Preference {
            prompt,
            chosen,
            rejected,
            margin,
        })
    }
}

fn typed<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, ColumnError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        let field = match path.as_str() {
            "." | "?" => name.to_string(),
            path if path.starts_with('[') => format!("{name}{path}"),
            path => format!("{name}.{path}"),
        };
        (Some(field), error.into_inner())
    })
}
