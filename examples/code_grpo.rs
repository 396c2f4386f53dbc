//! A model that writes programs, taught by running them:
//!
//! ```text
//! scripts/with-libtorch cargo run --release --example code_grpo
//! ```
//!
//! The task: given three digits and a number, write an arithmetic expression that uses each digit
//! once and comes to the number: `257=37:` asks for `2+5*7`, or `7*5+2`. Programs are run by an
//! interpreter; the reward is 1 if the result is right and 0 if not, and no model judges anything.
//!
//! 1. A transformer of characters, made here, learns from written solutions to some of the tasks.
//! 2. GRPO: it writes eight programs for each of many tasks, which are run, and the ones that are
//!    right are made likelier than their siblings.
//! 3. Before and after on tasks over digits that neither stage has seen together: the share
//!    of single samples that solve their task (pass@1), of greedy answers, and of tasks that one
//!    of eight samples solves (pass@8).
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

mod support;

use std::collections::BTreeSet;
use std::error::Error;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

use clap::Parser;
use rand::Rng;
use rlhf::core::{
    Device, EpochConfig, GenerationConfig, Generator, Kind, Observer, Policy, RngStreams,
    SamplingConfig, Sequence,
};
use rlhf::models::{CausalLm, Gpt2Config, ModelConfig, SpecialTokens};
use rlhf::ppo::{GrpoConfig, GrpoTrainer, WatchConfig};
use rlhf::reward::program;
use rlhf::scale::{AdamWConfig, Schedule, UpdateConfig};
use rlhf::sft::{SftConfig, SftTrainer};
use serde::Serialize;
use support::curves;
use support::expression::{Characters, Task, all_tasks, run as interpret};
use support::run_folder::RunFolder;
use support::table::table;
use support::watching::{taken, told, watch};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Teaches a small model to write arithmetic by running what it writes.
#[derive(Debug, Parser)]
struct Options {
    /// Steps of supervised training on written solutions.
    #[arg(long, default_value_t = 500)]
    sft_steps: u64,
    /// Steps of GRPO.
    #[arg(long, default_value_t = 600)]
    steps: u64,
    /// Tasks of a step, each with eight answers.
    #[arg(long, default_value_t = 32)]
    batch: usize,
    /// Learning rate of GRPO.
    #[arg(long, default_value_t = 3e-4)]
    lr: f64,
    /// Share of the training tasks that come with written solutions.
    #[arg(long, default_value_t = 0.5)]
    solved_share: f64,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Threads of libtorch; 0 leaves the choice to it.
    #[arg(long, default_value_t = 0)]
    threads: i32,
    /// Folder for the trained model, metrics and curves.
    #[arg(long, default_value = "runs/code")]
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
    let split = Split::new(&options);
    println!(
        "{} tasks to train on, {} of them with solutions; {} held out, over {} triples of digits of their own",
        split.train.len(),
        split.solved.len(),
        split.held_out.len(),
        split
            .held_out
            .iter()
            .map(|t| &t.digits)
            .collect::<BTreeSet<_>>()
            .len()
    );
    let watching = WatchConfig::default();
    let length = (options.steps, watching.window);
    let (watch, findings) = watch(watching)?;
    let mut observers = folder.observers(SHOWN)?;
    observers.push(Box::new(watch));

    println!("\n1. Supervised training on written solutions");
    let policy = warmed_up(&options, &split, &mut observers)?;
    let warm_s = started.elapsed().as_secs_f64();
    let before = Evaluation::of(&policy, &split.held_out)?;

    println!("\n2. GRPO on whether programs are right");
    let mut reference = policy.try_clone()?;
    reference.set_trainable(false);
    let reward = program(|prompt: &str, answer: &str| f64::from(solves(prompt, answer)));
    // The reference is there to measure the divergence, which has no price.
    let mut trainer = GrpoTrainer::with_reference(grpo(&options), policy, reference, reward)?
        .with_detokenizer(|ids: &[i64]| Ok(Characters::decode(ids)));
    let prompts: Vec<Arc<[i64]>> = split.train.iter().map(prompt).collect();
    trainer.train(&prompts, options.steps, &mut observers)?;
    let after = Evaluation::of(trainer.policy(), &split.held_out)?;

    println!("\n3. Held-out tasks, before and after GRPO");
    let report = Report {
        held_out: split.held_out.len(),
        before,
        after,
        warm_up_seconds: warm_s,
        seconds: started.elapsed().as_secs_f64(),
    };
    report.print()?;
    println!("{}\n", told(&taken(&findings), length, LOOKED_AT));
    print_examples(trainer.policy(), &split.held_out)?;
    folder.save_policy(trainer.policy(), None)?;
    folder.finish(("grpo", &PANELS, 5), &report)
}

