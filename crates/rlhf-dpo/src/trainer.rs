//! Training a policy on comparisons.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Policy, Preference, PreferenceBatch,
    Stats, train_epochs,
};
use rlhf_scale::{UpdateStats, Updater};
use tch::{Kind, Tensor};

use crate::evaluation::Heldout;
use crate::pair_scores::{PairScores, PairTargets};
use crate::shift::RunningMean;
use crate::summary::Judged;
use crate::{
    BatchMeans, DpoConfig, Error, Reference, ReferenceSync, Result, ScoredPreference,
    score_preferences, state,
};

/// Trains a [`Policy`] on comparisons with an [`Objective`](crate::Objective), held to a
/// [`Reference`].
///
/// Weights of the pairs are used, margins are not. [`train`](Self::train) scores the dataset
/// under the reference once; [`step`](Self::step) scores the batch it is given.
pub struct DpoTrainer<P> {
    pub(crate) model: P,
    pub(crate) reference: Reference,
    pub(crate) updater: Updater,
    pub(crate) config: DpoConfig,
    pub(crate) shift: RunningMean,
    pub(crate) heldout: Option<Heldout>,
}

impl<P: Policy> DpoTrainer<P> {
    /// A trainer of `model`. The reference is commonly a copy of it, made before the first step,
    /// or the model with its adapters off; nothing but [`DpoConfig::sync`] changes it.
    ///
    /// # Errors
    /// An invalid configuration; a loss that cannot use the reference or do without one; a weight
    /// that cannot be trained; a reference that cannot be synchronised where it is to be.
    pub fn new(model: P, reference: impl Into<Reference>, config: DpoConfig) -> Result<Self> {
        config.validate()?;
        let reference = reference.into();
        config.objective.check_reference(reference.is_there())?;
        if config.sync.is_some() {
            ReferenceSync::check(&model, reference.model())?;
        }
        Ok(Self {
            updater: Updater::of(&model, &config.update)?,
            model,
            reference,
            config,
            shift: RunningMean::default(),
            heldout: None,
        })
    }

    /// One optimiser step on the weighted mean loss of all pairs.
    ///
    /// The stats are those of the batch before its update, `dpo/` before each:
    ///
    /// | | |
    /// |---|---|
    /// | `loss`, `grad_norm`, `lr` | the norm before clipping; with loss scaling those of [`UpdateStats::metrics`] too |
    /// | `rewards/chosen`, `rewards/rejected` | mean [implicit rewards](crate::DpoOutput::chosen_rewards) |
    /// | `rewards/margin`, `rewards/accuracy` | of chosen over rejected; a tie is no success |
    /// | `logprobs/chosen`, `logprobs/rejected` | means over whole answers (LD-DPO's, where it is on), and `.._per_token` |
    /// | `logprobs/chosen_drift` | mean of `(log π − log π_ref) / n` of the chosen answers, where there is a reference: what [`ChosenWatch`](crate::ChosenWatch) watches |
    /// | `data/empty`, `data/equal` | pairs with an answer without a token, and of equal answers |
    /// | `nll` | of chosen answers a token, where a loss learns them |
    /// | `bco/shift`, `wpo/weight` | where these are on |
    ///
    /// [`UpdateStats::metrics`]: rlhf_scale::UpdateStats::metrics
    ///
    /// # Errors
    /// Those of both models; a loss or gradient that is not finite; weights that do not add up
    /// to a positive number. Nothing has changed then.
    pub fn step(&mut self, batch: &PreferenceBatch) -> Result<Stats> {
        let scored = self.score(batch.pairs(), "step_scored")?;
        self.step_scored(&scored)
    }

    /// [`step`](Self::step) on pairs that the reference has scored already.
    ///
    /// # Errors
    /// Those of [`step`](Self::step).
    pub fn step_scored(&mut self, pairs: &[ScoredPreference]) -> Result<Stats> {
        let total = self
            .config
            .check_weights(pairs.iter().map(|p| p.pair.weight))?;
        let whole = self.config.objective.is_batchwise();
        let replicas = self.updater.replicas();
        let size = replicas.microbatch_size(pairs.len(), self.config.microbatch_size);
        let spread = replicas.size() > 1;
        let (update, judged) = match whole && (spread || pairs.len() > size) {
            true => self.update_in_two_passes(pairs, total, size)?,
            false => self.update_in_one_pass(pairs, total, size)?,
        };
        if !update.skipped {
            if let Some(shift) = judged.shift {
                self.shift = shift;
            }
            self.synchronise()?;
        }
        let mut stats = Stats::from_iter(update.metrics("dpo"));
        judged.add_to(&mut stats, "dpo", pairs)?;
        Ok(stats)
    }

