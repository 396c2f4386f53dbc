//! What a block's attention computes, the same for training, prefill and decoding.

use rlhf_core::Result;
use tch::{Device, Kind, Tensor};

/// Scores, or elements of a mask, that exist at a time, at most: 64 MiB of f32.
const CHUNK_ELEMENTS: i64 = 1 << 24;

/// Scale, window and soft cap of a block's attention.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct AttentionSpec {
    /// Multiplies the products of queries and keys.
    pub(crate) scale: f64,
    /// Most keys that a token looks at, its own included; `None` for all before it.
    pub(crate) window: Option<i64>,
    /// Bounds the scaled products: `cap * tanh(x / cap)`.
    pub(crate) softcap: Option<f64>,
}

/// Which keys the queries of a call may look at.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Visible<'a> {
    /// The queries are the last tokens of the keys; each looks at itself and those before it,
    /// as far back as the window reaches.
    Causal,
    /// Those where this mask is true; it broadcasts to `[B, 1, Q, K]`. The window is the
    /// caller's to apply.
    Masked(&'a Tensor),
    /// All. The window is the caller's to apply.
    All,
}

impl AttentionSpec {
    /// Plain attention: products over the square root of the head's width.
    pub(crate) fn plain(head_dim: i64) -> Self {
        Self {
            scale: 1.0 / (head_dim as f64).sqrt(),
            window: None,
            softcap: None,
        }
    }

