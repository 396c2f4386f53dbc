//! Causal attention over packed sequences.

use std::sync::Arc;

use rlhf_core::{Error, Result, Segment};
use rlhf_scale::recorded::{self, CausalAttentionInput};
use tch::{Device, Kind, Tensor};

use crate::attention_spec::{AttentionSpec, Visible};

/// Queries, keys and values of the tokens of a run.
///
/// # Shapes
/// `query`: `[N, heads, d]`; `key`, `value`: `[N, kv_heads, d]`.
pub(crate) struct Qkv {
    pub(crate) query: Tensor,
    pub(crate) key: Tensor,
    pub(crate) value: Tensor,
}

impl Qkv {
    /// Query, key and value, in that order. A split where three narrows would do costs one
    /// gradient of the whole instead of three.
    pub(crate) fn from_parts(parts: Vec<Tensor>) -> Result<Self> {
        let found = parts.len();
        match <[Tensor; 3]>::try_from(parts) {
            Ok([query, key, value]) => Ok(Self { query, key, value }),
            Err(_) => Err(Error::LengthMismatch {
                left: "the parts of the attention's projection",
                left_len: found,
                right: "query, key and value",
                right_len: 3,
            }),
        }
    }
}

/// What the tokens of a run may look at. A model's blocks are the same for training, prefill
/// and decoding; only this differs.
pub(crate) trait Attention {
    /// Attends in layer `layer`, as `spec` says.
    ///
    /// # Shapes
    /// Returns `[N, heads * d]`.
    fn attend(&mut self, layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor>;

    /// The rows of the residual stream that [`attend`](Self::attend) returns in that layer: all,
    /// unless nothing after it reads the others.
    ///
    /// # Shapes
    /// `[N, H]` to `[M, H]`, where `attend` returns `M` rows.
    fn attended_rows(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        let _ = layer;
        Ok(x.shallow_clone())
    }
}

/// Attention that the last block goes on from with some rows only, those that a head reads.
pub(crate) struct RowsOfLast {
    pub(crate) segments: SegmentAttention,
    pub(crate) last: usize,
    /// `[M]` i64.
    pub(crate) rows: Tensor,
}

impl Attention for RowsOfLast {
    fn attend(&mut self, layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor> {
        let attended = self.segments.attend(layer, qkv, spec)?;
        self.attended_rows(layer, &attended)
    }

    fn attended_rows(&self, layer: usize, x: &Tensor) -> Result<Tensor> {
        match layer == self.last {
            true => Ok(x.f_index_select(0, &self.rows)?),
            false => Ok(x.shallow_clone()),
        }
    }
}

impl Clone for RowsOfLast {
    fn clone(&self) -> Self {
        Self {
            segments: self.segments.clone(),
            last: self.last,
            rows: self.rows.shallow_clone(),
        }
    }
}

/// The segments of a packed run, each token looking at those before it.
pub(crate) struct SegmentAttention {
    segments: Arc<[Segment]>,
    calls: Arc<[Call]>,
    /// What the queries of a call with a prefix may look at, `[length, prefix + length]` bool.
    masks: Vec<Option<Tensor>>,
}

/// Neighbouring segments of one length and one prefix: one kernel call.
#[derive(Debug, PartialEq, Eq)]
struct Call {
    segments: i64,
    length: i64,
    prefix: Option<Prefix>,
}

/// The first rows of an earlier segment, whose keys come before a call's own.
#[derive(Debug, PartialEq, Eq)]
struct Prefix {
    /// The call that the segment is in.
    call: usize,
    /// The first of its rows, counted in that call.
    start: i64,
    length: i64,
}

impl SegmentAttention {
    pub(crate) fn new(segments: &[Segment], device: Device) -> Result<Self> {
        let calls = calls(segments);
        let mask = |call: &Call| -> Result<Option<Tensor>> {
            let (queries, keys) = (call.length, call.keys());
            // A single query looks at everything.
            if queries == keys || queries == 1 {
                return Ok(None);
            }
            let all = Tensor::f_ones([queries, keys], (Kind::Bool, device))?;
            Ok(Some(all.f_tril(keys - queries)?))
        };
        Ok(Self {
            masks: calls.iter().map(mask).collect::<Result<_>>()?,
            segments: segments.into(),
            calls: calls.into(),
        })
    }
}

impl Clone for SegmentAttention {
    fn clone(&self) -> Self {
        let share = |mask: &Option<Tensor>| mask.as_ref().map(Tensor::shallow_clone);
        Self {
            segments: Arc::clone(&self.segments),
            calls: Arc::clone(&self.calls),
            masks: self.masks.iter().map(share).collect(),
        }
    }
}

fn calls(segments: &[Segment]) -> Vec<Call> {
    let mut calls: Vec<Call> = Vec::new();
    let mut firsts: Vec<&Segment> = Vec::new();
    for segment in segments {
        if let (Some(call), Some(first)) = (calls.last_mut(), firsts.last())
            && call.length == segment.len()
            && first.prefix == segment.prefix
        {
            call.segments += 1;
            continue;
        }
        let prefix = segment.prefix.as_ref().map(|prefix| {
            let after = firsts.partition_point(|first| first.rows.start <= prefix.start);
            let call = after.saturating_sub(1);
            Prefix {
                call,
                start: prefix.start - firsts[call].rows.start,
                length: prefix.end - prefix.start,
            }
        });
        calls.push(Call {
            segments: 1,
            length: segment.len(),
            prefix,
        });
        firsts.push(segment);
    }
    calls
}

impl SegmentAttention {
    /// By one kernel for all segments, where there is such.
    fn attend_at_once(&self, qkv: &Qkv, spec: &AttentionSpec) -> Result<Option<Tensor>> {
        if spec.softcap.is_some() {
            return Ok(None);
        }
        let input = CausalAttentionInput {
            query: &qkv.query,
            key: &qkv.key,
            value: &qkv.value,
            segments: &self.segments,
            scale: spec.scale,
            window: spec.window,
        };
        recorded::causal_attention(&input).map_err(Error::from)
    }
}

impl Attention for SegmentAttention {
    fn attend(&mut self, _layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor> {
        if let Some(attended) = self.attend_at_once(qkv, spec)? {
            return Ok(attended);
        }
        if let [call] = &*self.calls {
            let (query, key, value) = (&qkv.query, &qkv.key, &qkv.value);
            return call.attend(query, &call.own(key)?, &call.own(value)?, None, spec);
        }
        // One split instead of many narrows: the gradient of a narrow is as large as the whole
        // run, that of a split is one concatenation.
        let sizes: Vec<i64> = self.calls.iter().map(|c| c.segments * c.length).collect();
        let query = qkv.query.f_split_with_sizes(sizes.as_slice(), 0)?;
        let key = qkv.key.f_split_with_sizes(sizes.as_slice(), 0)?;
        let value = qkv.value.f_split_with_sizes(sizes.as_slice(), 0)?;
        let mut outputs = Vec::with_capacity(self.calls.len());
        for (i, call) in self.calls.iter().enumerate() {
            let (key, value) = (call.visible(&key, i)?, call.visible(&value, i)?);
            let mask = self.masks[i].as_ref();
            outputs.push(call.attend(&query[i], &key, &value, mask, spec)?);
        }
        Ok(Tensor::f_cat(&outputs, 0)?)
    }
}

impl Call {
    /// Number of keys that the last query of a segment looks at.
    fn keys(&self) -> i64 {
        self.length + self.prefix.as_ref().map_or(0, |prefix| prefix.length)
    }

