//! Which columns make a dataset of which kind.

use std::fmt;

use serde::Serialize;

/// TRL's dataset formats that a trainer here takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Format {
    /// `text`, or `messages`: all of it is learned.
    LanguageModelling,
    /// `prompt`: a model is to answer.
    PromptOnly,
    /// `prompt`, `completion`: the completion is learned.
    PromptCompletion,
    /// `chosen`, `rejected`, and `prompt` unless both begin with it; `margin` where there is one.
    Preference,
    /// `prompt`, `completion`, `label` (true: a good one).
    Unpaired,
    /// `text`, `label`: a class or a rating.
    Labelled,
}

impl Format {
    /// All formats.
    pub const ALL: [Self; 6] = [
        Self::LanguageModelling,
        Self::PromptOnly,
        Self::PromptCompletion,
        Self::Preference,
        Self::Unpaired,
        Self::Labelled,
    ];

    /// The format of a table with these columns, from the most particular to the most general.
    /// Other columns do not matter.
    ///
    /// ```
    /// use rlhf_models::data::Format;
    ///
    /// let of = |columns: &[&str]| Format::detect(columns.iter().copied());
    /// assert_eq!(of(&["prompt", "chosen", "rejected"]), Some(Format::Preference));
    /// assert_eq!(of(&["prompt", "id"]), Some(Format::PromptOnly));
    /// assert_eq!(of(&["question", "answer"]), None);
    /// ```
    pub fn detect<'a>(columns: impl IntoIterator<Item = &'a str>) -> Option<Self> {
        let columns: Vec<&str> = columns.into_iter().collect();
        let has = |name: &str| columns.contains(&name);
        if has("chosen") && has("rejected") {
            Some(Self::Preference)
        } else if has("prompt") && has("completion") && has("label") {
            Some(Self::Unpaired)
        } else if has("prompt") && has("completion") {
            Some(Self::PromptCompletion)
        } else if has("messages") || has("conversations") {
            Some(Self::LanguageModelling)
        } else if has("text") && has("label") {
            Some(Self::Labelled)
        } else if has("text") {
            Some(Self::LanguageModelling)
        } else if has("prompt") && !has("completions") {
            Some(Self::PromptOnly)
        } else {
            None
        }
    }

    /// Its columns, for messages.
    pub fn columns(self) -> &'static str {
        match self {
            Self::LanguageModelling => "`text` or `messages`",
            Self::PromptOnly => "`prompt`",
            Self::PromptCompletion => "`prompt`, `completion`",
            Self::Preference => "`chosen`, `rejected` (and `prompt`, `margin`)",
            Self::Unpaired => "`prompt`, `completion`, `label`",
            Self::Labelled => "`text`, `label`",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LanguageModelling => "language modelling",
            Self::PromptOnly => "prompt-only",
            Self::PromptCompletion => "prompt-completion",
            Self::Preference => "preference",
            Self::Unpaired => "unpaired preference",
            Self::Labelled => "labelled text",
        })
    }
}
