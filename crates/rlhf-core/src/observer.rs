//! Watching a run.

mod jsonl;
mod progress;

use std::ops::ControlFlow;

pub use jsonl::JsonlObserver;
pub use progress::ProgressObserver;

use crate::{Replicas, Result, Stats};

/// What an observer is told after a step.
#[derive(Debug, Clone, Copy)]
pub struct Event<'a> {
    /// Steps done, this one included: the first event of a run has 1.
    pub step: u64,
    /// Steps that the run will have, where that is known.
    pub total_steps: Option<u64>,
    /// Which part of a run this is: `"sft"`, `"reward"`, `"ppo"`, `"evaluation"`.
    pub phase: &'static str,
    /// What was measured.
    pub stats: &'a Stats,
}

/// Is told about every step, and may end the run.
///
/// Closures are observers:
///
/// ```
/// use std::ops::ControlFlow;
/// use rlhf_core::{Event, Observer};
///
/// let mut stop_at_high_kl = |event: &Event<'_>| {
///     Ok(match event.stats.get("ppo/kl") {
///         Some(kl) if kl > 10.0 => ControlFlow::Break(()),
///         _ => ControlFlow::Continue(()),
///     })
/// };
/// # let stats = [("ppo/kl", 11.0)].into_iter().collect();
/// # let event = Event { step: 1, total_steps: None, phase: "ppo", stats: &stats };
/// assert!(stop_at_high_kl.observe(&event)?.is_break());
/// # Ok::<(), rlhf_core::Error>(())
/// ```
pub trait Observer {
    /// Called once after each step. [`ControlFlow::Break`] asks the trainer to stop after it; the
    /// run ends in good order, as if this had been its last step.
    ///
    /// # Errors
    /// An error ends the run with that error.
    fn observe(&mut self, event: &Event<'_>) -> Result<ControlFlow<()>>;
}

impl<F: FnMut(&Event<'_>) -> Result<ControlFlow<()>>> Observer for F {
    fn observe(&mut self, event: &Event<'_>) -> Result<ControlFlow<()>> {
        self(event)
    }
}

impl Observer for Box<dyn Observer + '_> {
    fn observe(&mut self, event: &Event<'_>) -> Result<ControlFlow<()>> {
        (**self).observe(event)
    }
}

impl Observer for Vec<Box<dyn Observer + '_>> {
    fn observe(&mut self, event: &Event<'_>) -> Result<ControlFlow<()>> {
        tell(self, event)
    }
}

/// Tells every observer. The answer is `Break` if one of them said so.
///
/// Where several processes train together ([`Replicas::current`]), those of the first alone are
/// told, and its answer is everybody's.
///
/// # Errors
/// That of the first observer that failed; the others were told all the same.
pub fn notify(
    observers: &mut [Box<dyn Observer + '_>],
    event: &Event<'_>,
) -> Result<ControlFlow<()>> {
    let ask = || tell(observers, event).map(|answer| vec![f64::from(answer.is_break())]);
    let answer = Replicas::current().numbers_of_the_first(false, ask)?;
    Ok(match answer.first().is_some_and(|&stop| stop > 0.0) {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    })
}

fn tell(observers: &mut [Box<dyn Observer + '_>], event: &Event<'_>) -> Result<ControlFlow<()>> {
    let mut answer = Ok(ControlFlow::Continue(()));
    for observer in observers {
        match (observer.observe(event), &answer) {
            (Err(error), Ok(_)) => answer = Err(error),
            (Ok(ControlFlow::Break(())), Ok(_)) => answer = Ok(ControlFlow::Break(())),
            _ => {}
        }
    }
    answer
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::Error;

    #[test]
    fn every_observer_is_told_and_any_may_stop_the_run() {
        let told = std::cell::Cell::new(0);
        let answering = |answer: fn() -> Result<ControlFlow<()>>| -> Box<dyn Observer + '_> {
            let told = &told;
            Box::new(move |_: &Event<'_>| {
                told.set(told.get() + 1);
                answer()
            })
        };
        let go_on = || Ok(ControlFlow::Continue(()));
        let stop = || Ok(ControlFlow::Break(()));
        let fail = || Err(Error::config("a", 1, "b"));
        let stats = Stats::new();
        let event = Event {
            step: 1,
            total_steps: None,
            phase: "test",
            stats: &stats,
        };
        let mut fine = vec![answering(go_on), answering(go_on)];
        assert!(notify(&mut fine, &event).unwrap().is_continue());
        let mut stopping = vec![answering(stop), answering(go_on)];
        assert!(stopping.observe(&event).unwrap().is_break());
        let mut failing = [answering(fail), answering(stop)];
        assert!(matches!(
            notify(&mut failing, &event),
            Err(Error::InvalidConfig { .. })
        ));
        assert_eq!(told.get(), 6);
    }
}
