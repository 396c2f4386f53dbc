//! What the training of a block keeps in memory, and what decoding takes.

use rlhf_scale::{BlockMemory, GenerationMemory, Precision, kernels, recorded};

use crate::memory_plan::AdapterMemory;
use crate::model_shape::{ModelShape, Norm, Projection, when};

/// The tokens of a microbatch, as attention sees them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Tokens {
    pub(crate) count: u64,
    /// Squares of the sequences' lengths: all, and those of the largest kernel call.
    pub(crate) squares: u64,
    pub(crate) largest_call: u64,
    /// Elements of the kernel calls' masks.
    pub(crate) masks: u64,
    /// Whether there are several kernel calls, whose outputs are put together in a copy.
    pub(crate) ragged: bool,
}

impl Tokens {
    /// Neighbours of one length are one kernel call.
    pub(crate) fn of(lengths: impl IntoIterator<Item = u64>) -> Self {
        let mut calls: Vec<(u64, u64)> = Vec::new();
        for length in lengths {
            match calls.last_mut() {
                Some((rows, of)) if *of == length => *rows += 1,
                _ => calls.push((1, length)),
            }
        }
        let squares = || calls.iter().map(|(rows, length)| rows * length * length);
        Self {
            count: calls.iter().map(|(rows, length)| rows * length).sum(),
            squares: squares().sum(),
            largest_call: squares().max().unwrap_or(0),
            masks: calls.iter().map(|(_, length)| length * length).sum(),
            ragged: calls.len() > 1,
        }
    }
}

impl ModelShape {
    /// A block on `N` tokens.
    ///
    /// What autograd keeps, in order (`H` hidden, `I` intermediate, `Q` and `K` the widths of queries
    /// and keys; found by [`measure_memory`](rlhf_scale::measure_memory), which the tests hold this
    /// to). RMS norms of 16-bit models compute in f32:
    ///
    /// | tensor | kept by | shape |
    /// |---|---|---|
    /// | input (f32 for RMS norm) | norm | `[N, H]` |
    /// | mean and root, or root alone | norm | `[N]` each |
    /// | normalised, before the scale (f32 for Gemma) | RMS norm, for its weight | `[N, H]` |
    /// | normalised | projections to queries, keys, values | `[N, H]` |
    /// | queries and keys, twice as above | (norms of heads only) those norms | `[N, Q + K]` |
    /// | their and the values' common product | (GPT-NeoX only) values, which are part of it | `[N, 3H]` |
    /// | queries, keys, values, rotated | attention | `[N, Q + 2K]` |
    /// | attended, and the logarithms of sums | attention, output projection | `[N, Q]`, `[N, heads]` f32 |
    /// | attended, put together | output projection, if there are several kernel calls | `[N, Q]` |
    /// | capped scores, their softmax (f32; and in 16 bits), a mask a call | (capped only, in place of the logarithms) attention | `[heads, T, T]` a sequence |
    /// | attended, of the tokens that are scored | (last block only, in place of what was put together) output projection | `[M, Q]` |
    /// | attended, and normalised | (norms after sublayers only) as the first norm | `[N, H]` f32 each |
    /// | sum | second norm, as the first; in parallel blocks it is the input | `[N, H]` and so on |
    /// | feed-forward input | activation | `[N, I]` |
    /// | activated | output projection, or the product with the gated branch | `[N, I]` |
    /// | gated branch, product | (gated only) product, output projection | `[N, I]` each |
    ///
    /// `fed` are the tokens that go on after attention: in the last block those that are scored, in
    /// the others all (`None`). What follows attention then has as many rows.
    pub(crate) fn block(
        &self,
        precision: Precision,
        tokens: Tokens,
        fed: Option<u64>,
    ) -> BlockMemory {
        let bytes = bytes_of(precision);
        let (hidden, inner) = (self.hidden, self.intermediate);
        let single = self.has_single_passes(precision);
        let at_once = self.attends_at_once(precision);
        let head_norms = when(self.head_norms, self.head_norms_kept(precision));
        let rotated = match self.projection {
            Projection::FusedThenRotated => self.query + self.key,
            Projection::Fused | Projection::Separate => 0,
        };
        // The fused kernel keeps its output; what goes into the output projection is that or, of
        // several calls, a copy, unless rows are chosen from it.
        let copy = (tokens.ragged || self.score_cap) && fed.is_none();
        let attended = match at_once {
            true => when(fed.is_none(), self.query),
            false => when(!self.score_cap, self.query) + when(copy, self.query),
        };
        let before = self.norm_kept(precision)
            + head_norms
            + bytes * (self.query + 2 * self.key + rotated + attended)
            + when(!self.score_cap && !at_once, 4 * self.heads);
        let feed_forward = match (self.gated, single && self.silu) {
            (true, true) => 3 * inner,
            (true, false) => 4 * inner,
            (false, _) => 2 * inner,
        };
        // Parallel sublayers share their input, and chosen rows are tensors of their own.
        let shared = when(self.parallel && fed.is_none(), bytes * hidden);
        let after = self.norm_kept(precision) - shared
            + when(self.after_norms, 2 * (8 * hidden + 4))
            + bytes * (feed_forward + when(fed.is_some(), self.query));
        let fed = fed.unwrap_or(tokens.count);
        let (scores, mut attention_backward) = self.capped_scores(precision, tokens);
        if at_once {
            // The gradients of the stream, of what was attended, and of queries, keys and values, those
            // of the last two in f32, too.
            attention_backward = tokens.count
                * (bytes * (hidden + 2 * self.query + 2 * self.key) + 4 * 2 * self.key);
        }
        // The first weight of backward is the last of forward: all activations are still there, the
        // output's gradient, and those of the feed-forward layer. Attention may need more after the
        // feed-forward layer is done.
        let branches = if self.gated { 2 } else { 1 };
        // Of 16-bit operands in the layout of GPT-2's matrices libtorch's kernel makes a copy in the
        // other.
        let own_products = self.on_cpu && kernels::multiplies(precision.kind());
        let copied = when(
            bytes < 4 && self.projection == Projection::Fused && !own_products,
            inner,
        );
        let feed_forward_backward = bytes
            * (fed * (hidden + branches * inner + copied) + inner * hidden)
            + self.packing(precision, fed, self.packed_width(), true);
        let feed_forward_kept = bytes * fed * feed_forward;
        BlockMemory {
            input: bytes * tokens.count * hidden,
            kept: tokens.count * before + fed * after + scores,
            backward: feed_forward_backward
                .max(attention_backward.saturating_sub(feed_forward_kept)),
            gradients: bytes * self.block_parameters,
        }
    }

