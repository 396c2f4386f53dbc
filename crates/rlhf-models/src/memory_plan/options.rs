//! What is to be planned.

use rlhf_core::SequenceBatch;
use rlhf_scale::{GradientCheckpointing, Precision};
use tch::Device;

use crate::model::Model;
use crate::{CausalLm, SequenceClassifier, ValueHeadModel};

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

/// What a model gives, of which the loss is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum MemoryHead {
    /// Log-probabilities of the responses: [`Policy::logprobs`](rlhf_core::Policy::logprobs).
    #[default]
    Logprobs,
    /// Their likelihood, as SFT has it: [`Policy::weighted_nll`](rlhf_core::Policy::weighted_nll).
    Likelihood,
    /// A value for every state along the responses: [`ValueHeadModel`].
    Values,
    /// So many numbers a sequence: [`SequenceClassifier`].
    Labels(usize),
}

/// Adapters beside frozen weights, on every linear layer of the blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AdapterMemory {
    /// All trained weights, which are f32: of rank `r` an adapter has `r (in + out)`.
    pub weights: u64,
    /// The sum of all ranks.
    pub ranks: u64,
}

/// How a model is to be trained, as far as memory is concerned.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MemoryOptions {
    /// The format of weights and activations.
    pub precision: Precision,
    /// Where the model is. On a CPU the kernels that 16-bit products need are counted.
    pub device: Device,
    /// What the loss is made of.
    pub head: MemoryHead,
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
    /// Weights that are trained; `None` for all. What adapters are beside is not.
    pub trainable: Option<u64>,
    /// Adapters, which are trained instead of the weights.
    pub adapters: Option<AdapterMemory>,
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
            device: Device::Cpu,
            head: MemoryHead::default(),
            gradient_checkpointing: GradientCheckpointing::default(),
            microbatch_size: 8,
            logprob_chunk_rows: None,
            entropy: false,
            averages: false,
            trainable: None,
            adapters: None,
            generation: None,
            others: 0,
        }
    }
}

impl MemoryOptions {
    /// The options that a model already has: precision, checkpointing, chunks, trained weights.
    pub fn of(model: &CausalLm) -> Self {
        Self {
            logprob_chunk_rows: model.logprob_chunk_rows(),
            ..Self::of_model(&model.model, MemoryHead::Logprobs)
        }
    }

    /// Those of a critic.
    pub fn of_value_model(model: &ValueHeadModel) -> Self {
        Self::of_model(&model.model, MemoryHead::Values)
    }

    /// Those of a reward model.
    pub fn of_classifier(model: &SequenceClassifier) -> Self {
        let labels = model.num_labels() as usize;
        Self::of_model(&model.model, MemoryHead::Labels(labels))
    }

    fn of_model<H>(model: &Model<H>, head: MemoryHead) -> Self {
        let trained: u64 = model.trainable().iter().map(|p| p.1.numel() as u64).sum();
        let adapters = model.adapters.as_ref().map(|adapters| AdapterMemory {
            weights: trained,
            ranks: adapters.ranks(),
        });
        Self {
            precision: Precision::of_kind(model.kind()).unwrap_or_default(),
            device: model.device(),
            head,
            gradient_checkpointing: model.checkpointing,
            trainable: Some(if adapters.is_some() { 0 } else { trained }),
            adapters,
            ..Self::default()
        }
    }
}
