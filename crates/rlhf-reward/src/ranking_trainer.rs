//! Training a scorer on rankings.

use std::path::Path;

use rlhf_core::{
    EpochConfig, EpochTrainer, Error as CoreError, Observer, Scorer, Stats, train_epochs,
};
use rlhf_scale::{UpdateConfig, Updater};
use serde::{Deserialize, Serialize};
use tch::{Kind, Tensor};

use crate::access::trainer_access;
use crate::pair_scores::{floats, nothing_scored};
use crate::trainer::check_microbatch_size;
use crate::{
    Error, PairwiseInputs, PairwiseTerms, RankedRows, Ranking, RankingBatch, Result, RewardConfig,
    pairwise_loss, pairwise_metrics,
};

/// How a [`RankingTrainer`] trains.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RankingConfig {
    /// Optimiser, schedule and clipping.
    pub update: UpdateConfig,
    /// Label smoothing and centring.
    pub terms: PairwiseTerms,
    /// Prompts whose answers are in memory at once. The result of a step does not depend on it,
    /// but for rounding.
    pub microbatch_size: usize,
}

impl Default for RankingConfig {
    /// The optimiser of [`RewardConfig`]; two prompts at once, since each has several answers.
    fn default() -> Self {
        Self {
            update: RewardConfig::default().update,
            terms: PairwiseTerms::default(),
            microbatch_size: 2,
        }
    }
}

impl RankingConfig {
    /// Checks every field.
    ///
    /// # Errors
    /// An invalid configuration, naming the field.
    pub fn validate(&self) -> Result<()> {
        self.update.validate()?;
        self.terms.validate()?;
        check_microbatch_size(self.microbatch_size)
    }
}

/// The loss of rankings (Ouyang et al. 2022, equation 1): the mean over prompts of the mean over
/// the `K(K − 1)/2` comparisons of a prompt's `K` answers of [`pairwise_loss`].
///
/// `denominator` is the sum of the rankings' weights of the whole batch
/// ([`RankingBatch::total_weight`]), so that the losses of its microbatches add up to its mean.
///
/// # Shapes
/// `scores`: `[S]` f32, one an answer. Returns a scalar.
///
/// # Errors
/// Those of [`pairwise_loss`]; libtorch's, for a row that `scores` does not have.
pub fn ranking_loss(
    scores: &Tensor,
    rows: &RankedRows,
    terms: PairwiseTerms,
    denominator: f64,
) -> Result<Tensor> {
    let (better, worse) = sides(scores, rows)?;
    let inputs = PairwiseInputs {
        chosen: &better,
        rejected: &worse,
        margins: None,
        weights: Some(&floats(rows.weights.iter().copied(), scores.device())),
    };
    Ok(pairwise_loss(inputs, terms, denominator)?.loss)
}

/// Scores of the better and of the worse answers of all comparisons.
fn sides(scores: &Tensor, rows: &RankedRows) -> Result<(Tensor, Tensor)> {
    let pick = |rows: &[i64]| {
        let rows = Tensor::from_slice(rows).to_device(scores.device());
        scores.f_index_select(0, &rows).map_err(CoreError::from)
    };
    Ok((pick(&rows.better)?, pick(&rows.worse)?))
}

/// Trains a [`Scorer`] on rankings ([`ranking_loss`]).
///
/// All answers to a prompt are in one batch, and share their prompt. That is both cheaper and
/// better than shuffling the comparisons: each answer is seen once an epoch, not `K − 1` times,
/// and so is not overfitted (Ouyang et al. 2022, section 3.5).
#[derive(Debug)]
pub struct RankingTrainer<S> {
    model: S,
    updater: Updater,
    config: RankingConfig,
}

/// How well a scorer agrees with rankings.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct RankingEvaluation {
    /// Mean of the loss that is trained on.
    pub loss: f64,
    /// Share of comparisons whose better answer scores strictly higher.
    pub accuracy: f64,
    /// Number of comparisons.
    pub comparisons: usize,
    /// Pairs that were not compared, because their answers are equal or one is empty.
    pub skipped: usize,
}

impl<S: Scorer> RankingTrainer<S> {
    /// A trainer of `model`.
    ///
    /// # Errors
    /// An invalid configuration; a weight that cannot be trained.
    pub fn new(model: S, config: RankingConfig) -> Result<Self> {
        config.validate()?;
        Ok(Self {
            updater: Updater::of(&model, &config.update)?,
            model,
            config,
        })
    }