    /// `[segments * length, heads, d]` to `[segments, length, heads, d]`.
    fn own(&self, rows: &Tensor) -> Result<Tensor> {
        let size = rows.size();
        Ok(rows.f_view([self.segments, self.length, size[1], size[2]])?)
    }

    /// The keys, or values, of the prefix and of the segments, of those of all calls.
    ///
    /// # Shapes
    /// Returns `[segments, keys, kv_heads, d]`.
    fn visible(&self, parts: &[Tensor], this: usize) -> Result<Tensor> {
        let own = self.own(&parts[this])?;
        let Some(prefix) = &self.prefix else {
            return Ok(own);
        };
        let shared = parts[prefix.call]
            .f_narrow(0, prefix.start, prefix.length)?
            .f_unsqueeze(0)?
            .f_expand([self.segments, -1, -1, -1], false)?;
        Ok(Tensor::f_cat(&[shared, own], 1)?)
    }

    /// # Shapes
    /// `query`: `[segments * length, heads, d]`; `key`, `value`: `[segments, keys, kv_heads, d]`.
    /// Returns `[segments * length, heads * d]`.
    fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        mask: Option<&Tensor>,
        spec: &AttentionSpec,
    ) -> Result<Tensor> {
        let within_window = spec.window.is_none_or(|window| window >= self.keys());
        let visible = match mask {
            // Where scores are computed one by one they are cut into chunks, and masks with them.
            Some(mask) if within_window && spec.softcap.is_none() => Visible::Masked(mask),
            _ => Visible::Causal,
        };
        let heads_first = |t: &Tensor| t.transpose(1, 2);
        let output = spec.attend(
            &heads_first(&self.own(query)?),
            &heads_first(key),
            &heads_first(value),
            visible,
        )?;
        let width = query.size()[1] * query.size()[2];
        Ok(heads_first(&output).f_reshape([self.segments * self.length, width])?)
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    fn after(rows: Range<i64>, prefix: Range<i64>) -> Segment {
        Segment {
            rows,
            prefix: Some(prefix),
        }
    }

    fn call(segments: i64, length: i64) -> Call {
        Call {
            segments,
            length,
            prefix: None,
        }
    }

    #[test]
    fn neighbours_of_one_length_share_a_call() {
        let segments = [0..3, 3..6, 6..8, 8..11].map(Segment::whole);
        assert_eq!(calls(&segments), [call(2, 3), call(1, 2), call(1, 3)]);
    }

    #[test]
    fn neighbours_of_one_length_and_prefix_share_a_call() {
        let segments = [
            Segment::whole(0..4),
            Segment::whole(4..8),
            after(8..10, 4..7),
            after(10..12, 4..7),
            Segment::whole(12..14),
            after(14..16, 12..13),
        ];
        let prefixed = |segments, (call, start, length)| Call {
            segments,
            length: 2,
            prefix: Some(Prefix {
                call,
                start,
                length,
            }),
        };
        assert_eq!(
            calls(&segments),
            [
                call(2, 4),
                prefixed(2, (0, 4, 3)),
                call(1, 2),
                prefixed(1, (2, 0, 1)),
            ]
        );
    }
}
