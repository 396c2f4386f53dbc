//! Looks at a dataset with a model's tokenizer before it is trained on: what format it has, how
//! long its rows are, and which of them would train the model on something else than was meant.
//!
//! ```text
//! cargo run --release --example check_dataset -- train.jsonl --model path/to/model
//! ```
//!
//! Ends with 1 if something was found, so that a script can stop there. With
//! `--features parquet` Parquet files are read, too.

#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Parser;
use rlhf::models::Tokenizer;
use rlhf::models::data::{EncodeOptions, Rows, lint};

#[derive(Parser)]
#[command(about = "Checks a dataset against a model's tokenizer")]
struct Options {
    /// JSONL or Parquet file in one of TRL's formats (docs/data.md).
    file: PathBuf,
    /// Folder with the model's tokenizer.
    #[arg(long)]
    model: PathBuf,
    /// Report rows with more tokens than this.
    #[arg(long)]
    max_tokens: Option<usize>,
    /// Check answers as they are: no EOS token is appended.
    #[arg(long)]
    no_eos: bool,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(2)
        }
    }
}

/// Whether nothing was found.
fn run(options: &Options) -> Result<bool, rlhf::models::Error> {
    let tokenizer = Tokenizer::from_dir(&options.model)?;
    let encode = EncodeOptions {
        max_tokens: options.max_tokens,
        append_eos: !options.no_eos,
        ..EncodeOptions::default()
    };
    let report = lint(Rows::open(&options.file)?, &tokenizer, &encode)?;
    println!("{report}");
    Ok(report.findings.is_empty())
}
