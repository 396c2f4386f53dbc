//! The vocabulary in blocks of columns, and the memory that blocks of logits are in.

use tch::{Kind, Tensor};

use super::layer::Operands;
use crate::Result;

/// Logits of a block, unless the caller says otherwise: a sixteenth of all, within these bounds.
/// With the lower one few tokens are not computed in slivers; the upper one is 64 MiB of f32.
const ELEMENTS: (i64, i64) = (1 << 20, 1 << 24);

/// Blocks begin at multiples of this many columns, but for those that the caller wants smaller.
const STEP: i64 = 64;

/// The logits `[M, V]` in blocks `[M, width]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    tokens: i64,
    vocab: i64,
    width: i64,
}

/// Columns of the logits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Block {
    index: i64,
    pub(super) first: i64,
    pub(super) width: i64,
}

impl Block {
    /// All columns.
    pub(super) fn all(width: i64) -> Self {
        Self {
            index: 0,
            first: 0,
            width,
        }
    }
}

impl Blocks {
    /// As many logits at a time as `chunk_rows` tokens have.
    pub(crate) fn new(tokens: i64, vocab: i64, chunk_rows: Option<i64>) -> Self {
        let (rows, vocab) = (tokens.max(1), vocab.max(1));
        let width = match chunk_rows {
            Some(chunk) => chunk.saturating_mul(vocab) / rows,
            None => (rows * vocab / 16).clamp(ELEMENTS.0, ELEMENTS.1) / rows,
        };
        let width = if width > STEP {
            width / STEP * STEP
        } else {
            width
        };
        Self {
            tokens,
            vocab,
            width: width.clamp(1, vocab),
        }
    }

    /// Elements of a block.
    pub(crate) fn elements(self) -> i64 {
        self.tokens * self.width
    }

    /// Columns of a block.
    pub(crate) fn width(self) -> i64 {
        self.width
    }

    /// Columns of the first blocks that fit into this many elements.
    fn columns_within(self, elements: i64) -> i64 {
        let fitting = elements / self.tokens.max(1);
        match fitting >= self.vocab {
            true => self.vocab,
            false => fitting / self.width * self.width,
        }
    }

    /// Elements of the logits that are kept beside those that fit into `room` elements.
    pub(crate) fn spare_elements(self, room: i64) -> i64 {
        let left = self.vocab - self.columns_within(room);
        left.min(SPARE_BLOCKS * self.width) * self.tokens
    }

    pub(super) fn iter(self) -> impl Iterator<Item = Block> {
        (0..)
            .map(move |index| Block {
                index,
                first: index * self.width,
                width: self.width.min(self.vocab - index * self.width),
            })
            .take_while(|block| block.width > 0)
    }
}

/// Blocks of logits that are kept beside those in the room of the weight's gradient, at most.
const SPARE_BLOCKS: i64 = 4;

/// Memory for the gradient of the weight, and some more, that has logits until the gradient is made.
pub(crate) struct Room {
    pub(super) gradient: Tensor,
    spare: Option<Tensor>,
}

impl Room {
    /// For all logits of `blocks`, as far as the gradient's room and a few blocks more hold them.
    pub(super) fn new(operands: Operands<'_>, blocks: Blocks) -> Result<Self> {
        let gradient = operands.weight.f_empty_like()?.f_contiguous()?;
        let spare = blocks.spare_elements(gradient.numel() as i64);
        let options = (gradient.kind(), gradient.device());
        Ok(Self {
            spare: (spare > 0)
                .then(|| Tensor::f_empty([spare], options))
                .transpose()?,
            gradient,
        })
    }

    /// Memory that holds the logits of all blocks.
    pub(super) fn for_all(memory: &Tensor) -> Self {
        Self {
            gradient: memory.shallow_clone(),
            spare: None,
        }
    }
}

/// The logits of the first blocks, in the room that the gradient of the weight will take and in what is
/// spared for some blocks more.
///
/// Block by block, in order, the logits are read and the gradient of the block's rows is written, from
/// the room's start; so the logits lie at its end. What is written never reaches what is still to be
/// read: with `c` cached columns, `x` of them done, `x H + (c - x) M` elements are in use, which is
/// linear in `x` and fits at both ends, `c M ≤ V H` and `c H ≤ V H`.
pub(super) struct Cache {
    room: Tensor,
    spare: Option<Tensor>,
    blocks: Blocks,
    /// Those in the room; the spare ones follow.
    columns: i64,
}

impl Cache {
    /// The gradient's room is contiguous.
    pub(super) fn new(room: &Room, blocks: Blocks) -> Result<Self> {
        Ok(Self {
            room: room.gradient.f_view(-1)?,
            spare: room.spare.as_ref().map(Tensor::shallow_clone),
            blocks,
            columns: blocks.columns_within(room.gradient.numel() as i64),
        })
    }

    /// Where the logits of a block are, `[M, width]`; `None` if it is not among the first.
    pub(super) fn get(&self, block: Block) -> Result<Option<Tensor>> {
        let tokens = self.blocks.tokens;
        let (memory, offset) = if block.first + block.width <= self.columns {
            let from_end = (self.columns - block.first) * tokens;
            (&self.room, self.room.numel() as i64 - from_end)
        } else {
            let Some(spare) = &self.spare else {
                return Ok(None);
            };
            let offset = (block.first - self.columns) * tokens;
            if offset + block.width * tokens > spare.numel() as i64 {
                return Ok(None);
            }
            (spare, offset)
        };
        let logits = memory.f_narrow(0, offset, block.width * tokens)?;
        Ok(Some(logits.f_view([tokens, block.width])?))
    }
}

