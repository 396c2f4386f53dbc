//! RLHF for summarisation, from a language model to a better one, in one command:
//!
//! ```text
//! scripts/with-libtorch cargo run --release --example summarize_rlhf
//! ```
//!
//! 1. The model writes summaries of some texts. A reward model learns to prefer what people wrote
//!    for a text to that, to the first half of it, and to what people wrote for other texts.
//! 2. PPO makes the model write summaries that the reward model likes, at a price for every nat
//!    that it moves away from where it started.
//! 3. Both are judged on texts that no stage has seen: by the reward model, and by ROUGE-L
//!    against the human summaries, which PPO does not learn from. When the first rises and the
//!    second falls, the reward was hacked. Two checks look for that, and each says what it saw:
//!    the watch in the samples that PPO learns from, step by step, and the table on texts held out.
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

mod support;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use rlhf::core::{
    Completions, Device, EpochConfig, GenerationConfig, Kind, Observer, Policy, RngStreams,
    SamplingConfig, constraint_fn, generate, tch,
};
use rlhf::models::{CausalLm, LoadOptions, SequenceClassifier, ValueHeadModel};
use rlhf::ppo::{Constraint, PpoTrainer, WatchConfig};
use rlhf::reward::{
    Component, Normalized, PairwiseTerms, RankingConfig, RankingTrainer, RewardSum,
};
use support::curves;
use support::evaluate::{Evaluation, HeldOut, evaluate};
use support::faithful::unsupported_names;
use support::human::NearHuman;
use support::rankings::{comparisons, rankings};
use support::report::{Report, print_examples};
use support::run_folder::RunFolder;
use support::stages::{SAMPLES_PER_TEXT, SummaryPpo, classifier_updates, language_model};
use support::task::{Pair, SummaryTask, read_pairs};
use support::watching::{taken, told, watch};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Trains a language model to summarise, by reinforcement learning from human feedback.
#[derive(Debug, Parser)]
struct Options {
    /// Hugging Face folder of the language model to start from.
    #[arg(long, default_value = "examples/models/debtldr-gpt2")]
    model: PathBuf,
    /// Hugging Face folder of a reward model (a sequence classifier with one label and the
    /// language model's tokens); without it, one is trained and kept in the output folder.
    #[arg(long)]
    reward_model: Option<PathBuf>,
    /// JSONL file with `text` and `summary`; a tenth of it, at most 400 lines, is held out.
    /// Without it, the embedded data.
    #[arg(long)]
    data: Option<PathBuf>,
    /// PPO steps.
    #[arg(long, default_value_t = 62)]
    steps: u64,
    /// Texts of a PPO step; each is summarised four times.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Texts whose human summary the reward model learns to prefer.
    #[arg(long, default_value_t = 2600)]
    comparisons: usize,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// cpu, or cuda:N.
    #[arg(long, default_value = "cpu", value_parser = parse_device)]
    device: Device,
    /// Folder for the trained model, metrics and curves.
    #[arg(long, default_value = "runs/summarize")]
    out: PathBuf,
    /// Keeps summaries that name a number or a capitalised word which the text does not have
    /// from teaching the model.
    #[arg(long)]
    constraint: bool,
    /// PPO's learning rate.
    #[arg(long, default_value_t = 5e-4)]
    lr: f64,
    /// Price of a nat of divergence, in standard deviations of the reward.
    #[arg(long, default_value_t = 0.08)]
    kl_coef: f64,
    /// Temperature of sampling, in every stage; 1 is the model's own distribution.
    #[arg(long, default_value_t = 1.0)]
    temperature: f64,
    /// Tokens of a text that the model sees.
    #[arg(long, default_value_t = 64)]
    max_text_tokens: usize,
    /// Most tokens of a summary.
    #[arg(long, default_value_t = 24)]
    max_new_tokens: usize,
}

fn main() -> ExitCode {
    support::exit_code(run())
}

