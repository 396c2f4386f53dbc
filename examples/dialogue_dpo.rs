//! Teaches a model what a good answer in a conversation is, from comparisons alone:
//!
//! ```text
//! cargo run --release --example dialogue_dpo -- --loss sigmoid
//! cargo run --release --example dialogue_dpo -- --loss all
//! ```
//!
//! The conversations have several turns and go through the model's chat template. The policy is a
//! LoRA adapter, its reference the same model with the adapter off, whose log-probabilities are
//! computed once for all losses and kept on disk. `--loss all` trains with every member of the
//! family and compares them in one table.
//!
//! The embedded model has never seen a conversation, so it first learns to write answers, good and
//! bad alike; what it then learns from comparisons is which to write. A model of your own
//! (`--model`) is taken as it is, unless `--warm-up` says otherwise.
#![allow(clippy::print_stdout, clippy::print_stderr)] // an example talks to its user

#[path = "support/dialogues.rs"]
mod dialogues;

use std::error::Error;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use dialogues::{Data, Loss, Outcome, Table, family, judged, rouge, shown};
use rlhf::core::{EpochConfig, GenerationConfig, Kind, Observer, SamplingConfig, Sequence};
use rlhf::dpo::{
    ChosenFalls, ChosenWatch, DpoConfig, DpoTrainer, Fingerprint, KtoConfig, KtoObjective,
    KtoTrainer, LabelledAnswer, Objective, Reference, ReferenceCache, SampleConfig, SampledAnswers,
    ScoredPreference, WatchConfig, sample_answers,
};
use rlhf::models::{CausalLm, LoadOptions, LoraConfig, Tokenizer};
use rlhf::scale::{Schedule, UpdateConfig};
use rlhf::sft::{SftConfig, SftTrainer};

type Result<T, E = Box<dyn Error>> = std::result::Result<T, E>;

/// Trains a model on comparisons of answers in conversations.
#[derive(Debug, Parser)]
struct Options {
    /// A loss by name (`sigmoid`, `ipo`, `simpo`, `orpo`, `kto`, ...), `mpo`, or `all`.
    #[arg(long, default_value = "sigmoid")]
    loss: String,
    /// Hugging Face folder of the model.
    #[arg(long)]
    model: Option<PathBuf>,
    /// Folder with `train.jsonl` and `valid.jsonl`: `prompt`, `chosen`, `rejected`.
    #[arg(long, default_value = "examples/data/dialogues")]
    data: PathBuf,
    /// Folder for what is made: the adapter or model, and the reference's log-probabilities.
    #[arg(long, default_value = "runs/dialogue")]
    out: PathBuf,
    /// Passes over the comparisons.
    #[arg(long, default_value_t = 1)]
    epochs: u64,
    /// Comparisons of a step.
    #[arg(long, default_value_t = 8)]
    batch: usize,
    /// Peak learning rate.
    #[arg(long, default_value_t = 2e-4)]
    lr: f64,
    /// How strongly the policy is held to the reference; each loss has its own default.
    #[arg(long)]
    beta: Option<f64>,
    /// Rank of the adapter.
    #[arg(long, default_value_t = 8)]
    rank: i64,
    /// Passes of supervised learning before: 3 for the embedded model, else none.
    #[arg(long)]
    warm_up: Option<u64>,
    /// Writes a whole model (Hugging Face) in place of an adapter (PEFT).
    #[arg(long)]
    merge: bool,
    /// Conversations that are shown before and after.
    #[arg(long, default_value_t = 6)]
    show: usize,
    /// Seed of every random choice.
    #[arg(long, default_value_t = 1)]
    seed: u64,
}

