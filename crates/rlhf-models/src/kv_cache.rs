//! Keys and values of the tokens seen so far.

use std::ops::Range;

use rlhf_core::Result;
use rlhf_scale::kernels::{CachedAttentionInput, cached_attention};
use tch::{Device, Kind, Tensor};

use crate::attention::{Attention, Qkv, RowsOfLast};
use crate::attention_spec::{AttentionSpec, Visible};

/// Keys and values of every layer. A row's tokens fill the columns of its place from the first
/// on, so that rows come and go without moving the others.
#[derive(Default)]
pub(crate) struct KvCache {
    /// Keys and values, `[places, kv_heads, columns, d]` each, by layer.
    layers: Vec<(Tensor, Tensor)>,
    /// Tokens of each row.
    lengths: Vec<i64>,
    places: i64,
    columns: i64,
}

impl KvCache {
    pub(crate) fn rows(&self) -> usize {
        self.lengths.len()
    }

    /// Tokens that a row has room for.
    pub(crate) fn columns(&self) -> i64 {
        self.columns
    }

    /// Tokens of each row.
    pub(crate) fn lengths(&self) -> &[i64] {
        &self.lengths
    }

    /// Counts the tokens that a step has written in every layer.
    pub(crate) fn advance(&mut self) {
        self.lengths.iter_mut().for_each(|length| *length += 1);
    }

    /// Counts the rows that a prefill has written in every layer.
    pub(crate) fn add(&mut self, lengths: &[i64]) {
        self.lengths.extend_from_slice(lengths);
    }

    pub(crate) fn rewind(&mut self, row: usize, tokens: usize) {
        self.lengths[row] = tokens as i64;
    }

    /// Makes room for this many rows of this many tokens. What is there is copied only if there
    /// was less.
    pub(crate) fn reserve(&mut self, rows: usize, tokens: i64) -> Result<()> {
        let rows = rows as i64;
        if rows <= self.places && tokens <= self.columns {
            return Ok(());
        }
        let longest = self.lengths.iter().copied().max().unwrap_or(0);
        let (places, columns) = (rows.max(self.rows() as i64), tokens.max(longest));
        let (used, kept) = (self.rows() as i64, longest);
        for (keys, values) in &mut self.layers {
            for tensor in [keys, values] {
                let new = zeros(tensor, places, columns)?;
                new.f_narrow(0, 0, used)?
                    .f_narrow(2, 0, kept)?
                    .f_copy_(&tensor.f_narrow(0, 0, used)?.f_narrow(2, 0, kept)?)?;
                *tensor = new;
            }
        }
        (self.places, self.columns) = (places, columns);
        Ok(())
    }

    /// Keeps `rows`, in that order.
    pub(crate) fn select(&mut self, rows: &[usize]) -> Result<()> {
        let lengths: Vec<i64> = rows.iter().map(|&row| self.lengths[row]).collect();
        self.reserve(rows.len(), self.columns)?;
        let moves: Vec<(usize, usize)> = rows
            .iter()
            .copied()
            .enumerate()
            .filter(|(to, from)| to != from)
            .collect();
        // A place that is overwritten must not be one that another row comes from.
        if moves.iter().all(|(to, _)| !rows.contains(to)) {
            for (keys, values) in &self.layers {
                for (tensor, &(to, from)) in [keys, values]
                    .into_iter()
                    .flat_map(|tensor| moves.iter().map(move |m| (tensor, m)))
                {
                    let part =
                        |row: usize| tensor.f_select(0, row as i64)?.f_narrow(1, 0, lengths[to]);
                    part(to)?.f_copy_(&part(from)?)?;
                }
            }
        } else {
            let index: Vec<i64> = rows.iter().map(|&row| row as i64).collect();
            for (keys, values) in &self.layers {
                for tensor in [keys, values] {
                    let index = Tensor::from_slice(&index).f_to_device(tensor.device())?;
                    tensor
                        .f_narrow(0, 0, rows.len() as i64)?
                        .f_copy_(&tensor.f_index_select(0, &index)?)?;
                }
            }
        }
        self.lengths = lengths;
        Ok(())
    }

    /// Keys and values of a layer, allocated when the first token comes.
    fn layer(&mut self, layer: usize, like: &Tensor) -> Result<(&Tensor, &Tensor)> {
        while self.layers.len() <= layer {
            let size = like.size();
            let like = like.f_view([size[0], size[1], 1, size[2]])?;
            let make = || zeros(&like, self.places, self.columns);
            let made = (make()?, make()?);
            self.layers.push(made);
        }
        let (keys, values) = &self.layers[layer];
        Ok((keys, values))
    }
}

/// A cache's tensor for heads as in `like`, `[_, kv_heads, _, d]`. Zeros: what is masked must
/// still be finite.
fn zeros(like: &Tensor, places: i64, columns: i64) -> Result<Tensor> {
    let size = like.size();
    let shape = [places, size[1], columns, size[3]];
    Ok(Tensor::f_zeros(shape, (like.kind(), like.device()))?)
}

