//! Memory of a training step: predicted, and measured.

mod head;
mod meter;
mod plan;
mod step;

pub use head::LogprobsMemory;
pub use meter::{MemoryUse, measure_memory};
pub use plan::{MemoryPlan, available_memory};
pub use step::{BlockMemory, GenerationMemory, HeadMemory, StepMemory};

pub(crate) use plan::mib;
