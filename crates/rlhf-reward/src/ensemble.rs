//! Several reward models as one that knows how sure it is.

use rlhf_core::{Completions, Error as CoreError, RewardModel, Scorer, Stats};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::notes::Notes;
use crate::{Error, Result};

/// How the members' scores become one.
///
/// A policy finds what *one* reward model overrates; it is harder to find what all of them do
/// (Coste et al. 2024, arXiv 2310.02743, where the last two are "worst-case" and
/// "uncertainty-weighted" optimisation).
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combination {
    /// Their mean.
    Mean,
    /// The lowest.
    Minimum,
    /// Their mean less so many of their standard deviations.
    MeanMinusDeviations(f64),
}

impl Combination {
    fn validate(self) -> Result<()> {
        match self {
            Self::MeanMinusDeviations(k) if !(k.is_finite() && k >= 0.0) => {
                let reason = "a finite number that is not negative is needed";
                Err(CoreError::config("combination.mean_minus_deviations", k, reason).into())
            }
            _ => Ok(()),
        }
    }

    /// `[B, M]` scores of the members to `[B]`.
    fn of(self, members: &Tensor, disagreement: &Tensor) -> Tensor {
        let mean = || members.mean_dim([1i64].as_slice(), false, Kind::Float);
        match self {
            Self::Mean => mean(),
            Self::Minimum => members.amin([1i64].as_slice(), false),
            Self::MeanMinusDeviations(k) => mean() - disagreement * k,
        }
    }
}

/// What an ensemble says of a batch.
#[derive(Debug)]
pub struct EnsembleScores {
    /// The combined scores, `[B]` f32.
    pub scores: Tensor,
    /// Standard deviation (population) of the members' scores, `[B]` f32.
    pub disagreement: Tensor,
    /// The members' own scores, `[B, M]` f32.
    pub members: Tensor,
}

impl EnsembleScores {
    fn new(members: Tensor, combination: Combination) -> rlhf_core::Result<Self> {
        let members = members.to_kind(Kind::Float);
        let rows = Vec::<f32>::try_from(members.reshape([-1]))?;
        if let Some(i) = rows.iter().position(|score| !score.is_finite()) {
            return Err(CoreError::NonFinite {
                what: "score",
                row: i / (rows.len() / members.size()[0] as usize),
                value: rows[i].into(),
            });
        }
        let disagreement = members.std_dim([1i64].as_slice(), false, false);
        Ok(Self {
            scores: combination.of(&members, &disagreement),
            disagreement,
            members,
        })
    }

    /// Notes the mean disagreement and hands out the scores.
    fn noted(self, notes: &Notes) -> rlhf_core::Result<Tensor> {
        notes.add(DISAGREEMENT, &Vec::<f64>::try_from(&self.disagreement)?);
        Ok(self.scores)
    }
}

/// What [`RewardModel::take_report`] of an ensemble holds: the mean of
/// [`EnsembleScores::disagreement`] over the completions that it has scored.
const DISAGREEMENT: &str = "disagreement";

/// Reward models that were trained apart.
///
/// The loss of comparisons fixes neither origin nor unit of the scores, so members are comparable
/// only once they are on the same scale: wrap each in [`Normalized`](crate::Normalized), fitted
/// to the same completions.
///
/// ```
/// use rlhf_reward::core::{Completions, Sequence, SequenceBatch, Text, reward_fn};
/// use rlhf_reward::{Combination, Ensemble};
///
/// let batch = SequenceBatch::new(vec![Sequence::new([1], [2])])?;
/// let text = Text { prompt: "Hello".into(), response: "Hi there".into() };
/// let completions = Completions::written(batch).with_texts(vec![text])?;
///
/// let members = [1.0, 3.0].map(|factor| reward_fn(move |_, a| factor * a.len() as f64));
/// let ensemble = Ensemble::new(members.into(), Combination::MeanMinusDeviations(0.5))?;
/// let judged = ensemble.score_with_disagreement(&completions)?;
/// assert_eq!(judged.disagreement.double_value(&[0]), 8.0);
/// assert_eq!(judged.scores.double_value(&[0]), 16.0 - 0.5 * 8.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct Ensemble<M> {
    members: Vec<M>,
    combination: Combination,
    notes: Notes,
}

