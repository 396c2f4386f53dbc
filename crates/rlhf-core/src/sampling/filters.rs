//! Filters of next-token logits.

use tch::{Device, Kind, Tensor};

use crate::Result;

/// Makes the tokens that a row holds less likely (`penalty > 1`) or likelier (`penalty < 1`).
///
/// # Shapes
/// `logits`: `[B, V]` f32; `seen`: the ids that each row holds, each in `0..V`, repeated or not.
///
/// # Errors
/// libtorch's own.
pub fn repetition_penalty(logits: &Tensor, seen: &[Vec<i64>], penalty: f64) -> Result<Tensor> {
    let vocab = logits.size()[1];
    let cells: Vec<i64> = (0..)
        .zip(seen)
        .flat_map(|(row, ids)| ids.iter().map(move |id| row * vocab + id))
        .collect();
    let cells = Tensor::from_slice(&cells).f_to_device(logits.device())?;
    let flat = logits.f_reshape(-1)?;
    let before = flat.f_index_select(0, &cells)?;
    let after = before
        .f_mul_scalar(penalty)?
        .f_where_self(&before.f_lt(0.0)?, &before.f_div_scalar(penalty)?)?;
    Ok(flat.f_index_copy(0, &cells, &after)?.f_view_as(logits)?)
}

/// Forbids the tokens of `ids` in each of `rows`.
///
/// # Shapes
/// `logits`: `[B, V]` f32; `rows`: each in `0..B`; `ids`: each in `0..V`.
///
/// # Errors
/// libtorch's own.
pub fn ban_tokens(logits: &Tensor, rows: &[usize], ids: &[i64]) -> Result<Tensor> {
    let vocab = logits.size()[1];
    let cells: Vec<i64> = rows
        .iter()
        .flat_map(|&row| ids.iter().map(move |id| row as i64 * vocab + id))
        .collect();
    let cells = Tensor::from_slice(&cells).f_to_device(logits.device())?;
    let flat = logits.f_reshape(-1)?;
    Ok(flat
        .f_index_fill(0, &cells, f64::NEG_INFINITY)?
        .f_view_as(logits)?)
}

/// Keeps the `k` likeliest tokens of each row and those that tie with the last of them.
///
/// # Shapes
/// `[B, V]` f32 to `[B, V]` f32.
///
/// # Errors
/// libtorch's own.
pub fn top_k(logits: &Tensor, k: usize) -> Result<Tensor> {
    let vocab = logits.size()[1];
    let k = i64::try_from(k).unwrap_or(vocab).min(vocab);
    let (values, _) = logits.f_topk(k, -1, true, true)?;
    let last_kept = values.f_narrow(-1, k - 1, 1)?;
    Ok(logits.f_masked_fill(&logits.f_lt_tensor(&last_kept)?, f64::NEG_INFINITY)?)
}

/// Keeps the fewest likeliest tokens of each row whose probabilities together exceed `p`, at
/// least one. Of tokens that tie, those of higher ids stay.
///
/// # Shapes
/// `[B, V]` f32 to `[B, V]` f32.
///
/// # Errors
/// libtorch's own.
pub fn top_p(logits: &Tensor, p: f64) -> Result<Tensor> {
    match logits.device() {
        Device::Cpu => top_p_on_host(logits, p),
        _ => top_p_sorted(logits, p),
    }
}

fn top_p_sorted(logits: &Tensor, p: f64) -> Result<Tensor> {
    let (sorted, order) = logits.f_sort_stable(true, -1, false)?;
    let below = sorted
        .f_softmax(-1, Kind::Float)?
        .f_cumsum(-1, Kind::Float)?;
    let drop = below.f_le(1.0 - p)?;
    let _ = drop.f_narrow(-1, -1, 1)?.f_fill_(0)?;
    let drop = drop.f_zeros_like()?.f_scatter(1, &order, &drop)?;
    Ok(logits.f_masked_fill(&drop, f64::NEG_INFINITY)?)
}

