//! What a step has seen of its pairs.

use rlhf_core::{Error as CoreError, Ranks, Stats};
use tch::{Kind, Tensor};

use crate::metrics::means;
use crate::pair_scores::{PairScores, PairTargets};
use crate::shift::RunningMean;
use crate::trainer::weighted_mean;
use crate::{BatchMeans, Error, Objective, Result, ScoredPreference, reward_metrics};

/// Some pairs under the policy, `[B]` each.
pub(crate) struct Judged {
    losses: Tensor,
    weights: Tensor,
    pub(crate) chosen_rewards: Tensor,
    pub(crate) rejected_rewards: Tensor,
    pub(crate) chosen_logprobs: Tensor,
    pub(crate) rejected_logprobs: Tensor,
    chosen_per_token: Tensor,
    rejected_per_token: Tensor,
    drift: Option<Tensor>,
    nll: Option<Tensor>,
    pair_weights: Option<Tensor>,
    /// BCO's mean with these pairs among what was seen, where it is kept.
    pub(crate) shift: Option<RunningMean>,
    /// The shift that was subtracted.
    shifted_by: f64,
}

impl Judged {
    /// Judges pairs that are a batch, or a part of one whose `means` are given. `seen` is BCO's
    /// running mean; `learning` whether these pairs are to join it.
    pub(crate) fn new(
        scores: &PairScores,
        targets: &PairTargets,
        objective: &Objective,
        mut means: BatchMeans,
        (seen, learning): (RunningMean, bool),
    ) -> Result<Self> {
        let detached = scores.detached();
        let ratios = targets
            .reference
            .as_ref()
            .map(|[chosen, rejected]| [&detached.chosen - chosen, &detached.rejected - rejected]);
        let shift = match (&ratios, objective.has_shift() && learning) {
            (Some([chosen, rejected]), true) => {
                let rewards = [chosen * objective.beta, rejected * objective.beta];
                Some(seen.with(&[&rewards[0], &rewards[1]])?)
            }
            _ => None,
        };
        means.reward_shift = shift.unwrap_or(seen).mean;
        let out = scores.judge(targets, objective, means)?;
        let lengths = [&targets.chosen_lengths, &targets.rejected_lengths];
        let [chosen_tokens, rejected_tokens] = lengths.map(|l| l.clamp_min(1));
        Ok(Self {
            losses: out.losses,
            weights: targets.weights.shallow_clone(),
            chosen_rewards: out.chosen_rewards,
            rejected_rewards: out.rejected_rewards,
            chosen_per_token: &detached.chosen / &chosen_tokens,
            rejected_per_token: &detached.rejected / &rejected_tokens,
            chosen_logprobs: detached.chosen,
            rejected_logprobs: detached.rejected,
            drift: ratios.map(|[chosen, _]| chosen / &chosen_tokens),
            nll: out.nll,
            pair_weights: scores.weights().map(Tensor::shallow_clone),
            shift,
            shifted_by: means.reward_shift,
        })
    }

    /// The part of a batch's loss, whose weights add up to `total`, that is these pairs'.
    pub(crate) fn total(&self, total: f64) -> Result<Tensor> {
        weighted_mean(&self.losses, &self.weights, total)
    }

    fn columns(&self) -> [Option<&Tensor>; 11] {
        [
            Some(&self.losses),
            Some(&self.weights),
            Some(&self.chosen_rewards),
            Some(&self.rejected_rewards),
            Some(&self.chosen_logprobs),
            Some(&self.rejected_logprobs),
            Some(&self.chosen_per_token),
            Some(&self.rejected_per_token),
            self.drift.as_ref(),
            self.nll.as_ref(),
            self.pair_weights.as_ref(),
        ]
    }

    fn from_columns(
        columns: [Option<Tensor>; 11],
        shift: Option<RunningMean>,
        shifted_by: f64,
    ) -> Option<Self> {
        let [l, w, cr, rr, cl, rl, ct, rt, drift, nll, pair_weights] = columns;
        Some(Self {
            losses: l?,
            weights: w?,
            chosen_rewards: cr?,
            rejected_rewards: rr?,
            chosen_logprobs: cl?,
            rejected_logprobs: rl?,
            chosen_per_token: ct?,
            rejected_per_token: rt?,
            drift,
            nll,
            pair_weights,
            shift,
            shifted_by,
        })
    }

    pub(crate) fn detached(mut self) -> Self {
        self.losses = self.losses.detach();
        self
    }

