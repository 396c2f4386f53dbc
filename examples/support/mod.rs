//! What the examples share. Not part of the library.
#![allow(dead_code, unreachable_pub)] // a module of each example, which uses a part of it

pub mod bpe;
pub mod cheerful;
pub mod curves;
pub mod evaluate;
pub mod exercises;
pub mod expression;
pub mod faithful;
pub mod rankings;
pub mod report;
pub mod task;
pub mod watching;

use std::error::Error;
use std::process::ExitCode;

/// Prints an error as a sentence rather than as a Rust structure.
pub fn exit_code(outcome: Result<(), Box<dyn Error>>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}
