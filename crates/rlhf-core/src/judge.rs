//! Models that judge completions: rewards, constraints, values.

use rayon::prelude::*;
use tch::Tensor;

use crate::{
    Completions, Error, KeptTokens, LogprobOptions, Parameters, Policy, Result, SequenceBatch,
    Stats, Text, TokenLogprobs,
};

/// How good a completion is.
pub trait RewardModel: Send {
    /// One finite number per completion, the greater the better.
    ///
    /// # Shapes
    /// `[B]` f32.
    ///
    /// # Errors
    /// Whatever the model finds wrong, wrapped by [`Error::model`] if it is not an [`Error`].
    fn score(&self, completions: &Completions) -> Result<Tensor>;

    /// What the model has noted about the completions that it has scored since it was last asked:
    /// means of its components by name, the disagreement of its members. Nothing, unless a model
    /// says otherwise.
    fn take_report(&self) -> Stats {
        Stats::new()
    }

    /// Whether each of several processes that train together asks its own, as it must where a model
    /// lies on several of them. Otherwise the first asks for all. The first one's scores count in
    /// any case.
    fn is_asked_everywhere(&self) -> bool {
        true
    }
}

/// How much a completion offends against a rule.
///
/// A trainer compares the cost with a threshold that its configuration holds; what it does with
/// a completion above it is the trainer's affair.
pub trait ConstraintModel: Send {
    /// One finite number per completion, the greater the worse.
    ///
    /// # Shapes
    /// `[B]` f32.
    ///
    /// # Errors
    /// Whatever the model finds wrong, wrapped by [`Error::model`] if it is not an [`Error`].
    fn cost(&self, completions: &Completions) -> Result<Tensor>;

    /// As [`RewardModel::is_asked_everywhere`].
    fn is_asked_everywhere(&self) -> bool {
        true
    }
}

/// The critic: how much reward is still to come.
pub trait ValueModel: Parameters + Send {
    /// Values of the states along each response.
    ///
    /// Column `t < R_i` of row `i` is the value of the state *before* response token `t`, and
    /// column `R_i` that of the state after the last one. Columns past `R_i` may hold anything
    /// finite.
    ///
    /// # Shapes
    /// `[B, R + 1]` f32, with `R` the batch's longest response.
    ///
    /// # Errors
    /// Whatever the model finds wrong, wrapped by [`Error::model`] if it is not an [`Error`].
    fn values(&self, batch: &SequenceBatch) -> Result<Tensor>;

    /// As [`Policy::disable_dropout`].
    fn disable_dropout(&mut self) {}
}

/// A policy with a critic of its own on the same trunk: one forward pass gives both.
///
/// The gradient of the value loss reaches the trunk, as in lm-human-preferences and
/// `AutoModelForCausalLMWithValueHead` of TRL. Its weights are among the policy's
/// [`named_parameters`](Parameters::named_parameters).
pub trait ActorCritic: Policy {
    /// [`Policy::logprobs`], or [`Policy::logprobs_within`] where there are kept sets, and the
    /// values that [`ValueModel::values`] describes.
    ///
    /// # Shapes
    /// `[B, R]` and `[B, R + 1]` f32.
    ///
    /// # Errors
    /// Those of [`Policy::logprobs_within`].
    fn logprobs_and_values(
        &self,
        batch: &SequenceBatch,
        kept: Option<&[KeptTokens]>,
        options: &LogprobOptions,
    ) -> Result<(TokenLogprobs, Tensor)>;

    /// The values alone. `[B, R + 1]` f32.
    ///
    /// # Errors
    /// Those of [`ValueModel::values`].
    fn state_values(&self, batch: &SequenceBatch) -> Result<Tensor>;
}

