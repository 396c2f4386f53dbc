//! Trains a reward model and says how far to trust it:
//!
//! ```text
//! cargo run --release --example train_reward_model -- --data preferences.jsonl
//! ```
//!
//! The file has a line for each comparison, `{"prompt": …, "chosen": …, "rejected": …}` (and
//! `margin`, if you like); `collect_preferences` writes such a file. Without `--data` the
//! embedded texts serve: what a person wrote against what the base model writes, and against what
//! a person wrote for another text. What decides is the model that one starts from
//! (`--model DIR`): docs/reward.md has figures.
//!
//! Part of the comparisons is held out. The report is about those alone, and asks first what one
//! must ask of every reward model: does it know more than that longer (or shorter) is better?
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

#[path = "support/comparisons.rs"]
mod comparisons;
#[path = "support/reward_charts.rs"]
mod reward_charts;
mod support;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use comparisons::Writer;
use rlhf::core::{
    Completions, EpochConfig, JsonlObserver, Kind, Observer, Preference, PreferenceBatch,
    ProgressObserver, RngStreams,
};
use rlhf::models::{CausalLm, LoadOptions, LoraConfig, SequenceClassifier, Tokenizer};
use rlhf::reward::{
    Combination, Ensemble, Normalized, Overlong, PairReport, RewardConfig, RewardTrainer,
    agreement, score_pairs, screen_pairs,
};
use rlhf::scale::{AdamWConfig, Schedule, UpdateConfig};
use support::task::{SummaryTask, read_pairs};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Trains a reward model on comparisons and reports on it.
#[derive(Debug, Parser)]
struct Options {
    /// JSONL file with `prompt`, `chosen` and `rejected`; without it, the embedded data.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Hugging Face folder of the language model that the reward model starts from.
    #[arg(long, default_value = "examples/models/debtldr-gpt2")]
    model: PathBuf,
    /// Hugging Face folder of the model that writes the worse answers of the embedded data.
    #[arg(long, default_value = "examples/models/debtldr-gpt2")]
    sampler: PathBuf,
    /// Trains adapters of this rank (LoRA) on a frozen model, instead of all weights.
    #[arg(long, conflicts_with = "head_only")]
    lora: Option<i64>,
    /// Weights and arithmetic in bfloat16, with master weights in f32.
    #[arg(long)]
    bf16: bool,
    /// Folder for model, report and charts.
    #[arg(long, default_value = "runs/reward")]
    out: PathBuf,
    /// Comparisons that are held out, in percent.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u8).range(1..=90))]
    held_out: u8,
    /// Texts of the embedded data; each makes two comparisons to learn from.
    #[arg(long, default_value_t = 1024)]
    texts: usize,
    /// Passes over the comparisons.
    #[arg(long, default_value_t = 1)]
    epochs: u64,
    /// Comparisons of a step.
    #[arg(long, default_value_t = 16)]
    batch: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 3e-4)]
    lr: f64,
    /// How strongly scores are pulled towards 0.
    #[arg(long, default_value_t = 0.01)]
    center_coef: f64,
    /// Share of the labels that are thought to be wrong.
    #[arg(long, default_value_t = 0.0)]
    label_smoothing: f64,
    /// Trains the head alone.
    #[arg(long)]
    head_only: bool,
    /// Models to train, each from another head; more than one make an ensemble.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..))]
    members: u8,
    /// Leaves out comparisons of more tokens; the model's context window, if smaller.
    #[arg(long, default_value_t = 1024)]
    max_length: usize,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    support::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    std::fs::create_dir_all(&options.out)?;
    let load = |kind| LoadOptions {
        kind: Some(kind),
        ..LoadOptions::default()
    };
    let kind = if options.bf16 {
        Kind::BFloat16
    } else {
        Kind::Float
    };
    let base = CausalLm::from_pretrained(&options.model, &load(kind))?;
    let tokenizer = Tokenizer::from_dir(&options.model)?;
    tokenizer.check_fits(base.config())?;
    let data = match &options.data {
        Some(path) => own_data(options, path, &base, &tokenizer)?,
        None => {
            let sampler = CausalLm::from_pretrained(&options.sampler, &load(Kind::Float))?;
            let writer = Writer {
                model: &sampler,
                tokenizer: &Tokenizer::from_dir(&options.sampler)?,
                max_new_tokens: 24,
            };
            embedded_data(options, &writer, &base, &tokenizer)?
        }
    };
    println!(
        "{} comparisons to learn from, {} held out\n",
        data.train.len(),
        data.held_out.len()
    );
    let mut members = Vec::new();
    for member in 0..options.members {
        let model = train(options, &base, &data.train, member)?;
        let dir = match options.members {
            1 => options.out.join("model"),
            _ => options.out.join(format!("model-{member}")),
        };
        model.model().save_pretrained(&dir)?;
        model.normalizer().save(&dir)?;
        tokenizer.save(&dir)?;
        // The report is about the scores as they were learnt: their differences are log-odds,
        // which those of scaled scores are not.
        members.push(model.into_inner());
    }

    let mut report = None;
    for (member, model) in members.iter().enumerate() {
        let of_one = PairReport::of_model(model, &data.held_out, options.batch)?;
        println!("\nModel {member}, on comparisons that it has not seen\n\n{of_one}");
        report.get_or_insert(of_one);
        if let Some(mismatches) = &data.mismatches {
            let other = PairReport::of_model(model, mismatches, options.batch)?;
            println!(
                "human summary against that of another text: {:.1}% of {} right",
                100.0 * other.accuracy,
                other.pairs
            );
        }
    }
    if members.len() > 1 {
        let scored = |model: &SequenceClassifier| score_pairs(model, &data.held_out, options.batch);
        let ((first, _), (second, _)) = (scored(&members[0])?, scored(&members[1])?);
        println!("\nModels 0 and 1\n{}", agreement(&first, &second)?);
        let ensemble = Ensemble::new(members, Combination::Mean)?;
        let of_all = PairReport::of_model(&ensemble, &data.held_out, options.batch)?;
        println!("\nThe mean of all models\n\n{of_all}");
        report = Some(of_all);
    }
    let Some(report) = report else { return Ok(()) };
    println!("{}", verdict(&report));
    let json = serde_json::to_string_pretty(&report)?;
    std::fs::write(options.out.join("report.json"), json + "\n")?;
    reward_charts::draw(&report, &options.out.join("report.svg"))?;
    println!(
        "models, report.json, report.svg and metrics are in {}",
        options.out.display()
    );
    Ok(())
}

