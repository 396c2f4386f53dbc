//! Who says which answer is better.

use rayon::prelude::*;
use rlhf_core::{Completions, Error as CoreError, FinishReason, Replicas, RewardModel};
use tch::{Device, Kind};

use crate::{Error, Result};

/// Which of two answers is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The first.
    First,
    /// The second.
    Second,
    /// Neither.
    Tie,
}

/// A closure over the texts of a prompt and two answers.
type Comparison = Box<dyn Fn(&str, &str, &str) -> Verdict + Send + Sync>;

/// Says which of several answers to a prompt is best, and which worst.
pub enum Judge {
    /// By scores: the highest and the lowest.
    Reward(Box<dyn RewardModel>),
    /// By comparing every two answers of a prompt: the one that wins most often, and the one that
    /// does least often (a tie counts half for both). Needs texts.
    Comparison(Comparison),
}

impl<M: RewardModel + 'static> From<M> for Judge {
    fn from(model: M) -> Self {
        Self::Reward(Box::new(model))
    }
}

/// What a judge has said of some completions.
pub(super) struct Judgement {
    /// A number for each completion, the greater the better.
    pub(super) scores: Vec<f64>,
    /// The rows of the best and the worst answer to each prompt; `None` where they are tied.
    pub(super) extremes: Vec<Option<[usize; 2]>>,
}

impl Judge {
    /// A judge that compares the texts of two answers: `compare(prompt, first, second)`. Pairs are
    /// judged in parallel.
    pub fn comparing(
        compare: impl Fn(&str, &str, &str) -> Verdict + Send + Sync + 'static,
    ) -> Self {
        Self::Comparison(Box::new(compare))
    }

    pub(super) fn needs_texts(&self) -> bool {
        matches!(self, Self::Comparison(_))
    }

    /// Judges `each` answers to every prompt, which are adjacent. Answers that reached their limit
    /// lose `missing_eos_penalty`. The earliest of equals counts.
    pub(super) fn judge(
        &self,
        completions: &Completions,
        each: usize,
        missing_eos_penalty: f64,
    ) -> Result<Judgement> {
        let everywhere = match self {
            Self::Reward(model) => model.is_asked_everywhere(),
            Self::Comparison(_) => false,
        };
        let mut scores = Replicas::current().numbers_of_the_first(everywhere, || match self {
            Self::Reward(model) => scores_of(model.as_ref(), completions),
            Self::Comparison(compare) => wins(compare, completions, each),
        })?;
        for (score, finish) in scores.iter_mut().zip(&completions.finish_reasons) {
            if *finish == FinishReason::Length {
                *score -= missing_eos_penalty;
            }
        }
        let sequences = completions.batch.sequences();
        let extremes = (0..completions.batch.len() / each)
            .map(|prompt| {
                let rows = prompt * each..(prompt + 1) * each;
                let (mut best, mut worst) = (rows.start, rows.start);
                for row in rows {
                    if scores[row] > scores[best] {
                        best = row;
                    }
                    if scores[row] < scores[worst] {
                        worst = row;
                    }
                }
                let told_apart = scores[best] > scores[worst]
                    && sequences[best].response != sequences[worst].response;
                told_apart.then_some([best, worst])
            })
            .collect();
        Ok(Judgement { scores, extremes })
    }
}

fn scores_of(model: &dyn RewardModel, completions: &Completions) -> Result<Vec<f64>> {
    let _no_grad = tch::no_grad_guard();
    let scores = model.score(completions)?;
    let expected = vec![completions.batch.len() as i64];
    if scores.size() != expected {
        return Err(CoreError::ShapeMismatch {
            left: "scores",
            left_shape: scores.size(),
            right: "the completions [B]",
            right_shape: expected,
        }
        .into());
    }
    let scores = scores
        .f_to_device(Device::Cpu)
        .and_then(|s| s.f_to_kind(Kind::Double))
        .and_then(Vec::<f64>::try_from)
        .map_err(CoreError::from)?;
    match scores.iter().position(|score| !score.is_finite()) {
        Some(row) => Err(Error::Core(CoreError::NonFinite {
            what: "score",
            row,
            value: scores[row],
        })),
        None => Ok(scores),
    }
}

/// How many comparisons with the others each answer wins.
fn wins(compare: &Comparison, completions: &Completions, each: usize) -> Result<Vec<f64>> {
    let texts = completions.texts()?;
    let games: Vec<[usize; 2]> = (0..texts.len() / each)
        .flat_map(|prompt| {
            let rows = prompt * each..(prompt + 1) * each;
            rows.clone()
                .flat_map(move |a| (a + 1..rows.end).map(move |b| [a, b]))
        })
        .collect();
    let verdicts: Vec<Verdict> = games
        .par_iter()
        .map(|&[a, b]| compare(&texts[a].prompt, &texts[a].response, &texts[b].response))
        .collect();
    let mut wins = vec![0.0; texts.len()];
    for ([a, b], verdict) in games.into_iter().zip(verdicts) {
        let (first, second) = match verdict {
            Verdict::First => (1.0, 0.0),
            Verdict::Second => (0.0, 1.0),
            Verdict::Tie => (0.5, 0.5),
        };
        wins[a] += first;
        wins[b] += second;
    }
    Ok(wins)
}
