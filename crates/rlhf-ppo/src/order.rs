//! The order in which samples are visited.

use rand::RngCore;
use rlhf_core::rng::ChaCha8Rng;

/// Shuffles by Fisher and Yates. Written out, because a library's shuffle may change from version
/// to version, and with it the course of a run that is resumed.
pub(crate) fn shuffled(mut rows: Vec<usize>, rng: &mut ChaCha8Rng) -> Vec<usize> {
    for last in (1..rows.len()).rev() {
        let scaled = u128::from(rng.next_u64()) * (last as u128 + 1);
        rows.swap(last, (scaled >> 64) as usize);
    }
    rows
}

/// Cuts `rows` into at most `count` parts of sizes that differ by at most one; none is empty.
pub(crate) fn parts(rows: &[usize], count: usize) -> impl Iterator<Item = &[usize]> {
    let count = count.min(rows.len());
    (0..count).map(move |i| &rows[i * rows.len() / count..(i + 1) * rows.len() / count])
}

/// Cuts `rows` into at most `count` parts, in order, of nearly equal weight; none is empty.
pub(crate) fn parts_by_weight(
    rows: &[usize],
    count: usize,
    weight: impl Fn(usize) -> usize,
) -> Vec<&[usize]> {
    let count = count.min(rows.len());
    let total: usize = rows.iter().map(|&row| weight(row)).sum();
    let mut parts = Vec::with_capacity(count);
    let (mut start, mut end, mut below) = (0, 0, 0usize);
    for part in 1..=count {
        // Every part after this one needs a row.
        let last = rows.len() - (count - part);
        let target = total as f64 * part as f64 / count as f64;
        while end < last {
            let with = below + weight(rows[end]);
            // The row that reaches over the target goes where it is further in.
            let over = with as f64 - target > target - below as f64;
            if end > start && part < count && over {
                break;
            }
            below = with;
            end += 1;
        }
        parts.push(&rows[start..end]);
        start = end;
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use rlhf_core::RngStreams;

    #[test]
    fn orders_are_permutations_of_their_own() {
        let streams = RngStreams::new(5);
        let order = |i| shuffled((0..50).collect(), &mut streams.stream("order", i));
        assert_eq!(order(0), order(0));
        assert_ne!(order(0), order(1));
        let mut sorted = order(0);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..50).collect::<Vec<_>>());
    }

    #[test]
    fn every_order_is_as_likely() {
        let streams = RngStreams::new(7);
        let mut seen = std::collections::BTreeMap::new();
        for i in 0..600 {
            let order = shuffled(vec![0, 1, 2], &mut streams.stream("order", i));
            *seen.entry(order).or_insert(0) += 1;
        }
        assert_eq!(seen.len(), 6);
        // Of 100 each, with a deviation of 9.
        assert!(
            seen.values().all(|count| (60..140).contains(count)),
            "{seen:?}"
        );
    }

    #[test]
    fn parts_cover_everything_and_are_never_empty() {
        let sizes = |n: usize, count| -> Vec<usize> {
            let rows: Vec<usize> = (0..n).collect();
            let cut: Vec<&[usize]> = parts(&rows, count).collect();
            assert_eq!(cut.concat(), rows);
            cut.iter().map(|p| p.len()).collect()
        };
        assert_eq!(sizes(7, 3), [2, 2, 3]);
        assert_eq!(sizes(2, 4), [1, 1]);
        assert!(sizes(0, 4).is_empty());
    }

    #[test]
    fn parts_of_nearly_equal_weight() {
        let weights = [10usize, 1, 1, 1, 1, 1, 1, 4, 0, 0];
        let rows: Vec<usize> = (0..weights.len()).collect();
        let cut = |rows: &[usize], count| -> Vec<usize> {
            let parts = parts_by_weight(rows, count, |row| weights[row]);
            assert_eq!(parts.concat(), rows);
            assert!(parts.iter().all(|part| !part.is_empty()));
            let sum = |part: &&[usize]| part.iter().map(|&row| weights[row]).sum();
            parts.iter().map(sum).collect()
        };
        assert_eq!(cut(&rows, 2), [10, 10]);
        assert_eq!(cut(&rows[1..8], 2), [5, 5]);
        assert_eq!(cut(&rows, 10).len(), 10);
        assert_eq!(cut(&rows[8..], 2), [0, 0]);
        assert!(cut(&[], 3).is_empty());
    }
}
