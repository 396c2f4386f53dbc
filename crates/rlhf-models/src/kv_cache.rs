//! Keys and values of the tokens seen so far.

use rlhf_core::Result;
use tch::{Device, Kind, Tensor};

use crate::attention::{Attention, Qkv, SegmentAttention};
use crate::attention_spec::{AttentionSpec, Visible};

/// Keys and values of every layer, preallocated. Rows are aligned to the right: all write the
/// same column next, and short prompts leave the first columns of their row unused.
pub(crate) struct KvCache {
    /// One `[B, kv_heads, capacity, d]` tensor a layer.
    keys: Vec<Tensor>,
    values: Vec<Tensor>,
    /// First column in use, by row.
    offsets: Vec<i64>,
    /// Columns written so far.
    filled: i64,
    capacity: i64,
}

impl KvCache {
    /// A cache for prompts of these lengths and `more` tokens after each.
    pub(crate) fn new(lengths: &[i64], more: i64) -> Self {
        let filled = lengths.iter().copied().max().unwrap_or(0);
        Self {
            keys: Vec::new(),
            values: Vec::new(),
            offsets: lengths.iter().map(|length| filled - length).collect(),
            filled,
            capacity: filled + more,
        }
    }

    pub(crate) fn rows(&self) -> usize {
        self.offsets.len()
    }

    /// Tokens of each row.
    pub(crate) fn lengths(&self) -> Vec<i64> {
        self.offsets.iter().map(|o| self.filled - o).collect()
    }

    pub(crate) fn is_full(&self) -> bool {
        self.filled == self.capacity
    }

    /// Counts the column that a step has written in every layer.
    pub(crate) fn advance(&mut self) {
        self.filled += 1;
    }

    /// Keeps `rows`, in that order, and drops columns that none of them uses.
    pub(crate) fn select(&mut self, rows: &[usize]) -> Result<()> {
        if rows.iter().copied().eq(0..self.rows()) {
            return Ok(());
        }
        let offsets: Vec<i64> = rows.iter().map(|&row| self.offsets[row]).collect();
        let unused = offsets.iter().copied().min().unwrap_or(0);
        let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
        let kept = self.capacity - unused;
        let take = |tensors: &[Tensor]| -> Result<Vec<Tensor>> {
            tensors
                .iter()
                .map(|t| {
                    let index = Tensor::from_slice(&index).to_device(t.device());
                    Ok(t.f_narrow(2, unused, kept)?.f_index_select(0, &index)?)
                })
                .collect()
        };
        (self.keys, self.values) = (take(&self.keys)?, take(&self.values)?);
        self.offsets = offsets.iter().map(|offset| offset - unused).collect();
        self.filled -= unused;
        self.capacity = kept;
        Ok(())
    }

    /// `true` where a row may look, `[B, 1, 1, columns]`; `None` if it may look everywhere.
    fn mask(&self, columns: i64, device: Device) -> Option<Tensor> {
        if self.offsets.iter().all(|&offset| offset == 0) {
            return None;
        }
        let offsets = Tensor::from_slice(&self.offsets).to_device(device);
        let column = Tensor::arange(columns, (Kind::Int64, device));
        Some(
            column
                .ge_tensor(&offsets.unsqueeze(1))
                .unsqueeze(1)
                .unsqueeze(1),
        )
    }

    fn allocate(&mut self, like: &Tensor) -> Result<()> {
        let size = like.size();
        let shape = [self.rows() as i64, size[1], self.capacity, size[2]];
        // Zeros: what is masked must still be finite.
        let zeros = || Tensor::f_zeros(shape, (like.kind(), like.device()));
        self.keys.push(zeros()?);
        self.values.push(zeros()?);
        Ok(())
    }
}

/// The first pass over the prompts, which fills the cache.
pub(crate) struct PrefillAttention<'a> {
    cache: &'a mut KvCache,
    segments: SegmentAttention,
}

impl<'a> PrefillAttention<'a> {
    pub(crate) fn new(cache: &'a mut KvCache, segments: SegmentAttention) -> Self {
        Self { cache, segments }
    }
}

impl Attention for PrefillAttention<'_> {
    fn attend(&mut self, layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor> {
        let cache = &mut *self.cache;
        cache.allocate(&qkv.key)?;
        let lengths = cache.lengths();
        for (to, from) in [
            (&cache.keys[layer], &qkv.key),
            (&cache.values[layer], &qkv.value),
        ] {
            let parts = from.f_split_with_sizes(lengths.as_slice(), 0)?;
            for (row, part) in parts.iter().enumerate() {
                to.select(0, row as i64)
                    .f_narrow(1, cache.offsets[row], lengths[row])?
                    .f_copy_(&part.transpose(0, 1))?;
            }
        }
        self.segments.attend(layer, qkv, spec)
    }
}

/// One token of every row, looking at the cache.
pub(crate) struct StepAttention<'a> {
    cache: &'a mut KvCache,
    mask: Option<Tensor>,
}

impl<'a> StepAttention<'a> {
    pub(crate) fn new(cache: &'a mut KvCache, device: Device) -> Self {
        let mask = cache.mask(cache.filled + 1, device);
        Self { cache, mask }
    }
}

impl Attention for StepAttention<'_> {
    fn attend(&mut self, layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor> {
        let cache = &mut *self.cache;
        let [rows, heads, width] = [0, 1, 2].map(|dim| qkv.query.size()[dim]);
        let columns = cache.filled + 1;
        // Rows are aligned to the right, so the window begins at one column for all.
        let seen = spec.window.map_or(columns, |window| window.min(columns));
        let first = columns - seen;
        let written = |all: &Tensor, new: &Tensor| -> Result<Tensor> {
            all.f_narrow(2, cache.filled, 1)?
                .f_copy_(&new.unsqueeze(2))?;
            Ok(all.f_narrow(2, first, seen)?)
        };
        let keys = written(&cache.keys[layer], &qkv.key)?;
        let values = written(&cache.values[layer], &qkv.value)?;
        let mask = match &self.mask {
            Some(mask) => Some(mask.f_narrow(3, first, seen)?),
            None => None,
        };
        let visible = mask.as_ref().map_or(Visible::All, Visible::Masked);
        let output = spec.attend(&qkv.query.unsqueeze(2), &keys, &values, visible)?;
        Ok(output.f_reshape([rows, heads * width])?)
    }
}
