//! Open-ended text in a cheerful style, and what becomes of it when a judge is believed too long:
//!
//! ```text
//! scripts/with-libtorch cargo run --release --example open_text
//! ```
//!
//! The embedded language model continues descriptions of software after their first words. A judge
//! that counts positive words rewards it, by RLOO and at no price for leaving the base model: the
//! worst that one can do. A second judge, the gold reward, reads: it wants different positive
//! words, no repetition, and English. It is measured and not trained against.
//!
//! The watch sees the first judge rise while other numbers tell another story, says so, and stops
//! the run. The table shows held-out texts at the start, when the watch stopped it, and at the end
//! of the same run if nobody had.
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

mod support;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use rlhf::core::{
    Completions, Device, GenerationConfig, Generator, Kind, LogprobOptions, Policy, RewardModel,
    RngStreams, reward_fn, tch,
};
use rlhf::models::{CausalLm, Tokenizer};
use rlhf::ppo::{
    FindingKind, GrpoConfig, GrpoTrainer, KlPenalty, OldLogprobs, StopRule, WatchConfig,
};
use rlhf::reward::{Component, RewardSum};
use serde::Serialize;
use support::cheerful::{Gold, cheerfulness};
use support::curves;
use support::evaluate::mean;
use support::run_folder::RunFolder;
use support::stages::language_model;
use support::table::{Row, table};
use support::task::{INSTRUCTION, Pair, read_pairs};
use support::watching::{taken, told, watch};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Trains a language model to write cheerfully, and watches it overdo it.
#[derive(Debug, Parser)]
struct Options {
    /// Hugging Face folder of the language model to start from.
    #[arg(long, default_value = "examples/models/debtldr-gpt2")]
    model: PathBuf,
    /// Steps of the whole run, had nobody stopped it.
    #[arg(long, default_value_t = 60)]
    steps: u64,
    /// Openings of a step, each with four continuations.
    #[arg(long, default_value_t = 24)]
    batch: usize,
    /// Learning rate.
    #[arg(long, default_value_t = 4e-5)]
    lr: f64,
    /// Price of a nat of divergence a sequence, in positive words.
    #[arg(long, default_value_t = 0.0)]
    kl_coef: f64,
    /// Tokens of an opening that the model is given.
    #[arg(long, default_value_t = 12)]
    opening_tokens: usize,
    /// Tokens of a continuation.
    #[arg(long, default_value_t = 24)]
    max_new_tokens: usize,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads of libtorch; 0 leaves the choice to it.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    /// Folder for the models, metrics and curves.
    #[arg(long, default_value = "runs/open_text")]
    out: PathBuf,
}

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<()> {
    let started = Instant::now();
    let options = Options::parse();
    support::set_threads(options.threads);
    let folder = RunFolder::create(&options.out)?;
    let (base, tokenizer) = language_model(&options.model, Device::Cpu)?;
    let train = openings(
        &read_pairs(Path::new("examples/data/debtldr/train.jsonl"))?,
        &tokenizer,
        &options,
    )?;
    let mut valid = read_pairs(Path::new("examples/data/debtldr/valid.jsonl"))?;
    valid.truncate(HELD_OUT);
    let held_out = openings(&valid, &tokenizer, &options)?;
    println!(
        "{} openings to learn from, {} held out",
        train.len(),
        held_out.len()
    );

    // Two copies of the gold judge: one for the run's statistics, one for the held-out texts.
    let generation = generation(&options, &tokenizer)?;
    let typical = write(
        &base,
        &train[..HELD_OUT],
        &generation,
        &tokenizer,
        CALIBRATION,
    )?;
    let gold = || {
        Gold::new(
            base.try_clone().map_err(rlhf::core::Error::model)?,
            &typical,
        )
    };
    let reward = RewardSum::new(vec![
        Component::new("cheerful", reward_fn(|_, answer| cheerfulness(answer))),
        // Weighs nothing: it is reported, as `grpo/judge/gold`, and not learnt from.
        Component::new("gold", gold()?).weighted(0.0),
    ])?;
    let (mut policy, reference) = (base.try_clone()?, base.try_clone()?);
    policy.set_trainable(true);
    let config = config(&options, &generation);
    let mut trainer = GrpoTrainer::with_reference(config, policy, reference, reward)?
        .with_detokenizer(tokenizer.clone());
    let judge = Judge {
        gold: gold()?,
        reference: base,
        held_out,
        generation,
        tokenizer,
    };

    println!("\n1. Until the watch stops the run");
    let (watch, findings) = watch(WatchConfig {
        window: WINDOW,
        // Texts are short: fewer nats.
        max_kl: 15.0,
        stop: StopRule::On {
            kinds: vec![
                FindingKind::GoldDecline,
                FindingKind::Repetition,
                FindingKind::KlDrift,
            ],
            steps: 1,
        },
        ..WatchConfig::default()
    })?;
    let start = judge.evaluate(trainer.policy())?;
    let mut observers = folder.observers(SHOWN)?;
    observers.push(Box::new(watch));
    trainer.train(&train, options.steps, &mut observers)?;
    let stopped_at = trainer.steps_done();
    let stopped = judge.evaluate(trainer.policy())?;
    // Of this one, not of the one that goes on.
    folder.save_policy(trainer.policy(), Some(&judge.tokenizer))?;
    let findings = taken(&findings);
    println!("{}\n", told(&findings, (stopped_at, WINDOW), LOOKED_AT));

    println!("2. The same run, had it gone on");
    observers.pop();
    trainer.train(&train, options.steps, &mut observers)?;
    let end = judge.evaluate(trainer.policy())?;

    println!("\n3. Held-out openings");
    let report = Report {
        steps: options.steps,
        stopped_at,
        start,
        stopped,
        end,
        seconds: started.elapsed().as_secs_f64(),
    };
    report.print()?;
    let report = serde_json::json!({ "report": report, "findings": findings });
    folder.finish(("grpo", &PANELS, 3), &report)
}

