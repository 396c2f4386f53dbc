//! Constrained PPO: a policy that is to please, and to keep the house's rules, in one command:
//!
//! ```text
//! scripts/with-libtorch cargo run --release --example moderation_ppo
//! ```
//!
//! The house does not want summaries that advertise: *simple*, *fast*, *powerful*. The reward counts
//! how much of its text a summary says, and texts advertise, so a policy that follows the reward
//! alone advertises more the better it gets (`--unconstrained` shows it).
//!
//! 1. Moderators have marked texts. A classifier learns from their marks, not from their rule, and
//!    becomes the cost model.
//! 2. PPO follows the reward; a multiplier, which rises while the mean cost is above its target and
//!    falls below it, is the price of an offence (PPO-Lagrangian, with a critic of the cost).
//! 3. On texts that no stage has seen: reward and offences before and after, the offences by the cost
//!    model *and* by the moderators' own rule. Where the second is higher than the first, the policy
//!    has found what the cost model does not see. A bound says how far the sample can be trusted.
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

#[path = "support/moderation.rs"]
mod moderation;
mod support;

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use rlhf::core::{Device, EpochConfig, GenerationConfig, Observer, reward_fn};
use rlhf::models::{CausalLm, SequenceClassifier, ValueHeadInit, ValueHeadModel};
use rlhf::ppo::{Constraint, ConstraintRule, LagrangianConfig, PpoTrainer, SafetyReport};
use rlhf::reward::{Label, LabelConfig, LabelProbability, LabelTrainer, Labelled};
use serde::Serialize;

use moderation::{Moderator, advertises, informative};
use support::curves;
use support::evaluate::{Evaluation, HeldOut, evaluate, mean};
use support::run_folder::RunFolder;
use support::stages::{SummaryPpo, classifier_updates, language_model};
use support::table::table;
use support::task::{CUE, Pair, SummaryTask, read_pairs};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Trains a language model to say more of its texts without advertising.
#[derive(Debug, Parser)]
struct Options {
    /// Hugging Face folder of the language model to start from.
    #[arg(long, default_value = "examples/models/debtldr-gpt2")]
    model: PathBuf,
    /// PPO steps.
    #[arg(long, default_value_t = 40)]
    steps: u64,
    /// Texts of a PPO step; each is summarised four times.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Texts whose marks the cost model learns from, with pieces of them.
    #[arg(long, default_value_t = 2600)]
    marked: usize,
    /// The mean probability of an offence that the multiplier aims at.
    #[arg(long, default_value_t = 0.04)]
    target: f64,
    /// The share of offences that the held-out test allows.
    #[arg(long, default_value_t = 0.08)]
    limit: f64,
    /// How sure the test must be.
    #[arg(long, default_value_t = 0.95)]
    confidence: f64,
    /// Lets the policy follow the reward alone; costs are still counted.
    #[arg(long)]
    unconstrained: bool,
    /// PPO's learning rate.
    #[arg(long, default_value_t = 5e-4)]
    lr: f64,
    /// Price of a nat of divergence from the reference. A multiplier of λ divides what the reward
    /// weighs by 1 + λ, and this not.
    #[arg(long, default_value_t = 0.02)]
    kl_coef: f64,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Folder for the trained model, metrics and curves.
    #[arg(long, default_value = "runs/moderation")]
    out: PathBuf,
}

fn main() -> ExitCode {
    support::exit_code(run(&Options::parse()))
}

