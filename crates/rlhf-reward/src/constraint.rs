//! Constraints made of what this crate trains.

use rlhf_core::{Completions, ConstraintModel, Error as CoreError, RewardModel, Scorer};
use tch::{Kind, Tensor};

use crate::{Error, Result};

/// The probability that a classifier gives to one of its labels, as a cost: toxicity, say, with a
/// threshold of 0.5.
///
/// A classifier with one label has only one to ask for, whose probability is the logistic
/// function of its logit.
#[derive(Debug)]
pub struct LabelProbability<S> {
    classifier: S,
    label: usize,
}

impl<S: Scorer> LabelProbability<S> {
    /// The cost of being `label`, counted from 0.
    pub fn new(classifier: S, label: usize) -> Self {
        Self { classifier, label }
    }
}

impl<S: Scorer> ConstraintModel for LabelProbability<S> {
    /// In `0..=1`. No gradients are recorded.
    fn cost(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let logits = self.classifier.scores(&completions.batch)?;
        let logits = logits.to_kind(Kind::Float);
        let labels = match logits.size().as_slice() {
            [_, labels] => *labels,
            _ => 0,
        };
        if self.label as i64 >= labels {
            return Err(CoreError::model(Error::LabelOutOfRange {
                row: 0,
                label: self.label as i64,
                num_labels: labels,
            }));
        }
        let costs = match labels {
            1 => logits.sigmoid(),
            _ => logits.softmax(-1, Kind::Float),
        };
        finite("cost", costs.select(1, self.label as i64))
    }
}

/// A scorer that a [`CostTrainer`](crate::CostTrainer) has trained: above 0 is unsafe, so 0 is the
/// threshold.
#[derive(Debug)]
pub struct CostModel<S>(pub S);

impl<S: Scorer> ConstraintModel for CostModel<S> {
    /// No gradients are recorded.
    fn cost(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        let _no_grad = tch::no_grad_guard();
        let costs = self.0.scores(&completions.batch)?;
        if costs.size() != [completions.batch.len() as i64, 1] {
            return Err(CoreError::model(Error::NotAReward {
                shape: costs.size(),
                sequences: completions.batch.len(),
                objective: "a cost",
            }));
        }
        finite("cost", costs.to_kind(Kind::Float).squeeze_dim(1))
    }
}

/// A reward as a constraint: what has little reward costs much. The cost is the reward with its
/// sign turned, so "at least 0.5 of the reward" is a threshold of −0.5.
///
/// ```
/// use rlhf_reward::core::{Completions, ConstraintModel, Sequence, SequenceBatch, Text};
/// use rlhf_reward::{CostOf, program, programs::ForbiddenTerms};
///
/// let batch = SequenceBatch::new(vec![Sequence::new([1], [2])])?;
/// let text = Text { prompt: "Hello".into(), response: "Damn, DAMN".into() };
/// let completions = Completions::written(batch).with_texts(vec![text])?;
/// let rude = CostOf(program(ForbiddenTerms::new(["damn"])?)); // with a threshold of 0
/// assert_eq!(rude.cost(&completions)?.double_value(&[0]), 2.0);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct CostOf<M>(pub M);

impl<M: RewardModel> ConstraintModel for CostOf<M> {
    fn cost(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        Ok(-self.0.score(completions)?)
    }

    fn is_asked_everywhere(&self) -> bool {
        self.0.is_asked_everywhere()
    }
}

/// The values, unless one is not finite.
fn finite(what: &'static str, values: Tensor) -> Result<Tensor, CoreError> {
    let rows = Vec::<f32>::try_from(&values.contiguous())?;
    match rows.iter().position(|value| !value.is_finite()) {
        Some(row) => Err(CoreError::NonFinite {
            what,
            row,
            value: rows[row].into(),
        }),
        None => Ok(values),
    }
}