    /// The parts of a batch that all processes have, as one.
    pub(crate) fn gathered(parts: &[Self], ranks: &Ranks) -> Result<Self> {
        if ranks.is_one() {
            return Self::cat(parts);
        }
        let own = match parts.is_empty() {
            true => Vec::new(),
            false => {
                let whole = Self::cat(parts)?;
                let columns = whole.columns();
                // Before the columns, which of them there are: a process without pairs cannot know.
                let there = columns.map(|column| column.is_some());
                let there = Tensor::from_slice(&there).view([1, -1]);
                let columns = columns.into_iter().flatten().map(Tensor::shallow_clone);
                std::iter::once(there).chain(columns).collect()
            }
        };
        let mut gathered = ranks.gather_columns::<Error>(Ok(own))?.into_iter();
        let nothing = || CoreError::Empty {
            what: "the batch of comparisons",
            help: "give it at least one pair",
        };
        let there = gathered.next().ok_or_else(nothing)?.get(0);
        let there = Vec::<bool>::try_from(there).map_err(CoreError::from)?;
        let mut columns = [const { None }; 11];
        for (column, there) in columns.iter_mut().zip(there) {
            if there {
                *column = gathered.next();
            }
        }
        // Losses with a shift look at the whole batch, in two passes.
        Ok(Self::from_columns(columns, None, 0.0).ok_or_else(nothing)?)
    }

    /// The parts of a batch as one.
    pub(crate) fn cat(parts: &[Self]) -> Result<Self> {
        let mut columns = [const { None }; 11];
        for (i, column) in columns.iter_mut().enumerate() {
            let of_parts: Vec<_> = parts.iter().filter_map(|p| p.columns()[i]).collect();
            if !of_parts.is_empty() {
                *column = Some(Tensor::f_cat(&of_parts, 0).map_err(CoreError::from)?);
            }
        }
        let last = parts.last();
        let shift = last.and_then(|p| p.shift);
        Self::from_columns(columns, shift, last.map_or(0.0, |p| p.shifted_by)).ok_or_else(|| {
            CoreError::Empty {
                what: "the batch of comparisons",
                help: "give it at least one pair",
            }
            .into()
        })
    }

    /// Adds what [`DpoTrainer::step`](crate::DpoTrainer::step) says of its pairs.
    pub(crate) fn add_to(
        &self,
        stats: &mut Stats,
        prefix: &str,
        pairs: &[ScoredPreference],
    ) -> Result<()> {
        let rewards = reward_metrics(&self.chosen_rewards, &self.rejected_rewards)?;
        let [chosen, rejected, chosen_per_token, rejected_per_token] = means([
            &self.chosen_logprobs,
            &self.rejected_logprobs,
            &self.chosen_per_token,
            &self.rejected_per_token,
        ])?;
        let mut add = |name: &str, value: f64| stats.insert(format!("{prefix}/{name}"), value);
        for (name, value) in [
            ("rewards/chosen", rewards.chosen),
            ("rewards/rejected", rewards.rejected),
            ("rewards/margin", rewards.margin),
            ("rewards/accuracy", rewards.accuracy),
            ("logprobs/chosen", chosen),
            ("logprobs/rejected", rejected),
            ("logprobs/chosen_per_token", chosen_per_token),
            ("logprobs/rejected_per_token", rejected_per_token),
        ] {
            add(name, value);
        }
        let count =
            |what: fn(&ScoredPreference) -> bool| pairs.iter().filter(|p| what(p)).count() as f64;
        add("data/empty", count(has_empty_answer));
        add("data/equal", count(|p| p.pair.chosen == p.pair.rejected));
        for (name, column) in [
            ("logprobs/chosen_drift", &self.drift),
            ("wpo/weight", &self.pair_weights),
        ] {
            if let Some(column) = column {
                add(name, means([column])?[0]);
            }
        }
        if let Some(nll) = &self.nll {
            let total = f64::try_from(self.weights.sum(Kind::Double)).map_err(CoreError::from)?;
            let mean = weighted_mean(nll, &self.weights, total)?;
            add("nll", f64::try_from(mean).map_err(CoreError::from)?);
        }
        if self.shift.is_some() {
            add("bco/shift", self.shifted_by);
        }
        Ok(())
    }
}

fn has_empty_answer(scored: &ScoredPreference) -> bool {
    scored.pair.chosen.is_empty() || scored.pair.rejected.is_empty()
}