fn main() -> ExitCode {
    match run(&Options::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: &Options) -> Result<()> {
    let members = family(&options.loss, options.beta)?;
    std::fs::create_dir_all(&options.out)?;
    let dir = match &options.model {
        Some(dir) => dir.clone(),
        None => "examples/models/debtldr-gpt2".into(),
    };
    let load = LoadOptions {
        kind: Some(Kind::Float),
        ..LoadOptions::default()
    };
    let model = CausalLm::from_pretrained(&dir, &load)?;
    let tokenizer = dialogues::tokenizer(&dir, &options.out)?;
    tokenizer.check_fits(model.config())?;
    let data = Data::read(&options.data, &tokenizer, model.config().max_length())?;
    let base = warmed_up(options, model, &data)?;

    let runner = Runner::new(options, base, tokenizer, data)?;
    let (outcome, before, _) = runner.outcome("before", runner.base.try_clone()?, 0.0)?;
    let mut outcomes = vec![outcome];
    for (name, loss) in &members {
        let started = Instant::now();
        let model = runner.train(loss)?;
        let seconds = started.elapsed().as_secs_f64();
        let (outcome, answers, model) = runner.outcome(name, model, seconds)?;
        println!("{name}: {}", outcome.evaluation);
        outcomes.push(outcome);
        if members.len() == 1 {
            let table = shown(&before, &answers, &runner.tokenizer, options.show)?;
            println!("\n{table}");
            runner.save(model)?;
        }
    }
    println!("\n{}", Table(&outcomes));
    Ok(())
}

/// The model after supervised learning on both answers of each comparison.
fn warmed_up(options: &Options, model: CausalLm, data: &Data) -> Result<CausalLm> {
    let epochs = options.warm_up.unwrap_or(match options.model {
        Some(_) => 0,
        None => 3,
    });
    if epochs == 0 {
        return Ok(model);
    }
    let both: Vec<Sequence> = LabelledAnswer::from_pairs(&data.train)
        .into_iter()
        .map(|answer| answer.sequence)
        .collect();
    let epochs = EpochConfig {
        epochs,
        batch_size: 16,
        seed: options.seed,
        ..EpochConfig::default()
    };
    let mut config = SftConfig {
        microbatch_size: 16,
        ..SftConfig::default()
    };
    config.update = update(5e-4, epochs.total_steps(both.len()));
    let mut trainer = SftTrainer::new(model, config)?;
    trainer.train(&both, &epochs, &mut [])?;
    let perplexity = trainer.evaluate(&both)?.perplexity;
    println!("the model has learned to answer: perplexity {perplexity:.1} a token");
    Ok(trainer.into_model())
}

fn update(lr: f64, steps: u64) -> UpdateConfig {
    let mut update = UpdateConfig {
        schedule: Schedule::linear(steps / 10, steps),
        max_grad_norm: Some(1.0),
        ..UpdateConfig::default()
    };
    update.optimizer.lr = lr;
    update
}

/// Says so early when the chosen answers become less likely.
fn warn(falls: ChosenFalls) -> ControlFlow<()> {
    eprintln!("{falls}");
    ControlFlow::Continue(())
}

/// What all members of the family have in common.
struct Runner<'a> {
    options: &'a Options,
    base: CausalLm,
    tokenizer: Tokenizer,
    data: Data,
    /// The comparisons under the base model, which is every member's reference.
    train: Vec<ScoredPreference>,
    valid: Vec<ScoredPreference>,
}

impl<'a> Runner<'a> {
    fn new(options: &'a Options, base: CausalLm, tokenizer: Tokenizer, data: Data) -> Result<Self> {
        let print = Fingerprint::of_weights(&base)?;
        let scored = |name: &str, pairs: &[_]| {
            // Another model has another file.
            let cache = ReferenceCache::new(options.out.join(format!("{name}-{print}.ref")), print);
            cache.complete(&base, pairs, &DpoConfig::default().score_options())
        };
        Ok(Self {
            train: scored("train", &data.train)?,
            valid: scored("valid", &data.valid)?,
            options,
            base,
            tokenizer,
            data,
        })
    }

