//! Sampling answers until there are enough to learn from.

use std::sync::Arc;

use rlhf_core::{Completions, Error as CoreError, Policy, Sequence, SequenceBatch};

use super::config::Unscored;
use super::rollout::SampledPrompts;
use super::trainer::GrpoTrainer;
use crate::train::NextPrompts;
use crate::{Error, Result, completions, measure};

/// Answers with their scores, and which of the rewards gave them.
pub(super) struct Scored {
    pub(super) completions: Completions,
    /// One list for each reward, one number for each answer; NaN where a reward says nothing.
    pub(super) scores: Vec<Vec<f64>>,
}

/// What the rollout is made of.
pub(super) struct Judged {
    pub(super) completions: Completions,
    pub(super) scores: Vec<Vec<f64>>,
    pub(super) prompts: SampledPrompts,
    /// False where dynamic sampling found nothing to learn from.
    pub(super) learn: bool,
}

impl Judged {
    pub(super) fn all(scored: Scored, group_size: usize) -> Self {
        let sampled = scored.completions.batch.len() / group_size;
        Self {
            completions: scored.completions,
            scores: scored.scores,
            prompts: SampledPrompts {
                sampled,
                dropped: 0,
                rounds: 1,
            },
            learn: true,
        }
    }
}

impl<P: Policy> GrpoTrainer<P> {
    /// Answers `wanted` prompts, which `next` hands out. With dynamic sampling, prompts whose
    /// answers all have the same scores are dropped, and as many others sampled in
    /// their place, until there are enough, no prompt is left, or the rounds are used up. A step
    /// makes do with fewer then; where not one is left, with the last answers, unlearnt from.
    pub(super) fn collect(&mut self, wanted: usize, next: &mut NextPrompts<'_>) -> Result<Judged> {
        let group = self.config.group_size();
        let Some(dynamic) = self.config.dynamic_sampling else {
            let scored = self.sample(&next(wanted))?;
            return Ok(Judged::all(scored, group));
        };
        let mut kept: Vec<Scored> = Vec::new();
        let mut last = None;
        let mut count = SampledPrompts {
            sampled: 0,
            dropped: 0,
            rounds: 0,
        };
        let mut groups = 0;
        while groups < wanted && count.rounds < dynamic.max_rounds {
            let prompts = next(wanted - groups);
            if prompts.is_empty() && count.rounds > 0 {
                break;
            }
            let scored = self.sample(&prompts)?;
            let differing: Vec<usize> = (0..prompts.len())
                .filter(|g| scored.differs(g * group..(g + 1) * group))
                .collect();
            count.rounds += 1;
            count.sampled += prompts.len();
            count.dropped += prompts.len() - differing.len();
            groups += differing.len();
            let rows: Vec<usize> = differing
                .iter()
                .flat_map(|g| g * group..(g + 1) * group)
                .collect();
            match rows.is_empty() {
                true => last = Some(scored),
                false => kept.push(scored.select(&rows)?),
            }
        }
        let learn = !kept.is_empty();
        let scored = match (Scored::joined(kept)?, last) {
            (Some(scored), _) | (None, Some(scored)) => scored,
            (None, None) => {
                return Err(CoreError::Empty {
                    what: "the prompts of a step",
                    help: "give it at least one",
                }
                .into());
            }
        };
        Ok(Judged {
            completions: scored.completions,
            scores: scored.scores,
            prompts: count,
            learn,
        })
    }

    /// Answers to `prompts`, with their scores.
    fn sample(&mut self, prompts: &[Arc<[i64]>]) -> Result<Scored> {
        let place = (self.config.seed, self.completions_done);
        let (generation, detokenizer) = (&self.config.generation, self.detokenizer.as_deref());
        let completions =
            completions::write(&self.policy, generation, detokenizer, prompts, place)?;
        self.completions_done += completions.batch.len() as u64;
        self.judge(completions)
    }

    /// 2. Every reward model judges every answer.
    pub(super) fn judge(&self, completions: Completions) -> Result<Scored> {
        let _no_grad = tch::no_grad_guard();
        let completions = completions::with_texts(completions, self.detokenizer.as_deref())?;
        let mut scores = Vec::with_capacity(self.rewards.len());
        for reward in &self.rewards {
            let column = measure::judged(&reward.name, reward.model.as_ref(), &completions)?;
            let wrong = |score: &f64| match self.config.unscored {
                Unscored::Error => !score.is_finite(),
                Unscored::LeaveOut => score.is_infinite(),
            };
            if let Some(row) = column.iter().position(wrong) {
                let value = column[row];
                let what = "the score";
                return Err(CoreError::NonFinite { what, row, value }.into());
            }
            scores.push(column);
        }
        Ok(Scored {
            completions,
            scores,
        })
    }

    /// Checks that answers come in groups, and lets each group share its prompt.
    pub(super) fn in_groups(&self, completions: Completions) -> Result<Completions> {
        let group_size = self.config.group_size();
        let mut sequences = completions.batch.sequences().to_vec();
        for (first, group) in sequences.chunks_mut(group_size).enumerate() {
            let row = first * group_size;
            let prompt = Arc::clone(&group[0].prompt);
            let broken = group.len() < group_size || group.iter().any(|s| s.prompt != prompt);
            if broken {
                return Err(Error::BrokenGroup { row, group_size });
            }
            for sequence in group {
                sequence.prompt = Arc::clone(&prompt);
            }
        }
        Ok(Completions {
            batch: SequenceBatch::new(sequences)?,
            ..completions
        })
    }
}

impl Scored {
    /// Whether these answers have more than one score, by any of the rewards.
    fn differs(&self, rows: std::ops::Range<usize>) -> bool {
        self.scores.iter().any(|column| {
            let mut scores = column[rows.clone()].iter().filter(|score| !score.is_nan());
            let first = scores.next();
            scores.any(|score| Some(score) != first)
        })
    }

    fn select(&self, rows: &[usize]) -> Result<Self> {
        let pick = |column: &Vec<f64>| rows.iter().map(|&row| column[row]).collect();
        Ok(Self {
            completions: self.completions.select(rows)?,
            scores: self.scores.iter().map(pick).collect(),
        })
    }

    /// All answers of several rounds; what one round does not know of its answers is dropped.
    fn joined(rounds: Vec<Self>) -> Result<Option<Self>> {
        let mut rounds = rounds.into_iter();
        let Some(mut all) = rounds.next() else {
            return Ok(None);
        };
        let mut sequences: Vec<Sequence> = all.completions.batch.into_sequences();
        for round in rounds {
            let more = round.completions;
            sequences.extend(more.batch.into_sequences());
            join(&mut all.completions.texts, more.texts);
            all.completions.finish_reasons.extend(more.finish_reasons);
            join(
                &mut all.completions.sampling_logprobs,
                more.sampling_logprobs,
            );
            join(&mut all.completions.policy_logprobs, more.policy_logprobs);
            join(&mut all.completions.kept, more.kept);
            for (all, more) in all.scores.iter_mut().zip(round.scores) {
                all.extend(more);
            }
        }
        let batch = SequenceBatch::new(sequences)?;
        Ok(Some(Self {
            completions: Completions {
                batch,
                ..all.completions
            },
            scores: all.scores,
        }))
    }
}

fn join<T>(all: &mut Option<Vec<T>>, more: Option<Vec<T>>) {
    *all = match (all.take(), more) {
        (Some(mut all), Some(more)) => {
            all.extend(more);
            Some(all)
        }
        _ => None,
    };
}