/// What to make of the length bias, in words.
fn verdict(report: &PairReport) -> String {
    let length = &report.length;
    let gain = 100.0 * (report.accuracy - length.length_rule_accuracy);
    let (low, _) = report.accuracy_interval;
    if low <= length.length_rule_accuracy {
        return format!(
            "LENGTH: these comparisons do not show that the model knows more than a rule on \
             length ({:+.1} points).",
            gain
        );
    }
    format!("The model is {gain:.1} points better than a rule on length alone.")
}

/// Comparisons, part of which nothing is trained on.
struct Data {
    train: Vec<Preference>,
    held_out: Vec<Preference>,
    /// Of the embedded data: held-out summaries against those of other texts.
    mismatches: Option<Vec<Preference>>,
}

fn own_data(
    options: &Options,
    path: &Path,
    base: &CausalLm,
    tokenizer: &Tokenizer,
) -> Result<Data> {
    let (pairs, without_prompt) = comparisons::read_pairs(path, tokenizer)?;
    let limit = options.max_length.min(base.config().max_length());
    let (mut pairs, skipped) = screen_pairs(pairs, limit, Overlong::Drop);
    if without_prompt + skipped.total() > 0 {
        println!("left out: {without_prompt} with an empty prompt, {skipped}");
    }
    // Comparisons of one prompt stay together, or the model would have seen the prompt.
    let mut prompts: Vec<_> = pairs.iter().map(|pair| pair.prompt.clone()).collect();
    prompts.sort();
    prompts.dedup();
    let held_out = (prompts.len() * usize::from(options.held_out)).div_ceil(100);
    if held_out == 0 || held_out >= prompts.len() {
        let found = prompts.len();
        return Err(format!("{found} different prompts are too few to hold some out").into());
    }
    let order = shuffled(prompts.len(), options.seed);
    let chosen: std::collections::HashSet<_> = order[..held_out]
        .iter()
        .map(|&i| prompts[i].clone())
        .collect();
    let held_out = pairs
        .extract_if(.., |pair| chosen.contains(&pair.prompt))
        .collect();
    Ok(Data {
        train: pairs,
        held_out,
        mismatches: None,
    })
}