fn run(options: &Options) -> Result<()> {
    let started = Instant::now();
    let folder = RunFolder::create(&options.out)?;
    let (reference, tokenizer) = language_model(&options.model, Device::Cpu)?;
    let task = SummaryTask::new(tokenizer, MAX_TEXT_TOKENS)?;
    let train = read_pairs(Path::new("examples/data/debtldr/train.jsonl"))?;
    let held_out = read_pairs(Path::new("examples/data/debtldr/valid.jsonl"))?;
    let held_out = HeldOut::new(held_out, &task)?;
    println!(
        "{} texts to learn from, {} held out",
        train.len(),
        held_out.pairs.len()
    );
    let mut observers = folder.observers(SHOWN)?;

    println!("\n1. Cost model, from moderators' marks");
    let marked = &train[..options.marked.min(train.len())];
    let moderator = cost_model(
        &reference,
        &task,
        marked,
        &held_out.pairs,
        options,
        &mut observers,
    )?;

    println!("\n2. PPO");
    let mut trainer = ppo_trainer(reference, moderator, &task, options)?;
    let judge = |trainer: &Trainer, against_reference: bool| {
        let reference = against_reference.then(|| trainer.reference());
        let generation = &trainer.config().generation;
        let generation = GenerationConfig {
            samples_per_prompt: 1,
            ..generation.clone()
        };
        let (policy, reward) = (trainer.policy(), trainer.reward_model());
        evaluate(policy, reference, reward, &task, &held_out, &generation)
    };
    let before = judge(&trainer, false)?;
    let safe_before = trainer.safety_test(&held_out.prompts, TEST_SEED)?;
    let prompts = task.prompts(&train)?;
    trainer.train(&prompts, options.steps, &mut observers)?;
    let after = judge(&trainer, true)?;
    let safe_after = trainer.safety_test(&held_out.prompts, TEST_SEED)?;

    println!("\n3. Held-out texts, before and after");
    let rate = |report: &SafetyReport| {
        let offences: usize = report.constraints.iter().map(|c| c.violations).sum();
        offences as f64 / report.samples as f64
    };
    let bound = safe_after.upper_bounds(options.confidence)?[0];
    let report = Report {
        reward_before: mean(&before.scores),
        reward_after: mean(&after.scores),
        offences_before: rate(&safe_before),
        offences_after: rate(&safe_after),
        moderators_before: marked_rate(&before),
        moderators_after: marked_rate(&after),
        kl: mean(&after.kl),
        rouge_l_before: mean(&before.rouge_l),
        rouge_l_after: mean(&after.rouge_l),
        finished_before: mean(&before.finished),
        finished_after: mean(&after.finished),
        multiplier: trainer.multiplier("advertising"),
        limit: options.limit,
        confidence: options.confidence,
        upper_bound: bound,
        passes: safe_after.passes(options.limit, options.confidence)?,
        passes_before: safe_before.passes(options.limit, options.confidence)?,
        seconds: started.elapsed().as_secs_f64(),
    };
    report.print()?;
    for (i, pair) in held_out.pairs.iter().enumerate().take(5) {
        println!("human:  {}", pair.summary);
        println!("before: {} ({:.0})", before.summaries[i], before.scores[i]);
        println!("after:  {} ({:.0})\n", after.summaries[i], after.scores[i]);
    }
    folder.save_policy(trainer.policy(), Some(task.tokenizer()))?;
    folder.finish(("ppo", &PANELS, 3), &report)
}

/// The metrics of the progress line.
const SHOWN: [&str; 5] = [
    "label/loss",
    "label/accuracy",
    "ppo/score/mean",
    "ppo/constraint/advertising/violation_rate",
    "ppo/constraint/advertising/multiplier",
];

/// The curves.
const PANELS: [curves::Panel<'_>; 4] = [
    ("reward", &["ppo/score/mean"]),
    (
        "share of offences",
        &["ppo/constraint/advertising/violation_rate"],
    ),
    (
        "price of an offence",
        &["ppo/constraint/advertising/multiplier"],
    ),
    ("divergence from the reference, nats a summary", &["ppo/kl"]),
];

const MAX_TEXT_TOKENS: usize = 64;
const MAX_NEW_TOKENS: usize = 24;
/// Seed of the samples of the safety test; none of a run's own seeds.
const TEST_SEED: u64 = 0x5afe;

type Trainer = PpoTrainer<CausalLm, ValueHeadModel>;

/// A classifier of summaries alone, from marks on human summaries and on pieces of texts.
fn cost_model(
    reference: &CausalLm,
    task: &SummaryTask,
    marked: &[Pair],
    held_out: &[Pair],
    options: &Options,
    observers: &mut [Box<dyn Observer>],
) -> Result<Moderator<SequenceClassifier>> {
    let cue = task.tokenizer().encode(CUE)?;
    let mark = |text: &str| -> Result<Labelled> {
        let mut tokens = task.tokenizer().encode(&format!(" {text}"))?;
        tokens.truncate(MAX_NEW_TOKENS - 1);
        // What was cut off cannot be marked.
        let seen = task.tokenizer().decode(&tokens, true)?;
        Ok(Labelled {
            sequence: moderation::as_summary(&cue, &tokens, task.stop()),
            label: Label::Class(i64::from(advertises(&seen))),
        })
    };
    let marks = |pairs: &[Pair]| -> Result<Vec<Labelled>> {
        let mut marks = Vec::new();
        for pair in pairs {
            marks.push(mark(&pair.summary)?);
            let words: Vec<&str> = pair.text.split_whitespace().collect();
            for piece in words.chunks(PIECE_WORDS).take(3) {
                marks.push(mark(&piece.join(" "))?);
            }
        }
        Ok(marks)
    };
    let (train, test) = (marks(marked)?, marks(held_out)?);
    let epochs = EpochConfig {
        batch_size: 32,
        seed: options.seed,
        ..EpochConfig::default()
    };
    let steps = epochs.total_steps(train.len());
    let config = LabelConfig {
        update: classifier_updates(5e-4, steps),
        microbatch_size: 32,
    };
    let model = SequenceClassifier::from_causal_lm(reference, 2, options.seed)?;
    let mut trainer = LabelTrainer::new(model, config)?;
    trainer.train(&train, &epochs, observers)?;
    let accuracy = trainer.evaluate(&test)?.accuracy.unwrap_or(0.0);
    let common = test.iter().filter(|m| m.label == Label::Class(0)).count();
    println!(
        "agrees with the moderators on {:.1}% of {} held-out texts ({:.1}% are marked as fine)",
        100.0 * accuracy,
        test.len(),
        100.0 * common as f64 / test.len() as f64
    );
    Ok(Moderator {
        classifier: LabelProbability::new(trainer.into_model(), 1),
        cue,
    })
}

