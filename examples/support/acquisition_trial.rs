//! Does it pay to choose which comparisons people label? Measured with the embedded texts and a
//! reward model in the place of the person.
#![allow(dead_code, unreachable_pub)] // a module of examples, which use a part of it

use std::error::Error;
use std::fmt;

use rand::seq::SliceRandom;
use rlhf::core::{Completions, EpochConfig, Preference, RngStreams};
use rlhf::models::{CausalLm, SequenceClassifier};
use rlhf::reward::feedback::most_informative;
use rlhf::reward::{
    Combination, HeadEnsemble, Heads, Overlong, PairReport, RewardConfig, RewardTrainer,
    score_pairs, screen_pairs,
};
use rlhf::scale::{AdamWConfig, Schedule, UpdateConfig};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How a trial goes: labels are bought in rounds, and after each a model is trained from the
/// start on all that were bought.
#[derive(Debug, Clone, Copy)]
pub struct Budget {
    /// Labels before the first choice is made, taken at random.
    pub start: usize,
    /// Labels bought in a round.
    pub per_round: usize,
    /// Rounds.
    pub rounds: usize,
    /// Heads of the ensemble.
    pub heads: usize,
    /// Passes over the labels in each training.
    pub epochs: u64,
}

/// Held-out accuracy of one seed.
#[derive(Debug, Clone, Copy)]
pub struct Point {
    pub labels: usize,
    pub random: f64,
    pub uncertain: f64,
}

/// Runs both strategies with one seed. They start with the same labels and the same heads.
pub fn run(
    base: &CausalLm,
    pool: &[Preference],
    held_out: &[Preference],
    budget: Budget,
    seed: u64,
) -> Result<Vec<Point>> {
    let mut order: Vec<usize> = (0..pool.len()).collect();
    order.shuffle(&mut RngStreams::new(seed).stream("trial/order", 0));
    let mut bought = order[..budget.start].to_vec();
    let mut points = Vec::new();
    for round in 0..=budget.rounds {
        let labels = budget.start + round * budget.per_round;
        let random = train(base, pool, &order[..labels], budget, seed)?;
        let random_accuracy = accuracy(&random, held_out)?;
        // The first round has nothing to choose: both are the same model.
        let (uncertain, uncertain_accuracy) = match round {
            0 => (random, random_accuracy),
            _ => {
                let model = train(base, pool, &bought, budget, seed)?;
                let accuracy = accuracy(&model, held_out)?;
                (model, accuracy)
            }
        };
        points.push(Point {
            labels,
            random: random_accuracy,
            uncertain: uncertain_accuracy,
        });
        eprintln!(
            "seed {seed}, {labels} labels: random {:.3}, uncertain {:.3}",
            random_accuracy, uncertain_accuracy
        );
        if round < budget.rounds {
            let rest: Vec<usize> = order
                .iter()
                .copied()
                .filter(|i| !bought.contains(i))
                .collect();
            let questions: Vec<_> = rest.iter().map(|&i| pool[i].clone()).collect();
            let judge = |c: &Completions| uncertain.score_with_disagreement(c);
            let best = most_informative(judge, &questions, 32)?;
            bought.extend(best.into_iter().take(budget.per_round).map(|i| rest[i]));
        }
    }
    Ok(points)
}

/// Who answers: a reward model that learnt from `lessons`, which nothing else is taught with.
pub fn person(base: &CausalLm, lessons: &[Preference], seed: u64) -> Result<SequenceClassifier> {
    train_heads(base, lessons, Heads::ONE, 1, seed)
}

/// The questions with the better answer first. Those that the person cannot tell apart are left
/// out.
pub fn answers(person: &SequenceClassifier, questions: &[Preference]) -> Result<Vec<Preference>> {
    let (questions, _) = screen_pairs(questions.to_vec(), usize::MAX, Overlong::Drop);
    let (scored, _) = score_pairs(person, &questions, 32)?;
    let decided = questions.into_iter().zip(scored);
    Ok(decided
        .filter(|(_, scored)| scored.difference() != 0.0)
        .map(|(mut question, scored)| {
            if !scored.is_right() {
                std::mem::swap(&mut question.chosen, &mut question.rejected);
            }
            question
        })
        .collect())
}

fn train(
    base: &CausalLm,
    pool: &[Preference],
    labels: &[usize],
    budget: Budget,
    seed: u64,
) -> Result<HeadEnsemble<SequenceClassifier>> {
    let pairs: Vec<_> = labels.iter().map(|&i| pool[i].clone()).collect();
    let heads = Heads {
        count: budget.heads,
        bootstrap: Some(seed),
    };
    let model = train_heads(base, &pairs, heads, budget.epochs, seed)?;
    Ok(HeadEnsemble::new(model, Combination::Mean)?)
}

fn train_heads(
    base: &CausalLm,
    pairs: &[Preference],
    heads: Heads,
    epochs: u64,
    seed: u64,
) -> Result<SequenceClassifier> {
    let epochs = EpochConfig {
        epochs,
        batch_size: 16,
        seed,
        ..EpochConfig::default()
    };
    let steps = epochs.total_steps(pairs.len());
    let config = RewardConfig {
        update: UpdateConfig {
            optimizer: AdamWConfig {
                lr: 3e-4,
                ..AdamWConfig::default()
            },
            schedule: Schedule::linear(steps / 10, steps),
            ..UpdateConfig::default()
        },
        center_coef: 0.01,
        microbatch_size: 16,
        ..RewardConfig::default()
    };
    let model = SequenceClassifier::from_causal_lm(base, heads.count as i64, seed)?;
    let mut trainer = RewardTrainer::new(model, config)?.with_heads(heads)?;
    trainer.train(pairs, &epochs, &mut [])?;
    Ok(trainer.into_model())
}

fn accuracy(model: &HeadEnsemble<SequenceClassifier>, held_out: &[Preference]) -> Result<f64> {
    Ok(PairReport::of_model(model, held_out, 32)?.accuracy)
}

/// Means over the seeds, with what they can tell.
pub struct Summary(pub Vec<Vec<Point>>);

impl fmt::Display for Summary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seeds = self.0.len();
        writeln!(
            f,
            "{:>7}{:>10}{:>12}{:>24}",
            "labels", "random", "uncertain", "difference, points"
        )?;
        let rounds = self.0.first().map_or(0, Vec::len);
        for round in 0..rounds {
            let points: Vec<Point> = self.0.iter().map(|seed| seed[round]).collect();
            let mean =
                |of: fn(&Point) -> f64| 100.0 * points.iter().map(of).sum::<f64>() / seeds as f64;
            let difference = mean(|p| p.uncertain - p.random);
            let squares: f64 = points
                .iter()
                .map(|p| (100.0 * (p.uncertain - p.random) - difference).powi(2))
                .sum();
            let error = (squares / (seeds.max(2) - 1) as f64 / seeds as f64).sqrt();
            let spread = match seeds {
                1 => "(one seed)".to_string(),
                _ => format!("± {error:.1}"),
            };
            writeln!(
                f,
                "{:>7}{:>9.1}%{:>11.1}%{:>+13.1} {:<10}",
                points[0].labels,
                mean(|p| p.random),
                mean(|p| p.uncertain),
                difference,
                spread
            )?;
        }
        write!(f, "(mean and standard error over {seeds} seeds)")
    }
}