fn run() -> Result<()> {
    let started = Instant::now();
    let options = Options::parse();
    let folder = RunFolder::create(&options.out)?;
    let (train, held_out) = read_data(options.data.as_deref())?;
    let (reference, tokenizer) = language_model(&options.model, options.device)?;
    let task = SummaryTask::new(tokenizer, options.max_text_tokens)?;
    let run = Run {
        held_out: HeldOut::new(held_out, &task)?,
        options,
        train,
        task,
    };
    println!(
        "{}: {} texts to learn from, {} held out",
        run.options.model.display(),
        run.train.len(),
        run.held_out.pairs.len()
    );
    let mut observers = folder.observers(SHOWN)?;

    println!("\n1. Reward model");
    let (reward, accuracy) = run.reward_model(&reference, &mut observers)?;

    println!("\n2. PPO");
    let watching = WatchConfig::default();
    let length = (run.options.steps, watching.window);
    let (watch, findings) = watch(watching)?;
    observers.push(Box::new(watch));
    let mut trainer = run.ppo_trainer(reference, reward)?;
    let before = run.judge(&trainer, None)?;
    let prompts = run.task.prompts(&run.train)?;
    trainer.train(&prompts, run.options.steps, &mut observers)?;
    let after = run.judge(&trainer, Some(trainer.reference()))?;

    println!("\n3. Held-out texts, before and after");
    let report = Report::new(&before, &after, accuracy, started.elapsed());
    println!("{report}");
    println!("Was the reward hacked?");
    let seen = told(&taken(&findings), length, LOOKED_AT);
    println!("- in training: {seen}");
    println!("- on held-out texts: {}\n", report.verdict());
    if run.options.constraint {
        println!(
            "naming what the text does not: {:.0}% of the summaries before, {:.0}% after\n",
            violation_rate(&before, &run.held_out.pairs),
            violation_rate(&after, &run.held_out.pairs)
        );
    }
    print_examples(&run.held_out.pairs, &before, &after, 5);
    folder.save_policy(trainer.policy(), Some(run.task.tokenizer()))?;
    folder.finish(("ppo", &PANELS, 3), &report)
}

/// What the watch has to go by.
const LOOKED_AT: &str =
    "the reward, the KL, lengths, repetition, and ROUGE-L of each step's samples";

/// The curves.
const PANELS: [curves::Panel<'_>; 4] = [
    (
        "reward (reference: mean 0, deviation 1)",
        &["ppo/score/mean"],
    ),
    (
        "ROUGE-L to the human summary, not learnt from",
        &["ppo/judge/gold"],
    ),
    ("divergence from the reference, nats a summary", &["ppo/kl"]),
    ("length, tokens", &["ppo/length"]),
];

/// The metrics of the progress line.
const SHOWN: [&str; 5] = [
    "ranking/loss",
    "ranking/accuracy",
    "ppo/score/mean",
    "ppo/kl",
    "ppo/finished",
];

type Reward = Normalized<SequenceClassifier>;
type Trainer = PpoTrainer<CausalLm, ValueHeadModel>;

/// What every stage needs.
struct Run {
    options: Options,
    train: Vec<Pair>,
    held_out: HeldOut,
    task: SummaryTask,
}

impl Run {
    /// Loads or trains the reward model, and scales its scores so that the reference's summaries
    /// have mean 0 and deviation 1. Also the share of held-out comparisons that it gets right.
    fn reward_model(
        &self,
        reference: &CausalLm,
        observers: &mut [Box<dyn Observer>],
    ) -> Result<(Reward, f64)> {
        let model = match &self.options.reward_model {
            Some(dir) => {
                let load = LoadOptions {
                    device: self.options.device,
                    kind: Some(Kind::Float),
                    ..LoadOptions::default()
                };
                SequenceClassifier::from_pretrained(dir, &load)?
            }
            None => self.train_reward_model(reference, observers)?,
        };
        let texts = &self.held_out.pairs;
        let own = self.generate(reference, texts, HELD_OUT_SAMPLES)?;
        let unseen = comparisons(&self.task, texts, own.batch.into_sequences())?;
        let trainer = RankingTrainer::new(model, RankingConfig::default())?;
        let accuracy = trainer.evaluate(&unseen)?.accuracy;
        println!(
            "human summary preferred to the model's own: {:.1}% of {} held-out pairs",
            100.0 * accuracy,
            unseen.len()
        );
        let rest = self.train.len().saturating_sub(CALIBRATION_TEXTS);
        let own = self.generate(reference, &self.train[rest..], CALIBRATION_SAMPLES)?;
        Ok((Normalized::fit(trainer.into_model(), [&own])?, accuracy))
    }

    fn train_reward_model(
        &self,
        reference: &CausalLm,
        observers: &mut [Box<dyn Observer>],
    ) -> Result<SequenceClassifier> {
        let texts = &self.train[..self.options.comparisons.min(self.train.len())];
        let several = GenerationConfig {
            samples_per_prompt: SAMPLES_PER_TEXT,
            ..self.generation()
        };
        let own = self.write(reference, texts, &several, 0)?;
        let rankings = rankings(&self.task, texts, own.batch.sequences())?;
        let epochs = EpochConfig {
            batch_size: REWARD_BATCH,
            seed: self.options.seed,
            ..EpochConfig::default()
        };
        let steps = epochs.total_steps(rankings.len());
        let config = RankingConfig {
            update: classifier_updates(3e-4, steps),
            terms: PairwiseTerms {
                // Comparisons say nothing of how one text's scores compare with another's: keep
                // them level, or that difference drowns what the policy can change.
                center_coef: 0.05,
                ..PairwiseTerms::default()
            },
            microbatch_size: REWARD_BATCH,
        };
        let model = SequenceClassifier::from_causal_lm(reference, 1, self.options.seed)?;
        let mut trainer = RankingTrainer::new(model, config)?;
        trainer.train(&rankings, &epochs, observers)?;
        let dir = self.options.out.join("reward_model");
        trainer.model().save_pretrained(&dir)?;
        self.task.tokenizer().save(&dir)?;
        println!("written to {}", dir.display());
        Ok(trainer.into_model())
    }

