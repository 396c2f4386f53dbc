//! What can go wrong in the vocabulary crate.

use std::path::PathBuf;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-core`, and the one that the model traits return.
///
/// Implementations of [`Policy`](crate::Policy) and its siblings wrap an error type of their own
/// with [`Error::model`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A batch, a prompt or a mask has nothing in it.
    #[error("{what} is empty; {help}")]
    Empty {
        /// What has no elements.
        what: &'static str,
        /// What to do about it.
        help: &'static str,
    },
    /// A prompt of a batch has no token.
    #[error(
        "sequence {row} has an empty prompt; give it at least one token (a BOS token if nothing else)"
    )]
    EmptyPrompt {
        /// Position of the sequence in its batch.
        row: usize,
    },
    /// A token id that no vocabulary can hold.
    #[error("sequence {row} has token id {id} at position {position}, outside 0..{vocab_size}")]
    TokenOutOfRange {
        /// Position of the sequence in its batch.
        row: usize,
        /// Position of the token in the sequence.
        position: usize,
        /// The offending id.
        id: i64,
        /// Size of the vocabulary, `i64::MAX` where it is not known.
        vocab_size: i64,
    },
    /// A response token is not among those that its sampling filter kept.
    #[error(
        "token {id} at position {position} of response {row} is not among those kept when it was sampled"
    )]
    TokenNotKept {
        /// Row in the batch.
        row: usize,
        /// Position in the response.
        position: usize,
        /// The token.
        id: i64,
    },
    /// A sequence is longer than the model's context window.
    #[error("sequence {row} has {length} tokens but the model's context window is {max_length}")]
    TooLong {
        /// Position of the sequence in its batch.
        row: usize,
        /// Tokens in the sequence.
        length: usize,
        /// Tokens that fit.
        max_length: usize,
    },
    /// Two tensors that belong together have different shapes.
    #[error("{left} is {left_shape:?} but {right} is {right_shape:?}")]
    ShapeMismatch {
        /// Name of the first tensor.
        left: &'static str,
        /// Its shape.
        left_shape: Vec<i64>,
        /// Name of the second tensor.
        right: &'static str,
        /// Its shape, or the shape that was expected.
        right_shape: Vec<i64>,
    },
    /// Two lists that belong together have different lengths.
    #[error("{left} has {left_len} elements but {right} has {right_len}")]
    LengthMismatch {
        /// Name of the first list.
        left: &'static str,
        /// Its length.
        left_len: usize,
        /// Name of the second list.
        right: &'static str,
        /// Its length.
        right_len: usize,
    },
    /// A number that must be finite is not.
    #[error("{what} of row {row} is {value}, not a finite number")]
    NonFinite {
        /// What is not finite, e.g. `"score"`.
        what: &'static str,
        /// Row in the batch.
        row: usize,
        /// The value.
        value: f64,
    },
    /// A field of a configuration has a value that makes no sense.
    #[error("{field} = {value}: {reason}")]
    InvalidConfig {
        /// The field's path, e.g. `"generation.top_p"`.
        field: &'static str,
        /// The value, as the user wrote it.
        value: String,
        /// Which values are allowed.
        reason: &'static str,
    },
    /// A file could not be read or written.
    #[error("{action} {}: {source}", path.display())]
    Io {
        /// What was being done, e.g. `"writing"`.
        action: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The operating system's answer.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{}: {reason}", path.display())]
    Corrupt {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// libtorch refused an operation (out of memory included).
    #[error("libtorch: {message}")]
    Tensor {
        /// The first part of libtorch's message, without the C++ backtrace.
        message: String,
    },
    /// Another of the processes that train together failed in a step that all do.
    #[error("rank {rank} failed: {message}")]
    Peer {
        /// Which.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// A model reported an error of its own.
    #[error("model: {source}")]
    Model {
        /// The model's error.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Error {
    /// Wraps an error of a model of one's own.
    pub fn model(source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        Self::Model {
            source: source.into(),
        }
    }

    /// An [`Error::Io`] for `path`; meant for `map_err`.
    pub fn io(
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

    /// An [`Error::InvalidConfig`].
    pub fn config(field: &'static str, value: impl ToString, reason: &'static str) -> Self {
        Self::InvalidConfig {
            field,
            value: value.to_string(),
            reason,
        }
    }
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Tensor {
            message: first_part(&error.to_string()),
        }
    }
}

/// libtorch appends kilobytes of C++ frames to its messages; users need what comes before.
fn first_part(message: &str) -> String {
    let end = message
        .find("\nException raised from")
        .or_else(|| message.find("\nframe #"))
        .unwrap_or(message.len());
    message[..end].trim().to_string()
}

/// Fails with [`Error::ShapeMismatch`] unless both tensors have the same shape.
pub fn check_same_shape(
    left: (&'static str, &tch::Tensor),
    right: (&'static str, &tch::Tensor),
) -> Result<()> {
    let (left_shape, right_shape) = (left.1.size(), right.1.size());
    if left_shape == right_shape {
        return Ok(());
    }
    Err(Error::ShapeMismatch {
        left: left.0,
        left_shape,
        right: right.0,
        right_shape,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backtraces_are_cut() {
        let long = "shapes cannot be multiplied\nException raised from x at y.cpp:1\nframe #0: z";
        assert_eq!(first_part(long), "shapes cannot be multiplied");
    }
}
