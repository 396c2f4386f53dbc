//! An early sign of trouble: the chosen answers become less likely.

use std::fmt;
use std::ops::ControlFlow;

use rlhf_core::{Event, Observer};
use serde::{Deserialize, Serialize};

/// When a fall is worth a word.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct WatchConfig {
    /// Nats per token that the chosen answers may lose on average.
    pub tolerance: f64,
    /// Weight of the past in the moving average.
    pub smoothing: f64,
    /// Steps that are only counted.
    pub patience: u64,
}

impl Default for WatchConfig {
    /// More than 0.1 nats a token (10% in perplexity), averaged over some ten steps, five at least.
    fn default() -> Self {
        Self {
            tolerance: 0.1,
            smoothing: 0.9,
            patience: 5,
        }
    }
}

/// The chosen answers have become less likely than they were.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct ChosenFalls {
    /// Steps done.
    pub step: u64,
    /// Moving average of their change, in nats per token.
    pub change: f64,
}

impl fmt::Display for ChosenFalls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "step {}: the chosen answers have lost {:.3} nats a token: the margin grows because \
             rejected answers fall faster, and what the policy writes instead is neither. Lower \
             the learning rate, raise beta, or add a likelihood (rpo, or sft beside the loss)",
            self.step, -self.change
        )
    }
}

/// Watches the log-probability of chosen answers, which DPO's losses may lower as long as that of
/// the rejected ones falls faster (Pal et al. 2024, arXiv 2402.13228; Razin et al. 2024, arXiv
/// 2410.08847).
///
/// The change is that against the reference (`dpo/logprobs/chosen_drift`). Without one it is that
/// against the mean of the first [`WatchConfig::patience`] steps, which needs batches that are
/// alike. `warn` is called once for each fall below the tolerance, and its answer ends the run or
/// not.
///
/// ```
/// use std::ops::ControlFlow;
/// use rlhf_dpo::{ChosenWatch, WatchConfig};
///
/// let watch = ChosenWatch::new(WatchConfig::default(), |falls| {
///     eprintln!("{falls}");
///     ControlFlow::Continue(())
/// });
/// # let _ = watch;
/// ```
pub struct ChosenWatch<F> {
    config: WatchConfig,
    warn: F,
    average: Option<f64>,
    /// Without a reference: sum over the first steps.
    start: f64,
    steps: u64,
    warned: bool,
}

impl<F: FnMut(ChosenFalls) -> ControlFlow<()>> ChosenWatch<F> {
    /// An observer that tells `warn`.
    pub fn new(config: WatchConfig, warn: F) -> Self {
        Self {
            config,
            warn,
            average: None,
            start: 0.0,
            steps: 0,
            warned: false,
        }
    }

    /// The change that a step shows, once there is something to compare with.
    fn change(&mut self, event: &Event<'_>) -> Option<f64> {
        self.steps += 1;
        if let Some(drift) = event.stats.get("dpo/logprobs/chosen_drift") {
            return Some(drift);
        }
        let now = event.stats.get("dpo/logprobs/chosen_per_token")?;
        let first = self.config.patience.max(1);
        if self.steps <= first {
            self.start += now / first as f64;
            return None;
        }
        Some(now - self.start)
    }
}

impl<F: FnMut(ChosenFalls) -> ControlFlow<()>> Observer for ChosenWatch<F> {
    fn observe(&mut self, event: &Event<'_>) -> rlhf_core::Result<ControlFlow<()>> {
        let Some(change) = self.change(event) else {
            return Ok(ControlFlow::Continue(()));
        };
        let past = self.config.smoothing;
        let average = match self.average {
            None => change,
            Some(average) => past * average + (1.0 - past) * change,
        };
        self.average = Some(average);
        let fallen = average < -self.config.tolerance && self.steps >= self.config.patience;
        if !fallen || self.warned {
            self.warned &= fallen;
            return Ok(ControlFlow::Continue(()));
        }
        self.warned = true;
        Ok((self.warn)(ChosenFalls {
            step: event.step,
            change: average,
        }))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn steps_of_warnings(name: &str, values: &[f64]) -> Vec<u64> {
        let mut warned = Vec::new();
        let config = WatchConfig {
            tolerance: 0.5,
            smoothing: 0.5,
            patience: 2,
        };
        let mut watch = ChosenWatch::new(config, |falls: ChosenFalls| {
            warned.push(falls.step);
            ControlFlow::Break(())
        });
        for (i, value) in values.iter().enumerate() {
            let stats = [(name, *value)].into_iter().collect();
            let event = Event {
                step: i as u64 + 1,
                total_steps: None,
                phase: "dpo",
                stats: &stats,
            };
            let _ = watch.observe(&event).unwrap();
        }
        warned
    }

    #[test]
    fn each_fall_is_told_once() {
        // Averages: 0, -1, -1.5, -0.25, -1.1
        let drift = [0.0, -2.0, -2.0, 1.0, -2.0];
        let warned = steps_of_warnings("dpo/logprobs/chosen_drift", &drift);
        assert_eq!(warned, [2, 5]);
    }

    #[test]
    fn without_a_reference_the_first_steps_are_compared_with() {
        let falling = [-2.0, -2.2, -2.1, -2.1, -4.0, -4.0];
        let warned = steps_of_warnings("dpo/logprobs/chosen_per_token", &falling);
        assert_eq!(warned, [5]);
    }
}
