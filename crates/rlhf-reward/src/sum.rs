//! Weighted sums of rewards.

use std::fmt;

use rlhf_core::{Completions, Error as CoreError, RewardModel, Stats};
use tch::{Device, Kind, Tensor};

use crate::Result;
use crate::ensemble::one_a_completion;
use crate::notes::Notes;
use crate::programs::{TextReward, program};

/// One term of a [`RewardSum`].
pub struct Component {
    name: String,
    model: Box<dyn RewardModel>,
    weight: f64,
    clip: Option<(f64, f64)>,
}

impl Component {
    /// A term that counts once. The name is what it is reported by.
    pub fn new(name: impl Into<String>, model: impl RewardModel + 'static) -> Self {
        Self {
            name: name.into(),
            model: Box::new(model),
            weight: 1.0,
            clip: None,
        }
    }

    /// The same of a program over texts.
    pub fn program(name: impl Into<String>, reward: impl TextReward + 'static) -> Self {
        Self::new(name, program(reward))
    }

    /// How often it counts; may be negative.
    pub fn weighted(mut self, weight: f64) -> Self {
        self.weight = weight;
        self
    }

    /// Bounds that it is held to before it is weighted.
    pub fn clipped(mut self, low: f64, high: f64) -> Self {
        self.clip = Some((low, high));
        self
    }
}

/// A weighted sum of rewards of any kind, each of which is reported by its name.
///
/// ```
/// use rlhf_reward::core::{Completions, RewardModel, Sequence, SequenceBatch, Text};
/// use rlhf_reward::{Component, RewardSum, programs::{Format, LengthTarget, LengthUnit}};
///
/// let sum = RewardSum::new(vec![
///     Component::program("format", Format::whole(r"[A-Z].*\.")?),
///     Component::program("length", LengthTarget::new(4, 1, LengthUnit::Words)?)
///         .weighted(0.5)
///         .clipped(-1.0, 0.0),
/// ])?;
/// let batch = SequenceBatch::new(vec![Sequence::new([1], [2])])?;
/// let text = Text { prompt: "Who?".into(), response: "Nobody at all.".into() };
/// let completions = Completions::written(batch).with_texts(vec![text])?;
/// assert_eq!(sum.score(&completions)?.double_value(&[0]), 1.0);
/// assert_eq!(sum.take_report().get("format"), Some(1.0));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct RewardSum {
    components: Vec<Component>,
    clip: Option<(f64, f64)>,
    notes: Notes,
}

impl RewardSum {
    /// The sum of these terms.
    ///
    /// # Errors
    /// No term; a name twice; a weight that is not finite; bounds that are no interval.
    pub fn new(components: Vec<Component>) -> Result<Self> {
        if components.is_empty() {
            return Err(CoreError::Empty {
                what: "the sum of rewards",
                help: "give it at least one component",
            }
            .into());
        }
        for (i, component) in components.iter().enumerate() {
            let name = &component.name;
            if components[..i].iter().any(|other| other.name == *name) {
                let reason = "two components of a sum have this name";
                return Err(CoreError::config("component.name", name, reason).into());
            }
            if !component.weight.is_finite() {
                let reason = "must be finite";
                return Err(CoreError::config("component.weight", component.weight, reason).into());
            }
            check_bounds(component.clip)?;
        }
        Ok(Self {
            components,
            clip: None,
            notes: Notes::default(),
        })
    }

    /// Bounds that the sum is held to.
    ///
    /// # Errors
    /// Bounds that are no interval.
    pub fn clipped(mut self, low: f64, high: f64) -> Result<Self> {
        self.clip = Some((low, high));
        check_bounds(self.clip)?;
        Ok(self)
    }

    /// Every term by its name, held to its bounds and not yet weighted: `[B]` f32 each, on the
    /// CPU.
    ///
    /// # Errors
    /// Those of the terms; one that does not give one finite score a completion.
    pub fn components(&self, completions: &Completions) -> rlhf_core::Result<Vec<(&str, Tensor)>> {
        let rows = completions.batch.len() as i64;
        self.components
            .iter()
            .map(|component| {
                let scores = component.model.score(completions)?;
                one_a_completion(&scores, rows)?;
                let scores = scores.to_device(Device::Cpu).to_kind(Kind::Float);
                let values = Vec::<f32>::try_from(&scores)?;
                if let Some(row) = values.iter().position(|value| !value.is_finite()) {
                    return Err(CoreError::NonFinite {
                        what: "score",
                        row,
                        value: values[row].into(),
                    });
                }
                Ok((component.name.as_str(), held(scores, component.clip)))
            })
            .collect()
    }
}

impl RewardModel for RewardSum {
    fn score(&self, completions: &Completions) -> rlhf_core::Result<Tensor> {
        let size = [completions.batch.len() as i64];
        let mut sum = Tensor::zeros(size, (Kind::Float, Device::Cpu));
        for ((name, scores), component) in
            self.components(completions)?.iter().zip(&self.components)
        {
            self.notes.add(name, &Vec::<f64>::try_from(scores)?);
            sum += scores * component.weight;
        }
        Ok(held(sum, self.clip))
    }

    /// The mean of each term by its name, before its weight, and what the terms report
    /// themselves (`name/…`).
    fn take_report(&self) -> Stats {
        let mut stats = self.notes.take();
        for component in &self.components {
            let own = component.model.take_report();
            let name = &component.name;
            stats.extend(own.into_iter().map(|(key, v)| (format!("{name}/{key}"), v)));
        }
        stats
    }

    fn is_asked_everywhere(&self) -> bool {
        self.components
            .iter()
            .any(|component| component.model.is_asked_everywhere())
    }
}

impl fmt::Debug for RewardSum {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let terms = self.components.iter().map(|c| (&c.name, c.weight));
        f.debug_map().entries(terms).finish()
    }
}

fn held(scores: Tensor, clip: Option<(f64, f64)>) -> Tensor {
    match clip {
        Some((low, high)) => scores.clamp(low, high),
        None => scores,
    }
}

fn check_bounds(clip: Option<(f64, f64)>) -> Result<()> {
    match clip {
        Some((low, high)) if low.is_nan() || high.is_nan() || low > high => {
            let reason = "the lower bound must not be above the upper one";
            Err(CoreError::config("clip", format!("{low}..={high}"), reason).into())
        }
        _ => Ok(()),
    }
}