/// A model whose judgement of sequences is trained: what becomes a reward, cost or label model.
///
/// [`RewardModel`] is the same model in use; `Scorer` is what its trainer needs: weights, and
/// scores through which gradients flow unless the caller has switched them off
/// (`tch::no_grad_guard`).
pub trait Scorer: Parameters + Send {
    /// Scores of every whole sequence, prompt and response together: one number each for a
    /// reward model, one logit per label for a classifier.
    ///
    /// # Shapes
    /// `[B, num_labels]` f32.
    ///
    /// # Errors
    /// Whatever the model finds wrong, wrapped by [`Error::model`] if it is not an [`Error`].
    fn scores(&self, batch: &SequenceBatch) -> Result<Tensor>;
}

impl<M: Scorer + ?Sized> Scorer for Box<M> {
    fn scores(&self, batch: &SequenceBatch) -> Result<Tensor> {
        (**self).scores(batch)
    }
}

impl<M: RewardModel + ?Sized> RewardModel for Box<M> {
    fn score(&self, completions: &Completions) -> Result<Tensor> {
        (**self).score(completions)
    }

    fn take_report(&self) -> Stats {
        (**self).take_report()
    }

    fn is_asked_everywhere(&self) -> bool {
        (**self).is_asked_everywhere()
    }
}

impl<M: ConstraintModel + ?Sized> ConstraintModel for Box<M> {
    fn cost(&self, completions: &Completions) -> Result<Tensor> {
        (**self).cost(completions)
    }

    fn is_asked_everywhere(&self) -> bool {
        (**self).is_asked_everywhere()
    }
}

/// A reward computed by a closure over `(prompt, response)`; see [`reward_fn`].
pub struct RewardFn<F>(F);

/// A constraint computed by a closure over `(prompt, response)`; see [`constraint_fn`].
pub struct ConstraintFn<F>(F);

/// A reward model from a closure over the texts of prompt and response. The completions of a
/// batch are scored in parallel.
///
/// ```
/// use rlhf_core::{Completions, RewardModel, Sequence, SequenceBatch, Text, reward_fn};
///
/// let brevity = reward_fn(|_prompt, response| -(response.len() as f64));
/// let batch = SequenceBatch::new(vec![Sequence::new([1], [2, 3])])?;
/// let text = Text { prompt: "Hello".into(), response: "Hi".into() };
/// let scores = brevity.score(&Completions::written(batch).with_texts(vec![text])?)?;
/// assert_eq!(scores.double_value(&[0]), -2.0);
/// # Ok::<(), rlhf_core::Error>(())
/// ```
pub fn reward_fn<F: Fn(&str, &str) -> f64 + Send + Sync>(f: F) -> RewardFn<F> {
    RewardFn(f)
}

/// A constraint model from a closure over the texts of prompt and response. The completions of a
/// batch are judged in parallel.
pub fn constraint_fn<F: Fn(&str, &str) -> f64 + Send + Sync>(f: F) -> ConstraintFn<F> {
    ConstraintFn(f)
}

impl<F: Fn(&str, &str) -> f64 + Send + Sync> RewardModel for RewardFn<F> {
    fn score(&self, completions: &Completions) -> Result<Tensor> {
        judge_texts("reward", completions.texts()?, &self.0)
    }

    fn is_asked_everywhere(&self) -> bool {
        false
    }
}

impl<F: Fn(&str, &str) -> f64 + Send + Sync> ConstraintModel for ConstraintFn<F> {
    fn cost(&self, completions: &Completions) -> Result<Tensor> {
        judge_texts("cost", completions.texts()?, &self.0)
    }

    fn is_asked_everywhere(&self) -> bool {
        false
    }
}

fn judge_texts(
    what: &'static str,
    texts: &[Text],
    judge: &(impl Fn(&str, &str) -> f64 + Sync),
) -> Result<Tensor> {
    let values: Vec<f64> = texts
        .par_iter()
        .map(|t| judge(&t.prompt, &t.response))
        .collect();
    if let Some(row) = values.iter().position(|v| !v.is_finite()) {
        let value = values[row];
        return Err(Error::NonFinite { what, row, value });
    }
    Ok(Tensor::from_slice(&values).to_kind(tch::Kind::Float))
}
