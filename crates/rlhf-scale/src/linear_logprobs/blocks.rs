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
    /// The first column behind it.
    fn end(self) -> i64 {
        self.first + self.width
    }

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

    /// Elements of the logits that are kept beside those in the room of a gradient `[V, hidden]`.
    ///
    /// Logits that are gone through in one pass are kept for a few blocks more, so many that all memory
    /// but the gradients' stays within an eighth of what the plain computation takes, which is three
    /// times all logits less the gradient. Others are copied to a block before, and four are kept.
    pub(crate) fn spare_elements(self, hidden: i64, in_one_pass: bool) -> i64 {
        let blocks = match self.tokens / hidden.max(1) {
            _ if !in_one_pass => 4,
            0..2 => 3,
            2..4 => 4,
            _ => 5,
        };
        let left = self.vocab - self.columns_within(self.vocab * hidden);
        left.min(blocks * self.width) * self.tokens
    }

    /// Where a block's logits begin in a room whose end the first `columns` have.
    fn offset_in(self, room: i64, columns: i64, block: Block) -> i64 {
        room - (columns - block.first) * self.tokens
    }

    /// Elements of the memory that is needed because the gradients of some blocks' logits are where a gradient
    /// `[V, hidden]` is written meanwhile: for either.
    pub(crate) fn aside(self, hidden: i64) -> i64 {
        let room = self.vocab * hidden;
        let columns = self.columns_within(room);
        let collides = |block: &Block| block.end() * hidden > self.offset_in(room, columns, *block);
        let mut kept = self.iter().take_while(|block| block.end() <= columns);
        match kept.any(|block| collides(&block)) {
            true => self.width * self.tokens.min(hidden),
            false => 0,
        }
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

/// Memory for the gradient of the weight, and some more, that has logits until the gradient is made.
pub(crate) struct Room {
    pub(super) gradient: Tensor,
    spare: Option<Tensor>,
    /// Elements of the gradient that a column of logits has.
    column: i64,
}

impl Room {
    /// For all logits of `blocks`, as far as the gradient's room and a few blocks more hold them.
    pub(super) fn new(operands: Operands<'_>, blocks: Blocks, in_one_pass: bool) -> Result<Self> {
        let gradient = operands.weight.f_empty_like()?.f_contiguous()?;
        let spare = blocks.spare_elements(gradient.size()[1], in_one_pass);
        let options = (gradient.kind(), gradient.device());
        Ok(Self {
            spare: (spare > 0)
                .then(|| Tensor::f_empty([spare], options))
                .transpose()?,
            column: gradient.size()[1],
            gradient,
        })
    }

    /// Memory that holds the logits of all blocks, and of no gradient.
    pub(super) fn for_all(memory: &Tensor) -> Self {
        Self {
            gradient: memory.shallow_clone(),
            spare: None,
            column: 0,
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
///
/// Blocks that find no room pass through the first spare block: before it is filled in forward, and after it is read
/// in backward.
pub(super) struct Cache {
    room: Tensor,
    spare: Option<Tensor>,
    blocks: Blocks,
    /// Elements of the gradient that a column of logits has.
    column: i64,
    /// Those in the room; the spare ones follow.
    columns: i64,
}

/// Memory for the logits of a block.
pub(super) struct Place {
    /// `[M, width]`
    pub(super) logits: Tensor,
    /// Whether they are there from forward to backward.
    pub(super) is_kept: bool,
    /// Whether their gradients may take their place.
    pub(super) is_free: bool,
    /// Whether the rows of the weight's gradient would then reach them, and are to be made elsewhere.
    pub(super) is_in_the_way: bool,
}

impl Cache {
    /// The gradient's room is contiguous.
    pub(super) fn new(room: &Room, blocks: Blocks) -> Result<Self> {
        Ok(Self {
            room: room.gradient.f_view(-1)?,
            spare: room.spare.as_ref().map(Tensor::shallow_clone),
            blocks,
            column: room.column,
            columns: blocks.columns_within(room.gradient.numel() as i64),
        })
    }

    /// All blocks: those that are not kept first, then the others in the order in which they are read.
    pub(super) fn in_forward(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = self.blocks.iter().collect();
        blocks.sort_by_key(|&block| self.keeps(block));
        blocks
    }

    fn keeps(&self, block: Block) -> bool {
        let spare = self.spare.as_ref().map_or(0, |spare| spare.numel() as i64);
        block.end() <= self.columns || (block.end() - self.columns) * self.blocks.tokens <= spare
    }

    /// Where the logits of a block are, or pass through; `None` if there is no place for them.
    pub(super) fn place(&self, block: Block) -> Result<Option<Place>> {
        let (tokens, is_kept) = (self.blocks.tokens, self.keeps(block));
        let (memory, offset, collide) = if block.end() <= self.columns {
            let room = self.room.numel() as i64;
            let offset = self.blocks.offset_in(room, self.columns, block);
            (&self.room, offset, block.end() * self.column > offset)
        } else {
            let Some(spare) = &self.spare else {
                return Ok(None);
            };
            let first = if is_kept {
                block.first - self.columns
            } else {
                0
            };
            (spare, first * tokens, false)
        };
        // What is smaller goes elsewhere.
        let is_free = !collide || tokens > self.column;
        let logits = memory.f_narrow(0, offset, block.width * tokens)?;
        Ok(Some(Place {
            logits: logits.f_view([tokens, block.width])?,
            is_kept,
            is_free,
            is_in_the_way: collide && is_free,
        }))
    }
}

/// Memory that every block uses again, made when it is first needed.
pub(super) struct Buffers {
    blocks: Blocks,
    kind: Kind,
    scratch: Option<Tensor>,
    wide: Option<Tensor>,
    second: Option<Tensor>,
    rows: Option<Tensor>,
}

impl Buffers {
    pub(super) fn new(blocks: Blocks, operands: Operands<'_>) -> Self {
        Self {
            blocks,
            kind: operands.weight.kind(),
            scratch: None,
            wide: None,
            second: None,
            rows: None,
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

    /// A copy of the logits in f32, or they themselves if they are f32 and `is_free`. In f32 the copy takes
    /// the scratch block.
    pub(super) fn widened(
        &mut self,
        (logits, is_free): (&Tensor, bool),
        block: Block,
        operands: Operands<'_>,
    ) -> Result<Tensor> {
        let mut target = match self.kind {
            Kind::Float if is_free => return Ok(logits.shallow_clone()),
            Kind::Float => self.scratch(block, operands)?,
            _ => of_block(&mut self.wide, self.blocks, block, operands, Kind::Float)?,
        };
        target.f_copy_(logits)?;
        Ok(target)
    }

    /// Another block of f32.
    pub(super) fn second(&mut self, block: Block, operands: Operands<'_>) -> Result<Tensor> {
        of_block(&mut self.second, self.blocks, block, operands, Kind::Float)
    }

    /// As many rows of the weight as a block has columns.
    pub(super) fn rows(&mut self, block: Block, operands: Operands<'_>) -> Result<Tensor> {
        let rows = match self.rows.take() {
            Some(rows) => rows,
            None => {
                let size = [self.blocks.width, operands.hidden.size()[1]];
                Tensor::f_empty(size, (self.kind, operands.weight.device()))?
            }
        };
        Ok(self.rows.insert(rows).f_narrow(0, 0, block.width)?)
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
        for (tokens, hidden, vocab, chunk, in_one_pass) in [
            (37, 24, 301, 3, false),
            (37, 24, 301, 3, true),
            (37, 24, 301, 37, true),
            (10, 24, 301, 2, true),
            (24, 24, 301, 5, true),
            (200, 3, 301, 1, false),
            (200, 3, 301, 12, true),
            (200, 60, 301, 12, true),
            (1, 50, 7, 1, true),
            (40, 24, 301, 4, true),
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
            let room = Room::new(operands, blocks, in_one_pass).unwrap();
            let cache = Cache::new(&room, blocks).unwrap();
            let mut cached = 0;
            for block in cache.in_forward() {
                let Some(mut place) = cache.place(block).unwrap() else {
                    continue;
                };
                let _ = place.logits.fill_(block.index + 1);
                if place.is_kept {
                    cached += block.width;
                }
            }
            let all = |logits: &Tensor, number: i64| bool::try_from(logits.eq(number).all());
            let mut aside = 0;
            for block in blocks.iter() {
                let Some(mut place) = cache.place(block).unwrap().filter(|place| place.is_kept)
                else {
                    continue;
                };
                assert!(
                    all(&place.logits, block.index + 1).unwrap(),
                    "{block:?} of {blocks:?}"
                );
                let mut rows = room.gradient.narrow(0, block.first, block.width);
                if place.is_free && !place.is_in_the_way {
                    let _ = place.logits.fill_(-2);
                    let _ = rows.fill_(-1);
                    assert!(all(&place.logits, -2).unwrap(), "{block:?} of {blocks:?}");
                } else {
                    aside = blocks.width * tokens.min(hidden);
                    let _ = rows.fill_(-1);
                }
            }
            assert_eq!(aside, blocks.aside(hidden));
            // Fewer than a block's columns go unused.
            let fitting =
                vocab * hidden / tokens * tokens + blocks.spare_elements(hidden, in_one_pass);
            let fitting = (fitting / tokens).min(vocab);
            assert!(cached <= fitting && fitting - cached < blocks.width);
        }
    }
}