/// Sorts only the tokens that can be kept, which are few unless the distribution is flat: those
/// of less than `(1 - p) / V` weigh less than `1 - p` together. A whole vocabulary takes longer to
/// sort than a small model takes for a token.
fn top_p_on_host(logits: &Tensor, p: f64) -> Result<Tensor> {
    let (rows, vocab) = (logits.size()[0], logits.size()[1] as usize);
    let probabilities = logits.f_softmax(-1, Kind::Float)?;
    // Half, for rounding.
    let least = (0.5 * (1.0 - p) / vocab as f64) as f32;
    let mut row_probabilities = vec![0f32; vocab];
    let (mut candidates, mut kept) = (Vec::new(), Vec::new());
    for row in 0..rows {
        let values = probabilities.f_get(row)?;
        values.f_copy_data(&mut row_probabilities, vocab)?;
        candidates.clear();
        let likely = (0..).zip(&row_probabilities).filter(|(_, p)| **p > least);
        candidates.extend(likely.map(|(token, &p)| (p, token)));
        candidates.sort_unstable_by(|a, b| b.0.total_cmp(&a.0).then(b.1.cmp(&a.1)));
        let first = row * vocab as i64;
        if candidates.is_empty() {
            // No distribution: the row stays as it is, and drawing from it says so.
            kept.extend(first..first + vocab as i64);
        }
        let mut above = 0.0;
        for &(probability, token) in &candidates {
            if above >= p {
                break;
            }
            above += f64::from(probability);
            kept.push(first + token);
        }
    }
    let kept = Tensor::from_slice(&kept);
    let chosen = logits.f_reshape(-1)?.f_index_select(0, &kept)?;
    Ok(logits
        .f_full_like(f64::NEG_INFINITY)?
        .f_view(-1)?
        .f_index_copy(0, &kept, &chosen)?
        .f_view_as(logits)?)
}

/// Keeps the tokens of each row at least `p` times as likely as its likeliest.
///
/// # Shapes
/// `[B, V]` f32 to `[B, V]` f32.
///
/// # Errors
/// libtorch's own.
pub fn min_p(logits: &Tensor, p: f64) -> Result<Tensor> {
    let probabilities = logits.f_softmax(-1, Kind::Float)?;
    let threshold = probabilities
        .f_amax([-1i64].as_slice(), true)?
        .f_mul_scalar(p)?;
    Ok(logits.f_masked_fill(&probabilities.f_lt_tensor(&threshold)?, f64::NEG_INFINITY)?)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn kept(filtered: &Tensor) -> Tensor {
        filtered.isfinite()
    }

    /// Peaked, flat and tied rows, which sorting the whole vocabulary and sorting a part of it must
    /// cut alike.
    #[test]
    fn host_and_device_keep_the_same_of_top_p() {
        let waves = Tensor::arange(4 * 1000, (Kind::Float, Device::Cpu))
            .f_mul_scalar(1.3)
            .unwrap()
            .sin()
            .view([4, 1000]);
        for sharpness in [0.0, 0.5, 3.0, 30.0] {
            let logits = &waves * sharpness;
            for p in [0.013, 0.3333, 0.9, 0.999] {
                let host = top_p_on_host(&logits, p).unwrap();
                let device = top_p_sorted(&logits, p).unwrap();
                // f32 sums of a thousand equal probabilities may end a token earlier or later.
                let off = (kept(&host).to_kind(Kind::Int64) - kept(&device).to_kind(Kind::Int64))
                    .sum(Kind::Int64)
                    .abs()
                    .int64_value(&[]);
                let most = if sharpness == 0.0 { 8 } else { 0 };
                assert!(off <= most, "{sharpness}, {p}: {off}");
                if sharpness > 0.0 {
                    assert!(host.equal(&device), "{sharpness}, {p}");
                }
            }
        }
        let tied = Tensor::from_slice(&[1f32, 1.0, 1.0, 0.0]).unsqueeze(0);
        for filtered in [top_p_on_host(&tied, 0.5), top_p_sorted(&tied, 0.5)] {
            let kept = Vec::<bool>::try_from(kept(&filtered.unwrap()).view(-1));
            assert_eq!(kept.unwrap(), [false, true, true, false]);
        }
    }

    #[test]
    fn a_row_without_a_distribution_stays_as_it_is() {
        let nan = Tensor::from_slice(&[0f32, f32::NAN, 1.0]).unsqueeze(0);
        let filtered = top_p(&nan, 0.5).unwrap();
        assert_eq!(filtered.isnan().sum(Kind::Int64).int64_value(&[]), 1);
        assert_eq!(filtered.double_value(&[0, 2]), 1.0);
    }
}
