//! What training a model will need, from its config and the lengths of a batch.

use std::collections::BTreeSet;

use rlhf_core::Error as CoreError;
use rlhf_scale::{
    AdamW, BlockMemory, CheckpointPolicy, GenerationMemory, GradientCheckpointing, HeadMemory,
    LogprobsMemory, MemoryPlan, Precision, StepMemory, kernels,
};
use tch::Device;

use crate::block_memory::Tokens;
use crate::model_shape::ModelShape;
use crate::{CausalLm, Error, ModelConfig, Result};

mod options;

pub use options::{AdapterMemory, BatchShape, GenerationShape, MemoryHead, MemoryOptions};

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
    /// Predicts the memory of a training step of this model by [`Updater`](rlhf_scale::Updater),
    /// without loading it.
    ///
    /// What is predicted are tensors, and for 16 bits on a CPU the kernels that oneDNN compiles for
    /// every shape of product, about 0.8 MiB each; it keeps 1,024 of them unless the environment says
    /// otherwise (`docs/scaling.md`), so that batches of ever new lengths need more of them than one
    /// step does. A prompt that several sequences share is counted for each; masks of attention windows
    /// are not counted. A model of which only some weights are trained, without adapters, is taken to
    /// keep as many activations as if all were.
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
        let kernels = compiled_kernels(microbatches.clone(), options);
        let reads_narrow_gradients = microbatches.len() == 1
            && options.precision == Precision::Bf16
            && AdamW::reads_bf16_gradients(options.device);
        let plans = microbatches.enumerate().map(|(i, microbatch)| {
            let step = StepMemory {
                kernels,
                reads_narrow_gradients,
                ..step(self, microbatch, i > 0, options)
            };
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

impl ModelConfig {
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
                changes: self.memory_changes(batch, options, budget)?,
            }),
        }
    }
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

    /// [`ModelConfig::check_memory`] of this model.
    ///
    /// # Errors
    /// As there.
    pub fn check_memory(
        &self,
        batch: &BatchShape,
        options: &MemoryOptions,
        budget: u64,
    ) -> Result<MemoryPlan> {
        self.config().check_memory(batch, options, budget)
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

/// Tokens of a microbatch, and of them those that the head sees.
fn counts(microbatch: &[(usize, usize)], head: MemoryHead) -> (u64, u64) {
    let all = microbatch.iter().map(|&(p, r)| (p + r) as u64).sum();
    let of_head = microbatch.iter().map(|&(_, response)| match head {
        MemoryHead::Logprobs | MemoryHead::Likelihood => response as u64,
        MemoryHead::Values => response as u64 + 1,
        MemoryHead::Labels(_) => 1,
    });
    (all, of_head.sum())
}

/// Bytes of the kernels that oneDNN compiles, one for every shape of product, and keeps.
fn compiled_kernels(
    microbatches: std::slice::Chunks<'_, (usize, usize)>,
    options: &MemoryOptions,
) -> u64 {
    /// A kernel of bf16 on a processor with AVX-512, the average of GPT-2's and Llama's.
    const BYTES: u64 = 4 * (1 << 20) / 5;
    // Forward and both gradients. A frozen matrix has one gradient less, and an adapter six products
    // of its own, whose kernels are small: measured, as much as five.
    let of_matrix = if options.adapters.is_some() { 5 } else { 3 };
    // Two matrices of attention and two of the feed-forward layer; the last block does all but one,
    // that of queries, keys and values, with the head's tokens.
    let (of_block, of_last_block) = (4 * of_matrix, 3 * of_matrix);
    let on_cpu = options.device == Device::Cpu;
    let own_products = on_cpu && kernels::multiplies(options.precision.kind());
    if options.precision == Precision::F32 || !on_cpu || own_products {
        return 0;
    }
    let of_head = match options.head {
        // Two widths of blocks of the vocabulary, or less.
        MemoryHead::Logprobs | MemoryHead::Likelihood => 2 * 3,
        MemoryHead::Values | MemoryHead::Labels(_) => 3,
    };
    // The last block and the head see some of the tokens.
    let (all, fed): (BTreeSet<u64>, BTreeSet<u64>) =
        microbatches.map(|part| counts(part, options.head)).unzip();
    let products = all.len() as u64 * of_block + fed.len() as u64 * (of_last_block + of_head);
    BYTES * products.min(1024)
}

/// The step on one microbatch, which `accumulates` if there were others before it.
fn step(
    config: &ModelConfig,
    microbatch: &[(usize, usize)],
    accumulates: bool,
    options: &MemoryOptions,
) -> StepMemory {
    let mut shape = ModelShape::of(config);
    shape.on_cpu = options.device == Device::Cpu;
    let precision = options.precision;
    let bytes = precision.kind().elt_size_in_bytes() as u64;
    let tokens = Tokens::of(microbatch.iter().map(|&(p, r)| (p + r) as u64));
    let (_, fed) = counts(microbatch, options.head);
    let parameters = match options.head {
        MemoryHead::Logprobs | MemoryHead::Likelihood => shape.parameters(),
        MemoryHead::Values => shape.trunk_parameters() + shape.hidden,
        MemoryHead::Labels(labels) => shape.trunk_parameters() + labels as u64 * shape.hidden,
    };
    let trainable = match options.adapters {
        Some(_) => 0,
        None => options.trainable.unwrap_or(parameters),
    };
    let share = |gradients: u64| {
        (gradients as f64 * (trainable as f64 / parameters as f64).min(1.0)) as u64
    };
    let block = |fed| {
        let block = shape.block(precision, tokens, fed);
        match options.adapters {
            Some(adapters) => shape.adapted(block, precision, (tokens, fed), adapters),
            None => BlockMemory {
                gradients: share(block.gradients),
                ..block
            },
        }
    };
    // The last block's feed-forward layer and what follows see the head's tokens alone.
    let mut blocks = vec![block(None); shape.layers.saturating_sub(1) as usize];
    blocks.push(block(Some(fed)));
    let (norm_kept, norm_backward) = shape.last_norm(precision, fed);
    let head = HeadMemory {
        // The rotation is kept as long as any block is.
        norm_kept: norm_kept + shape.rotation(precision, tokens.count),
        norm_backward,
        ..head(&shape, fed, options)
    };
    StepMemory {
        precision,
        parameters,
        trainable,
        adapters: options.adapters.map_or(0, |adapters| adapters.weights),
        embedding_gradient: share(bytes * shape.embeddings),
        blocks,
        head: HeadMemory {
            gradient: share(head.gradient),
            ..head
        },
        accumulates,
        reads_narrow_gradients: false,
        averages: options.averages,
        others: options.others,
        kernels: 0,
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

/// What follows the last norm.
fn head(shape: &ModelShape, fed: u64, options: &MemoryOptions) -> HeadMemory {
    let bytes = options.precision.kind().elt_size_in_bytes() as u64;
    let labels = match options.head {
        MemoryHead::Logprobs | MemoryHead::Likelihood => {
            let logprobs = LogprobsMemory {
                precision: options.precision,
                tokens: fed,
                hidden: shape.hidden,
                vocab: shape.vocab,
                entropy: options.entropy,
                softcap: shape.logit_cap,
                frozen: options.adapters.is_some(),
                token_loss: options.head == MemoryHead::Likelihood,
                chunk_rows: options.logprob_chunk_rows,
            };
            return HeadMemory {
                tied: shape.tied && options.adapters.is_none(),
                ..logprobs.head()
            };
        }
        MemoryHead::Values => 1,
        MemoryHead::Labels(labels) => labels as u64,
    };
    let hidden = bytes * fed * shape.hidden;
    HeadMemory {
        kept: hidden,
        forward: (bytes + 4) * fed * labels,
        backward: hidden,
        gradient: bytes * labels * shape.hidden,
        ..HeadMemory::default()
    }
}
