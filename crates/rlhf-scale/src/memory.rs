//! Memory of a training step: predicted, and measured.

mod meter;
mod plan;
mod step;

pub use meter::{MemoryUse, measure_memory};
pub use plan::{MemoryPlan, available_memory};
pub use step::{BlockMemory, GenerationMemory, HeadMemory, LogprobsMemory, StepMemory};

pub(crate) use plan::mib;
