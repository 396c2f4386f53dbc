//! The table of a run, and summary.json.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::evaluate::{Evaluation, deviation, mean};
use super::table::table;
use super::task::Pair;

/// Before and after, in numbers.
#[derive(Debug, Serialize)]
pub struct Report {
    pub reward_before: f64,
    pub reward_after: f64,
    /// Standard deviation of the reference's scores.
    pub reward_std_before: f64,
    /// Share of the summaries that score above the reference's mean.
    pub above_before: f64,
    pub above_after: f64,
    /// Nats a summary.
    pub kl: f64,
    pub rouge_l_before: f64,
    pub rouge_l_after: f64,
    pub length_before: f64,
    pub length_after: f64,
    pub finished_before: f64,
    pub finished_after: f64,
    /// Share of held-out comparisons that the reward model gets right.
    pub rm_accuracy: f64,
    pub seconds: f64,
}

impl Report {
    pub fn new(before: &Evaluation, after: &Evaluation, rm_accuracy: f64, time: Duration) -> Self {
        let bar = mean(&before.scores);
        let above = |scores: &[f64]| {
            scores.iter().filter(|s| **s > bar).count() as f64 / scores.len() as f64
        };
        Self {
            reward_before: bar,
            reward_after: mean(&after.scores),
            reward_std_before: deviation(&before.scores),
            above_before: above(&before.scores),
            above_after: above(&after.scores),
            kl: mean(&after.kl),
            rouge_l_before: mean(&before.rouge_l),
            rouge_l_after: mean(&after.rouge_l),
            length_before: mean(&before.lengths),
            length_after: mean(&after.lengths),
            finished_before: mean(&before.finished),
            finished_after: mean(&after.finished),
            rm_accuracy,
            seconds: time.as_secs_f64(),
        }
    }

    /// What held-out texts say of whether the reward was hacked: it rises while the summaries drift
    /// away from the human ones.
    pub fn verdict(&self) -> String {
        let (before, after) = (self.rouge_l_before, self.rouge_l_after);
        let rouge = format!("ROUGE-L to the human summary went from {before:.1} to {after:.1}");
        if self.reward_after <= self.reward_before {
            return format!("the reward did not rise; {rouge}");
        }
        match after < before - ROUGE_TOLERANCE {
            true => format!(
                "REWARD HACKING: the reward rose, but {rouge}. The reward model likes these \
                 summaries more than people would; raise --kl-coef or lower --steps"
            ),
            false => format!("no sign of it: the reward rose, and {rouge}"),
        }
    }
}

/// ROUGE-L that the samples of some hundred texts may lose by chance.
const ROUGE_TOLERANCE: f64 = 1.0;

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let percent = |share: f64| 100.0 * share;
        let rows = [
            ("mean reward", 2, [self.reward_before, self.reward_after]),
            (
                "above the reference's mean, %",
                0,
                [percent(self.above_before), percent(self.above_after)],
            ),
            ("KL to the reference, nats a summary", 2, [0.0, self.kl]),
            (
                "ROUGE-L to the human summary",
                1,
                [self.rouge_l_before, self.rouge_l_after],
            ),
            ("length, tokens", 1, [self.length_before, self.length_after]),
            (
                "finished, %",
                0,
                [percent(self.finished_before), percent(self.finished_after)],
            ),
        ];
        writeln!(f, "{}", table(["before", "after"], &rows)?)?;
        writeln!(
            f,
            "reward: {:+.2} standard deviations of the reference's; {:.0} s in all",
            (self.reward_after - self.reward_before) / self.reward_std_before,
            self.seconds
        )
    }
}

/// Prints the first few texts with the human summary and the model's.
pub fn print_examples(pairs: &[Pair], before: &Evaluation, after: &Evaluation, count: usize) {
    for (i, pair) in pairs.iter().enumerate().take(count) {
        let text: String = pair.text.chars().take(100).collect();
        println!("text:   {text}…");
        println!("human:  {}", pair.summary);
        println!("before: {} ({:+.2})", before.summaries[i], before.scores[i]);
        println!("after:  {} ({:+.2})\n", after.summaries[i], after.scores[i]);
    }
}
