//! What the examples share. Not part of the library.

pub mod curves;
pub mod task;
