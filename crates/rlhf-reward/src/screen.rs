//! Comparisons that teach nothing.

use std::fmt;

use rlhf_core::{Preference, PreferenceBatch};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// How many comparisons were left out, and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Skipped {
    /// Both answers have the same tokens.
    pub equal: usize,
    /// An answer has no token (any more).
    pub empty: usize,
    /// Prompt and an answer are longer than the limit.
    pub too_long: usize,
}

impl Skipped {
    /// All of them.
    pub fn total(&self) -> usize {
        self.equal + self.empty + self.too_long
    }
}

impl fmt::Display for Skipped {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            equal,
            empty,
            too_long,
        } = self;
        write!(
            f,
            "{equal} with equal answers, {empty} with an empty one, {too_long} too long"
        )
    }
}

/// What becomes of a comparison that is longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// It is left out, as TRL's `RewardTrainer` does.
    Drop,
    /// Its answers lose their ends. Where they became equal or empty, it is left out.
    CutAnswers,
}

/// Leaves out the comparisons that teach nothing, and counts them: those of equal answers, those
/// with an empty answer, and, where [`Overlong`] says so, those of more than `max_length` tokens.
///
/// ```
/// use rlhf_reward::core::Preference;
/// use rlhf_reward::{Overlong, screen_pairs};
///
/// let pairs = vec![
///     Preference::new([1, 2], [3, 4], [5]),
///     Preference::new([1, 2], [3, 4], [3, 6]), // equal once they are cut
/// ];
/// let (kept, skipped) = screen_pairs(pairs, 3, Overlong::CutAnswers);
/// assert_eq!((kept[0].chosen.as_slice(), kept.len()), ([3].as_slice(), 1));
/// assert_eq!((skipped.equal, skipped.total()), (1, 1));
/// ```
pub fn screen_pairs(
    pairs: Vec<Preference>,
    max_length: usize,
    overlong: Overlong,
) -> (Vec<Preference>, Skipped) {
    let mut skipped = Skipped::default();
    let keep = |mut pair: Preference| {
        let room = max_length.saturating_sub(pair.prompt.len());
        if pair.chosen.len().max(pair.rejected.len()) > room {
            match overlong {
                Overlong::Drop => {
                    skipped.too_long += 1;
                    return None;
                }
                Overlong::CutAnswers => {
                    pair.chosen.truncate(room);
                    pair.rejected.truncate(room);
                }
            }
        }
        count_useless(&pair, &mut skipped).then_some(pair)
    };
    let kept = pairs.into_iter().filter_map(keep).collect();
    (kept, skipped)
}

/// The comparisons of a batch that teach something; an error if there is none.
pub(crate) fn usable(batch: &PreferenceBatch) -> Result<(PreferenceBatch, Skipped)> {
    let mut skipped = Skipped::default();
    let kept: Vec<_> = batch
        .pairs()
        .iter()
        .filter(|pair| count_useless(pair, &mut skipped))
        .cloned()
        .collect();
    if kept.is_empty() {
        return Err(Error::NothingToLearn {
            pairs: batch.len(),
            skipped,
        });
    }
    Ok((PreferenceBatch::new(kept)?, skipped))
}

/// Whether a comparison teaches something; counts it where it does not.
fn count_useless(pair: &Preference, skipped: &mut Skipped) -> bool {
    let empty = pair.chosen.is_empty() || pair.rejected.is_empty();
    let equal = pair.chosen == pair.rejected;
    skipped.empty += usize::from(empty);
    skipped.equal += usize::from(equal && !empty);
    !empty && !equal
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_is_counted_once() {
        let pairs = || {
            vec![
                Preference::new([1], [2, 3, 4], [5]),
                Preference::new([1], [2], [2]),
                Preference::new([1], [], []),
                Preference::new([1], [2], [3]),
                Preference::new([1, 1, 1, 1], [2], [3]),
            ]
        };
        let (kept, skipped) = screen_pairs(pairs(), 3, Overlong::Drop);
        let counts = |s: Skipped| (s.equal, s.empty, s.too_long);
        assert_eq!((kept.len(), counts(skipped)), (1, (1, 1, 2)));
        // A prompt that fills the window leaves nothing of its answers.
        let (kept, skipped) = screen_pairs(pairs(), 3, Overlong::CutAnswers);
        assert_eq!((kept.len(), counts(skipped)), (2, (1, 2, 0)));
        assert_eq!(kept[0].chosen, [2, 3]);
        assert_eq!(
            skipped.to_string(),
            "1 with equal answers, 2 with an empty one, 0 too long"
        );
    }
}
