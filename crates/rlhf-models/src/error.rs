//! What can go wrong with model folders, tokenizers and data files.

use std::path::PathBuf;

use crate::MemoryChange;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-models`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file or folder could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done, e.g. `"reading"`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file is not the JSON that it should be.
    #[error("{}: not valid JSON: {source}", path.display())]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A configuration lacks a field.
    #[error("{}: field `{field}` is missing", path.display())]
    MissingField {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
    },
    /// A field of a configuration holds something that this crate cannot use.
    #[error("{}: field `{field}` is {value}: {reason}", path.display())]
    InvalidField {
        /// The file.
        path: PathBuf,
        /// The field.
        field: String,
        /// Its value, as JSON.
        value: String,
        /// What is supported.
        reason: String,
    },
    /// A model of a kind that this crate does not implement.
    #[error(
        "{}: architecture `{found}` is not supported (supported: {})",
        path.display(),
        supported.join(", ")
    )]
    UnknownArchitecture {
        /// The configuration file.
        path: PathBuf,
        /// Its `model_type`.
        found: String,
        /// Every `model_type` that can be loaded.
        supported: &'static [&'static str],
    },
    /// A weights file is truncated or damaged.
    #[error("{}: not a complete safetensors file: {source}", path.display())]
    Safetensors {
        /// The file.
        path: PathBuf,
        /// What the parser says.
        source: safetensors::SafeTensorError,
    },
    /// An index names a file that does not lie beside it.
    #[error("{}: `{name}` is no name of a file in this folder", path.display())]
    ShardName {
        /// The index.
        path: PathBuf,
        /// What it names.
        name: String,
    },
    /// An index names files that are not there. Every one is listed.
    #[error(
        "{}: {} of its files are missing, download them again: {}",
        index.display(),
        missing.len(),
        names(missing)
    )]
    MissingShards {
        /// The index.
        index: PathBuf,
        /// The files.
        missing: Vec<PathBuf>,
    },
    /// A folder, a pipe or a device where a file should be.
    #[error("{}: not a regular file", path.display())]
    NotAFile {
        /// What was to be read.
        path: PathBuf,
    },
    /// Weights do not fit the configuration. Every problem is listed.
    #[error(
        "{}: weights do not fit config.json:{}",
        path.display(),
        problems.iter().map(|p| format!("\n  {p}")).collect::<String>()
    )]
    Weights {
        /// The model's folder.
        path: PathBuf,
        /// All tensors that are missing, not expected, or of another shape or type.
        problems: Vec<WeightProblem>,
    },
    /// LoRA adapters do not fit the model. Every problem is listed.
    #[error(
        "{}adapters do not fit the model:{}",
        path.as_ref().map(|path| format!("{}: ", path.display())).unwrap_or_default(),
        problems.iter().map(|p| format!("\n  {p}")).collect::<String>()
    )]
    Adapter {
        /// The adapter's folder, unless they are new.
        path: Option<PathBuf>,
        /// All names that no layer has, and all tensors that do not fit.
        problems: Vec<AdapterProblem>,
    },
    /// A model cannot be split over so many ranks.
    #[error("{field} = {size} cannot be split over {ranks} ranks: {reason}")]
    CannotSplit {
        /// The size, by its name in `config.json`.
        field: &'static str,
        /// Its value.
        size: i64,
        /// The ranks of the group.
        ranks: usize,
        /// What they must be.
        reason: &'static str,
    },
    /// A model on several ranks is written by the first, which failed.
    #[error("rank 0 could not write the model; its error says why")]
    NotWritten,
    /// A stage of a pipeline was asked for what takes the whole model.
    #[error("a stage of a pipeline has no {what}: use a model whose blocks are all on this rank")]
    OnlyAStage {
        /// What was asked for.
        what: &'static str,
    },
    /// A model without LoRA adapters was asked for something that needs them.
    #[error("the model has no LoRA adapters; add or load some first")]
    NoAdapter,
    /// A model cannot have two sets of adapters.
    #[error("the model has LoRA adapters already; merge them first")]
    HasAdapter,
    /// `tokenizer.json` cannot be used.
    #[error("{}: not a usable tokenizer: {source}", path.display())]
    Tokenizer {
        /// The file.
        path: PathBuf,
        /// What the tokenizers library says.
        source: tokenizers::Error,
    },
    /// A text that the tokenizer cannot encode.
    #[error("encoding a text: {source}")]
    Encode {
        /// What the tokenizers library says.
        source: tokenizers::Error,
    },
    /// Ids that the tokenizer cannot decode.
    #[error("decoding token ids: {source}")]
    Decode {
        /// What the tokenizers library says.
        source: tokenizers::Error,
    },
    /// A number that is no token id.
    #[error("{id} is not a token id")]
    InvalidId {
        /// The number.
        id: i64,
    },
    /// A tokenizer has ids that the model does not know.
    #[error(
        "the tokenizer has ids up to {largest_id} but the model's vocabulary is {vocab_size}; \
         they do not belong together"
    )]
    VocabularyTooSmall {
        /// The tokenizer's largest id.
        largest_id: i64,
        /// Number of ids that the model knows.
        vocab_size: i64,
    },
    /// A file is larger than anything of its kind.
    #[error("{}: more than {limit} bytes", path.display())]
    FileTooLarge {
        /// The file.
        path: PathBuf,
        /// Most bytes that are read.
        limit: u64,
    },
    /// A conversation for a tokenizer that has no chat template.
    #[error("the tokenizer has no chat template")]
    NoChatTemplate,
    /// A chat template with an error, or one that refused a conversation.
    #[error("chat template: {source}")]
    ChatTemplate {
        /// What Jinja says.
        source: minijinja::Error,
    },
    /// A tokenizer has no chat template of a name.
    #[error("no chat template is named `{name}` (there are: {})", known.join(", "))]
    NoSuchTemplate {
        /// The name.
        name: String,
        /// Those that there are.
        known: Vec<String>,
    },
    /// A chat template that is longer than any in use.
    #[error("chat template `{name}` has {bytes} bytes (at most {limit} are taken)")]
    TemplateTooLong {
        /// Its name.
        name: String,
        /// Its length.
        bytes: usize,
        /// The longest that is taken.
        limit: usize,
    },
    /// A conversation was to be left open after its last message, which the template does not
    /// write as it is.
    #[error("the chat template does not write the last message, so the text cannot end with it")]
    FinalMessageNotRendered,
    /// A line of a dataset cannot be used.
    #[error(
        "{}:{line}: {}{source}",
        path.display(),
        field.as_ref().map(|f| format!("field `{f}`: ")).unwrap_or_default()
    )]
    JsonLine {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// The field, unless the line as a whole is at fault.
        field: Option<String>,
        /// What the parser says.
        source: serde_json::Error,
    },
    /// A line that is longer than any record.
    #[error("{}:{line}: the line has more than {limit} bytes", path.display())]
    LineTooLong {
        /// The file.
        path: PathBuf,
        /// Number of the line, from 1.
        line: usize,
        /// The longest that is read, in bytes.
        limit: usize,
    },
    /// A dataset whose columns are those of no format.
    #[error(
        "{}: columns {} are no format's; there are{}",
        path.display(),
        columns.iter().map(|c| format!("`{c}`")).collect::<Vec<_>>().join(", "),
        crate::data::Format::ALL
            .iter()
            .map(|f| format!("\n  {f}: {}", f.columns()))
            .collect::<String>()
    )]
    UnknownFormat {
        /// The file.
        path: PathBuf,
        /// Its columns.
        columns: Vec<String>,
    },
    /// A dataset of another format than what is to be made of it.
    #[error("the dataset is {found} ({}), but {needed} is needed", found.columns())]
    WrongFormat {
        /// What it is.
        found: crate::data::Format,
        /// What would do.
        needed: &'static str,
    },
    /// A prompt that is a text, and an answer that is messages, or the other way round.
    #[error("prompt and answer must both be texts, or both messages")]
    MixedText,
    /// A row of a dataset cannot be used.
    #[error("{location}: {source}")]
    Row {
        /// Where it is.
        location: crate::data::Location,
        /// Why.
        source: Box<Error>,
    },
    /// A Parquet file, for a build without them.
    #[error("{}: Parquet files need the feature `parquet` of rlhf-models", path.display())]
    NoParquet {
        /// The file.
        path: PathBuf,
    },
    /// A Parquet file cannot be read.
    #[error("{}: row {row}: {reason}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// Number of the row, from 1; 0 for what the file says of itself.
        row: usize,
        /// What is wrong.
        reason: String,
    },
    /// A dataset without a record.
    #[error("{}: no records", path.display())]
    NoRecords {
        /// The file.
        path: PathBuf,
    },
    /// A training step that is predicted not to fit.
    #[error("{source}{}", proposals(changes))]
    OverBudget {
        /// What is needed, and what there is.
        source: Box<rlhf_scale::Error>,
        /// What would fit, the cheapest first.
        changes: Vec<MemoryChange>,
    },
    /// libtorch, a batch or a configuration of the core crate.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
}

/// One tensor that does not fit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightProblem {
    /// The model needs it, the file lacks it.
    #[error("missing: {name} {shape:?}")]
    Missing {
        /// The tensor.
        name: String,
        /// The shape that the model needs.
        shape: Vec<i64>,
    },
    /// The file has it, the model has no place for it.
    #[error("unexpected: {name} {shape:?}")]
    Unexpected {
        /// The tensor.
        name: String,
        /// Its shape.
        shape: Vec<i64>,
    },
    /// The shapes differ.
    #[error("misshapen: {name} is {found:?}, the model needs {expected:?}")]
    Shape {
        /// The tensor.
        name: String,
        /// Shape in the file.
        found: Vec<i64>,
        /// Shape that the model needs.
        expected: Vec<i64>,
    },
    /// Two of the checkpoint's files have it.
    #[error("in two files: {name}")]
    Duplicate {
        /// The tensor.
        name: String,
    },
    /// The element type is not one that weights can have here.
    #[error("{name} has element type {dtype}, not f64, f32, f16 or bf16")]
    Dtype {
        /// The tensor.
        name: String,
        /// Type in the file.
        dtype: String,
    },
}

/// One thing that keeps adapters from a model.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum AdapterProblem {
    /// A tensor of the adapter's folder.
    #[error(transparent)]
    Weight(#[from] WeightProblem),
    /// A name or pattern of `target_modules` that fits no linear layer.
    #[error("no linear layer is called {name}; there are {}", known.join(", "))]
    UnknownTarget {
        /// What was asked for.
        name: String,
        /// What the model's linear layers are called.
        known: Vec<String>,
    },
    /// A name of `modules_to_save` that fits no module.
    #[error("modules_to_save: no module is called {name}; there are {}", known.join(", "))]
    UnknownModule {
        /// What was asked for.
        name: String,
        /// What the model's modules are called.
        known: Vec<String>,
    },
    /// All that was chosen was excluded too.
    #[error("no linear layer is left that may have an adapter; there are {}", known.join(", "))]
    NoTarget {
        /// What the model's linear layers are called.
        known: Vec<String>,
    },
}

fn proposals(changes: &[MemoryChange]) -> String {
    match changes {
        [] => "\nno checkpointing and no smaller microbatch would make it fit".into(),
        _ => changes
            .iter()
            .map(|change| format!("\nwould fit: {change}"))
            .collect(),
    }
}

impl Error {
    /// With the place of a row, where it has one.
    pub(crate) fn of_row(self, row: &crate::data::Row) -> Self {
        match &row.location {
            Some(location) => Self::Row {
                location: location.clone(),
                source: Box::new(self),
            },
            None => self,
        }
    }

    /// An [`Error::Io`] for `path`; meant for `map_err`.
    pub(crate) fn io(
        action: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io {
            action,
            path,
            source,
        }
    }
}

fn names(paths: &[PathBuf]) -> String {
    let names = paths.iter().filter_map(|path| path.file_name());
    let names: Vec<_> = names.map(|name| name.to_string_lossy()).collect();
    names.join(", ")
}

impl From<rlhf_scale::Error> for Error {
    fn from(error: rlhf_scale::Error) -> Self {
        Self::Core(error.into())
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Core(error.into())
    }
}

impl From<Error> for rlhf_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Core(error) => error,
            other => Self::model(other),
        }
    }
}