/// The first pass over prompts, whose keys and values go behind the rows that there are.
pub(crate) struct PrefillAttention<'a> {
    cache: &'a mut KvCache,
    prompts: &'a [Range<i64>],
    attention: RowsOfLast,
}

impl<'a> PrefillAttention<'a> {
    /// `prompts` says where each lies in the run.
    pub(crate) fn new(
        cache: &'a mut KvCache,
        prompts: &'a [Range<i64>],
        attention: RowsOfLast,
    ) -> Self {
        Self {
            cache,
            prompts,
            attention,
        }
    }
}

impl Attention for PrefillAttention<'_> {
    fn attend(&mut self, layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor> {
        let first = self.cache.rows() as i64;
        let (keys, values) = self.cache.layer(layer, &qkv.key)?;
        for (to, from) in [(keys, &qkv.key), (values, &qkv.value)] {
            for (place, row) in (first..).zip(self.prompts) {
                let length = row.end - row.start;
                let part = from.f_narrow(0, row.start, length)?;
                to.f_select(0, place)?
                    .f_narrow(1, 0, length)?
                    .f_copy_(&part.f_transpose(0, 1)?)?;
            }
        }
        self.attention.attend(layer, qkv, spec)
    }

    fn attended_rows(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        self.attention.attended_rows(layer, x)
    }
}

/// One token of every row, looking at the cache.
pub(crate) struct StepAttention<'a> {
    cache: &'a mut KvCache,
    device: Device,
}

impl<'a> StepAttention<'a> {
    pub(crate) fn new(cache: &'a mut KvCache, device: Device) -> Self {
        Self { cache, device }
    }

    /// Where a row may look, `[B, 1, 1, columns]`; `None` if all see all columns.
    fn mask(&self, columns: i64, window: Option<i64>) -> Result<Option<Tensor>> {
        let lengths = &self.cache.lengths;
        let all = lengths.iter().all(|length| length + 1 == columns);
        if all && window.is_none_or(|window| window >= columns) {
            return Ok(None);
        }
        let last = Tensor::from_slice(lengths)
            .f_to_device(self.device)?
            .f_view([-1, 1, 1, 1])?;
        let column = Tensor::f_arange(columns, (Kind::Int64, self.device))?;
        let mask = column.f_le_tensor(&last)?;
        Ok(Some(match window {
            Some(window) => {
                let outside = column.f_le_tensor(&last.f_sub_scalar(window)?)?;
                mask.f_logical_and(&outside.f_logical_not()?)?
            }
            None => mask,
        }))
    }

    /// With libtorch's own operations, on rows padded to the longest.
    fn attend_padded(
        &self,
        (keys, values): (&Tensor, &Tensor),
        qkv: &Qkv,
        spec: &AttentionSpec,
    ) -> Result<Tensor> {
        let [rows, heads, width] = [0, 1, 2].map(|dim| qkv.query.size()[dim]);
        let lengths = &self.cache.lengths;
        let columns = lengths.iter().copied().max().unwrap_or(0) + 1;
        let place = Tensor::f_arange(rows, (Kind::Int64, self.device))?;
        let column = Tensor::from_slice(lengths).f_to_device(self.device)?;
        let written = |all: &Tensor, new: &Tensor| -> Result<Tensor> {
            // [B, kv_heads, d] at (place, :, column).
            let mut places = all.f_transpose(1, 2)?;
            let _ = places.f_index_put_(&[Some(&place), Some(&column)], new, false)?;
            Ok(all.f_narrow(0, 0, rows)?.f_narrow(2, 0, columns)?)
        };
        let (keys, values) = (written(keys, &qkv.key)?, written(values, &qkv.value)?);
        let mask = self.mask(columns, spec.window)?;
        let visible = mask.as_ref().map_or(Visible::All, Visible::Masked);
        let output = spec.attend(&qkv.query.f_unsqueeze(2)?, &keys, &values, visible)?;
        Ok(output.f_reshape([rows, heads * width])?)
    }
}

impl Attention for StepAttention<'_> {
    fn attend(&mut self, layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor> {
        let (keys, values) = self.cache.layer(layer, &qkv.key)?;
        let (keys, values) = (keys.shallow_clone(), values.shallow_clone());
        let attended = cached_attention(&CachedAttentionInput {
            query: &qkv.query,
            key: &qkv.key,
            value: &qkv.value,
            keys: &keys,
            values: &values,
            lengths: &self.cache.lengths,
            scale: spec.scale,
            window: spec.window,
            softcap: spec.softcap,
        })
        .map_err(rlhf_core::Error::from)?;
        match attended {
            Some(attended) => Ok(attended),
            None => self.attend_padded((&keys, &values), qkv, spec),
        }
    }
}
