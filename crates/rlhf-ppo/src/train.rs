//! The loop over steps, of every trainer that learns from what its policy writes to prompts.

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use rlhf_core::{
    Checkpoint, CheckpointConfig, CheckpointStore, DataCursor, DataOrder, Event, Observer, Policy,
    Replicas, Stats, notify,
};

use crate::{Critic, GrpoTrainer, PpoTrainer, Result};

/// What the loop asks of a trainer.
pub(crate) trait PromptTrainer {
    /// Name of the run's part in events.
    const PHASE: &'static str;

    /// Seed of the prompts' order.
    fn seed(&self) -> u64;
    /// Prompts of a step.
    fn batch_size(&self) -> usize;
    fn steps_done(&self) -> u64;
    /// The place in the prompts; `None` before the first step.
    fn cursor(&mut self) -> &mut Option<DataCursor>;

    /// A step on as many prompts as `wanted`, which `next` hands out; it may ask for more. A step
    /// that fails changes nothing.
    fn step_on(&mut self, wanted: usize, next: &mut NextPrompts<'_>) -> Result<Stats>;

    fn save_to(&self, dir: &Path) -> Result<()>;
    fn load_from(&mut self, dir: &Path) -> Result<()>;
}

/// Hands out that many prompts.
pub(crate) type NextPrompts<'a> = dyn FnMut(usize) -> Vec<Arc<[i64]>> + 'a;

/// Trains until `steps` steps are done; with checkpoints, from the newest one that is there.
fn train<T: PromptTrainer>(
    trainer: &mut T,
    prompts: &[Arc<[i64]>],
    steps: u64,
    observers: &mut [Box<dyn Observer + '_>],
    checkpoints: Option<&CheckpointConfig>,
) -> Result<()> {
    let mut store = None;
    if let Some(CheckpointConfig { dir, every, keep }) = checkpoints {
        if *every == 0 {
            let reason = "at least 1 is needed";
            return Err(rlhf_core::Error::config("checkpoints.every", 0, reason).into());
        }
        let opened = CheckpointStore::open(dir, *keep)?;
        let step = resume(trainer, &opened)?;
        Replicas::current().check_same("checkpoints.dir", step)?;
        store = Some((opened, *every));
    }
    let mut stop = false;
    while !stop && trainer.steps_done() < steps {
        // Observers are told before the checkpoint is written: a resumed run may repeat what
        // they were told, but never leaves a step out.
        stop = train_step(trainer, prompts, steps, observers)?.is_break();
        let done = trainer.steps_done();
        if let Some((store, every)) = &store
            && (stop || done == steps || done.is_multiple_of(*every))
        {
            store.save(done, |dir| trainer.save_to(dir))?;
        }
    }
    Ok(())
}

fn train_step<T: PromptTrainer>(
    trainer: &mut T,
    prompts: &[Arc<[i64]>],
    steps: u64,
    observers: &mut [Box<dyn Observer + '_>],
) -> Result<ControlFlow<()>> {
    // Works on a copy of the cursor, so that a step that fails skips no prompt.
    let mut cursor = match trainer.cursor() {
        Some(cursor) => cursor.clone(),
        None => DataCursor::new(trainer.seed(), prompts.len(), DataOrder::Shuffled)?,
    };
    cursor.check_items(prompts.len())?;
    let stats = trainer.step_on(trainer.batch_size(), &mut |count| {
        let batch = cursor.next_full_batch(count).into_iter();
        batch.map(|i| Arc::clone(&prompts[i])).collect()
    })?;
    *trainer.cursor() = Some(cursor);
    let event = Event {
        step: trainer.steps_done(),
        total_steps: Some(steps),
        phase: T::PHASE,
        stats: &stats,
    };
    Ok(notify(observers, &event)?)
}

/// Loads the newest checkpoint, if it is further than the trainer. Returns the steps done.
fn resume<T: PromptTrainer>(trainer: &mut T, store: &CheckpointStore) -> Result<u64> {
    match store.latest()? {
        Some(Checkpoint { step, path }) if step > trainer.steps_done() => {
            trainer.load_from(&path)?;
        }
        _ => {}
    }
    Ok(trainer.steps_done())
}

/// What both trainers have of the loop, beside the step: the trait, and the methods that users see.
macro_rules! trained_on_prompts {
    (
        [$($generics:tt)*] $trainer:ty, phase $phase:literal,
        step $step:expr,
        $(#[doc = $prompts:literal])*
    ) => {
        impl<$($generics)*> PromptTrainer for $trainer {
            const PHASE: &'static str = $phase;

            fn seed(&self) -> u64 {
                self.config.seed
            }

            fn batch_size(&self) -> usize {
                self.config.batch_size
            }

            fn steps_done(&self) -> u64 {
                self.steps_done
            }

            fn cursor(&mut self) -> &mut Option<DataCursor> {
                &mut self.cursor
            }

            fn step_on(&mut self, wanted: usize, next: &mut NextPrompts<'_>) -> Result<Stats> {
                $step(self, wanted, next)
            }

            fn save_to(&self, dir: &Path) -> Result<()> {
                self.save(dir)
            }

            fn load_from(&mut self, dir: &Path) -> Result<()> {
                self.load(dir)
            }
        }

        impl<$($generics)*> $trainer {
            /// Trains until `steps` steps are done, those that a loaded trainer had behind it
            /// included.
            ///
            $(#[doc = $prompts])*
            /// Observers are told after each step, in phase
            #[doc = concat!("`\"", $phase, "\"`,")]
            /// and may end the run.
            ///
            /// # Errors
            /// No prompts; other prompts than a loaded trainer was trained on; those of
            /// [`step`](Self::step) and of the observers. What was done up to then stays.
            pub fn train(
                &mut self,
                prompts: &[Arc<[i64]>],
                steps: u64,
                observers: &mut [Box<dyn Observer + '_>],
            ) -> Result<()> {
                train(self, prompts, steps, observers, None)
            }

            /// [`train`](Self::train), with a checkpoint every so many steps and at the end, and
            /// going on from the newest that is there: a run that was killed, and is started again
            /// in the same way, ends with the same weights as one that was left alone.
            ///
            /// For a metrics file that is whole too, call [`resume`](Self::resume) first and start
            /// a [`JsonlObserver`](rlhf_core::JsonlObserver) from the step it returns.
            ///
            /// # Errors
            /// Those of [`train`](Self::train), of [`save`](Self::save) and [`load`](Self::load);
            /// [`InvalidConfig`](rlhf_core::Error::InvalidConfig) if `checkpoints.every` is 0.
            pub fn train_with_checkpoints(
                &mut self,
                prompts: &[Arc<[i64]>],
                steps: u64,
                observers: &mut [Box<dyn Observer + '_>],
                checkpoints: &CheckpointConfig,
            ) -> Result<()> {
                train(self, prompts, steps, observers, Some(checkpoints))
            }

            /// Loads the newest checkpoint of `store`, if it is further than this trainer. Returns
            /// the steps done.
            ///
            /// # Errors
            /// Those of [`CheckpointStore::latest`] and [`load`](Self::load).
            pub fn resume(&mut self, store: &CheckpointStore) -> Result<u64> {
                resume(self, store)
            }
        }
    };
}

trained_on_prompts! {
    [P: Policy, V: Critic<P>] PpoTrainer<P, V>, phase "ppo",
    step |trainer: &mut Self, wanted, next: &mut NextPrompts<'_>| trainer.step(&next(wanted)),
    /// Each step takes the next `batch_size` of the prompts, which every epoch visits in an order
    /// of its own.
}

trained_on_prompts! {
    [P: Policy] GrpoTrainer<P>, phase "grpo",
    step Self::step_from,
    /// Each step takes the next `batch_size` of the prompts, which every epoch visits in an order
    /// of its own; with dynamic sampling, as many more as it needs.
}
