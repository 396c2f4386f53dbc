//! What training a model will need, from its config and the lengths of a batch.

use rlhf_core::{Error as CoreError, Parameters, SequenceBatch};
use rlhf_scale::{
    BlockMemory, CheckpointPolicy, GenerationMemory, GradientCheckpointing, HeadMemory,
    LogprobsMemory, MemoryPlan, Precision, StepMemory,
};

use crate::block_shape::{ModelShape, Tokens};
use crate::{CausalLm, Error, ModelConfig, Result};

/// The lengths of the sequences of a training step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchShape {
    /// Prompt and response tokens of each sequence, in order.
    pub lengths: Vec<(usize, usize)>,
}

impl BatchShape {
    /// `rows` sequences of one length.
    pub fn uniform(rows: usize, prompt: usize, response: usize) -> Self {
        Self {
            lengths: vec![(prompt, response); rows],
        }
    }
}

impl From<&SequenceBatch> for BatchShape {
    fn from(batch: &SequenceBatch) -> Self {
        let lengths = batch.sequences().iter();
        Self {
            lengths: lengths
                .map(|s| (s.prompt.len(), s.response.len()))
                .collect(),
        }
    }
}

/// Text that the model in training generates between its steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GenerationShape {
    /// Sequences decoded at once.
    pub rows: usize,
    /// Tokens of the longest prompt.
    pub prompt: usize,
    /// Most tokens of a response.
    pub max_new_tokens: usize,
}

/// How a model is to be trained, as far as memory is concerned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryOptions {
    /// The format of weights and activations.
    pub precision: Precision,
    /// Which activations are kept.
    pub gradient_checkpointing: GradientCheckpointing,
    /// Sequences whose activations are there at once.
    pub microbatch_size: usize,
    /// Tokens whose logits are there at once; `None` for the default of `linear_logprobs`.
    pub logprob_chunk_rows: Option<usize>,
    /// Whether the loss needs entropies.
    pub entropy: bool,
    /// Whether weights are averaged ([`EmaConfig`](rlhf_scale::EmaConfig)).
    pub averages: bool,
    /// Weights that are trained; `None` for all.
    pub trainable: Option<u64>,
    /// Text generated between the steps.
    pub generation: Option<GenerationShape>,
    /// Bytes that stay beside: a reference policy, a reward model, a value model.
    pub others: u64,
}

impl Default for MemoryOptions {
    /// f32, eight sequences at once, everything kept, every weight trained, nothing beside.
    fn default() -> Self {
        Self {
            precision: Precision::F32,
            gradient_checkpointing: GradientCheckpointing::default(),
            microbatch_size: 8,
            logprob_chunk_rows: None,
            entropy: false,
            averages: false,
            trainable: None,
            generation: None,
            others: 0,
        }
    }
}

impl MemoryOptions {
    /// The options that a model already has: precision, checkpointing, chunks, trained weights.
    pub fn of(model: &CausalLm) -> Self {
        let trained = model.named_parameters();
        Self {
            precision: Precision::of_kind(model.kind()).unwrap_or_default(),
            gradient_checkpointing: model.gradient_checkpointing(),
            logprob_chunk_rows: model.logprob_chunk_rows(),
            trainable: Some(trained.iter().map(|(_, p)| p.numel() as u64).sum()),
            ..Self::default()
        }
    }
}

/// Options under which a step fits, and its plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryChange {
    /// The options proposed.
    pub options: MemoryOptions,
    /// What is needed with them.
    pub plan: MemoryPlan,
}

/// `checkpointing every_block, 4 sequences at once, chunks of 64 tokens: 812.3 MiB`
impl std::fmt::Display for MemoryChange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.options.gradient_checkpointing.policy {
            CheckpointPolicy::None => write!(f, "no checkpointing")?,
            CheckpointPolicy::EveryBlock => write!(f, "checkpointing every_block")?,
            CheckpointPolicy::EveryKth(k) => write!(f, "checkpointing every_kth {k}")?,
            CheckpointPolicy::SquareRoot => write!(f, "checkpointing square_root")?,
        }
        write!(f, ", {} sequences at once", self.options.microbatch_size)?;
        if let Some(rows) = self.options.logprob_chunk_rows {
            write!(f, ", logits of {rows} tokens at once")?;
        }
        let mib = self.plan.peak() as f64 / f64::from(1 << 20);
        write!(f, ": {mib:.1} MiB")
    }
}