impl<M: RewardModel> Ensemble<M> {
    /// An ensemble of `members`, at least one. `Box<dyn RewardModel>` mixes their types.
    ///
    /// # Errors
    /// No member; an invalid combination.
    pub fn new(members: Vec<M>, combination: Combination) -> Result<Self> {
        combination.validate()?;
        if members.is_empty() {
            return Err(CoreError::Empty {
                what: "the ensemble",
                help: "give it at least one member",
            }
            .into());
        }
        Ok(Self {
            members,
            combination,
            notes: Notes::default(),
        })
    }

    /// The members.
    pub fn members(&self) -> &[M] {
        &self.members
    }

    /// How their scores become one.
    pub fn combination(&self) -> Combination {
        self.combination
    }

    /// The combined scores, and how far the members are from one another. No gradients are
    /// recorded.
    ///
    /// # Errors
    /// Those of the members; a score that is not finite; members that do not give one score a
    /// completion.
    pub fn score_with_disagreement(
        &self,
        completions: &Completions,
    ) -> rlhf_core::Result<EnsembleScores> {
        let _no_grad = tch::no_grad_guard();
        let rows = completions.batch.len() as i64;
        let scores = self
            .members
            .iter()
            .map(|member| {
                let scores = member.score(completions)?;
                one_a_completion(&scores, rows)?;
                Ok(scores.to_device(tch::Device::Cpu).to_kind(Kind::Float))
            })
            .collect::<rlhf_core::Result<Vec<_>>>()?;
        EnsembleScores::new(Tensor::f_stack(&scores, 1)?, self.combination)
    }
}

impl<M: RewardModel> RewardModel for Ensemble<M> {
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        self.score_with_disagreement(completions)?
            .noted(&self.notes)
    }

    /// The mean `disagreement`.
    fn take_report(&self) -> Stats {
        self.notes.take()
    }

    fn is_asked_everywhere(&self) -> bool {
        self.members.iter().any(RewardModel::is_asked_everywhere)
    }
}

/// Several heads on one trunk: a scorer with a column for each
/// ([`RewardTrainer::with_heads`](crate::RewardTrainer::with_heads) trains it). It costs what one
/// model does, but its members share what the trunk has learnt, and so disagree less than models
/// that were trained apart.
#[derive(Debug)]
pub struct HeadEnsemble<S> {
    scorer: S,
    combination: Combination,
    notes: Notes,
}

impl<S: Scorer> HeadEnsemble<S> {
    /// An ensemble of all columns of `scorer`.
    ///
    /// # Errors
    /// An invalid combination.
    pub fn new(scorer: S, combination: Combination) -> Result<Self> {
        combination.validate()?;
        Ok(Self {
            scorer,
            combination,
            notes: Notes::default(),
        })
    }

    /// The scorer.
    pub fn scorer(&self) -> &S {
        &self.scorer
    }

    /// The combined scores, and how far the heads are from one another. No gradients are
    /// recorded.
    ///
    /// # Errors
    /// Those of the scorer; a score that is not finite.
    pub fn score_with_disagreement(
        &self,
        completions: &Completions,
    ) -> rlhf_core::Result<EnsembleScores> {
        let _no_grad = tch::no_grad_guard();
        let scores = self.scorer.scores(&completions.batch)?;
        let rows = completions.batch.len() as i64;
        match scores.size().as_slice() {
            [found, heads] if *found == rows && *heads > 0 => {}
            other => {
                return Err(CoreError::model(Error::NotHeads {
                    shape: other.to_vec(),
                    sequences: completions.batch.len(),
                    heads: 1,
                }));
            }
        }
        EnsembleScores::new(scores.to_device(tch::Device::Cpu), self.combination)
    }
}

impl<S: Scorer> RewardModel for HeadEnsemble<S> {
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        self.score_with_disagreement(completions)?
            .noted(&self.notes)
    }

    /// The mean `disagreement`.
    fn take_report(&self) -> Stats {
        self.notes.take()
    }
}

/// Fails unless there is one score for each completion.
pub(crate) fn one_a_completion(scores: &Tensor, rows: i64) -> rlhf_core::Result<()> {
    match scores.size() == [rows] {
        true => Ok(()),
        false => Err(CoreError::ShapeMismatch {
            left: "scores",
            left_shape: scores.size(),
            right: "the completions",
            right_shape: vec![rows],
        }),
    }
}
