//! A model's layers on several ranks (Shoeybi et al. 2019, "Megatron-LM", arXiv 1909.08053).
//!
//! Every architecture has one plan: a list of its modules' names, each with a [`Role`]. The
//! [`Builder`](crate::weights::Builder) looks a module up there, gives its layer this rank's part of the
//! weights, and tells the layer its role; blocks know nothing of it but that they have fewer heads.

use std::sync::Arc;

use rlhf_core::{Collective, Cut};
use rlhf_scale::VocabularyShard;
use tch::Tensor;

use crate::architecture::{Architecture, Sizes};
use crate::{Error, Result};

/// The ranks that a model's layers are split over.
///
/// All ranks of the group load the same model and call the same methods with the same batches; every
/// rank gets the same log-probabilities, logits and losses, and the gradients of its part of the
/// weights. Attention is split by heads and the feed-forward layer by inner units, so that a block
/// needs one sum over the ranks after each of the two; embedding and output layer are split by tokens
/// of the vocabulary. Norms, positions and the biases that follow a sum are the same on all ranks.
///
/// # Bytes
/// Of a pass over `N` packed tokens, `M` of them scored, with `L` blocks and hidden size `H`, in
/// elements of the model's kind that are all-reduced (a ring sends `2 (n - 1) / n` of their bytes from
/// each of `n` ranks):
///
/// | | forward | backward |
/// |---|---|---|
/// | embedding | `N H` | |
/// | block, but the last | `2 N H` | `2 N H` |
/// | last block | `2 M H` | `N H + M H` |
/// | output layer | `3 M` f32, with entropies `4 M` | `M H` |
/// | LoRA on a layer that is split | | `r in` of `A` or `r out` of `B`, f32 |
/// | norms of heads, keys and values of fewer heads than ranks | | their weights |
///
/// A checkpointed block's forward is done again in backward, without its second sum: another `N H`.
/// The gradient norm is one number more a step.
///
/// # Limits
/// The ranks must divide the query heads and the feed-forward layer's inner units; and the key and value
/// heads, or be a multiple of them: each rank then has all keys' and values' projections and computes
/// those of the one head that its queries read.
#[derive(Clone)]
pub struct TensorParallel {
    group: Arc<dyn Collective>,
}

impl std::fmt::Debug for TensorParallel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TensorParallel")
            .field("rank", &self.rank())
            .field("ranks", &self.ranks())
            .finish()
    }
}

/// What a module does in a model that is split.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    /// A linear layer from what all ranks have to a part of its outputs, which are so many blocks side
    /// by side (query, key and value in one matrix: 3), each of which is split.
    Column { blocks: i64 },
    /// A column layer of keys or values. Where there are fewer heads than ranks, each rank has all of
    /// it and computes one head.
    KeyValue,
    /// A linear layer from a part of its inputs to a sum over ranks.
    Row,
    /// Rows of tokens: an embedding, or the output layer.
    Vocabulary,
    /// The same on all ranks, each of which uses it for its own heads.
    Shared,
}

/// Modules by the end of their names. What is not listed is the same on all ranks.
pub(crate) type Plan = &'static [(&'static str, Role)];

