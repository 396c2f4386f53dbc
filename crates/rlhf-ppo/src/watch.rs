//! An observer that sees a reward rise while everything else tells another story.

mod config;
mod finding;
mod rules;
mod trend;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::ControlFlow;

use rlhf_core::{Event, Observer, Result, Stats};

pub use config::{StopRule, WatchConfig};
pub use finding::{Evidence, Finding, FindingKind};

use trend::History;

/// What a [`HackingWatch`] does with a finding as it is made.
type Listener = Box<dyn FnMut(&Finding) + Send>;

/// Watches the statistics of a [`PpoTrainer`](crate::PpoTrainer) or a
/// [`GrpoTrainer`](crate::GrpoTrainer) for rewards that are hacked and runs that have gone wrong.
///
/// A policy that is optimised against a judge finds what the judge overrates: longer answers,
/// repeated words, whatever (Gao et al. 2023, arXiv 2210.10760). The judged reward rises all the
/// same, so it cannot tell; other numbers can. The watch compares the mean of each over the last
/// [`window`](WatchConfig::window) steps with that over the first, and reports what
/// [`FindingKind`] lists, each with its numbers and with what to change. A change counts if it is
/// large ([`WatchConfig`] says how large) *and* stands out of the noise from step to step.
///
/// It only reads statistics: a run with it is the same run, unless [`WatchConfig::stop`] lets it
/// end it. A finding is reported once, and again if it was away for a window and came back. Runs that go on
/// from a checkpoint start a new watch, which takes the first steps that it sees for the start.
///
/// ```
/// use std::ops::ControlFlow;
/// use rlhf_ppo::core::{Event, Observer, Stats};
/// use rlhf_ppo::{FindingKind, HackingWatch, WatchConfig};
///
/// let mut watch = HackingWatch::new(WatchConfig::default())?;
/// for step in 1..=40 {
///     let t = step as f64 + (step % 3) as f64; // a trend, and noise
///     let stats = Stats::from_iter([
///         ("ppo/score/mean", 0.05 * t),
///         ("ppo/length", 20.0 + t), // answers grow with the score
///     ]);
///     let event = Event { step, total_steps: Some(40), phase: "ppo", stats: &stats };
///     assert!(watch.observe(&event)?.is_continue());
/// }
/// let [finding] = watch.findings() else { panic!("one finding") };
/// assert_eq!(finding.kind, FindingKind::LengthDrift);
/// assert!(finding.advice.contains("length"));
/// # Ok::<(), rlhf_ppo::Error>(())
/// ```
pub struct HackingWatch {
    config: WatchConfig,
    /// Of each phase.
    histories: BTreeMap<&'static str, History>,
    /// What was found of late.
    active: BTreeMap<(&'static str, FindingKind), Active>,
    findings: Vec<Finding>,
    listener: Option<Listener>,
    stopped: Option<usize>,
}

/// A finding that has been reported.
#[derive(Default)]
struct Active {
    /// Steps in a row that it was found in, up to now.
    found: usize,
    /// Steps in a row that it was not.
    missing: usize,
}

impl HackingWatch {
    /// A watch that has seen nothing yet.
    ///
    /// # Errors
    /// Those of [`WatchConfig::validate`].
    pub fn new(config: WatchConfig) -> crate::Result<Self> {
        config.validate()?;
        Ok(Self {
            config,
            histories: BTreeMap::new(),
            active: BTreeMap::new(),
            findings: Vec::new(),
            listener: None,
            stopped: None,
        })
    }

    /// Calls `listener` with each finding as it is made.
    #[must_use]
    pub fn on_finding(mut self, listener: impl FnMut(&Finding) + Send + 'static) -> Self {
        self.listener = Some(Box::new(listener));
        self
    }

    /// All findings so far, in the order in which they were made.
    pub fn findings(&self) -> &[Finding] {
        &self.findings
    }

    /// The finding that ended the run, if one did.
    pub fn stopped_by(&self) -> Option<&Finding> {
        self.findings.get(self.stopped?)
    }

    /// The options.
    pub fn config(&self) -> &WatchConfig {
        &self.config
    }

    /// Takes in the statistics of a step. [`Observer::observe`] calls this for the phases that
    /// there are rules for.
    pub fn look(&mut self, phase: &'static str, step: u64, stats: &Stats) -> ControlFlow<()> {
        let history = self
            .histories
            .entry(phase)
            .or_insert_with(|| History::new(phase));
        history.push(step, stats);
        let found = rules::findings(history, &self.config);
        let kinds: BTreeSet<FindingKind> = found.iter().map(|finding| finding.kind).collect();
        let window = self.config.window;
        self.active.retain(|(of, kind), active| {
            if *of == phase && !kinds.contains(kind) {
                active.found = 0;
                active.missing += 1;
            }
            active.missing < window
        });
        let mut answer = ControlFlow::Continue(());
        for finding in found {
            let kind = finding.kind;
            let new = !self.active.contains_key(&(phase, kind));
            let active = self.active.entry((phase, kind)).or_default();
            active.found += 1;
            active.missing = 0;
            let steps = active.found;
            if new {
                if let Some(listener) = &mut self.listener {
                    listener(&finding);
                }
                self.findings.push(finding);
            }
            if self.config.stop.ends(kind, steps) && answer.is_continue() {
                self.stopped = self.findings.iter().rposition(|f| f.kind == kind);
                answer = ControlFlow::Break(());
            }
        }
        answer
    }
}

impl Observer for HackingWatch {
    /// Looks at events of the phases `"ppo"` and `"grpo"`, and passes over the others.
    fn observe(&mut self, event: &Event<'_>) -> Result<ControlFlow<()>> {
        Ok(match event.phase {
            "ppo" | "grpo" => self.look(event.phase, event.step, event.stats),
            _ => ControlFlow::Continue(()),
        })
    }
}