fn shuffled(count: usize, seed: u64) -> Vec<usize> {
    use rand::seq::SliceRandom;
    let mut order: Vec<usize> = (0..count).collect();
    order.shuffle(&mut RngStreams::new(seed).stream("examples/held-out", 0));
    order
}

fn embedded_data(
    options: &Options,
    writer: &Writer,
    base: &CausalLm,
    tokenizer: &Tokenizer,
) -> Result<Data> {
    let task = SummaryTask::new(tokenizer.clone(), 64)?;
    let mut train = read_pairs(Path::new("examples/data/debtldr/train.jsonl"))?;
    train.truncate(options.texts);
    let mut unseen = read_pairs(Path::new("examples/data/debtldr/valid.jsonl"))?;
    unseen.truncate(
        (train.len() * usize::from(options.held_out))
            .div_ceil(100)
            .max(50),
    );
    let streams = RngStreams::new(options.seed);
    let sampled = |texts: &[_], first| writer.comparisons(&task, texts, &streams, first);
    let mut pairs = sampled(&train, 0)?;
    pairs.extend(comparisons::against_mismatches(&task, &train)?);
    let limit = options.max_length.min(base.config().max_length());
    let (train, skipped) = screen_pairs(pairs, limit, Overlong::Drop);
    if skipped.total() > 0 {
        println!("left out: {skipped}");
    }
    Ok(Data {
        train,
        held_out: sampled(&unseen, 1 << 32)?,
        mismatches: Some(comparisons::against_mismatches(&task, &unseen)?),
    })
}

/// A trained model, its scores scaled to mean 0 and deviation 1 on part of the training data.
fn train(
    options: &Options,
    base: &CausalLm,
    pairs: &[Preference],
    member: u8,
) -> Result<Normalized<SequenceClassifier>> {
    let seed = options.seed + u64::from(member);
    let epochs = EpochConfig {
        epochs: options.epochs,
        batch_size: options.batch,
        seed,
        ..EpochConfig::default()
    };
    let steps = epochs.total_steps(pairs.len());
    let config = RewardConfig {
        update: UpdateConfig {
            optimizer: AdamWConfig {
                lr: options.lr,
                ..AdamWConfig::default()
            },
            schedule: Schedule::linear(steps / 10, steps),
            ..UpdateConfig::default()
        },
        center_coef: options.center_coef,
        label_smoothing: options.label_smoothing,
        microbatch_size: options.batch.min(16),
    };
    let mut model = SequenceClassifier::from_causal_lm(base, 1, seed)?;
    if let Some(rank) = options.lora {
        let lora = LoraConfig {
            rank,
            alpha: 2.0 * rank as f64,
            ..LoraConfig::default()
        };
        model.add_adapter(&lora, seed)?;
    }
    if options.head_only {
        model.train_head_only();
    }
    let mut trainer = RewardTrainer::new(model, config)?;
    let metrics = options.out.join(format!("metrics-{member}.jsonl"));
    let mut observers: Vec<Box<dyn Observer>> = vec![
        Box::new(JsonlObserver::create(&metrics)?),
        Box::new(ProgressObserver::new(["reward/loss", "reward/accuracy"])),
    ];
    trainer.train(pairs, &epochs, &mut observers)?;
    let calibration = PreferenceBatch::new(pairs.iter().take(200).cloned().collect())?;
    let calibration = calibration
        .split(options.batch)?
        .iter()
        .map(|part| Ok(Completions::written(part.interleaved()?)))
        .collect::<Result<Vec<_>>>()?;
    let mut model = trainer.into_model();
    if options.lora.is_some() {
        model.merge()?;
    }
    Ok(Normalized::fit(model, &calibration)?)
}
