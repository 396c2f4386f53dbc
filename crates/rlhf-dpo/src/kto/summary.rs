//! What a step has seen of its answers.

use rlhf_core::Stats;
use serde::{Deserialize, Serialize};

use super::examples::ScoredAnswer;

/// How a policy's implicit rewards agree with labels.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct KtoEvaluation {
    /// Mean weighted loss.
    pub loss: f64,
    /// KTO's `z` in nats, where the loss has one.
    pub kl: Option<f64>,
    /// Mean implicit reward of desirable answers; `None` without any.
    pub desirable: Option<f64>,
    /// Mean implicit reward of undesirable answers; `None` without any.
    pub undesirable: Option<f64>,
    /// Probability that a desirable answer's implicit reward is above an undesirable one's, a tie
    /// counting half (the area under the ROC curve); `None` without both kinds.
    pub auc: Option<f64>,
    /// Number of answers.
    pub answers: usize,
}

/// Numbers about answers, on the host.
pub(super) struct Summary<'a> {
    pub(super) answers: &'a [ScoredAnswer],
    pub(super) rewards: &'a [f32],
    pub(super) logprobs: &'a [f32],
}

impl Summary<'_> {
    /// Means over the answers of a kind: there may be none.
    fn mean(&self, values: &[f32], desirable: bool) -> Option<f64> {
        let of_kind = |(a, v): (&ScoredAnswer, &f32)| {
            (a.answer.desirable == desirable).then_some(f64::from(*v))
        };
        let of_kind: Vec<f64> = self
            .answers
            .iter()
            .zip(values)
            .filter_map(of_kind)
            .collect();
        match of_kind.is_empty() {
            true => None,
            false => Some(of_kind.iter().sum::<f64>() / of_kind.len() as f64),
        }
    }

    pub(super) fn rewards(&self) -> [Option<f64>; 2] {
        [true, false].map(|kind| self.mean(self.rewards, kind))
    }

    pub(super) fn add_to(&self, stats: &mut Stats) {
        let rewards = self.rewards();
        let logprobs = [true, false].map(|kind| self.mean(self.logprobs, kind));
        for (name, value) in [
            ("kto/rewards/chosen", rewards[0]),
            ("kto/rewards/rejected", rewards[1]),
            ("kto/logprobs/chosen", logprobs[0]),
            ("kto/logprobs/rejected", logprobs[1]),
        ] {
            if let Some(value) = value {
                stats.insert(name, value);
            }
        }
        if let [Some(chosen), Some(rejected)] = rewards {
            stats.insert("kto/rewards/margin", chosen - rejected);
        }
        let empty = |a: &&ScoredAnswer| a.answer.sequence.response.is_empty();
        let empty = self.answers.iter().filter(empty).count();
        stats.insert("kto/data/empty", empty as f64);
    }

    /// By ranks: the Mann-Whitney statistic.
    pub(super) fn auc(&self) -> Option<f64> {
        let labels = self.answers.iter().map(|a| a.answer.desirable);
        let mut ranked: Vec<(f32, bool)> = self.rewards.iter().copied().zip(labels).collect();
        ranked.sort_by(|a, b| a.0.total_cmp(&b.0));
        let good = ranked.iter().filter(|(_, good)| *good).count() as f64;
        let bad = ranked.len() as f64 - good;
        let mut rank_sum = 0.0;
        let mut before = 0;
        for tied in ranked.chunk_by(|a, b| a.0 == b.0) {
            let rank = before as f64 + (tied.len() + 1) as f64 / 2.0;
            rank_sum += rank * tied.iter().filter(|(_, good)| *good).count() as f64;
            before += tied.len();
        }
        (good > 0.0 && bad > 0.0).then(|| (rank_sum - good * (good + 1.0) / 2.0) / (good * bad))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use rlhf_core::Sequence;

    use super::*;
    use crate::LabelledAnswer;

    fn auc(rewards: &[f32], labels: &[bool]) -> Option<f64> {
        let answer = |desirable: &bool| ScoredAnswer {
            answer: LabelledAnswer::new(Sequence::new([1], [2]), *desirable),
            ref_logprob: 0.0,
        };
        let answers: Vec<_> = labels.iter().map(answer).collect();
        let summary = Summary {
            answers: &answers,
            rewards,
            logprobs: rewards,
        };
        summary.auc()
    }

    #[test]
    fn auc_counts_pairs() {
        // Of the four pairs of one kind each: 3 > 1, 3 > 2, 2 > 1, and a tie.
        let got = auc(&[3.0, 2.0, 1.0, 2.0], &[true, true, false, false]);
        assert_eq!(got, Some(3.5 / 4.0));
        assert_eq!(auc(&[3.0, 2.0], &[true, true]), None);
        assert_eq!(auc(&[1.0, 2.0], &[true, false]), Some(0.0));
    }
}
