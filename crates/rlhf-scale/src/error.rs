//! What can go wrong in an update or with its files.

use std::path::PathBuf;

use tch::{Device, Kind};

use crate::MemoryPlan;
use crate::io::TensorProblem;
use crate::memory::mib;

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of `rlhf-scale`.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A configuration, a file or libtorch itself: the errors shared by all crates.
    #[error(transparent)]
    Core(#[from] rlhf_core::Error),
    /// Two tensors have the same name, so that a file could not tell them apart.
    #[error("two tensors are named {name:?}")]
    DuplicateName {
        /// The name.
        name: String,
    },
    /// A parameter that backward never gives a gradient.
    #[error("parameter {name:?} is not a leaf that requires gradients")]
    NotTrainable {
        /// The parameter.
        name: String,
    },
    /// A parameter of a kind that is neither trained nor averaged.
    #[error("parameter {name:?} is {kind:?}; it must be Float, Double, Half or BFloat16")]
    UnsupportedParameter {
        /// The parameter.
        name: String,
        /// Its kind.
        kind: Kind,
    },
    /// A parameter whose elements overlap or have gaps between them.
    #[error("parameter {name:?} with strides {strides:?} is a view; train the tensor it views")]
    NotDense {
        /// The parameter.
        name: String,
        /// Its strides.
        strides: Vec<i64>,
    },
    /// Two stages of a pipeline are at different passes.
    #[error(
        "this stage is at pass {pass}, its neighbour at {}: all stages must make the same passes, and \
         go back through them, in one order",
        found.map_or("one without a gradient".into(), |found| found.to_string())
    )]
    PipelineOrder {
        /// The pass of this stage.
        pass: u64,
        /// What the neighbour sent.
        found: Option<u64>,
    },
    /// A microbatch's loss has more or fewer than one element.
    #[error("the loss of microbatch {microbatch} is {shape:?}; reduce it to one number")]
    LossShape {
        /// Index of the microbatch.
        microbatch: usize,
        /// Shape of its loss.
        shape: Vec<i64>,
    },
    /// A microbatch's loss does not depend on any parameter.
    #[error("the loss of microbatch {microbatch} has no gradient; was it computed under no_grad?")]
    LossWithoutGraph {
        /// Index of the microbatch.
        microbatch: usize,
    },
    /// After backward no parameter has a gradient.
    #[error("none of the {parameters} parameters has a gradient")]
    NoGradients {
        /// How many parameters there are.
        parameters: usize,
    },
    /// A loss is NaN or infinite; nothing was updated.
    #[error(
        "the loss is {loss} (first not finite in microbatch {microbatch}); nothing was updated"
    )]
    NonFiniteLoss {
        /// Sum of the microbatch losses.
        loss: f64,
        /// The first microbatch whose loss is not finite.
        microbatch: usize,
    },
    /// A gradient is NaN or infinite although the loss is not; nothing was updated.
    #[error(
        "the gradient of {parameter:?} is not finite (the loss is {loss}); nothing was updated"
    )]
    NonFiniteGradient {
        /// The first such parameter by name.
        parameter: String,
        /// Sum of the microbatch losses.
        loss: f64,
    },
    /// Every gradient is finite but their squares overflow f32; nothing was updated.
    #[error("the gradient norm overflows f32 (the loss is {loss}); nothing was updated")]
    NormOverflow {
        /// Sum of the microbatch losses.
        loss: f64,
    },
    /// A gradient is NaN or infinite at a loss scale that may not fall any further; nothing was
    /// updated.
    #[error(
        "the gradient of {parameter:?} is not finite at a loss scale of {scale}, and the scale may \
         not fall below {floor} (the loss is {loss}); nothing was updated"
    )]
    LossScaleExhausted {
        /// The first such parameter by name.
        parameter: String,
        /// Sum of the microbatch losses.
        loss: f64,
        /// The loss scale, which stays.
        scale: f64,
        /// The smallest scale that the configuration allows.
        floor: f64,
    },
    /// A pattern of a parameter group fits no parameter.
    #[error("no parameter's name fits the pattern {pattern:?} of a parameter group")]
    UnmatchedPattern {
        /// The pattern.
        pattern: String,
    },
    /// All parameters that a group's patterns fit are in groups before it.
    #[error("parameter group {group} {patterns:?} is empty: earlier groups have all that it names")]
    ShadowedGroup {
        /// Position of the group.
        group: usize,
        /// Its patterns.
        patterns: Vec<String>,
    },
    /// Averaged weights stand in for the trained ones.
    #[error("averages are in the place of the weights; restore these first")]
    EmaApplied,
    /// Two lists that belong together have different lengths.
    #[error("{outputs} outputs but {grad_outputs} output gradients")]
    GradOutputCount {
        /// Number of outputs.
        outputs: usize,
        /// Number of output gradients.
        grad_outputs: usize,
    },
    /// A gradient cannot belong to its tensor.
    #[error(
        "a gradient of shape {grad_shape:?}, {grad_kind:?} on {grad_device:?} for a tensor of \
         shape {shape:?}, {kind:?} on {device:?}"
    )]
    GradMismatch {
        /// Shape of the tensor.
        shape: Vec<i64>,
        /// Kind of the tensor.
        kind: Kind,
        /// Device of the tensor.
        device: Device,
        /// Shape of the gradient.
        grad_shape: Vec<i64>,
        /// Kind of the gradient.
        grad_kind: Kind,
        /// Device of the gradient.
        grad_device: Device,
    },
    /// A tensor that a backward closure had saved was changed in place before it ran.
    #[error(
        "a saved tensor of shape {shape:?} was changed in place {changes} times before backward; \
         save a copy, or change it later"
    )]
    SavedTensorChanged {
        /// Shape of the tensor.
        shape: Vec<i64>,
        /// How often it was changed.
        changes: u32,
    },
    /// Gradients that [`linear_token_loss`](crate::linear_token_loss) made are given out once.
    #[error("backward through a token loss for the second time: its gradients are gone")]
    SecondBackward,
    /// Kinds that [`linear_logprobs`](crate::linear_logprobs) cannot compute with.
    #[error(
        "hidden is {hidden:?}, weight {weight:?}, bias {bias:?} and ids {ids:?}; the first three \
         must be one of Float, BFloat16 and Half, the ids Int64"
    )]
    LogprobKinds {
        /// Kind of the hidden states.
        hidden: Kind,
        /// Kind of the output layer.
        weight: Kind,
        /// Kind of its bias.
        bias: Option<Kind>,
        /// Kind of the token ids.
        ids: Kind,
    },
    /// Memory that cannot hold the tensor asked for.
    #[error("{bytes} bytes{alignment} cannot hold a {kind:?} tensor of shape {shape:?}")]
    Memory {
        /// Bytes offered.
        bytes: usize,
        /// Says so if they are not aligned to the element size.
        alignment: &'static str,
        /// Shape asked for.
        shape: Vec<i64>,
        /// Kind asked for.
        kind: Kind,
    },
    /// A training step that is predicted not to fit.
    #[error("the step needs {} MiB, the budget is {} MiB:\n{plan}", mib(plan.peak()), mib(*budget))]
    OverBudget {
        /// Bytes that there are.
        budget: u64,
        /// What is needed.
        plan: Box<MemoryPlan>,
    },
    /// A tensor file does not hold the tensors it should; all problems are listed.
    #[error("{} does not fit:{}", path.display(), list(problems))]
    TensorFile {
        /// The file.
        path: PathBuf,
        /// Every problem found.
        problems: Vec<TensorProblem>,
    },
    /// A kind that safetensors files cannot hold.
    #[error("tensor {name:?} is {kind:?}, which safetensors cannot hold")]
    UnsupportedKind {
        /// The tensor.
        name: String,
        /// Its kind.
        kind: Kind,
    },
    /// What a launcher sets is missing or makes no sense.
    #[error(
        "{variable} {problem}; start the program by torchrun, or by anything that sets RANK, \
         WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
    )]
    Environment {
        /// The environment variable.
        variable: &'static str,
        /// What is wrong with it.
        problem: String,
    },
    /// The processes of a run did not find each other.
    #[error(
        "rank {rank} of {size} could not join at {address} within {seconds} s{}: {reason}",
        absent(ranks)
    )]
    Rendezvous {
        /// This process.
        rank: usize,
        /// How many there should be.
        size: usize,
        /// Where they were to meet.
        address: String,
        /// The time limit.
        seconds: f64,
        /// The ranks that were never heard of, where that could be found out.
        ranks: Vec<usize>,
        /// What c10d said.
        reason: String,
    },
    /// Processes of a run are gone: killed, stopped, or ended early.
    #[error("{operation}: {} gone: {reason}", who(ranks))]
    RanksLost {
        /// What was being done.
        operation: &'static str,
        /// The ranks.
        ranks: Vec<usize>,
        /// How it was noticed.
        reason: String,
    },
    /// An operation of several processes took longer than the time limit.
    #[error(
        "{operation} did not end within {seconds} s; all processes are alive{}",
        absent(ranks)
    )]
    OperationTimeout {
        /// The operation.
        operation: &'static str,
        /// The time limit.
        seconds: f64,
        /// The ranks that were busy with something else.
        ranks: Vec<usize>,
    },
    /// What one process tells the others when its loss cannot be computed.
    #[error("{0}")]
    LossFailed(String),
    /// Another process failed in a step that all do together; none has changed anything.
    #[error("rank {rank} failed: {message}")]
    PeerFailed {
        /// The rank.
        rank: usize,
        /// Its error.
        message: String,
    },
    /// Another of the ranks that have a model together could not read or write its part.
    #[error("another rank of the model failed: see what it says itself")]
    ModelRankFailed,
    /// An operation of several processes failed although all are alive.
    #[error("{operation}: {reason}")]
    Communication {
        /// The operation.
        operation: &'static str,
        /// What c10d said.
        reason: String,
    },
    /// A process group that failed before. No group of the run can be used any more.
    #[error("{operation}: the process groups of this run broke before: {reason}")]
    GroupBroken {
        /// What was to be done.
        operation: &'static str,
        /// The first failure.
        reason: String,
    },
    /// Ranks or tensors that an operation of several processes cannot work with.
    #[error("{operation}: {reason}")]
    InvalidOperation {
        /// The operation.
        operation: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// A process that this one started did not end well.
    #[error("rank {rank} ended with {status}{}", said(stderr))]
    ProcessFailed {
        /// The first rank that did not.
        rank: usize,
        /// Its exit status.
        status: String,
        /// The end of what it wrote to its standard error.
        stderr: String,
    },
    /// A saved state belongs to an updater that is configured otherwise.
    #[error("{} was saved with {field} = {saved}, but this updater has {current}", path.display())]
    ConfigMismatch {
        /// The file.
        path: PathBuf,
        /// The first field that differs, e.g. `"optimizer.lr"`.
        field: String,
        /// Its value in the file, as JSON.
        saved: String,
        /// Its value in the updater, as JSON.
        current: String,
    },
}

impl From<tch::TchError> for Error {
    fn from(error: tch::TchError) -> Self {
        Self::Core(error.into())
    }
}

/// For implementations of the model traits, which return the core's error.
impl From<Error> for rlhf_core::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Core(error) => error,
            other => Self::model(other),
        }
    }
}

/// "rank 2 is", "ranks 1, 2 are".
fn who(ranks: &[usize]) -> String {
    match ranks {
        [rank] => format!("rank {rank} is"),
        _ => format!("ranks {} are", joined(ranks)),
    }
}

fn absent(ranks: &[usize]) -> String {
    match ranks {
        [] => String::new(),
        [rank] => format!(" (rank {rank} was not there)"),
        _ => format!(" (ranks {} were not there)", joined(ranks)),
    }
}

fn said(stderr: &str) -> String {
    match stderr.trim() {
        "" => String::new(),
        text => format!(": {text}"),
    }
}

fn joined(ranks: &[usize]) -> String {
    let ranks: Vec<String> = ranks.iter().map(usize::to_string).collect();
    ranks.join(", ")
}

fn list(problems: &[TensorProblem]) -> String {
    problems
        .iter()
        .map(|problem| format!("\n  {problem}"))
        .collect()
}