/// Heads and inner units of an architecture's blocks, by their names in `config.json`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Widths {
    pub(crate) heads: (&'static str, i64),
    pub(crate) kv_heads: (&'static str, i64),
    pub(crate) head_dim: i64,
    pub(crate) inner: (&'static str, i64),
}

impl TensorParallel {
    /// A model on these ranks.
    pub fn new(group: Arc<dyn Collective>) -> Self {
        Self { group }
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.group.rank()
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.group.size()
    }

    /// The group of the ranks.
    pub fn group(&self) -> &Arc<dyn Collective> {
        &self.group
    }

    /// This rank's tokens of a vocabulary.
    pub(crate) fn vocabulary(&self, size: i64) -> VocabularyShard {
        let cut = Cut::vocabulary();
        let widest = cut.len(size, 0, self.ranks());
        VocabularyShard {
            first: (self.rank() as i64 * widest).min(size),
            widest,
            vocabulary: size,
            group: Arc::clone(&self.group),
        }
    }
}

/// A model that is being built on several ranks.
#[derive(Debug, Clone)]
pub(crate) struct Splitting {
    pub(crate) ranks: TensorParallel,
    plan: Plan,
    widths: Widths,
}

/// What a linear layer must know of the other ranks.
#[derive(Clone)]
pub(crate) struct Shard {
    pub(crate) part: Part,
    pub(crate) group: Arc<dyn Collective>,
}

impl Shard {
    /// Whether what the ranks compute has to be summed.
    pub(crate) fn has_some_inputs(&self) -> bool {
        matches!(self.part, Part::Inputs { .. })
    }
}

/// How a layer's part is used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Part {
    /// Some outputs.
    Outputs,
    /// All outputs are here; those from `first` on are computed, `count` of them.
    SomeOf { first: i64, count: i64 },
    /// Some inputs, of `all`.
    Inputs { first: i64, all: i64 },
}

impl Splitting {
    /// Fails where the ranks do not divide the model.
    pub(crate) fn new(ranks: &TensorParallel, architecture: &dyn Architecture) -> Result<Self> {
        let Widths {
            heads,
            kv_heads,
            inner,
            ..
        } = architecture.widths();
        let Sizes { vocab_size, .. } = architecture.sizes();
        let n = ranks.ranks() as i64;
        let refuse = |(field, size): (&'static str, i64), reason| {
            Err(Error::CannotSplit {
                field,
                size,
                ranks: ranks.ranks(),
                reason,
            })
        };
        if heads.1 % n != 0 {
            return refuse(heads, "the number of ranks must divide it");
        }
        if kv_heads.1 % n != 0 && n % kv_heads.1 != 0 {
            return refuse(
                kv_heads,
                "the number of ranks must divide it or be a multiple",
            );
        }
        if inner.1 % n != 0 {
            return refuse(inner, "the number of ranks must divide it");
        }
        let widest = Cut::vocabulary().len(vocab_size, 0, ranks.ranks());
        if widest * (n - 1) >= vocab_size {
            return refuse(
                ("vocab_size", vocab_size),
                "a rank would have no token of it",
            );
        }
        Ok(Self {
            ranks: ranks.clone(),
            plan: architecture.plan(),
            widths: architecture.widths(),
        })
    }

    /// This rank's part of a whole tensor, in memory of its own.
    pub(crate) fn part(&self, cut: Cut, whole: &Tensor) -> Result<Tensor> {
        Ok(cut.take(whole, self.ranks.rank(), self.ranks.ranks())?)
    }

    /// The shape of that.
    pub(crate) fn part_shape(&self, cut: Cut, whole: &[i64]) -> Vec<i64> {
        cut.shape(whole, self.ranks.rank(), self.ranks.ranks())
    }

    /// The role of a module, by its name.
    fn role(&self, module: &str) -> Option<Role> {
        let fits = |end: &str| {
            module
                .strip_suffix(end)
                .is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
        };
        let found = self.plan.iter().find(|(end, _)| fits(end));
        found.map(|(_, role)| *role)
    }

    /// Whether this rank has all keys and values and computes one head of them.
    fn repeats_kv(&self) -> bool {
        (self.widths.kv_heads.1 as usize) < self.ranks.ranks()
    }

    /// Query heads of this rank.
    pub(crate) fn heads(&self) -> i64 {
        self.widths.heads.1 / self.ranks.ranks() as i64
    }

    /// How a weight of so many dimensions is cut; `None` where each rank has all of it. Matrices are
    /// `[out, in]` unless `transposed`.
    pub(crate) fn cut(&self, weight: &str, dims: usize, transposed: bool) -> Option<Cut> {
        let module = weight.rsplit_once('.').map_or(weight, |(module, _)| module);
        let (outputs, inputs) = match transposed {
            true => (dims as i64 - 1, 0),
            false => (0, 1),
        };
        match self.role(module)? {
            Role::Column { blocks } => Some(Cut {
                dim: outputs,
                blocks,
            }),
            Role::KeyValue if self.repeats_kv() => None,
            Role::KeyValue => Some(Cut {
                dim: outputs,
                blocks: 1,
            }),
            // The bias comes after the sum.
            Role::Row if dims < 2 => None,
            Role::Row => Some(Cut {
                dim: inputs,
                blocks: 1,
            }),
            Role::Vocabulary => Some(Cut::vocabulary()),
            Role::Shared => None,
        }
    }

    /// How the two factors of an adapter on a module are cut, `A` `[r, in]` and `B` `[out, r]`.
    pub(crate) fn adapter_cuts(&self, module: &str) -> (Option<Cut>, Option<Cut>) {
        let cut = |dim, blocks| Some(Cut { dim, blocks });
        match self.role(module) {
            Some(Role::Column { blocks }) => (None, cut(0, blocks)),
            Some(Role::KeyValue) if !self.repeats_kv() => (None, cut(0, 1)),
            Some(Role::Row) => (cut(1, 1), None),
            _ => (None, None),
        }
    }

    /// What the linear layer of that name must know; `inputs` are those of all ranks.
    pub(crate) fn shard(&self, module: &str, inputs: i64) -> Option<Shard> {
        let (rank, n) = (self.ranks.rank() as i64, self.ranks.ranks() as i64);
        let part = match self.role(module)? {
            Role::Column { .. } => Part::Outputs,
            Role::KeyValue if self.repeats_kv() => {
                let Widths {
                    kv_heads, head_dim, ..
                } = self.widths;
                Part::SomeOf {
                    first: rank / (n / kv_heads.1) * head_dim,
                    count: head_dim,
                }
            }
            Role::KeyValue => Part::Outputs,
            Role::Row => Part::Inputs {
                first: rank * (inputs / n),
                all: inputs,
            },
            Role::Vocabulary | Role::Shared => return None,
        };
        Some(Shard {
            part,
            group: Arc::clone(self.ranks.group()),
        })
    }

    /// The ranks, where the module is the same on all and each uses it for its own heads.
    pub(crate) fn shared(&self, module: &str) -> Option<Arc<dyn Collective>> {
        let is_shared = self.role(module) == Some(Role::Shared);
        is_shared.then(|| Arc::clone(self.ranks.group()))
    }
}

/// The modules of Llama and its relatives.
pub(crate) const LLAMA_PLAN: Plan = &[
    ("embed_tokens", Role::Vocabulary),
    ("self_attn.q_proj", Role::Column { blocks: 1 }),
    ("self_attn.k_proj", Role::KeyValue),
    ("self_attn.v_proj", Role::KeyValue),
    ("self_attn.o_proj", Role::Row),
    ("self_attn.q_norm", Role::Shared),
    ("self_attn.k_norm", Role::Shared),
    ("mlp.gate_proj", Role::Column { blocks: 1 }),
    ("mlp.up_proj", Role::Column { blocks: 1 }),
    ("mlp.down_proj", Role::Row),
    ("lm_head", Role::Vocabulary),
];

/// Those of GPT-2: query, key and value side by side in one matrix.
pub(crate) const GPT2_PLAN: Plan = &[
    ("wte", Role::Vocabulary),
    ("attn.c_attn", Role::Column { blocks: 3 }),
    ("attn.c_proj", Role::Row),
    ("mlp.c_fc", Role::Column { blocks: 1 }),
    ("mlp.c_proj", Role::Row),
    ("lm_head", Role::Vocabulary),
];

/// Those of GPT-NeoX: query, key and value of a head lie together, and heads side by side.
pub(crate) const GPT_NEOX_PLAN: Plan = &[
    ("embed_in", Role::Vocabulary),
    ("attention.query_key_value", Role::Column { blocks: 1 }),
    ("attention.dense", Role::Row),
    ("mlp.dense_h_to_4h", Role::Column { blocks: 1 }),
    ("mlp.dense_4h_to_h", Role::Row),
    ("embed_out", Role::Vocabulary),
];