/// Steps of the windows that the watch compares: texts are short, and so is the run.
const WINDOW: usize = 5;
/// What the watch has to go by.
const LOOKED_AT: &str = "the rewards, the KL and the variety of each step's samples";

/// The curves.
const PANELS: [curves::Panel<'_>; 4] = [
    (
        "positive words: the judge that is trained against",
        &["grpo/score/mean"],
    ),
    ("the gold reward, which is not", &["grpo/judge/gold"]),
    (
        "pairs of tokens that are new in their text, and in all texts",
        &["grpo/distinct_2", "grpo/distinct_2_across"],
    ),
    ("divergence from the base model, nats a text", &["grpo/kl"]),
];

/// The metrics of the progress line.
const SHOWN: [&str; 4] = [
    "grpo/score/mean",
    "grpo/judge/gold",
    "grpo/kl",
    "grpo/distinct_2",
];
const HELD_OUT: usize = 200;
/// Where the random numbers of each use of `write` start, so that none is used twice.
const CALIBRATION: u64 = 1 << 32;
/// Seed of the texts that are judged; none of a run's own seeds.
const EVALUATION_SEED: u64 = 0x5eed;

/// The first words of texts, as the model met them in its training.
fn openings(pairs: &[Pair], tokenizer: &Tokenizer, options: &Options) -> Result<Vec<Arc<[i64]>>> {
    let instruction = tokenizer.encode(INSTRUCTION)?;
    let opening = |pair: &Pair| {
        let mut tokens = tokenizer.encode(&pair.text)?;
        tokens.truncate(options.opening_tokens);
        Ok([instruction.clone(), tokens].concat().into())
    };
    pairs.iter().map(opening).collect()
}

fn generation(options: &Options, tokenizer: &Tokenizer) -> Result<GenerationConfig> {
    let stop = tokenizer
        .eos_token_id()
        .ok_or("the tokenizer names no eos_token")?;
    Ok(GenerationConfig {
        max_new_tokens: options.max_new_tokens,
        stop_token_ids: vec![stop],
        batch_size: 128,
        ..GenerationConfig::default()
    })
}

