//! What scoring tokens takes.

use tch::Kind;

use crate::ffi::{kernels, softmax};
use crate::linear_logprobs::{Blocks, at_once, rows_at_once};
use crate::{HeadMemory, Precision};

/// The head of a language model that is scored by [`linear_logprobs`](crate::linear_logprobs()) or
/// by [`linear_token_loss`](crate::linear_token_loss()), on this machine's processor. Elsewhere
/// there may be a block or two of f32 logits more.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogprobsMemory {
    /// The format of hidden states and weight; the hidden states need gradients.
    pub precision: Precision,
    /// Tokens that are scored, `M`.
    pub tokens: u64,
    /// `H`
    pub hidden: u64,
    /// `V`
    pub vocab: u64,
    /// Whether entropies are asked for.
    pub entropy: bool,
    /// Whether logits are capped.
    pub softcap: bool,
    /// Whether the weight needs no gradient.
    pub frozen: bool,
    /// Whether gradients are made in forward, by `linear_token_loss`.
    pub token_loss: bool,
    /// Bounds the logits that are there at once, as that many tokens'; `None` for the default.
    pub chunk_rows: Option<usize>,
}

impl LogprobsMemory {
    /// The head alone, without the norm before it.
    pub fn head(&self) -> HeadMemory {
        let bytes = self.bytes();
        let (hidden, weight) = (self.tokens * self.hidden, self.vocab * self.hidden);
        let blocks = self.blocks(self.tokens, self.chunk_rows);
        let work = self.work(blocks, !self.frozen);
        // The sum over blocks, of 16 bits also the gradient that is returned, and a block's share unless
        // a product of our own adds it in f32.
        let copies = match bytes {
            4 => 0,
            _ if kernels::multiplies(self.kind()) => 1,
            _ => 2,
        };
        let hidden_grads = (4 + copies * bytes) * hidden;
        let gradient = if self.frozen { 0 } else { bytes * weight };
        if self.token_loss {
            return self.token_loss_head(gradient);
        }
        if self.frozen && !self.entropy && !self.softcap {
            // Forward makes the hidden states' gradients, with the weights of the tokens beside.
            return HeadMemory {
                kept: bytes * hidden,
                forward: work.forward + (4 + 2 * bytes) * hidden,
                backward: bytes * hidden,
                ..HeadMemory::default()
            };
        }
        let spare = if self.frozen { 0 } else { self.spare(blocks) };
        HeadMemory {
            // Three numbers a token, the room of the gradient, which has logits until then, and more.
            kept: bytes * hidden + 12 * self.tokens + gradient + spare,
            forward: work.forward,
            backward: work.backward + hidden_grads + self.packed(blocks),
            gradient,
            ..HeadMemory::default()
        }
    }

    fn token_loss_head(&self, gradient: u64) -> HeadMemory {
        let bytes = self.bytes();
        let (hidden, weight) = (self.tokens * self.hidden, self.vocab * self.hidden);
        let returned = if bytes < 4 { bytes * hidden } else { 0 };
        let one_group = at_once(self.tokens as i64, self.hidden as i64, self.kind());
        if one_group && !self.frozen {
            let blocks = self.blocks(self.tokens, self.chunk_rows);
            let work = self.work(blocks, true).most();
            return HeadMemory {
                kept: gradient + 4 * hidden,
                forward: self.spare(blocks) + work + bytes * hidden + returned,
                backward: returned,
                gradient,
                ..HeadMemory::default()
            };
        }
        let chunk_rows = self.chunk_rows.map(|rows| rows as i64);
        let rows = rows_at_once(self.tokens as i64, self.vocab as i64, chunk_rows) as u64;
        let rows = rows.min(self.tokens);
        let blocks = self.blocks(rows, None);
        // A group's logits are all kept, apart from gradients.
        let work = self.work_beside(blocks, true, 0).most();
        let sums = if self.frozen { 0 } else { 4 * weight };
        // Of 16 bits a block's share is scaled in f32.
        let share = match bytes {
            4 => 0,
            _ if kernels::multiplies(self.kind()) => {
                4 * (blocks.width() as u64).max(rows) * self.hidden
            }
            _ => (bytes + 8) * (blocks.width() as u64).max(rows) * self.hidden,
        };
        HeadMemory {
            kept: sums + 4 * hidden,
            forward: bytes * (rows * self.vocab + hidden) + work + share,
            backward: returned + if bytes < 4 { gradient } else { 0 },
            gradient,
            ..HeadMemory::default()
        }
    }

    fn blocks(&self, tokens: u64, chunk_rows: Option<usize>) -> Blocks {
        let chunk_rows = chunk_rows.map(|rows| rows as i64);
        Blocks::new(tokens as i64, self.vocab as i64, chunk_rows)
    }

    /// Bytes of logits that are kept beside those in the room of the weight's gradient.
    fn spare(&self, blocks: Blocks) -> u64 {
        let spare = blocks.spare_elements(self.hidden as i64, self.in_one_pass());
        self.bytes() * spare as u64
    }

    /// Whether blocks are gone through by kernels, and never copied.
    fn in_one_pass(&self) -> bool {
        !self.softcap && softmax::is_available(self.kind())
    }

    /// What blocks need besides those that are `kept`, in the room of the weight's gradient.
    fn work(&self, blocks: Blocks, kept: bool) -> Work {
        self.work_beside(blocks, kept, blocks.aside(self.hidden as i64) as u64)
    }

    /// What blocks need besides those that are `kept`, and `aside` elements if gradients take their place.
    fn work_beside(&self, blocks: Blocks, kept: bool, aside: u64) -> Work {
        let block = blocks.elements() as u64;
        let (bytes, in_one_pass) = (self.bytes(), self.in_one_pass());
        let (forward, backward) = match (kept, in_one_pass) {
            (false, _) => (block, block),
            (true, true) => (0, aside),
            // Of f32 the copy, of 16 bits the gradients that are rounded.
            (true, false) if bytes == 4 => (block, aside),
            (true, false) => (0, block + aside),
        };
        let wide = match in_one_pass {
            true => 0,
            false => 4 * u64::from(bytes < 4) + 4 * u64::from(self.entropy),
        };
        let slope = 4 * u64::from(self.softcap);
        Work {
            forward: bytes * forward + wide * block,
            backward: bytes * backward + (wide + slope) * block,
        }
    }

    /// Bytes of a block's gradient as a product of our own copies it for that of the weight: in f32,
    /// at most 1,050 of the vocabulary and 832 tokens at a time.
    fn packed(&self, blocks: Blocks) -> u64 {
        match kernels::multiplies(self.kind()) {
            true => 4 * (blocks.width() as u64).min(1050) * self.tokens.min(832),
            false => 0,
        }
    }

    fn kind(&self) -> Kind {
        self.precision.kind()
    }

    fn bytes(&self) -> u64 {
        self.kind().elt_size_in_bytes() as u64
    }
}

/// Bytes of the buffers that blocks of logits are computed with.
struct Work {
    forward: u64,
    backward: u64,
}

impl Work {
    fn most(&self) -> u64 {
        self.forward.max(self.backward)
    }
}