/// Memory that every block uses again, made when it is first needed.
pub(super) struct Buffers {
    blocks: Blocks,
    kind: Kind,
    scratch: Option<Tensor>,
    wide: Option<Tensor>,
    second: Option<Tensor>,
}

impl Buffers {
    pub(super) fn new(blocks: Blocks, operands: Operands<'_>) -> Self {
        Self {
            blocks,
            kind: operands.weight.kind(),
            scratch: None,
            wide: None,
            second: None,
        }
    }

    /// From now on for blocks of these.
    pub(super) fn set_blocks(&mut self, blocks: Blocks) {
        self.blocks = blocks;
    }

    /// A block of the weight's kind.
    pub(super) fn scratch(&mut self, block: Block, operands: Operands<'_>) -> Result<Tensor> {
        of_block(&mut self.scratch, self.blocks, block, operands, self.kind)
    }

    /// A copy of the logits in f32, or they themselves if they are f32 and in the scratch block. In
    /// f32 the copy takes the scratch block.
    pub(super) fn widened(
        &mut self,
        logits: &Tensor,
        block: Block,
        operands: Operands<'_>,
    ) -> Result<Tensor> {
        let mut target = match self.kind {
            Kind::Float => self.scratch(block, operands)?,
            _ => of_block(&mut self.wide, self.blocks, block, operands, Kind::Float)?,
        };
        if target.data_ptr() != logits.data_ptr() {
            target.f_copy_(logits)?;
        }
        Ok(target)
    }

    /// Another block of f32.
    pub(super) fn second(&mut self, block: Block, operands: Operands<'_>) -> Result<Tensor> {
        of_block(&mut self.second, self.blocks, block, operands, Kind::Float)
    }
}

fn of_block(
    buffer: &mut Option<Tensor>,
    blocks: Blocks,
    block: Block,
    operands: Operands<'_>,
    kind: Kind,
) -> Result<Tensor> {
    let count = blocks.tokens * block.width;
    let memory = match buffer.take() {
        Some(memory) if memory.numel() as i64 >= count => memory,
        _ => {
            let size = [blocks.elements().max(count)];
            Tensor::f_empty(size, (kind, operands.weight.device()))?
        }
    };
    let memory = buffer.insert(memory);
    Ok(memory
        .f_narrow(0, 0, count)?
        .f_view([blocks.tokens, block.width])?)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;
    use tch::Device;

    #[test]
    fn blocks_cover_the_vocabulary_once() {
        for (tokens, vocab, chunk) in [
            (37, 301, Some(1)),
            (37, 301, Some(10)),
            (37, 301, Some(1000)),
            (37, 301, None),
            (1024, 50_000, None),
            (1024, 50_000, Some(64)),
            (1, 1, None),
            (0, 5, None),
        ] {
            let blocks = Blocks::new(tokens, vocab, chunk);
            let mut next = 0;
            for block in blocks.iter() {
                assert_eq!(block.first, next);
                next += block.width;
            }
            assert_eq!(next, vocab);
            if let Some(chunk) = chunk {
                assert!(blocks.elements() <= (chunk * vocab).max(tokens));
            }
        }
    }

    /// Cached logits are all there until they are read, whatever is written before.
    #[test]
    fn gradients_do_not_reach_logits_that_are_still_to_be_read() {
        for (tokens, hidden, vocab, chunk) in [
            (37, 24, 301, 3),
            (37, 24, 301, 37),
            (10, 24, 301, 2),
            (24, 24, 301, 5),
            (200, 3, 301, 1),
            (1, 50, 7, 1),
            (40, 24, 301, 4),
        ] {
            let blocks = Blocks::new(tokens, vocab, Some(chunk));
            let f32s = (Kind::Float, Device::Cpu);
            let (states, weight) = ([tokens, hidden], Tensor::zeros([vocab, hidden], f32s));
            let (states, ids) = (Tensor::zeros(states, f32s), Tensor::zeros([tokens], f32s));
            let operands = Operands {
                hidden: &states,
                weight: &weight,
                bias: None,
                ids: &ids,
            };
            let room = Room::new(operands, blocks).unwrap();
            let cache = Cache::new(&room, blocks).unwrap();
            let mut cached = 0;
            for block in blocks.iter() {
                if let Some(mut logits) = cache.get(block).unwrap() {
                    let _ = logits.fill_(block.index + 1);
                    cached += block.width;
                }
            }
            for block in blocks.iter() {
                if let Some(logits) = cache.get(block).unwrap() {
                    let same = logits.eq(block.index + 1).all();
                    assert!(bool::try_from(same).unwrap(), "{block:?} of {blocks:?}");
                }
                let _ = room.gradient.narrow(0, block.first, block.width).fill_(-1);
            }
            // Fewer than a block's columns go unused.
            let fitting = vocab * hidden / tokens + SPARE_BLOCKS * blocks.width;
            let fitting = fitting.min(vocab);
            assert!(cached <= fitting && fitting - cached < blocks.width);
        }
    }
}
