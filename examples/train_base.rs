//! Trains the small GPT-2 that the other examples start from, tokenizer included.
//!
//! ```text
//! cargo run --release --example train_base -- --data DIR --out DIR
//! ```
//!
//! `--data` holds `base.jsonl` and `valid.jsonl`, as `scripts/make_debtldr.py --extract` makes them. A run
//! that was stopped goes on where it was when the same command is given again.
//!
//! The loss is that of the summaries, plus `--text-weight` times that of the texts, on a random
//! share of their tokens. A share of the sequences are copying exercises ("repeat these words"):
//! to summarise, a model must learn to look words up in its prompt, and plain text teaches that
//! slowly.
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

mod support;

use std::collections::HashMap;
use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use rlhf::core::{
    CheckpointConfig, EpochConfig, EpochTrainer, GenerationConfig, JsonlObserver, Kind, Observer,
    Parameters, ProgressObserver, RngStreams, SamplingConfig, Sequence, SequenceBatch, Stats,
    generate, train_epochs,
};
use rlhf::models::{CausalLm, Gpt2Config, LoadOptions, ModelConfig, SpecialTokens, Tokenizer};
use rlhf::reward::rouge::rouge_l;
use rlhf::scale::{AdamWConfig, Schedule, UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use support::bpe::train_tokenizer;
use support::exercises::{Exercise, Mixture, weighted_loss};
use support::task::{Pair, SummaryTask, read_pairs};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Trains a small GPT-2 for one-line summaries.
#[derive(Debug, Parser, Serialize, Deserialize, PartialEq)]
struct Options {
    /// Folder with base.jsonl and valid.jsonl.
    #[arg(long)]
    data: PathBuf,
    /// Folder of the model; checkpoints go to its subfolder `checkpoints`.
    #[arg(long, default_value = "runs/base")]
    out: PathBuf,
    /// Folder of a model to go on from, tokenizer included, instead of fresh weights; the options
    /// that shape a model are not used then.
    #[arg(long)]
    from: Option<PathBuf>,
    /// Passes over the data.
    #[arg(long, default_value_t = 5)]
    epochs: u64,
    /// Sequences a step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Peak learning rate; it rises for 100 steps and then falls to 0 in a straight line.
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Tokens of the vocabulary.
    #[arg(long, default_value_t = 4096)]
    vocab: usize,
    /// Width of the model.
    #[arg(long, default_value_t = 192)]
    width: i64,
    /// Blocks of the model.
    #[arg(long, default_value_t = 4)]
    layers: i64,
    /// Attention heads of a block.
    #[arg(long, default_value_t = 6)]
    heads: i64,
    /// Tokens of a text that the model sees.
    #[arg(long, default_value_t = 64)]
    max_text_tokens: usize,
    #[command(flatten)]
    mixture: Mixture,
    /// Seed of weights, order and samples.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads of libtorch; 0 leaves the choice to it.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    /// Steps between checkpoints.
    #[arg(long, default_value_t = 200)]
    save_every: u64,
}

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<()> {
    let options = Options::parse();
    support::set_threads(options.threads);
    let train = read_pairs(&options.data.join("base.jsonl"))?;
    let valid = read_pairs(&options.data.join("valid.jsonl"))?;
    std::fs::create_dir_all(&options.out)?;
    if let Some(from) = &options.from {
        Tokenizer::from_dir(from)?.save(&options.out)?;
    } else if !options.out.join("tokenizer.json").exists() {
        train_tokenizer(&train, options.vocab, &options.out)?;
    }
    let task = SummaryTask::new(Tokenizer::from_dir(&options.out)?, options.max_text_tokens)?;
    let load = LoadOptions {
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    };
    let model = match &options.from {
        Some(from) => CausalLm::from_pretrained(from, &load)?,
        None => CausalLm::new(
            config(&options, &task),
            options.seed,
            load.device,
            Kind::Float,
        )?,
    };
    let parameters: i64 = model
        .named_parameters()
        .iter()
        .map(|(_, t)| t.numel() as i64)
        .sum();
    eprintln!("{parameters} parameters, {} texts", train.len());

    train_model(&options, &task, &model, &train)?;

    let report = evaluate(&task, &model, &valid)?;
    eprintln!("{report}");
    // 16 bits hold what a model of this size knows, in half the space.
    model.save_pretrained_as(&options.out, Kind::BFloat16)?;
    std::fs::write(
        options.out.join("training.json"),
        serde_json::to_string_pretty(&serde_json::json!({
            "options": options, "parameters": parameters, "held_out": serde_json::to_value(&report)?,
        }))?,
    )?;
    let panels = [(
        "loss, nats a token",
        ["base/summary_nll", "base/text_nll"].as_slice(),
    )];
    support::curves::draw(
        &options.out.join("metrics.jsonl"),
        "base",
        &panels,
        50,
        &options.out.join("loss.svg"),
    )
}

fn config(options: &Options, task: &SummaryTask) -> ModelConfig {
    ModelConfig::Gpt2(Gpt2Config {
        vocab_size: task.tokenizer().vocab_size() as i64,
        n_positions: 128,
        n_embd: options.width,
        n_layer: options.layers,
        n_head: options.heads,
        special_tokens: SpecialTokens {
            bos: Some(task.stop()),
            eos: vec![task.stop()],
            pad: Some(task.stop()),
        },
        ..Gpt2Config::default()
    })
}

fn train_model(
    options: &Options,
    task: &SummaryTask,
    model: &CausalLm,
    train: &[Pair],
) -> Result<()> {
    let examples = train
        .iter()
        .map(|p| task.sequence(p))
        .collect::<Result<Vec<_>>>()?;
    let config = EpochConfig {
        epochs: options.epochs,
        batch_size: options.batch,
        seed: options.seed,
        checkpoints: Some(CheckpointConfig {
            dir: options.out.join("checkpoints"),
            every: options.save_every,
            keep: 2,
        }),
        ..EpochConfig::default()
    };
    let updates = UpdateConfig {
        optimizer: AdamWConfig {
            lr: options.lr,
            beta2: 0.95,
            weight_decay: 0.1,
            ..AdamWConfig::default()
        },
        schedule: Schedule::linear(100, config.total_steps(examples.len())),
        ..UpdateConfig::default()
    };
    let mut trainer = BaseTrainer {
        options,
        task,
        model,
        updater: Updater::new(model.named_parameters(), &updates)?,
        streams: RngStreams::new(options.seed),
    };
    let metrics = options.out.join("metrics.jsonl");
    let mut observers: Vec<Box<dyn Observer>> = vec![
        Box::new(JsonlObserver::resume(metrics, config.resumed_step()?)?),
        Box::new(ProgressObserver::new(SHOWN)),
    ];
    train_epochs(&mut trainer, &examples, &config, &mut observers)?;
    Ok(())
}

/// The metrics of the progress line.
const SHOWN: [&str; 4] = [
    "base/summary_nll",
    "base/copy_nll",
    "base/text_nll",
    "base/tokens_per_s",
];

struct BaseTrainer<'a> {
    options: &'a Options,
    task: &'a SummaryTask,
    model: &'a CausalLm,
    updater: Updater,
    streams: RngStreams,
}