    /// Forward and backward of a microbatch at a time.
    fn update_in_one_pass(
        &mut self,
        pairs: &[ScoredPreference],
        total: f64,
        size: usize,
    ) -> Result<(UpdateStats, Judged)> {
        let parts: Vec<_> = pairs.chunks(size).collect();
        let means = means_of(pairs, total);
        let (model, objective) = (&self.model, &self.config.objective);
        let (referenced, shift) = (self.reference.is_there(), self.shift);
        let mut judged = Vec::with_capacity(parts.len());
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let scores = PairScores::of(model, parts[i], objective)?;
            let targets = PairTargets::new(parts[i], referenced, scores.chosen.device());
            let part = Judged::new(&scores, &targets, objective, means, (shift, true))?;
            let loss = part.total(total)?;
            judged.push(part.detached());
            Ok(loss)
        })?;
        let judged = Judged::gathered(&judged, &self.updater.ranks())?;
        Ok((update, judged))
    }

    /// For losses that need the whole batch at once: its log-probabilities first, without
    /// gradients, the loss and its slope in each of them, and then the gradients along the slopes,
    /// a microbatch at a time. The sum is the gradient of the loss of the whole batch.
    fn update_in_two_passes(
        &mut self,
        pairs: &[ScoredPreference],
        total: f64,
        size: usize,
    ) -> Result<(UpdateStats, Judged)> {
        let leaves = PairScores::leaves(&self.scores_without_gradients(pairs)?)?;
        let device = leaves.chosen.device();
        let targets = PairTargets::new(pairs, self.reference.is_there(), device);
        let objective = &self.config.objective;
        let means = means_of(pairs, total);
        let seen = (self.shift, true);
        let judged = Judged::new(&leaves, &targets, objective, means, seen)?;
        let loss = judged.total(total)?;
        loss.f_backward().map_err(CoreError::from)?;
        let slopes = leaves.slopes();

        let parts: Vec<_> = pairs.chunks(size).collect();
        let share = loss.detach() / parts.len() as f64;
        let model = &self.model;
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let scores = PairScores::of(model, parts[i], objective)?;
            let along = scores.along(&slopes, (i * size) as i64)?;
            // The parts' values add up to the loss.
            Ok(&along - along.detach() + &share)
        })?;
        Ok((update, judged.detached()))
    }

    pub(crate) fn scores_without_gradients(
        &self,
        pairs: &[ScoredPreference],
    ) -> Result<Vec<PairScores>> {
        let _no_grad = tch::no_grad_guard();
        pairs
            .chunks(self.config.microbatch_size)
            .map(|part| PairScores::of(&self.model, part, &self.config.objective))
            .collect()
    }

    fn synchronise(&self) -> Result<()> {
        match (&self.config.sync, self.reference.model()) {
            (Some(sync), Some(reference)) if self.updater.step().is_multiple_of(sync.every) => {
                sync.apply(&self.model, reference)
            }
            _ => Ok(()),
        }
    }

    /// Epochs over `pairs`; see [`train_epochs`] for order, checkpoints, resumption and
    /// observers. Returns the steps done. The pairs are scored once, unless the reference follows
    /// the policy.
    ///
    /// # Errors
    /// Those of [`train_epochs`] and [`step`](Self::step).
    pub fn train(
        &mut self,
        pairs: &[Preference],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        if self.config.sync.is_some() {
            return train_epochs(&mut Live(self), pairs, epochs, observers);
        }
        let scored = self.score(pairs, "train_scored")?;
        self.train_scored(&scored, epochs, observers)
    }

    /// [`train`](Self::train) on pairs that the reference has scored already.
    ///
    /// # Errors
    /// Those of [`train`](Self::train); [`Error::Unusable`] where the reference follows the
    /// policy, so that its scores would be out of date.
    pub fn train_scored(
        &mut self,
        pairs: &[ScoredPreference],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        if self.config.sync.is_some() {
            return Err(Error::Unusable {
                loss: "TR-DPO".into(),
                option: "reference (scored in advance)",
                reason: "the reference follows the policy, and its scores change with it; call \
                         train",
            });
        }
        train_epochs(self, pairs, epochs, observers)
    }

    /// The model in training.
    pub fn model(&self) -> &P {
        &self.model
    }

    /// The model, trained.
    pub fn into_model(self) -> P {
        self.model
    }

    /// What the model is held to.
    pub fn reference(&self) -> &Reference {
        &self.reference
    }

    /// The options this trainer was made with.
    pub fn config(&self) -> &DpoConfig {
        &self.config
    }

    /// The update path: its learning rate, loss scale and averaged weights.
    pub fn updater(&self) -> &Updater {
        &self.updater
    }

    /// Writes weights, optimiser state, step and BCO's running mean into the folder `dir`; the
    /// reference too where it follows the policy, and not where it never changes.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn save(&self, dir: &Path) -> Result<()> {
        self.updater.save(dir)?;
        state::save(dir, self.shift, self.followed().as_deref())
    }

    /// Restores bit for bit what [`save`](Self::save) wrote.
    ///
    /// # Errors
    /// A missing or damaged file; a file of another model or configuration. Nothing has changed
    /// then.
    pub fn load(&mut self, dir: &Path) -> Result<()> {
        let loaded = state::load(dir, self.followed().as_deref())?;
        self.updater.load(dir)?;
        self.shift = loaded.apply()?;
        Ok(())
    }

    /// The weights of a reference that changes.
    fn followed(&self) -> Option<Vec<(String, Tensor)>> {
        let reference = self.config.sync.and(self.reference.model());
        reference.map(|model| model.named_parameters())
    }

    /// The reference's view of `pairs`; `instead` is the method for those that have it.
    pub(crate) fn score(
        &self,
        pairs: &[Preference],
        instead: &'static str,
    ) -> Result<Vec<ScoredPreference>> {
        match &self.reference {
            Reference::Model(model) => {
                score_preferences(model, pairs, &self.config.score_options())
            }
            Reference::Scored => Err(Error::NotScored { instead }),
            Reference::Free => {
                PreferenceBatch::new(pairs.to_vec())?;
                Ok(pairs.iter().map(ScoredPreference::free).collect())
            }
        }
    }

    fn step_and_evaluate(&mut self, pairs: &[ScoredPreference]) -> Result<Stats> {
        let mut stats = self.step_scored(pairs)?;
        self.add_heldout(&mut stats)?;
        Ok(stats)
    }
}