impl ModelConfig {
    /// Predicts the memory of a training step of this model by [`Updater`](rlhf_scale::Updater) and
    /// [`Policy::logprobs`](rlhf_core::Policy::logprobs), without loading it.
    ///
    /// What is predicted are tensors. A prompt that several sequences share is counted for each; masks
    /// of attention windows are not counted. Weights of which only some are trained (LoRA) are taken to keep
    /// as many activations as if all were, but have gradients and optimiser state for those alone.
    ///
    /// # Errors
    /// [`InvalidConfig`](CoreError::InvalidConfig) for options that no training could have;
    /// [`Empty`](CoreError::Empty) for a batch without sequences; a sequence longer than the model's
    /// context.
    ///
    /// ```
    /// use rlhf_models::{BatchShape, Gpt2Config, MemoryOptions, ModelConfig};
    ///
    /// # fn main() -> Result<(), rlhf_models::Error> {
    /// let config = ModelConfig::Gpt2(Gpt2Config::default());
    /// let (batch, options) = (BatchShape::uniform(32, 512, 512), MemoryOptions::default());
    /// let plan = config.memory_plan(&batch, &options)?;
    /// let budget = 4 << 30;
    /// assert!(plan.check(budget).is_err());
    /// let proposal = config.memory_changes(&batch, &options, budget)?[0];
    /// assert!(proposal.options.microbatch_size < options.microbatch_size);
    /// assert!(proposal.plan.check(budget).is_ok());
    /// # Ok(())
    /// # }
    /// ```
    pub fn memory_plan(&self, batch: &BatchShape, options: &MemoryOptions) -> Result<MemoryPlan> {
        options.gradient_checkpointing.validate()?;
        let microbatches = check(self, batch, options)?;
        let plans = microbatches.enumerate().map(|(i, microbatch)| {
            let step = step(self, microbatch, i > 0, options);
            step.plan(options.gradient_checkpointing.policy)
        });
        // The largest microbatch decides.
        plans
            .max_by_key(MemoryPlan::peak)
            .ok_or_else(|| empty().into())
    }

    /// Options under which the step fits `budget` bytes, those that cost least first.
    ///
    /// Changed are the logits' chunk (which costs next to nothing), the microbatch (which costs
    /// little, as long as it has some hundreds of tokens) and checkpointing (a forward pass more, or
    /// two), in this order; there is one proposal for each checkpoint policy that can fit, with the
    /// largest microbatch that does. None if nothing helps. Precision is left alone, since it changes
    /// the result.
    ///
    /// # Errors
    /// Those of [`memory_plan`](Self::memory_plan).
    pub fn memory_changes(
        &self,
        batch: &BatchShape,
        options: &MemoryOptions,
        budget: u64,
    ) -> Result<Vec<MemoryChange>> {
        let mut found = Vec::new();
        for policy in policies(options.gradient_checkpointing.policy) {
            if let Some(change) = self.first_fitting(batch, options, policy, budget)? {
                found.push(change);
            }
        }
        Ok(found)
    }

    fn first_fitting(
        &self,
        batch: &BatchShape,
        options: &MemoryOptions,
        policy: CheckpointPolicy,
        budget: u64,
    ) -> Result<Option<MemoryChange>> {
        let mut size = options.microbatch_size.min(batch.lengths.len());
        loop {
            let small_chunk =
                Some(SMALLEST_CHUNK.min(options.logprob_chunk_rows.unwrap_or(usize::MAX)));
            for logprob_chunk_rows in [options.logprob_chunk_rows, small_chunk] {
                let options = MemoryOptions {
                    gradient_checkpointing: GradientCheckpointing {
                        policy,
                        ..options.gradient_checkpointing
                    },
                    microbatch_size: size,
                    logprob_chunk_rows,
                    ..*options
                };
                let plan = self.memory_plan(batch, &options)?;
                if plan.peak() <= budget {
                    return Ok(Some(MemoryChange { options, plan }));
                }
            }
            if size <= 1 {
                return Ok(None);
            }
            size /= 2;
        }
    }
}

/// Fewer rows than this make the products of the output layer slow.
const SMALLEST_CHUNK: usize = 64;

/// The policy in use and those that keep less, the cheapest first.
fn policies(current: CheckpointPolicy) -> Vec<CheckpointPolicy> {
    let mut policies = vec![current];
    let more = [CheckpointPolicy::EveryBlock, CheckpointPolicy::SquareRoot];
    policies.extend(match current {
        CheckpointPolicy::None | CheckpointPolicy::EveryKth(_) => &more[..],
        CheckpointPolicy::EveryBlock => &more[1..],
        CheckpointPolicy::SquareRoot => &[],
    });
    policies
}

