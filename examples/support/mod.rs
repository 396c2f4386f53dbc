//! What the examples share. Not part of the library.

pub mod curves;
pub mod evaluate;
pub mod faithful;
pub mod report;
pub mod task;