impl EpochTrainer for BaseTrainer<'_> {
    type Item = Sequence;
    type Error = Box<dyn Error>;
    const PHASE: &'static str = "base";

    fn step_on(&mut self, examples: Vec<Sequence>) -> Result<Stats> {
        let started = Instant::now();
        // Keyed by the step, so that a resumed run draws what an uninterrupted one would.
        let mut rng = self.streams.stream("base", self.updater.step());
        let mixture = &self.options.mixture;
        let exercises: Vec<_> = examples
            .iter()
            .map(|example| Exercise::draw(example, mixture, self.task, &mut rng))
            .collect();
        let batch = SequenceBatch::new(exercises.iter().map(|e| e.sequence.clone()).collect())?;
        let (model, task) = (self.model, self.task);
        let mut stats = Stats::new();
        let update = self.updater.update::<Box<dyn Error>>(1, |_| {
            let (loss, means) = weighted_loss(model, &batch, &exercises, mixture, task, &mut rng)?;
            stats = means;
            Ok(loss)
        })?;
        let tokens: usize = batch.sequences().iter().map(Sequence::len).sum();
        stats.extend(update.metrics("base"));
        stats.insert(
            "base/tokens_per_s",
            tokens as f64 / started.elapsed().as_secs_f64(),
        );
        Ok(stats)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        Ok(self.updater.save(dir)?)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        Ok(self.updater.load(dir)?)
    }
}

/// How well the model does on texts that it has not seen.
#[derive(Debug, Serialize)]
struct Report {
    texts: usize,
    rouge_l: f64,
    mean_tokens: f64,
    samples: Vec<HashMap<&'static str, String>>,
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(
            f,
            "held out: {} texts, ROUGE-L {:.1}, {:.1} tokens",
            self.texts, self.rouge_l, self.mean_tokens
        )?;
        for sample in &self.samples {
            writeln!(
                f,
                "  human: {}\n  model: {}",
                sample["human"], sample["model"]
            )?;
        }
        Ok(())
    }
}

fn evaluate(task: &SummaryTask, model: &CausalLm, valid: &[Pair]) -> Result<Report> {
    let prompts = valid
        .iter()
        .map(|p| task.prompt(&p.text))
        .collect::<Result<Vec<_>>>()?;
    let config = GenerationConfig {
        max_new_tokens: 24,
        sampling: SamplingConfig::greedy(),
        stop_token_ids: vec![task.stop()],
        ..GenerationConfig::default()
    };
    let written = generate(model, &prompts, &config, &RngStreams::new(0), 0)?;
    let (mut rouge, mut tokens, mut samples) = (0.0, 0, Vec::new());
    for (sequence, pair) in written.batch.sequences().iter().zip(valid) {
        let summary = task.tokenizer().decode(&sequence.response, true)?;
        rouge += rouge_l(&pair.summary, &summary).f1;
        tokens += sequence.response.len();
        if samples.len() < 5 {
            samples.push(HashMap::from([
                ("human", pair.summary.clone()),
                ("model", summary),
            ]));
        }
    }
    let texts = valid.len();
    Ok(Report {
        texts,
        rouge_l: 100.0 * rouge / texts as f64,
        mean_tokens: tokens as f64 / texts as f64,
        samples,
    })
}