const PIECE_WORDS: usize = 10;

fn ppo_trainer(
    reference: CausalLm,
    moderator: Moderator<SequenceClassifier>,
    task: &SummaryTask,
    options: &Options,
) -> Result<Trainer> {
    let config = SummaryPpo {
        seed: options.seed,
        steps: options.steps,
        batch: options.batch,
        lr: options.lr,
        kl_coef: options.kl_coef,
        // It has said nothing.
        unfinished: 0.0,
        generation: GenerationConfig {
            max_new_tokens: MAX_NEW_TOKENS,
            stop_token_ids: vec![task.stop()],
            batch_size: 128,
            ..GenerationConfig::default()
        },
    };
    let critic = |seed| ValueHeadModel::from_causal_lm_with(&reference, ValueHeadInit::Zeros, seed);
    let (value, cost_critic) = (critic(1)?, critic(2)?);
    let mut policy = reference.try_clone()?;
    policy.set_trainable(true);
    let constraint = match options.unconstrained {
        // Counted, and free of charge.
        true => Constraint::new("advertising", moderator, OFFENCE)
            .with_rule(ConstraintRule::Shaping { coef: 0.0 }),
        false => {
            let price = LagrangianConfig {
                target: Some(options.target),
                init: 2.0,
                lr: 0.5,
                max: Some(20.0),
                ..LagrangianConfig::default()
            };
            Constraint::lagrangian("advertising", moderator, OFFENCE, price, cost_critic)
        }
    };
    let trainer = PpoTrainer::new(
        config.config(),
        policy,
        value,
        reference,
        reward_fn(informative),
    )?
    .with_detokenizer(task.tokenizer().clone())
    .with_constraint(constraint)?;
    Ok(trainer)
}

/// A summary is an offence if that is the likelier of the two.
const OFFENCE: f64 = 0.5;

/// The share that the moderators' own rule objects to.
fn marked_rate(evaluation: &Evaluation) -> f64 {
    let marked = evaluation
        .summaries
        .iter()
        .filter(|s| advertises(s))
        .count();
    marked as f64 / evaluation.summaries.len() as f64
}

#[derive(Debug, Serialize)]
struct Report {
    reward_before: f64,
    reward_after: f64,
    /// By the cost model, as the safety test counts.
    offences_before: f64,
    offences_after: f64,
    /// By the moderators' own rule, on other samples.
    moderators_before: f64,
    moderators_after: f64,
    kl: f64,
    rouge_l_before: f64,
    rouge_l_after: f64,
    finished_before: f64,
    finished_after: f64,
    multiplier: Option<f64>,
    limit: f64,
    confidence: f64,
    upper_bound: f64,
    passes: bool,
    passes_before: bool,
    seconds: f64,
}

impl Report {
    fn print(&self) -> Result<()> {
        let percent = |x: f64| 100.0 * x;
        let rows = [
            (
                "reward: words taken from the text",
                2,
                [self.reward_before, self.reward_after],
            ),
            (
                "offences by the cost model, %",
                2,
                [percent(self.offences_before), percent(self.offences_after)],
            ),
            (
                "offences by the moderators' rule, %",
                2,
                [
                    percent(self.moderators_before),
                    percent(self.moderators_after),
                ],
            ),
            ("KL to the reference, nats a summary", 2, [0.0, self.kl]),
            (
                "ROUGE-L to the human summary",
                2,
                [self.rouge_l_before, self.rouge_l_after],
            ),
            (
                "finished, %",
                2,
                [percent(self.finished_before), percent(self.finished_after)],
            ),
        ];
        println!("{}", table(["before", "after"], &rows)?);
        let verdict = |passes: bool| if passes { "passes" } else { "fails" };
        println!(
            "safety test, at most {:.0}% with confidence {:.2}: {} before, {} after (at most {:.1}%)",
            percent(self.limit),
            self.confidence,
            verdict(self.passes_before),
            verdict(self.passes),
            percent(self.upper_bound)
        );
        if let Some(multiplier) = self.multiplier {
            println!("the price of an offence ended at {multiplier:.1}");
        }
        if self.moderators_after > 2.0 * self.offences_after + 0.02 {
            println!(
                "THE COST MODEL WAS HACKED: moderators object to far more than it sees. Have them mark \
                 what the policy writes, and train it again."
            );
        }
        println!("{:.0} s in all\n", self.seconds);
        Ok(())
    }
}
