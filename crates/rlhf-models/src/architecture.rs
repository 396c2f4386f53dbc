//! What tells one architecture from another. Everything else is common to all.

use serde_json::{Map, Value};

use crate::tensor_parallel::{Plan, Widths};
use crate::trunk::Trunk;
use crate::weights::Builder;
use crate::{Result, SpecialTokens};

/// The resolved configuration of an architecture, and how its trunk is made of it.
pub(crate) trait Architecture {
    fn names(&self) -> Names;

    fn sizes(&self) -> Sizes;

    fn special_tokens(&self) -> &SpecialTokens;

    fn special_tokens_mut(&mut self) -> &mut SpecialTokens;

    /// Fails for sizes that make no model.
    fn validate(&self) -> rlhf_core::Result<()>;

    /// The fields of `config.json` that are the architecture's own.
    fn to_json(&self) -> Map<String, Value>;

    /// How its modules are split over ranks.
    fn plan(&self) -> Plan;

    /// What must be divisible for that.
    fn widths(&self) -> Widths;

    /// Embedding, blocks and last norm.
    fn build(&self, builder: &mut Builder) -> Result<Trunk>;

    /// Bound of the output layer's logits: `cap * tanh(x / cap)`.
    fn logit_softcap(&self) -> Option<f64> {
        None
    }
}

/// How `config.json` and the weights of a checkpoint call things.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Names {
    /// `model_type` in `config.json`.
    pub(crate) model_type: &'static str,
    /// What the names of transformers' classes begin with.
    pub(crate) class: &'static str,
    /// What that of the language model ends with.
    pub(crate) causal_lm: &'static str,
    /// Prefix of the trunk's weights.
    pub(crate) trunk: &'static str,
    /// The output layer's matrix.
    pub(crate) head: &'static str,
}

impl Names {
    /// Names that most architectures have.
    pub(crate) fn usual(model_type: &'static str, class: &'static str) -> Self {
        Self {
            model_type,
            class,
            causal_lm: "ForCausalLM",
            trunk: "model.",
            head: "lm_head.weight",
        }
    }
}

/// What code that knows no architecture asks of a configuration.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) vocab_size: i64,
    pub(crate) hidden_size: i64,
    pub(crate) layers: i64,
    /// Most tokens of a sequence.
    pub(crate) max_length: i64,
    /// Whether the output layer is the input embedding.
    pub(crate) ties_embeddings: bool,
    /// Standard deviation of fresh weights.
    pub(crate) initializer_range: f64,
}