    /// The weighted sum of the values.
    ///
    /// # Shapes
    /// `query`: `[B, heads, Q, d]`; `key`, `value`: `[B, kv_heads, K, d]`. Returns
    /// `[B, heads, Q, d]`.
    pub(crate) fn attend(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        visible: Visible,
    ) -> Result<Tensor> {
        let (queries, keys) = (query.size()[2], key.size()[2]);
        if let (Visible::Causal, Some(rows)) = (visible, self.chunk_rows(query, keys)) {
            return self.attend_in_chunks(query, key, value, rows);
        }
        let within_window = self.window.is_none_or(|window| window >= keys);
        let made;
        let (mask, causal) = match visible {
            Visible::All => (None, false),
            Visible::Masked(mask) => (Some(mask), false),
            // One query at the end sees all of what the window leaves.
            Visible::Causal if queries == 1 && within_window => (None, false),
            // The kernel's flag aligns the first query with the first key.
            Visible::Causal if queries == keys && within_window && self.softcap.is_none() => {
                (None, true)
            }
            Visible::Causal => {
                made = self.causal_mask(queries, keys, query.device())?;
                (Some(&made), false)
            }
        };
        match self.softcap {
            Some(cap) => self.capped(query, key, value, mask, cap),
            None => Ok(Tensor::f_scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                0.0,
                causal,
                Some(self.scale),
                query.size()[1] != key.size()[1],
            )?),
        }
    }

    /// Queries that are attended at a time, where scores or masks of all would be too large.
    fn chunk_rows(&self, query: &Tensor, keys: i64) -> Option<i64> {
        let size = query.size();
        let windowed = self.window.is_some_and(|window| window < keys);
        let scores = match self.softcap {
            Some(_) => size[0] * size[1] * keys,
            None if windowed => keys,
            // The fused kernel makes neither.
            None => return None,
        };
        let rows = (CHUNK_ELEMENTS / scores.max(1)).max(1);
        (rows < size[2]).then_some(rows)
    }

    /// Causal attention of `rows` queries at a time to the keys that they see.
    fn attend_in_chunks(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        rows: i64,
    ) -> Result<Tensor> {
        let (queries, before) = (query.size()[2], key.size()[2] - query.size()[2]);
        let mut chunks = Vec::new();
        for start in (0..queries).step_by(rows as usize) {
            let count = rows.min(queries - start);
            let (own, end) = (before + start, before + start + count);
            let first = self.window.map_or(0, |window| (own + 1 - window).max(0));
            let seen = |t: &Tensor| t.f_narrow(2, first, end - first);
            let chunk = query.f_narrow(2, start, count)?;
            chunks.push(self.attend(&chunk, &seen(key)?, &seen(value)?, Visible::Causal)?);
        }
        Ok(Tensor::f_cat(&chunks, 2)?)
    }

    /// `true` where a query looks: the last `queries` of `keys` tokens, each at itself and
    /// those before it, as far back as the window reaches.
    ///
    /// # Shapes
    /// `[queries, keys]` bool.
    pub(crate) fn causal_mask(&self, queries: i64, keys: i64, device: Device) -> Result<Tensor> {
        let mask = Tensor::f_ones([queries, keys], (Kind::Bool, device))?.f_tril(keys - queries)?;
        Ok(match self.window {
            Some(window) if window < keys => mask.f_triu(keys - queries - window + 1)?,
            _ => mask,
        })
    }

    /// The fused kernels have no cap: products, cap, softmax and sum one after another. The
    /// softmax is taken in f32, as transformers does.
    fn capped(
        &self,
        query: &Tensor,
        key: &Tensor,
        value: &Tensor,
        mask: Option<&Tensor>,
        cap: f64,
    ) -> Result<Tensor> {
        let size = query.size();
        let (kv_heads, keys) = (key.size()[1], key.size()[2]);
        let group = size[1] / kv_heads;
        // The queries that share a key lie side by side, so that no key is repeated.
        let grouped = query.f_reshape([size[0], kv_heads, group * size[2], size[3]])?;
        let products = grouped.f_matmul(&key.transpose(2, 3))?;
        let capped = products
            .f_mul_scalar(self.scale / cap)?
            .f_tanh()?
            .f_mul_scalar(cap)?
            .f_view([size[0], size[1], size[2], keys])?;
        let seen = match mask {
            Some(mask) => capped.f_masked_fill(&mask.f_logical_not()?, f64::NEG_INFINITY)?,
            None => capped,
        };
        let weights = seen
            .f_softmax(-1, Kind::Float)?
            .f_to_kind(query.kind())?
            .f_view([size[0], kv_heads, group * size[2], keys])?;
        Ok(weights.f_matmul(value)?.f_view(size.as_slice())?)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const PLAIN: AttentionSpec = AttentionSpec {
        scale: 0.4,
        window: None,
        softcap: None,
    };

    fn random(shape: [i64; 4], seed: i64) -> Tensor {
        let count: i64 = shape.iter().product();
        let values = Tensor::arange(count, (Kind::Float, Device::Cpu)) * 1.7 + seed as f64;
        values.sin().view(shape) * 2.0
    }

    /// Query by query, from the definition.
    fn by_hand(spec: &AttentionSpec, query: &Tensor, key: &Tensor, value: &Tensor) -> Vec<f64> {
        let [rows, heads, queries, width] = <[i64; 4]>::try_from(query.size()).unwrap();
        let (kv_heads, keys) = (key.size()[1], key.size()[2]);
        let at = |t: &Tensor, index: [i64; 4]| t.double_value(&index);
        let mut output = Vec::new();
        for (b, h) in (0..rows).flat_map(|b| (0..heads).map(move |h| (b, h))) {
            let shared = h / (heads / kv_heads);
            for q in 0..queries {
                let last = keys - queries + q;
                let first = spec.window.map_or(0, |window| (last - window + 1).max(0));
                let weights: Vec<f64> = (first..=last)
                    .map(|k| {
                        let product: f64 = (0..width)
                            .map(|d| at(query, [b, h, q, d]) * at(key, [b, shared, k, d]))
                            .sum();
                        let product = product * spec.scale;
                        let capped = spec.softcap.map(|cap| cap * (product / cap).tanh());
                        capped.unwrap_or(product).exp()
                    })
                    .collect();
                let total: f64 = weights.iter().sum();
                output.extend((0..width).map(|d| {
                    let sum: f64 = (first..=last)
                        .zip(&weights)
                        .map(|(k, weight)| weight * at(value, [b, shared, k, d]))
                        .sum();
                    sum / total
                }));
            }
        }
        output
    }

    #[test]
    fn causal_attention_of_every_kind_follows_its_definition() {
        for (queries, keys) in [(6, 6), (2, 6), (1, 6), (1, 1)] {
            let query = random([2, 4, queries, 3], 0);
            let (key, value) = (random([2, 2, keys, 3], 1), random([2, 2, keys, 3], 2));
            for window in [None, Some(1), Some(3), Some(6), Some(100)] {
                for softcap in [None, Some(0.7)] {
                    let spec = AttentionSpec {
                        window,
                        softcap,
                        ..PLAIN
                    };
                    let output = spec.attend(&query, &key, &value, Visible::Causal).unwrap();
                    assert_eq!(output.size(), query.size());
                    let got = Vec::<f64>::try_from(output.flatten(0, -1).to_kind(Kind::Double));
                    let want = by_hand(&spec, &query, &key, &value);
                    for (got, want) in got.unwrap().iter().zip(&want) {
                        let difference = (got - want).abs();
                        assert!(difference < 1e-5, "{spec:?} {queries} {keys}: {difference}");
                    }
                }
            }
        }
    }

    #[test]
    fn chunks_of_queries_see_what_all_would() {
        for (queries, keys) in [(7, 7), (5, 9)] {
            let query = random([2, 4, queries, 3], 0);
            let (key, value) = (random([2, 2, keys, 3], 1), random([2, 2, keys, 3], 2));
            for window in [None, Some(1), Some(3), Some(8)] {
                for softcap in [None, Some(0.7)] {
                    let spec = AttentionSpec {
                        window,
                        softcap,
                        ..PLAIN
                    };
                    let whole = spec.attend(&query, &key, &value, Visible::Causal).unwrap();
                    for rows in [1, 2, 3, 6] {
                        let chunks = spec.attend_in_chunks(&query, &key, &value, rows).unwrap();
                        assert!(
                            chunks.allclose(&whole, 1e-5, 1e-6, false),
                            "{spec:?} {queries} {keys} {rows}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn long_prompts_are_attended_in_chunks_where_a_kernel_would_hold_their_square() {
        let query = Tensor::zeros([1, 8, 1, 4], (Kind::Float, Device::Cpu));
        let long =
            |spec: AttentionSpec, n: i64| spec.chunk_rows(&query.expand([1, 8, n, 4], false), n);
        let capped = AttentionSpec {
            softcap: Some(30.0),
            ..PLAIN
        };
        let windowed = AttentionSpec {
            window: Some(4096),
            ..PLAIN
        };
        assert_eq!(long(PLAIN, 1 << 20), None);
        assert_eq!(long(capped, 1 << 10), None);
        assert_eq!(long(capped, 1 << 14), Some(128));
        assert_eq!(long(windowed, 4096), None);
        assert_eq!(long(windowed, 1 << 15), Some(512));
    }

    #[test]
    fn masks_are_the_callers() {
        let (query, key) = (random([1, 2, 1, 4], 0), random([1, 2, 5, 4], 1));
        for softcap in [None, Some(0.7)] {
            let spec = AttentionSpec { softcap, ..PLAIN };
            let mask = Tensor::from_slice(&[false, false, true, true, true]).view([1, 1, 1, 5]);
            let masked = spec.attend(&query, &key, &key, Visible::Masked(&mask));
            let kept = key.narrow(2, 2, 3);
            let narrowed = spec.attend(&query, &kept, &kept, Visible::All).unwrap();
            assert!(masked.unwrap().allclose(&narrowed, 1e-5, 1e-6, false));
        }
    }
}