/// What the watch has to go by.
const LOOKED_AT: &str = "the reward, the KL, lengths and the variety of each step's samples";

/// The curves.
const PANELS: [curves::Panel<'_>; 3] = [
    ("share of programs that are right", &["grpo/score/mean"]),
    (
        "tasks whose eight programs are all right or all wrong",
        &["grpo/groups/zero_std"],
    ),
    ("entropy of a character, nats", &["grpo/policy/entropy"]),
];

/// The metrics of the progress line.
const SHOWN: [&str; 4] = [
    "sft/loss",
    "grpo/score/mean",
    "grpo/groups/zero_std",
    "grpo/policy/entropy",
];
/// The longest program, `(1+2)*3` and its end.
const PROGRAM_TOKENS: usize = 8;

/// Which task is for what.
struct Split {
    train: Vec<Task>,
    /// Tasks of `train` with their programs.
    solved: Vec<(Task, Vec<String>)>,
    held_out: Vec<Task>,
}

impl Split {
    /// A tenth of the triples of digits is held out, with all of their tasks.
    fn new(options: &Options) -> Self {
        let mut rng = RngStreams::new(options.seed).stream("code/split", 0);
        let tasks = all_tasks();
        let triples: BTreeSet<&Vec<u8>> = tasks.keys().map(|t| &t.digits).collect();
        let held: BTreeSet<Vec<u8>> = triples
            .into_iter()
            .filter(|_| rng.random::<f64>() < 0.1)
            .cloned()
            .collect();
        let mut split = Self {
            train: Vec::new(),
            solved: Vec::new(),
            held_out: Vec::new(),
        };
        for (task, programs) in &tasks {
            if held.contains(&task.digits) {
                split.held_out.push(task.clone());
                continue;
            }
            split.train.push(task.clone());
            if rng.random::<f64>() < options.solved_share {
                split.solved.push((task.clone(), programs.clone()));
            }
        }
        split
    }
}

fn prompt(task: &Task) -> Arc<[i64]> {
    Characters::encode(&task.prompt()).into()
}

fn solves(prompt: &str, program: &str) -> bool {
    Task::parse(prompt).is_some_and(|task| task.solved_by(program))
}

/// A transformer of half a million parameters after its first lessons.
fn warmed_up(
    options: &Options,
    split: &Split,
    observers: &mut [Box<dyn Observer>],
) -> Result<CausalLm> {
    const BATCH: usize = 128;
    let config = Gpt2Config {
        vocab_size: Characters::len() as i64,
        n_positions: 24,
        n_embd: 128,
        n_layer: 3,
        n_head: 4,
        special_tokens: SpecialTokens {
            bos: Some(0),
            eos: vec![0],
            pad: Some(0),
        },
        ..Gpt2Config::default()
    };
    let model = CausalLm::new(
        ModelConfig::Gpt2(config),
        options.seed,
        Device::Cpu,
        Kind::Float,
    )?;
    // A task is seen again and again, with any of its programs.
    let mut rng = RngStreams::new(options.seed).stream("code/solutions", 0);
    let solutions: Vec<Sequence> = (0..options.sft_steps as usize * BATCH)
        .map(|_| {
            let (task, programs) = &split.solved[rng.random_range(0..split.solved.len())];
            let program = &programs[rng.random_range(0..programs.len())];
            let mut answer = Characters::encode(program);
            answer.push(0);
            Sequence::new(prompt(task), answer)
        })
        .collect();
    let config = SftConfig {
        update: UpdateConfig {
            optimizer: AdamWConfig {
                lr: 2e-3,
                ..AdamWConfig::default()
            },
            schedule: Schedule::linear(50, options.sft_steps),
            ..UpdateConfig::default()
        },
        microbatch_size: BATCH,
        ..SftConfig::default()
    };
    let epochs = EpochConfig {
        batch_size: BATCH,
        seed: options.seed,
        ..EpochConfig::default()
    };
    let mut trainer = SftTrainer::new(model, config)?;
    trainer.train(&solutions, &epochs, observers)?;
    Ok(trainer.into_model())
}

fn grpo(options: &Options) -> GrpoConfig {
    let mut config = GrpoConfig {
        seed: options.seed,
        batch_size: options.batch,
        microbatch_size: 256,
        // Every other prompt teaches nothing at first, and more of them at last; all the same, a
        // step takes its prompts as they come, so that the curve is that of all tasks.
        dynamic_sampling: None,
        ..GrpoConfig::dr_grpo()
    };
    config.generation = generation(8);
    config.update.optimizer.lr = options.lr;
    config.annealed(options.steps)
}

