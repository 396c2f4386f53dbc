//! A progress bar.

use std::fmt::Write as _;
use std::io::{IsTerminal, Write};
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::{Event, Observer};
use crate::stats::Short;
use crate::{Error, Result};

/// How often a run that nobody watches writes a line.
const LINE_EVERY: Duration = Duration::from_secs(30);

/// Shows phase, steps, time left and a few metrics on standard error: a bar in a terminal, and
/// one line every thirty seconds (and the first and last of each phase) anywhere else.
pub struct ProgressObserver {
    metrics: Vec<String>,
    phase: &'static str,
    display: Display,
}

enum Display {
    Bar(Option<ProgressBar>),
    Lines {
        out: Box<dyn Write + Send>,
        every: Duration,
        last: Option<Instant>,
    },
}

impl ProgressObserver {
    /// Shows `metrics`, in that order, each without the first part of its path. Three or four fit
    /// a terminal. What an event does not have is left out.
    pub fn new(metrics: impl IntoIterator<Item = impl Into<String>>) -> Self {
        if std::io::stderr().is_terminal() {
            return Self::with(metrics, Display::Bar(None));
        }
        Self::lines(metrics, LINE_EVERY, std::io::stderr())
    }

    /// Writes a line to `out` for the first and the last step of each phase, and for the first
    /// step that ends `every` or more after the last line.
    pub fn lines(
        metrics: impl IntoIterator<Item = impl Into<String>>,
        every: Duration,
        out: impl Write + Send + 'static,
    ) -> Self {
        let out = Box::new(out);
        let last = None;
        Self::with(metrics, Display::Lines { out, every, last })
    }

    fn with(metrics: impl IntoIterator<Item = impl Into<String>>, display: Display) -> Self {
        Self {
            metrics: metrics.into_iter().map(Into::into).collect(),
            phase: "",
            display,
        }
    }

    fn message(&self, event: &Event<'_>) -> String {
        let mut message = String::new();
        for metric in &self.metrics {
            if let Some(value) = event.stats.get(metric) {
                let name = metric
                    .split_once('/')
                    .map_or(metric.as_str(), |(_, name)| name);
                // Writing to a String cannot fail.
                let _ = write!(message, "  {name} {}", Short(value));
            }
        }
        message
    }
}

impl Observer for ProgressObserver {
    fn observe(&mut self, event: &Event<'_>) -> Result<ControlFlow<()>> {
        let message = self.message(event);
        let new_phase = self.phase != event.phase;
        let ends = event.total_steps == Some(event.step);
        self.phase = event.phase;
        match &mut self.display {
            Display::Bar(bar) => {
                if new_phase && let Some(bar) = bar.take() {
                    bar.abandon();
                }
                let bar = bar.get_or_insert_with(|| new_bar(event));
                bar.set_message(message);
                bar.set_position(event.step);
                if ends {
                    bar.abandon(); // stays on the screen
                }
            }
            Display::Lines { out, every, last } => {
                let due = last.is_none_or(|at| at.elapsed() >= *every);
                if new_phase || ends || due {
                    *last = Some(Instant::now());
                    let total = event.total_steps.map_or(String::new(), |n| format!("/{n}"));
                    writeln!(out, "{} {}{total}{message}", event.phase, event.step)
                        .map_err(Error::io("writing progress to", "the log"))?;
                }
            }
        }
        Ok(ControlFlow::Continue(()))
    }
}

fn new_bar(event: &Event<'_>) -> ProgressBar {
    let (bar, template) = match event.total_steps {
        Some(total) => (
            ProgressBar::new(total),
            "{prefix:>10} {bar:24} {pos}/{len} {eta:>4}{msg}",
        ),
        None => (
            ProgressBar::no_length(),
            "{prefix:>10} {pos} steps {elapsed:>4}{msg}",
        ),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(event.phase);
    // A resumed run begins in the middle; the time left is estimated from here on.
    bar.set_position(event.step);
    bar.reset_eta();
    bar
}

impl std::fmt::Debug for ProgressObserver {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ProgressObserver")
            .field("metrics", &self.metrics)
            .field("phase", &self.phase)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Stats;
    use std::sync::{Arc, Mutex};

    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl Write for Log {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_gets_the_first_and_last_line_of_each_phase() {
        let log = Log::default();
        let hour = Duration::from_secs(3600);
        let mut observer =
            ProgressObserver::lines(["ppo/score/mean", "ppo/absent"], hour, log.clone());
        let stats: Stats = [("ppo/score/mean", 0.5)].into_iter().collect();
        for phase in ["reward", "ppo"] {
            for step in 1..=4 {
                let event = Event {
                    step,
                    total_steps: Some(4),
                    phase,
                    stats: &stats,
                };
                assert!(observer.observe(&event).unwrap().is_continue());
            }
        }
        let text = String::from_utf8(log.0.lock().unwrap().clone()).unwrap();
        let expected = "reward 1/4  score/mean 0.50000\nreward 4/4  score/mean 0.50000\n\
                        ppo 1/4  score/mean 0.50000\nppo 4/4  score/mean 0.50000\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn bars_of_known_and_unknown_length() {
        let stats: Stats = [("ppo/kl", 0.5)].into_iter().collect();
        let mut observer = ProgressObserver::with(["ppo/kl"], Display::Bar(None));
        for total_steps in [Some(2), None] {
            let phase = if total_steps.is_some() { "ppo" } else { "sft" };
            let event = Event {
                step: 1,
                total_steps,
                phase,
                stats: &stats,
            };
            assert!(observer.observe(&event).unwrap().is_continue());
            let Display::Bar(Some(bar)) = &observer.display else {
                unreachable!("a bar was made")
            };
            assert_eq!((bar.position(), bar.length()), (1, total_steps));
            assert_eq!(bar.message(), "  kl 0.50000");
        }
    }
}
