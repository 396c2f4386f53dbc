//! Critic-free methods: the pieces against reference values, whole runs against TRL 1.16, and the
//! trainer on models that are small enough to see through.

#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "../common/mod.rs"]
mod common;
mod constraints;
mod pieces;
mod reference_runs;
mod trainer;