fn generation(samples: usize) -> GenerationConfig {
    GenerationConfig {
        max_new_tokens: PROGRAM_TOKENS,
        stop_token_ids: vec![0],
        samples_per_prompt: samples,
        batch_size: 512,
        ..GenerationConfig::default()
    }
}

/// How well a policy does on tasks, in percent.
#[derive(Debug, Serialize)]
struct Evaluation {
    pass_at_1: f64,
    greedy: f64,
    pass_at_8: f64,
    /// Share of the samples that are programs of the digits, whatever they come to.
    runnable: f64,
}

impl Evaluation {
    /// Eight samples and one greedy answer for every task.
    fn of(policy: &dyn Policy, tasks: &[Task]) -> Result<Self> {
        let samples = programs(policy, tasks, &generation(SAMPLES))?;
        let mut greedy = generation(1);
        greedy.sampling = SamplingConfig::greedy();
        let greedy = programs(policy, tasks, &greedy)?;
        let percent = |count: usize, of: usize| 100.0 * count as f64 / of as f64;
        let groups = || tasks.iter().zip(samples.chunks(SAMPLES));
        let solved = |task: &Task, programs: &[String]| {
            programs.iter().filter(|p| task.solved_by(p)).count()
        };
        let runnable = |task: &Task, programs: &[String]| {
            let runs = |p: &&String| task.fits(p) && interpret(p).is_some();
            programs.iter().filter(runs).count()
        };
        let right = groups()
            .map(|(task, programs)| solved(task, programs))
            .sum();
        let fit = groups()
            .map(|(task, programs)| runnable(task, programs))
            .sum();
        let any = groups()
            .filter(|(task, programs)| solved(task, programs) > 0)
            .count();
        let best = tasks
            .iter()
            .zip(&greedy)
            .filter(|(task, p)| task.solved_by(p))
            .count();
        Ok(Self {
            pass_at_1: percent(right, samples.len()),
            greedy: percent(best, tasks.len()),
            pass_at_8: percent(any, tasks.len()),
            runnable: percent(fit, samples.len()),
        })
    }
}

const SAMPLES: usize = 8;
/// Seed of the samples that are judged; none of a run's own seeds.
const EVALUATION_SEED: u64 = 0x5eed;

fn programs(
    policy: &dyn Policy,
    tasks: &[Task],
    generation: &GenerationConfig,
) -> Result<Vec<String>> {
    let prompts: Vec<Arc<[i64]>> = tasks.iter().map(prompt).collect();
    let streams = RngStreams::new(EVALUATION_SEED);
    let written = Generator::new(policy, generation)?.generate(&prompts, &streams, 0)?;
    let answers = written.batch.sequences().iter();
    Ok(answers.map(|s| Characters::decode(&s.response)).collect())
}

fn print_examples(policy: &dyn Policy, tasks: &[Task]) -> Result<()> {
    let some: Vec<Task> = tasks
        .iter()
        .step_by(tasks.len().div_ceil(8))
        .cloned()
        .collect();
    let mut greedy = generation(1);
    greedy.sampling = SamplingConfig::greedy();
    for (task, program) in some.iter().zip(programs(policy, &some, &greedy)?) {
        let result = match interpret(&program) {
            Some(value) => format!("is {value}"),
            None => "is no program".to_string(),
        };
        let verdict = match task.solved_by(&program) {
            true => "right",
            false => "wrong",
        };
        println!("{:<10} {program:<9} {result:<14} {verdict}", task.prompt());
    }
    println!();
    Ok(())
}

#[derive(Debug, Serialize)]
struct Report {
    held_out: usize,
    before: Evaluation,
    after: Evaluation,
    warm_up_seconds: f64,
    seconds: f64,
}

impl Report {
    fn print(&self) -> Result<()> {
        let Self { before, after, .. } = self;
        let rows = [
            (
                "pass@1: samples that solve their task, %",
                1,
                [before.pass_at_1, after.pass_at_1],
            ),
            (
                "greedy answers that do, %",
                1,
                [before.greedy, after.greedy],
            ),
            (
                "pass@8: tasks that one of 8 samples solves, %",
                1,
                [before.pass_at_8, after.pass_at_8],
            ),
            (
                "samples that are programs of the digits, %",
                1,
                [before.runnable, after.runnable],
            ),
        ];
        println!("{}", table(["before", "after"], &rows)?);
        println!(
            "{} tasks; {:.0} s of supervised training, {:.0} s in all\n",
            self.held_out, self.warm_up_seconds, self.seconds
        );
        Ok(())
    }
}
