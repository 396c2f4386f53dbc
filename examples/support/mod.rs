//! What the examples share. Not part of the library.
#![allow(dead_code, unreachable_pub)] // a module of each example, which uses a part of it

pub mod bpe;
pub mod cheerful;
pub mod curves;
pub mod evaluate;
pub mod exercises;
pub mod expression;
pub mod faithful;
pub mod human;
pub mod rankings;
pub mod report;
pub mod run_folder;
pub mod stages;
pub mod table;
pub mod task;
pub mod watching;

use std::error::Error;
use std::process::ExitCode;

use rlhf::core::tch;

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

/// Threads of libtorch; 0 leaves the choice to it.
pub fn set_threads(threads: i32) {
    if threads > 0 {
        tch::set_num_threads(threads);
    }
}