    /// A block whose weights are frozen, with adapters on its linear layers.
    ///
    /// Adapters need the inputs of the layers as the weights' gradients would, and their own
    /// products `[N, r]`. RMS norms do not keep what their frozen scale multiplies. Of 16-bit models
    /// the adapters, which are f32, are rounded, and the rounded are kept.
    pub(crate) fn adapted(
        &self,
        block: BlockMemory,
        precision: Precision,
        (tokens, fed): (Tokens, Option<u64>),
        adapters: AdapterMemory,
    ) -> BlockMemory {
        let bytes = bytes_of(precision);
        let fed = fed.unwrap_or(tokens.count);
        let normalised = match self.norm {
            Norm::Layer => 0,
            Norm::Rms if self.has_single_passes(precision) => 0,
            Norm::Rms => bytes,
            Norm::RmsAroundOne => 4,
        };
        let first = self.hidden + when(self.head_norms, self.query + self.key);
        let later = self.hidden + when(self.after_norms, 2 * self.hidden);
        let unkept = normalised * (tokens.count * first + fed * later);
        let (ranks, weights) = (adapters.ranks / self.layers, adapters.weights / self.layers);
        let narrow = when(bytes < 4, bytes * weights);
        let packing = |backward| self.packing(precision, fed, self.packed_width(), backward);
        BlockMemory {
            input: block.input,
            kept: (block.kept + bytes * tokens.count * ranks + narrow).saturating_sub(unkept),
            // No gradient of a whole matrix.
            backward: block
                .backward
                .saturating_sub(bytes * self.intermediate * self.hidden + packing(true))
                + packing(false),
            gradients: 4 * weights,
        }
    }

    /// What attention keeps of scores that are computed one by one, and what its backward needs.
    fn capped_scores(&self, precision: Precision, tokens: Tokens) -> (u64, u64) {
        if !self.score_cap {
            return (0, 0);
        }
        let bytes = bytes_of(precision);
        let rounded = if bytes < 4 { bytes } else { 0 };
        let kept = self.heads * tokens.squares * (bytes + 4 + rounded) + tokens.masks;
        // The gradients before and after softmax in f32, and as measured some of what autograd has
        // not freed by then.
        (kept, (6 + bytes) * self.heads * tokens.largest_call)
    }

    /// Whether norms and gates are kernels that keep what they read, and nothing between.
    fn has_single_passes(&self, precision: Precision) -> bool {
        self.on_cpu && recorded::available(precision.kind())
    }

    /// Whether the attention of all sequences is one kernel, which keeps queries, keys and values.
    fn attends_at_once(&self, precision: Precision) -> bool {
        self.has_single_passes(precision)
            && !self.score_cap
            && (self.query / self.heads).is_multiple_of(16)
    }

    /// Bytes a token that norms of queries and keys keep.
    fn head_norms_kept(&self, precision: Precision) -> u64 {
        let (bytes, width) = (bytes_of(precision), self.query + self.key);
        match self.has_single_passes(precision) {
            true => bytes * width,
            false => (4 + bytes) * width,
        }
    }

