//! Comparisons and labelled answers that are too long, or teach nothing.

use std::fmt;

use rlhf_core::Preference;
use serde::{Deserialize, Serialize};

/// What becomes of examples that are longer than the limit, or teach nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ScreenConfig {
    /// Most tokens of a prompt and an answer together; `None` for any number.
    pub max_length: Option<usize>,
    /// What becomes of longer ones.
    pub overlong: Overlong,
    /// Whether pairs of which an answer has no token stay. Such an answer has log-probability 0
    /// under every model and no gradient: losses learn from the other one alone.
    pub keep_empty: bool,
    /// Whether pairs of equal answers stay. They have no gradient in the losses of differences;
    /// the others pull both ways at once.
    pub keep_equal: bool,
}

/// What becomes of an example that is longer than the limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Overlong {
    /// It is left out.
    #[default]
    Drop,
    /// Its answers lose their ends (TRL's `keep_start`); a prompt that leaves no room makes them
    /// empty.
    CutAnswers,
}

impl Default for ScreenConfig {
    /// No limit; pairs with an empty answer and equal answers are left out.
    fn default() -> Self {
        Self {
            max_length: None,
            overlong: Overlong::default(),
            keep_empty: false,
            keep_equal: false,
        }
    }
}

/// What [`screen_pairs`] has found. A pair may be counted several times: cut, and then equal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ScreenReport {
    /// Pairs that came.
    pub pairs: usize,
    /// Pairs that stay.
    pub kept: usize,
    /// Pairs with an answer that was, or would have been, too long.
    pub too_long: usize,
    /// Those of them whose prompt leaves no room for an answer.
    pub prompt_fills_window: usize,
    /// Pairs with an answer without a token.
    pub empty: usize,
    /// Pairs of equal answers, two empty ones included.
    pub equal: usize,
}

impl fmt::Display for ScreenReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} of {} pairs: {} too long ({} of them by the prompt alone), {} with an empty \
             answer, {} of equal answers",
            self.kept, self.pairs, self.too_long, self.prompt_fills_window, self.empty, self.equal
        )
    }
}

/// Cuts or leaves out pairs that are too long, leaves out those that teach nothing, and counts.
///
/// ```
/// use rlhf_dpo::core::Preference;
/// use rlhf_dpo::{Overlong, ScreenConfig, screen_pairs};
///
/// let pairs = vec![
///     Preference::new([1, 2], [3, 4], [5]),
///     Preference::new([1, 2], [3, 4], [3, 6]), // equal once they are cut
///     Preference::new([1, 2, 3], [3], [4]),    // no room
/// ];
/// let config = ScreenConfig {
///     max_length: Some(3),
///     overlong: Overlong::CutAnswers,
///     ..ScreenConfig::default()
/// };
/// let (kept, report) = screen_pairs(pairs, &config);
/// assert_eq!((kept.len(), kept[0].chosen.as_slice()), (1, [3].as_slice()));
/// assert_eq!((report.too_long, report.prompt_fills_window), (3, 1));
/// assert_eq!((report.empty, report.equal), (1, 2));
/// ```
pub fn screen_pairs(
    pairs: Vec<Preference>,
    config: &ScreenConfig,
) -> (Vec<Preference>, ScreenReport) {
    let mut report = ScreenReport {
        pairs: pairs.len(),
        ..ScreenReport::default()
    };
    let mut kept = Vec::with_capacity(pairs.len());
    for mut pair in pairs {
        if let Some(max_length) = config.max_length {
            let room = max_length.saturating_sub(pair.prompt.len());
            if pair.chosen.len().max(pair.rejected.len()) > room {
                report.too_long += 1;
                report.prompt_fills_window += usize::from(room == 0);
                if config.overlong == Overlong::Drop {
                    continue;
                }
                pair.chosen.truncate(room);
                pair.rejected.truncate(room);
            }
        }
        let empty = pair.chosen.is_empty() || pair.rejected.is_empty();
        let equal = pair.chosen == pair.rejected;
        report.empty += usize::from(empty);
        report.equal += usize::from(equal);
        if (config.keep_empty || !empty) && (config.keep_equal || !equal) {
            kept.push(pair);
        }
    }
    report.kept = kept.len();
    (kept, report)
}
