//! Asks a person which of two answers is better:
//!
//! ```text
//! cargo run --release --example collect_preferences -- --out feedback.jsonl
//! ```
//!
//! A policy samples two answers to each prompt, and the terminal shows them side by side, in
//! random order. Every choice is on the disk before the next question comes; the same command goes
//! on where it was left. `train_reward_model --data feedback.jsonl` learns from the file.
//!
//! With `--ask DIR --ask DIR …`, folders of reward models, the questions on which they differ most
//! come first. `--trial` measures whether that pays, on the embedded texts, where a reward model
//! stands in for the person.
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

#[path = "support/acquisition_trial.rs"]
mod acquisition_trial;
#[path = "support/comparisons.rs"]
mod comparisons;
mod support;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use acquisition_trial::{Budget, Summary};
use clap::Parser;
use rlhf::core::{
    Completions, GenerationConfig, Kind, Preference, RngStreams, SamplingConfig, generate,
};
use rlhf::models::data::read_jsonl;
use rlhf::models::{CausalLm, LoadOptions, SequenceClassifier, Tokenizer};
use rlhf::reward::feedback::{
    AskOptions, End, FeedbackLog, Question, Recovery, ask, most_informative,
};
use rlhf::reward::{Combination, Ensemble, Normalized};
use serde::Deserialize;
use support::task::{SummaryTask, read_pairs};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Samples two answers to each prompt and asks which is better.
#[derive(Debug, Parser)]
struct Options {
    /// Hugging Face folder of the policy.
    #[arg(long, default_value = "examples/models/debtldr-gpt2")]
    policy: PathBuf,
    /// JSONL file with `prompt`; without it, the embedded texts and the request to summarise
    /// them.
    #[arg(long)]
    prompts: Option<PathBuf>,
    /// File that the choices are appended to.
    #[arg(long, default_value = "runs/feedback.jsonl")]
    out: PathBuf,
    /// Prompts to sample answers to.
    #[arg(long, default_value_t = 50)]
    count: usize,
    /// Most tokens of an answer.
    #[arg(long, default_value_t = 24)]
    max_new_tokens: usize,
    /// Temperature of sampling.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Folder of a reward model with the policy's tokens. Given twice or more, the questions on
    /// which they differ most come first.
    #[arg(long)]
    ask: Vec<PathBuf>,
    /// Seed of the answers and of the sides they are shown on.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Columns of the terminal.
    #[arg(long, default_value_t = 100)]
    width: usize,
    /// Asks nobody: measures uncertain against random questions on the embedded data.
    #[arg(long)]
    trial: bool,
    /// Seeds of the trial.
    #[arg(long, default_value_t = 3)]
    trial_seeds: u64,
    /// Labels bought in each round of the trial.
    #[arg(long, default_value_t = 48)]
    trial_labels: usize,
    /// Rounds of the trial.
    #[arg(long, default_value_t = 3)]
    trial_rounds: usize,
    /// Comparisons to choose from in the trial.
    #[arg(long, default_value_t = 800)]
    trial_pool: usize,
}

fn main() -> ExitCode {
    support::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let policy = CausalLm::from_pretrained(&options.policy, &in_f32())?;
    let tokenizer = Tokenizer::from_dir(&options.policy)?;
    tokenizer.check_fits(policy.config())?;
    if options.trial {
        return trial(options, &policy, tokenizer);
    }
    // Opened first: a file that cannot be used must not cost the sampling.
    let mut log = FeedbackLog::open(&options.out)?;
    for recovery in log.recoveries() {
        match recovery {
            Recovery::Removed { path, bytes } => {
                println!("{}: removed a torn line of {bytes} bytes", path.display());
            }
            Recovery::Completed { path } => {
                println!("{}: completed the last line", path.display());
            }
        }
    }
    let questions = questions(options, &policy, &tokenizer)?;
    let options = AskOptions {
        seed: options.seed,
        width: options.width,
    };
    let (mut input, mut output) = (std::io::stdin().lock(), std::io::stdout().lock());
    let report = ask(&questions, &mut log, &mut input, &mut output, options)?;
    drop(output);
    println!(
        "\n{}: {} choices in this session; {} preferences and {} ties or skipped in all, {} to go",
        match report.end {
            End::AllAnswered => "Done",
            End::Quit => "Until next time",
            End::EndOfInput => "The input ended",
        },
        report.answered,
        log.preferences(),
        log.undecided(),
        report.left
    );
    Ok(())
}

/// Differences of scores that are small would be lost in bf16.
fn in_f32() -> LoadOptions {
    LoadOptions {
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    }
}

#[derive(Debug, Deserialize)]
struct Prompt {
    prompt: String,
}