    /// Bytes a token that a norm keeps, its input and output included.
    fn norm_kept(&self, precision: Precision) -> u64 {
        let bytes = bytes_of(precision);
        match self.norm {
            Norm::Layer => bytes * (2 * self.hidden + 2),
            Norm::Rms if self.has_single_passes(precision) => 2 * bytes * self.hidden,
            Norm::Rms => (4 + 2 * bytes) * self.hidden + 4,
            Norm::RmsAroundOne => (4 + 4 + bytes) * self.hidden + 4,
        }
    }

    /// What the last norm keeps, and what its backward needs beside: its output is not kept.
    pub(crate) fn last_norm(&self, precision: Precision, tokens: u64) -> (u64, u64) {
        let output = bytes_of(precision) * tokens * self.hidden;
        let kept = tokens * self.norm_kept(precision) - output;
        match self.norm {
            Norm::Layer => (kept, 2 * output),
            Norm::Rms if self.has_single_passes(precision) => (kept, 2 * output),
            // In f32: the gradients of the two factors of x / rms(x), and their sum.
            Norm::Rms | Norm::RmsAroundOne => (kept, 4 * 4 * tokens * self.hidden),
        }
    }

    /// Sines and cosines, which all blocks share.
    pub(crate) fn rotation(&self, precision: Precision, tokens: u64) -> u64 {
        2 * bytes_of(precision) * tokens * self.rotary
    }

    /// Decoding `new` tokens after prompts of at most `prompt`: keys and values of every layer, and
    /// the logits that are sampled from, or the activations of the first pass if they are more.
    pub(crate) fn generation(
        &self,
        precision: Precision,
        rows: u64,
        prompt: u64,
        new: u64,
    ) -> GenerationMemory {
        let bytes = bytes_of(precision);
        let (hidden, inner) = (self.hidden, self.intermediate);
        // What a block's forward holds at the end of attention: input, norm, queries, keys, values, theirs
        // turned, and what was attended. At the block's end: input, sum, output and norms; the feed-forward
        // layer; GPT-2's also its queries, keys, values and what was attended.
        let (attended, whole) = match (self.gated, self.projection) {
            (true, _) => (3 * (self.query + self.key), 3 * hidden + 3 * inner),
            (false, Projection::Fused) => {
                let projected = 2 * (self.query + self.key);
                (projected, 2 * hidden + projected + 2 * inner)
            }
            (false, _) => (3 * (self.query + self.key), 2 * hidden + 2 * inner),
        };
        let packing = self.packing(precision, rows * prompt, inner, false);
        let pass = |row: u64| bytes * rows * prompt * (2 * hidden + row) + packing;
        let layer = 2 * bytes * rows * self.key * (prompt + new);
        // The last block has the keys and values of all beside it, and goes on from attention with one token of
        // each prompt.
        let before_last = match self.layers {
            1 => 0,
            _ => pass(whole.max(attended)).saturating_sub(layer),
        };
        // 16-bit logits, theirs in f32, and what sampling makes of these.
        let logits = rows * self.vocab * (bytes + 4 + 4);
        GenerationMemory {
            kv_cache: self.layers * layer,
            working: before_last.max(pass(attended)).max(logits),
        }
    }

    /// Elements of what the last layer of a block reads, as its products copy them.
    fn packed_width(&self) -> u64 {
        match self.gated {
            true => self.hidden,
            false => self.intermediate,
        }
    }

    /// Buffers that products of `rows` rows of so many elements copy their factors to, in f32: of the left one at most
    /// 1,050 rows and 832 elements at a time, of the right one half of the cache of every thread, or all of it where it is
    /// smaller: once for every 168 rows, as long as there are threads for them. Rows of f32 are read where they lie, but for
    /// the weights' gradients.
    fn packing(&self, precision: Precision, rows: u64, width: u64, backward: bool) -> u64 {
        if !(self.on_cpu && kernels::multiplies(precision.kind())) {
            return 0;
        }
        let threads = u64::try_from(tch::get_num_threads()).unwrap_or(1);
        let packed = |rows: u64, terms: u64| rows.min(1050).next_multiple_of(14) * terms.min(832);
        let left = match (precision, backward) {
            (Precision::F32, false) => 0,
            (Precision::F32, true) => packed(width, rows),
            (_, false) => packed(rows, width),
            (_, true) => packed(rows, width).max(packed(width, rows)),
        };
        let copies = (rows / 168).clamp(1, threads.max(1));
        let right = (threads * (112 << 10)).min(copies * self.hidden * self.intermediate);
        4 * (left + right)
    }
}

fn bytes_of(precision: Precision) -> u64 {
    precision.kind().elt_size_in_bytes() as u64
}