impl CausalLm {
    /// [`ModelConfig::memory_plan`] of this model; begin with
    /// [`MemoryOptions::of`] it.
    ///
    /// # Errors
    /// As there.
    pub fn memory_plan(&self, batch: &BatchShape, options: &MemoryOptions) -> Result<MemoryPlan> {
        self.config().memory_plan(batch, options)
    }

    /// The plan of a step that fits `budget` bytes.
    ///
    /// # Errors
    /// [`Error::OverBudget`] with the plan and what would fit; those of
    /// [`memory_plan`](Self::memory_plan).
    pub fn check_memory(
        &self,
        batch: &BatchShape,
        options: &MemoryOptions,
        budget: u64,
    ) -> Result<MemoryPlan> {
        let plan = self.memory_plan(batch, options)?;
        match plan.check(budget) {
            Ok(()) => Ok(plan),
            Err(source) => Err(Error::OverBudget {
                source: Box::new(source),
                changes: self.config().memory_changes(batch, options, budget)?,
            }),
        }
    }
}

fn empty() -> CoreError {
    CoreError::Empty {
        what: "the batch",
        help: "give it at least one sequence",
    }
}

/// The microbatches, after a look at what was given.
fn check<'a>(
    config: &ModelConfig,
    batch: &'a BatchShape,
    options: &MemoryOptions,
) -> Result<std::slice::Chunks<'a, (usize, usize)>> {
    let needed = "must be at least 1";
    if options.microbatch_size == 0 {
        return Err(CoreError::config("microbatch_size", 0, needed).into());
    }
    if options.logprob_chunk_rows == Some(0) {
        return Err(CoreError::config("logprob_chunk_rows", 0, needed).into());
    }
    if batch.lengths.is_empty() {
        return Err(empty().into());
    }
    let max_length = config.max_length();
    let too_long = |&(prompt, response): &(usize, usize)| prompt + response > max_length;
    if let Some(row) = batch.lengths.iter().position(too_long) {
        let (prompt, response) = batch.lengths[row];
        return Err(CoreError::TooLong {
            row,
            length: prompt + response,
            max_length,
        }
        .into());
    }
    Ok(batch.lengths.chunks(options.microbatch_size))
}

/// The step on one microbatch, which `accumulates` if there were others before it.
fn step(
    config: &ModelConfig,
    microbatch: &[(usize, usize)],
    accumulates: bool,
    options: &MemoryOptions,
) -> StepMemory {
    let shape = ModelShape::of(config);
    let precision = options.precision;
    let bytes = precision.kind().elt_size_in_bytes() as u64;
    let tokens = Tokens::of(microbatch.iter().map(|&(p, r)| (p + r) as u64));
    let scored: u64 = microbatch.iter().map(|&(_, r)| r as u64).sum();
    let parameters = shape.parameters();
    let trainable = options.trainable.unwrap_or(parameters);
    let share = |gradients: u64| {
        (gradients as f64 * (trainable as f64 / parameters as f64).min(1.0)) as u64
    };
    let block = |fed| {
        let block = shape.block(precision, tokens, fed);
        BlockMemory {
            gradients: share(block.gradients),
            ..block
        }
    };
    // The last block's feed-forward layer and what follows see the scored tokens alone.
    let mut blocks = vec![block(None); shape.layers.saturating_sub(1) as usize];
    blocks.push(block(Some(scored)));
    let logprobs = LogprobsMemory {
        precision,
        tokens: scored,
        hidden: shape.hidden,
        vocab: shape.vocab,
        entropy: options.entropy,
        softcap: shape.logit_cap,
        chunk_rows: options.logprob_chunk_rows,
    }
    .head();
    let (norm_kept, norm_backward) = shape.last_norm(precision, scored);
    let head = HeadMemory {
        // The rotation is kept as long as any block is.
        norm_kept: norm_kept + shape.rotation(precision, tokens.count),
        norm_backward,
        gradient: share(logprobs.gradient),
        tied: shape.tied,
        ..logprobs
    };
    StepMemory {
        precision,
        parameters,
        trainable,
        embedding_gradient: share(bytes * shape.embeddings),
        blocks,
        head,
        accumulates,
        averages: options.averages,
        others: options.others,
        generation: options
            .generation
            .map_or_else(GenerationMemory::default, |g| {
                shape.generation(
                    precision,
                    g.rows as u64,
                    g.prompt as u64,
                    g.max_new_tokens as u64,
                )
            }),
    }
}
