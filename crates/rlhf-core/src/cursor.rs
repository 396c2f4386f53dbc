//! The place in a dataset that a training run has reached.

use rand_chacha::rand_core::RngCore;
use serde::{Deserialize, Serialize};

use crate::{Error, Result, RngStreams};

/// In which order an epoch visits the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DataOrder {
    /// A new permutation every epoch.
    #[default]
    Shuffled,
    /// As the data lies.
    Given,
}

/// Which items come next, epoch after epoch: a pure function of seed, epoch and position.
///
/// It is a few numbers, so a checkpoint holds it whole, and a run that resumes from them sees
/// the batches that it would have seen. A trainer that must not skip data when a step fails
/// works on a clone and keeps it once the step is done.
///
/// ```
/// use rlhf_core::{DataCursor, DataOrder};
///
/// let mut cursor = DataCursor::new(7, 5, DataOrder::Shuffled)?;
/// let first = cursor.next_batch(3);
/// let saved = cursor.clone();
/// let rest = cursor.next_batch(3);
/// assert_eq!((first.len(), rest.len(), cursor.epoch()), (3, 2, 1));
/// assert_eq!(saved.clone().next_batch(3), rest);
/// # Ok::<(), rlhf_core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataCursor {
    seed: u64,
    items: usize,
    order: DataOrder,
    epoch: u64,
    position: usize,
}

impl DataCursor {
    /// The start of the first epoch over `items` items.
    ///
    /// # Errors
    /// [`Error::Empty`] without items.
    pub fn new(seed: u64, items: usize, order: DataOrder) -> Result<Self> {
        if items == 0 {
            return Err(Error::Empty {
                what: "the training data",
                help: "give it at least one item",
            });
        }
        Ok(Self {
            seed,
            items,
            order,
            epoch: 0,
            position: 0,
        })
    }

    /// Indices of the next `size` items, or of those that are left of the epoch if they are
    /// fewer: no batch reaches over the end of an epoch. None only where `size` is 0.
    pub fn next_batch(&mut self, size: usize) -> Vec<usize> {
        let start = self.position.min(self.items); // past it only in a file somebody edited
        let end = self.items.min(start.saturating_add(size));
        let batch = self.permutation()[start..end].to_vec();
        self.position = end;
        if end == self.items {
            self.epoch += 1;
            self.position = 0;
        }
        batch
    }

    /// Indices of exactly `size` items; where an epoch has too few left, the next one fills up.
    pub fn next_full_batch(&mut self, size: usize) -> Vec<usize> {
        let mut batch = Vec::with_capacity(size);
        while batch.len() < size {
            batch.extend(self.next_batch(size - batch.len()));
        }
        batch
    }

    /// Epochs completed.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Number of [`next_batch`](Self::next_batch) calls that an epoch takes.
    pub fn batches_per_epoch(&self, size: usize) -> u64 {
        self.items.div_ceil(size.max(1)) as u64
    }

    /// Fails unless the data has as many items as this cursor was made for: a resumed run must
    /// be given the data it was started with.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`].
    pub fn check_items(&self, items: usize) -> Result<()> {
        if items == self.items {
            return Ok(());
        }
        Err(Error::LengthMismatch {
            left: "the training data",
            left_len: items,
            right: "the data that this run was started with",
            right_len: self.items,
        })
    }

    /// Fails unless `saved` is a later state of the run that starts with this cursor: the same
    /// number of items, seed and order.
    ///
    /// # Errors
    /// [`Error::LengthMismatch`], [`Error::InvalidConfig`].
    pub fn check_continues(&self, saved: &Self) -> Result<()> {
        saved.check_items(self.items)?;
        let reason = "the checkpoint is of a run with another order of the data";
        if saved.seed != self.seed {
            return Err(Error::config("seed", self.seed, reason));
        }
        if saved.order != self.order {
            return Err(Error::config("order", format!("{:?}", self.order), reason));
        }
        Ok(())
    }

    fn permutation(&self) -> Vec<usize> {
        let mut order: Vec<usize> = (0..self.items).collect();
        if self.order == DataOrder::Given {
            return order;
        }
        // Written out, because the libraries' shuffles may change from version to version.
        let mut rng = RngStreams::new(self.seed).stream("data order", self.epoch);
        for last in (1..order.len()).rev() {
            let scaled = u128::from(rng.next_u64()) * (last as u128 + 1);
            order.swap(last, (scaled >> 64) as usize);
        }
        order
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_every_item_once_in_an_order_of_its_own() {
        let mut cursor = DataCursor::new(3, 40, DataOrder::Shuffled).unwrap();
        let mut epochs = Vec::new();
        for epoch in 0..2 {
            assert_eq!(cursor.epoch(), epoch);
            let mut seen: Vec<usize> = Vec::new();
            for _ in 0..cursor.batches_per_epoch(16) {
                seen.extend(cursor.next_batch(16));
            }
            epochs.push(seen.clone());
            seen.sort_unstable();
            assert_eq!(seen, (0..40).collect::<Vec<_>>());
        }
        assert_ne!(epochs[0], epochs[1]);
    }

    #[test]
    fn the_order_never_changes() {
        let mut cursor = DataCursor::new(0, 8, DataOrder::Shuffled).unwrap();
        assert_eq!(cursor.next_batch(8), [2, 4, 0, 6, 5, 7, 1, 3]);
        let mut given = DataCursor::new(0, 3, DataOrder::Given).unwrap();
        assert_eq!(given.next_full_batch(5), [0, 1, 2, 0, 1]);
    }

    #[test]
    fn a_cursor_read_back_goes_on_where_it_stood() {
        let mut cursor = DataCursor::new(9, 10, DataOrder::Shuffled).unwrap();
        cursor.next_full_batch(13);
        let text = serde_json::to_string(&cursor).unwrap();
        let mut back: DataCursor = serde_json::from_str(&text).unwrap();
        assert_eq!(back.next_batch(4), cursor.next_batch(4));
        assert!(matches!(
            back.check_items(11),
            Err(Error::LengthMismatch { right_len: 10, .. })
        ));
        assert!(matches!(
            DataCursor::new(0, 0, DataOrder::Given),
            Err(Error::Empty { .. })
        ));
    }
}