    /// One optimiser step on the weighted mean loss of all rankings.
    ///
    /// The stats are those of the batch before its update: `ranking/loss`, `ranking/accuracy`
    /// and `ranking/mean_margin` (over all comparisons), `ranking/skipped` (pairs not compared),
    /// `ranking/grad_norm` (before clipping), `ranking/lr`; with loss scaling those of
    /// [`UpdateStats::metrics`](rlhf_scale::UpdateStats::metrics) too.
    ///
    /// # Errors
    /// Those of the model; a loss or gradient that is not finite; weights that add up to 0.
    /// Nothing has changed then.
    pub fn step(&mut self, batch: &RankingBatch) -> Result<Stats> {
        let (model, terms) = (&self.model, self.config.terms);
        let (replicas, ranks) = (self.updater.replicas().clone(), self.updater.ranks());
        let size = replicas.microbatch_size(batch.len(), self.config.microbatch_size);
        let parts = batch.split(size)?;
        let denominator = batch.total_weight();
        let (mut better, mut worse) = (Vec::new(), Vec::new());
        let update = self.updater.update(parts.len(), |i| -> Result<Tensor> {
            let (scores, rows) = (answer_scores(model, &parts[i])?, parts[i].rows());
            let loss = ranking_loss(&scores, &rows, terms, denominator)?;
            let (above, below) = sides(&scores.detach(), &rows)?;
            better.push(above);
            worse.push(below);
            Ok(loss)
        })?;
        let own = match better.is_empty() {
            true => Vec::new(),
            false => vec![Tensor::cat(&better, 0), Tensor::cat(&worse, 0)],
        };
        let [better, worse] = <[Tensor; 2]>::try_from(ranks.gather_columns::<Error>(Ok(own))?)
            .map_err(|_| nothing_scored())?;
        let metrics = pairwise_metrics(&better, &worse)?;
        let mut stats = Stats::from_iter(update.metrics("ranking"));
        stats.extend([
            ("ranking/accuracy", metrics.accuracy),
            ("ranking/mean_margin", metrics.mean_margin),
            ("ranking/skipped", batch.skipped_pairs() as f64),
        ]);
        Ok(stats)
    }

    /// Epochs over `rankings`; see [`train_epochs`] for order, checkpoints, resumption and
    /// observers. Returns the steps done.
    ///
    /// # Errors
    /// Those of [`train_epochs`] and [`step`](Self::step).
    pub fn train(
        &mut self,
        rankings: &[Ranking],
        epochs: &EpochConfig,
        observers: &mut [Box<dyn Observer + '_>],
    ) -> Result<u64> {
        train_epochs(self, rankings, epochs, observers)
    }

    /// Loss and accuracy on `rankings`.
    ///
    /// # Errors
    /// No rankings; a score that is not finite; those of the model.
    pub fn evaluate(&self, rankings: &[Ranking]) -> Result<RankingEvaluation> {
        let _no_grad = tch::no_grad_guard();
        let batch = RankingBatch::new(rankings.to_vec())?;
        let parts = batch.split(self.config.microbatch_size)?;
        let scores = parts
            .iter()
            .map(|part| answer_scores(&self.model, part))
            .collect::<Result<Vec<_>>>()?;
        let (scores, rows) = (Tensor::cat(&scores, 0), batch.rows());
        check_finite(&scores)?;
        let loss = ranking_loss(&scores, &rows, self.config.terms, batch.total_weight())?;
        let (better, worse) = sides(&scores, &rows)?;
        Ok(RankingEvaluation {
            loss: f64::try_from(loss).map_err(CoreError::from)?,
            accuracy: pairwise_metrics(&better, &worse)?.accuracy,
            comparisons: rows.better.len(),
            skipped: batch.skipped_pairs(),
        })
    }
}

trainer_access!(RankingTrainer, RankingConfig);

impl<S: Scorer> EpochTrainer for RankingTrainer<S> {
    type Item = Ranking;
    type Error = Error;
    const PHASE: &'static str = "ranking";

    fn step_on(&mut self, items: Vec<Ranking>) -> Result<Stats> {
        self.step(&RankingBatch::new(items)?)
    }

    fn save_to(&self, dir: &Path) -> Result<()> {
        self.save(dir)
    }

    fn load_from(&mut self, dir: &Path) -> Result<()> {
        self.load(dir)
    }
}

/// `[S]` f32: the scores of all answers.
fn answer_scores(model: &impl Scorer, batch: &RankingBatch) -> Result<Tensor> {
    let sequences = batch.sequences()?;
    let scores = model.scores(&sequences)?;
    if scores.size() != [sequences.len() as i64, 1] {
        return Err(Error::NotAReward {
            shape: scores.size(),
            sequences: sequences.len(),
            objective: "a ranking",
        });
    }
    Ok(scores.to_kind(Kind::Float).squeeze_dim(1))
}

/// Fails for the first of `[S]` scores that is not finite.
pub(crate) fn check_finite(scores: &Tensor) -> Result<()> {
    let values = Vec::<f64>::try_from(scores.to_kind(Kind::Double)).map_err(CoreError::from)?;
    match values.iter().position(|score| !score.is_finite()) {
        Some(row) => Err(CoreError::NonFinite {
            what: "score",
            row,
            value: values[row],
        }
        .into()),
        None => Ok(()),
    }
}
