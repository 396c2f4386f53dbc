//! Windows of metrics, and what counts as a change between them.

use std::collections::BTreeMap;

use rlhf_core::Stats;

/// What a run has reported so far. A few numbers a step; runs have thousands of steps at most.
pub(super) struct History {
    phase: &'static str,
    pub(super) steps: Vec<u64>,
    metrics: BTreeMap<String, Vec<(u64, f64)>>,
}

impl History {
    pub(super) fn new(phase: &'static str) -> Self {
        Self {
            phase,
            steps: Vec::new(),
            metrics: BTreeMap::new(),
        }
    }

    pub(super) fn phase(&self) -> &'static str {
        self.phase
    }

    pub(super) fn push(&mut self, step: u64, stats: &Stats) {
        self.steps.push(step);
        for (name, value) in stats.iter().filter(|(_, value)| value.is_finite()) {
            let Some(name) = name
                .strip_prefix(self.phase)
                .and_then(|n| n.strip_prefix('/'))
            else {
                continue;
            };
            match self.metrics.get_mut(name) {
                Some(values) => values.push((step, value)),
                None => {
                    self.metrics.insert(name.to_string(), vec![(step, value)]);
                }
            }
        }
    }

    pub(super) fn step(&self) -> u64 {
        self.steps.last().copied().unwrap_or(0)
    }

    /// All values of a metric with their steps; `name` is below the phase.
    pub(super) fn of(&self, name: &str) -> &[(u64, f64)] {
        self.metrics.get(name).map_or(&[], Vec::as_slice)
    }

    /// The values of the last `count` steps; `None` where there are fewer.
    pub(super) fn last(&self, name: &str, count: usize) -> Option<Vec<f64>> {
        let values = self.of(name);
        let start = values.len().checked_sub(count)?;
        Some(values[start..].iter().map(|(_, v)| *v).collect())
    }

    /// The first window against the last; `None` unless they are apart and full.
    pub(super) fn trend(&self, name: &str, window: usize) -> Option<Trend> {
        let values = self.of(name);
        let last = values.len().checked_sub(window)?;
        (last >= window).then(|| Trend::between(values, 0, last, window))
    }

    /// The window with the highest mean against the last, and its last step; `None` unless they
    /// are apart.
    pub(super) fn trend_from_peak(&self, name: &str, window: usize) -> Option<(u64, Trend)> {
        let values = self.of(name);
        let last = values.len().checked_sub(window)?;
        let starts = 0..=last.checked_sub(window)?;
        let mean = |start: &usize| mean(&values[*start..start + window]);
        let peak = starts.max_by(|a, b| mean(a).total_cmp(&mean(b)))?;
        let step = values[peak + window - 1].0;
        Some((step, Trend::between(values, peak, last, window)))
    }
}

/// The means of two windows.
#[derive(Debug, Clone, Copy)]
pub(super) struct Trend {
    pub(super) before: f64,
    pub(super) now: f64,
    /// Standard error of their difference.
    error: f64,
}

impl Trend {
    /// The windows that begin at two places. The noise is that from step to step over the whole
    /// run, which has many more degrees of freedom than a window, and a trend is none of it.
    fn between(values: &[(u64, f64)], before: usize, now: usize, window: usize) -> Self {
        let steps: Vec<(u64, f64)> = values
            .windows(2)
            .map(|pair| (pair[1].0, pair[1].1 - pair[0].1))
            .collect();
        let drift = mean(&steps);
        let squares = steps.iter().map(|(_, d)| (d - drift).powi(2)).sum::<f64>();
        // A difference of two values has twice the variance of one.
        let variance = squares / (steps.len().max(2) - 1) as f64 / 2.0;
        Self {
            before: mean(&values[before..before + window]),
            now: mean(&values[now..now + window]),
            error: (2.0 * variance / window as f64).sqrt(),
        }
    }

    /// Whether it rose by `least` and by `z` standard errors.
    pub(super) fn rose(&self, least: f64, z: f64) -> bool {
        let change = self.now - self.before;
        change > 0.0 && change >= least && change >= z * self.error
    }

    pub(super) fn fell(&self, least: f64, z: f64) -> bool {
        let change = self.before - self.now;
        change > 0.0 && change >= least && change >= z * self.error
    }
}

fn mean(values: &[(u64, f64)]) -> f64 {
    values.iter().map(|(_, value)| value).sum::<f64>() / values.len().max(1) as f64
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn history(values: &[f64]) -> History {
        let mut history = History::new("ppo");
        for (i, value) in values.iter().enumerate() {
            let stats = [("ppo/x", *value), ("other/x", 9.0), ("ppo/nan", f64::NAN)];
            history.push(i as u64 + 1, &Stats::from_iter(stats));
        }
        history
    }

    #[test]
    fn windows_are_apart_and_noise_is_not_a_trend() {
        assert!(history(&[1.0; 7]).trend("x", 4).is_none());
        let rising: Vec<f64> = (0..12).map(f64::from).collect();
        let trend = history(&rising).trend("x", 4).unwrap();
        assert_eq!((trend.before, trend.now), (1.5, 9.5));
        assert!(trend.rose(7.9, 3.0) && !trend.rose(8.1, 3.0) && !trend.fell(0.0, 0.0));
        // Up and down by 5, up by 1 on the whole.
        let noisy = history(&[0.0, 5.0, 5.0, 0.0, 1.0, 6.0, 6.0, 1.0]);
        let trend = noisy.trend("x", 4).unwrap();
        assert!((trend.now - trend.before - 1.0).abs() < 1e-12 && !trend.rose(0.5, 3.0));
        assert!(noisy.of("nan").is_empty());
        assert_eq!(noisy.last("x", 2), Some(vec![6.0, 1.0]));
        assert_eq!(noisy.last("x", 9), None);
    }

    #[test]
    fn peaks_are_found() {
        let values = [0.0, 1.0, 4.0, 5.0, 3.0, 1.0, 0.0, 0.5];
        let (step, trend) = history(&values).trend_from_peak("x", 2).unwrap();
        assert_eq!((step, trend.before, trend.now), (4, 4.5, 0.25));
    }
}
