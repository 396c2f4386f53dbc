//! The best of several responses.

use std::sync::Arc;

use tch::{Device, Kind};

use super::Generator;
use crate::rng::RngStreams;
use crate::{Completions, Error, Policy, Result, RewardModel};

/// Responses of which a reward model has chosen the best.
#[derive(Debug, Clone)]
pub struct BestOfN {
    /// The best response to each prompt, in the order of the prompts.
    pub best: Completions,
    /// Their scores.
    pub best_scores: Vec<f64>,
    /// All responses, `n` to a prompt.
    pub all: Completions,
    /// Their scores.
    pub scores: Vec<f64>,
}

impl<P: Policy + ?Sized> Generator<'_, P> {
    /// Samples `n` responses to each prompt, from one prefill of it, and keeps the one that
    /// `reward` scores highest, the earliest where several do (Stiennon et al. 2020, arXiv
    /// 2009.01325, section 4.4). `samples_per_prompt` of the configuration plays no part.
    ///
    /// Reward models that read texts need a detokenizer here.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] for `n` 0, those of [`generate`](Self::generate), the reward
    /// model's own, [`Error::ShapeMismatch`] unless it gives one score a response, and
    /// [`Error::NonFinite`] for a score that is not finite.
    pub fn best_of_n(
        &self,
        prompts: &[Arc<[i64]>],
        n: usize,
        reward: &(impl RewardModel + ?Sized),
        rng: &RngStreams,
        first_index: u64,
    ) -> Result<BestOfN> {
        if n == 0 {
            return Err(Error::config("best_of_n.n", n, "at least 1 is needed"));
        }
        let all = self.write(prompts, n, rng, first_index)?;
        let scores = {
            let _no_grad = tch::no_grad_guard();
            reward.score(&all)?
        };
        if scores.size() != [all.batch.len() as i64] {
            return Err(Error::ShapeMismatch {
                left: "scores",
                left_shape: scores.size(),
                right: "the completions [B]",
                right_shape: vec![all.batch.len() as i64],
            });
        }
        let scores = scores.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double)?;
        let scores = Vec::<f64>::try_from(scores)?;
        if let Some(row) = scores.iter().position(|score| !score.is_finite()) {
            let (what, value) = ("score", scores[row]);
            return Err(Error::NonFinite { what, row, value });
        }
        let best: Vec<usize> = (0..prompts.len())
            .map(|prompt| {
                let rows = prompt * n..(prompt + 1) * n;
                rows.rev().fold((prompt + 1) * n - 1, |best, row| {
                    if scores[row] >= scores[best] {
                        row
                    } else {
                        best
                    }
                })
            })
            .collect();
        Ok(BestOfN {
            best: all.select(&best)?,
            best_scores: best.iter().map(|&row| scores[row]).collect(),
            all,
            scores,
        })
    }
}