/// Two different answers to each prompt, those that are worth asking about first.
fn questions(options: &Options, policy: &CausalLm, tokenizer: &Tokenizer) -> Result<Vec<Question>> {
    let mut prompts = prompts(options, tokenizer)?;
    prompts.truncate(options.count);
    let room = policy
        .config()
        .max_length()
        .saturating_sub(options.max_new_tokens);
    let before = prompts.len();
    prompts.retain(|prompt| !prompt.is_empty() && prompt.len() <= room);
    if prompts.len() < before {
        println!(
            "left out: {} prompts, empty or too long",
            before - prompts.len()
        );
    }
    let generation = GenerationConfig {
        max_new_tokens: options.max_new_tokens,
        samples_per_prompt: 2,
        sampling: SamplingConfig {
            temperature: options.temperature,
            ..SamplingConfig::default()
        },
        stop_token_ids: tokenizer.stop_token_ids().to_vec(),
        ..GenerationConfig::default()
    };
    println!(
        "sampling two answers to each of {} prompts …",
        prompts.len()
    );
    let streams = RngStreams::new(options.seed);
    let written = generate(policy, &prompts, &generation, &streams, 0)?.decoded(tokenizer)?;
    let (mut questions, mut pairs) = (Vec::new(), Vec::new());
    let sequences = written.batch.sequences();
    for (texts, sequences) in written.texts()?.chunks(2).zip(sequences.chunks(2)) {
        let answers = [0, 1].map(|i| texts[i].response.trim().to_string());
        if answers[0] == answers[1] || answers.iter().any(String::is_empty) {
            continue;
        }
        let (first, second) = (&sequences[0], &sequences[1]);
        pairs.push(Preference::new(
            Arc::clone(&first.prompt),
            first.response.clone(),
            second.response.clone(),
        ));
        questions.push(Question {
            prompt: texts[0].prompt.clone(),
            answers,
        });
    }
    let useless = prompts.len() - questions.len();
    if useless > 0 {
        println!("left out: {useless} prompts whose answers are equal, or one of them empty");
    }
    let Some(order) = order(options, &pairs)? else {
        return Ok(questions);
    };
    println!(
        "the questions on which {} reward models differ most come first",
        options.ask.len()
    );
    Ok(order.into_iter().map(|i| questions[i].clone()).collect())
}

fn prompts(options: &Options, tokenizer: &Tokenizer) -> Result<Vec<Arc<[i64]>>> {
    let Some(path) = &options.prompts else {
        let task = SummaryTask::new(tokenizer.clone(), 64)?;
        let pairs = read_pairs(Path::new("examples/data/debtldr/train.jsonl"))?;
        return pairs.iter().map(|pair| task.prompt(&pair.text)).collect();
    };
    let lines: Vec<Prompt> = read_jsonl(path)?;
    let encode = |line: &Prompt| Ok(tokenizer.encode(&line.prompt)?.into());
    lines.iter().map(encode).collect()
}

/// The order that the reward models suggest, where there are two or more.
fn order(options: &Options, pairs: &[Preference]) -> Result<Option<Vec<usize>>> {
    match options.ask.len() {
        0 => return Ok(None),
        1 => return Err("--ask: one reward model cannot disagree; give two or more".into()),
        _ => {}
    }
    if pairs.is_empty() {
        return Ok(None);
    }
    let load = |dir: &PathBuf| -> Result<_> {
        let model = SequenceClassifier::from_pretrained(dir, &in_f32())?;
        Ok(Normalized::from_dir(model, dir)?)
    };
    let members = options.ask.iter().map(load).collect::<Result<Vec<_>>>()?;
    let ensemble = Ensemble::new(members, Combination::Mean)?;
    let judge = |c: &Completions| ensemble.score_with_disagreement(c);
    Ok(Some(most_informative(judge, pairs, 32)?))
}

/// Uncertain against random questions, at equal numbers of labels.
///
/// A reward model that learnt from the human summaries of other texts stands in for the person:
/// it knows what it wants, and gives the same answer every time. The questions are pairs of the
/// policy's own summaries, as they are when a person is asked.
fn trial(options: &Options, policy: &CausalLm, tokenizer: Tokenizer) -> Result<()> {
    let task = SummaryTask::new(tokenizer.clone(), 64)?;
    let texts = read_pairs(Path::new("examples/data/debtldr/train.jsonl"))?;
    let unseen = read_pairs(Path::new("examples/data/debtldr/valid.jsonl"))?;
    let writer = comparisons::Writer {
        model: policy,
        tokenizer: &tokenizer,
        max_new_tokens: options.max_new_tokens,
    };
    let streams = RngStreams::new(options.seed);
    let (asked, others) = texts.split_at(options.trial_pool.min(texts.len() / 2));
    let mut lessons = writer.comparisons(&task, others, &streams, 0)?;
    lessons.extend(comparisons::against_mismatches(&task, others)?);
    let person = acquisition_trial::person(policy, &lessons, options.seed)?;
    let labelled = |texts: &[_], first| -> Result<Vec<Preference>> {
        let a = writer.summaries(&task, texts, &streams, first)?;
        let b = writer.summaries(&task, texts, &streams, first + (1 << 32))?;
        let pairs = texts
            .iter()
            .zip(a.into_iter().zip(b))
            .map(|(text, (a, b))| Ok(Preference::new(task.prompt(&text.text)?, a, b)))
            .collect::<Result<Vec<_>>>()?;
        acquisition_trial::answers(&person, &pairs)
    };
    let (pool, held_out) = (labelled(asked, 1 << 40)?, labelled(&unseen, 1 << 50)?);
    let budget = Budget {
        start: options.trial_labels,
        per_round: options.trial_labels,
        rounds: options.trial_rounds,
        heads: 5,
        epochs: 4,
    };
    if budget.start + budget.rounds * budget.per_round > pool.len() {
        let found = pool.len();
        return Err(format!("the trial wants more labels than its pool of {found}").into());
    }
    println!(
        "{} comparisons to choose from, {} held out",
        pool.len(),
        held_out.len()
    );
    let seeds = (0..options.trial_seeds)
        .map(|i| acquisition_trial::run(policy, &pool, &held_out, budget, options.seed + i));
    println!("{}", Summary(seeds.collect::<Result<_>>()?));
    Ok(())
}