impl<P: Policy> EpochTrainer for DpoTrainer<P> {
    type Item = ScoredPreference;
    type Error = Error;
    const PHASE: &'static str = "dpo";

    fn step_on(&mut self, items: Vec<ScoredPreference>) -> Result<Stats> {
        self.step_and_evaluate(&items)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

/// A trainer whose reference scores each batch when its turn comes.
struct Live<'a, P>(&'a mut DpoTrainer<P>);

impl<P: Policy> EpochTrainer for Live<'_, P> {
    type Item = Preference;
    type Error = Error;
    const PHASE: &'static str = "dpo";

    fn step_on(&mut self, items: Vec<Preference>) -> Result<Stats> {
        let scored = self.0.score(&items, "train_scored")?;
        self.0.step_and_evaluate(&scored)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.0.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.0.load(dir)
    }
}

/// Means over a batch, whose weights add up to `total`.
pub(crate) fn means_of(pairs: &[ScoredPreference], total: f64) -> BatchMeans {
    let mean = |tokens: fn(&Preference) -> usize| {
        let weighted = pairs.iter().map(|p| p.pair.weight * tokens(&p.pair) as f64);
        weighted.sum::<f64>() / total
    };
    let chosen_tokens = mean(|pair| pair.chosen.len());
    BatchMeans {
        chosen_tokens,
        prompt_and_chosen_tokens: chosen_tokens + mean(|pair| pair.prompt.len().saturating_sub(1)),
        reward_shift: 0.0,
    }
}

/// `Σ weight · value / total`, in f32.
pub(crate) fn weighted_mean(values: &Tensor, weights: &Tensor, total: f64) -> Result<Tensor> {
    let sum = (values * weights).f_sum(Kind::Float);
    Ok(sum.map_err(CoreError::from)? / total)
}