    /// A fresh adapter, trained with one member of the family.
    fn train(&self, loss: &Loss) -> Result<CausalLm> {
        let mut policy = self.base.try_clone()?;
        let lora = LoraConfig {
            rank: self.options.rank,
            alpha: 2.0 * self.options.rank as f64,
            ..LoraConfig::default()
        };
        policy.add_adapter(&lora, self.options.seed)?;
        match loss {
            Loss::Pairs(objective) => self.learn_pairs(policy, objective.clone()),
            Loss::Labels(objective) => self.learn_labels(policy, *objective),
        }
    }

    fn learn_pairs(&self, policy: CausalLm, objective: Objective) -> Result<CausalLm> {
        let reference = match objective.reads_reference() {
            true => Reference::Scored,
            false => Reference::Free,
        };
        let epochs = self.epochs(self.options.batch);
        let config = DpoConfig {
            update: update(self.options.lr, epochs.total_steps(self.train.len())),
            microbatch_size: self.options.batch,
            ..DpoConfig::of(objective)
        };
        let mut trainer = DpoTrainer::new(policy, reference, config)?;
        let mut observers: Vec<Box<dyn Observer>> =
            vec![Box::new(ChosenWatch::new(WatchConfig::default(), warn))];
        trainer.train_scored(&self.train, &epochs, &mut observers)?;
        Ok(trainer.into_model())
    }

    /// Both answers of each comparison, one by one.
    fn learn_labels(&self, policy: CausalLm, objective: KtoObjective) -> Result<CausalLm> {
        let reference = policy.reference()?;
        let answers = LabelledAnswer::from_pairs(&self.data.train);
        let epochs = self.epochs(2 * self.options.batch);
        let config = KtoConfig {
            update: update(self.options.lr, epochs.total_steps(answers.len())),
            objective,
            microbatch_size: epochs.batch_size,
        };
        let mut trainer = KtoTrainer::new(policy, reference, config)?;
        trainer.train(&answers, &epochs, &mut [])?;
        Ok(trainer.into_model())
    }

    fn epochs(&self, batch_size: usize) -> EpochConfig {
        EpochConfig {
            epochs: self.options.epochs,
            batch_size,
            seed: self.options.seed,
            ..EpochConfig::default()
        }
    }

    /// How a model does on what is held out, and its likeliest answers. The KL is estimated on
    /// answers that are sampled.
    fn outcome(
        &self,
        name: &'static str,
        model: CausalLm,
        seconds: f64,
    ) -> Result<(Outcome, SampledAnswers, CausalLm)> {
        let answers = |sampling| {
            let generation = GenerationConfig {
                max_new_tokens: 40,
                sampling,
                stop_token_ids: self.tokenizer.stop_token_ids().to_vec(),
                ..GenerationConfig::default()
            };
            let config = SampleConfig {
                generation,
                seed: self.options.seed,
            };
            sample_answers(&model, &self.data.prompts(), &config)
        };
        let likeliest = answers(SamplingConfig::greedy())?;
        let kl = answers(SamplingConfig::default())?.kl(&self.base)?;
        let (evaluation, model) = judged(model, &self.valid)?;
        let outcome = Outcome {
            name,
            evaluation,
            kl,
            rouge: rouge(&likeliest, &self.data, &self.tokenizer)?,
            tokens: likeliest.mean_tokens(),
            seconds,
        };
        Ok((outcome, likeliest, model))
    }

    /// An adapter as PEFT reads it, or a whole model as transformers does; the tokenizer is there.
    fn save(&self, mut model: CausalLm) -> Result<()> {
        let dir = match self.options.merge {
            true => self.options.out.join("model"),
            false => self.options.out.join("adapter"),
        };
        if self.options.merge {
            model.merge()?;
            model.save_pretrained(&dir)?;
        } else {
            model.save_adapter(&dir)?;
            // The adapter belongs to the model that it was trained beside.
            self.base.save_pretrained(self.options.out.join("base"))?;
            self.tokenizer.save(self.options.out.join("base"))?;
        }
        self.tokenizer.save(&dir)?;
        println!("written to {}", dir.display());
        Ok(())
    }
}
