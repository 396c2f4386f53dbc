//! Causal attention over packed sequences.

use std::ops::Range;
use std::sync::Arc;

use rlhf_core::{Error, Result};
use tch::Tensor;

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
}

/// Every sequence of a packed run on its own, each token looking at those before it.
#[derive(Clone)]
pub(crate) struct SegmentAttention {
    runs: Arc<[Run]>,
}

/// Neighbouring segments of one length: one kernel call.
#[derive(Debug, PartialEq, Eq)]
struct Run {
    rows: i64,
    length: i64,
}

impl SegmentAttention {
    pub(crate) fn new(segments: &[Range<i64>]) -> Self {
        let mut runs: Vec<Run> = Vec::new();
        for segment in segments {
            let length = segment.end - segment.start;
            match runs.last_mut() {
                Some(run) if run.length == length => run.rows += 1,
                _ => runs.push(Run { rows: 1, length }),
            }
        }
        Self { runs: runs.into() }
    }
}

impl Attention for SegmentAttention {
    fn attend(&mut self, _layer: usize, qkv: &Qkv, spec: &AttentionSpec) -> Result<Tensor> {
        if let [run] = &*self.runs {
            return causal(run, &qkv.query, &qkv.key, &qkv.value, spec);
        }
        // One split instead of many narrows: the gradient of a narrow is as large as the whole
        // run, that of a split is one concatenation.
        let sizes: Vec<i64> = self.runs.iter().map(|r| r.rows * r.length).collect();
        let query = qkv.query.f_split_with_sizes(sizes.as_slice(), 0)?;
        let key = qkv.key.f_split_with_sizes(sizes.as_slice(), 0)?;
        let value = qkv.value.f_split_with_sizes(sizes.as_slice(), 0)?;
        let mut outputs = Vec::with_capacity(self.runs.len());
        for (i, run) in self.runs.iter().enumerate() {
            outputs.push(causal(run, &query[i], &key[i], &value[i], spec)?);
        }
        Ok(Tensor::f_cat(&outputs, 0)?)
    }
}

fn causal(
    run: &Run,
    query: &Tensor,
    key: &Tensor,
    value: &Tensor,
    spec: &AttentionSpec,
) -> Result<Tensor> {
    let rows = |t: &Tensor| -> Result<Tensor> {
        let size = t.size();
        Ok(t.f_view([run.rows, run.length, size[1], size[2]])?
            .transpose(1, 2))
    };
    let (q, k, v) = (rows(query)?, rows(key)?, rows(value)?);
    let output = spec.attend(&q, &k, &v, Visible::Causal)?;
    let width = query.size()[1] * query.size()[2];
    Ok(output
        .transpose(1, 2)
        .f_reshape([run.rows * run.length, width])?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_of_one_length_share_a_call() {
        let attention = SegmentAttention::new(&[0..3, 3..6, 6..8, 8..11]);
        let run = |rows, length| Run { rows, length };
        assert_eq!(*attention.runs, [run(2, 3), run(1, 2), run(1, 3)]);
    }
}