    fn ppo_trainer(&self, reference: CausalLm, reward: Reward) -> Result<Trainer> {
        let options = &self.options;
        let config = SummaryPpo {
            seed: options.seed,
            steps: options.steps,
            batch: options.batch,
            lr: options.lr,
            kl_coef: options.kl_coef,
            // Two deviations worse than the usual summary.
            unfinished: -2.0,
            generation: self.generation(),
        };
        let mut policy = reference.try_clone()?;
        policy.set_trainable(true);
        let value = ValueHeadModel::from_classifier(reward.model())?;
        let known = self.train.iter().chain(&self.held_out.pairs);
        let reward = RewardSum::new(vec![
            Component::new("reward_model", reward),
            // Weighs nothing: the watch sees it, as `ppo/judge/gold`, and the policy does not.
            Component::new("gold", NearHuman::new(&self.task, known)?).weighted(0.0),
        ])?;
        let trainer = PpoTrainer::new(config.config(), policy, value, reference, reward)?
            .with_detokenizer(self.task.tokenizer().clone());
        if !options.constraint {
            return Ok(trainer);
        }
        let cost = constraint_fn(unsupported_names);
        let constraint = Constraint::new("unsupported_names", cost, 0.5);
        Ok(trainer.with_constraint(constraint)?)
    }

    fn judge(&self, trainer: &Trainer, reference: Option<&dyn Policy>) -> Result<Evaluation> {
        evaluate(
            trainer.policy(),
            reference,
            trainer.reward_model(),
            &self.task,
            &self.held_out,
            &self.generation(),
        )
    }

    /// How summaries are sampled, in every stage.
    fn generation(&self) -> GenerationConfig {
        GenerationConfig {
            max_new_tokens: self.options.max_new_tokens,
            sampling: SamplingConfig {
                temperature: self.options.temperature,
                ..SamplingConfig::default()
            },
            stop_token_ids: vec![self.task.stop()],
            batch_size: 128,
            ..GenerationConfig::default()
        }
    }

    fn generate(&self, model: &CausalLm, pairs: &[Pair], first_index: u64) -> Result<Completions> {
        self.write(model, pairs, &self.generation(), first_index)
    }

    fn write(
        &self,
        model: &CausalLm,
        pairs: &[Pair],
        generation: &GenerationConfig,
        first_index: u64,
    ) -> Result<Completions> {
        let streams = RngStreams::new(self.options.seed);
        let prompts = self.task.prompts(pairs)?;
        Ok(generate(
            model,
            &prompts,
            generation,
            &streams,
            first_index,
        )?)
    }
}

const REWARD_BATCH: usize = 16;
const CALIBRATION_TEXTS: usize = 512;
/// Where the random numbers of each use of `generate` start, so that none is used twice.
const HELD_OUT_SAMPLES: u64 = 1 << 32;
const CALIBRATION_SAMPLES: u64 = 2 << 32;

fn read_data(file: Option<&Path>) -> Result<(Vec<Pair>, Vec<Pair>)> {
    let Some(file) = file else {
        let mut held_out = read_pairs(Path::new("examples/data/debtldr/valid.jsonl"))?;
        held_out.truncate(HELD_OUT_TEXTS);
        return Ok((
            read_pairs(Path::new("examples/data/debtldr/train.jsonl"))?,
            held_out,
        ));
    };
    let mut pairs = read_pairs(file)?;
    if pairs.len() < 20 {
        return Err(format!(
            "{}: {} lines; at least 20 are needed, since a tenth is held out",
            file.display(),
            pairs.len()
        )
        .into());
    }
    let held_out = pairs.split_off(pairs.len() - (pairs.len() / 10).min(HELD_OUT_TEXTS));
    Ok((pairs, held_out))
}

const HELD_OUT_TEXTS: usize = 400;

fn violation_rate(evaluation: &Evaluation, pairs: &[Pair]) -> f64 {
    let offends = |(summary, pair): (&String, &Pair)| unsupported_names(&pair.text, summary) > 0.5;
    let count = evaluation
        .summaries
        .iter()
        .zip(pairs)
        .filter(|p| offends(*p))
        .count();
    100.0 * count as f64 / pairs.len() as f64
}

fn parse_device(name: &str) -> Result<Device, String> {
    if name == "cpu" {
        return Ok(Device::Cpu);
    }
    let number = name.strip_prefix("cuda:").and_then(|n| n.parse().ok());
    let number: usize = number.ok_or(format!("{name:?} is neither cpu nor cuda:N"))?;
    let found = tch::Cuda::device_count().max(0) as usize;
    match number < found {
        true => Ok(Device::Cuda(number)),
        false => Err(format!(
            "this libtorch sees {found} CUDA devices; see docs/libtorch.md"
        )),
    }
}