fn config(options: &Options, generation: &GenerationConfig) -> GrpoConfig {
    let mut config = GrpoConfig {
        seed: options.seed,
        batch_size: options.batch,
        microbatch_size: 96,
        // No filter shapes the samples, so their log-probs are the policy's own.
        old_logprobs: OldLogprobs::Sampled,
        generation: GenerationConfig {
            samples_per_prompt: 4,
            ..generation.clone()
        },
        ..GrpoConfig::rloo()
    };
    if let KlPenalty::InReward { kl_coef, .. } = &mut config.kl {
        *kl_coef = options.kl_coef;
    }
    config.update.optimizer.lr = options.lr;
    config
}

fn write(
    policy: &dyn Policy,
    prompts: &[Arc<[i64]>],
    generation: &GenerationConfig,
    tokenizer: &Tokenizer,
    first_index: u64,
) -> Result<Completions> {
    let streams = RngStreams::new(EVALUATION_SEED);
    let generator = Generator::new(policy, generation)?.with_detokenizer(tokenizer);
    Ok(generator.generate(prompts, &streams, first_index)?)
}

/// What the held-out texts are judged by.
struct Judge {
    gold: Gold,
    reference: CausalLm,
    held_out: Vec<Arc<[i64]>>,
    generation: GenerationConfig,
    tokenizer: Tokenizer,
}

/// Means over the held-out openings, one continuation each.
#[derive(Debug, Serialize)]
struct Evaluation {
    cheerful: f64,
    gold: f64,
    /// Nats a text.
    kl: f64,
    /// Share of a text's words that it has not had before, in percent.
    new_words: f64,
    example: String,
}

impl Judge {
    fn evaluate(&self, policy: &CausalLm) -> Result<Evaluation> {
        let _no_grad = tch::no_grad_guard();
        let written = write(policy, &self.held_out, &self.generation, &self.tokenizer, 0)?;
        let texts = written.texts()?;
        let of = |f: &dyn Fn(&str) -> f64| {
            mean(&texts.iter().map(|t| f(&t.response)).collect::<Vec<_>>())
        };
        let gold = Vec::<f64>::try_from(self.gold.score(&written)?.to_kind(Kind::Double))?;
        let options = LogprobOptions::default();
        let mut kl = Vec::new();
        for part in written.batch.split(64)? {
            let (new, old) = (
                policy.logprobs(&part, &options)?,
                self.reference.logprobs(&part, &options)?,
            );
            kl.push(
                (new.logprobs - old.logprobs)
                    .sum(Kind::Double)
                    .double_value(&[]),
            );
        }
        let shown = &texts[EXAMPLE];
        let opening = shown
            .prompt
            .strip_prefix(INSTRUCTION)
            .unwrap_or(&shown.prompt);
        Ok(Evaluation {
            cheerful: of(&cheerfulness),
            gold: mean(&gold),
            kl: kl.iter().sum::<f64>() / texts.len() as f64,
            new_words: of(&new_words),
            example: format!("{opening}|{}", shown.response).replace('\n', " "),
        })
    }
}

const EXAMPLE: usize = 3;

fn new_words(text: &str) -> f64 {
    let words: Vec<&str> = text.split_whitespace().collect();
    let different: std::collections::HashSet<&&str> = words.iter().collect();
    100.0 * different.len() as f64 / words.len().max(1) as f64
}

#[derive(Debug, Serialize)]
struct Report {
    steps: u64,
    stopped_at: u64,
    start: Evaluation,
    stopped: Evaluation,
    end: Evaluation,
    seconds: f64,
}

impl Report {
    fn print(&self) -> Result<()> {
        let states = [&self.start, &self.stopped, &self.end];
        let (stop, last) = (
            format!("step {}", self.stopped_at),
            format!("step {}", self.steps),
        );
        let row = |name, decimals, of: fn(&Evaluation) -> f64| -> Row<'_, 3> {
            (name, decimals, states.map(of))
        };
        let rows = [
            row("positive words: the judge of the training", 2, |e| {
                e.cheerful
            }),
            row("gold reward", 2, |e| e.gold),
            row("KL to the base model, nats a text", 1, |e| e.kl),
            row("words that a text has not had before, %", 0, |e| {
                e.new_words
            }),
        ];
        println!("{}", table(["start", &stop, &last], &rows)?);
        println!("\nstart:   {}", self.start.example);
        println!("stopped: {}", self.stopped.example);
        println!("end:     {}\n", self.end.example);
        println!("{:.0} s in all", self.seconds);
        Ok(())
    }
}
