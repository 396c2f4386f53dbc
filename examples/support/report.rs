//! The table of a run, and summary.json.

use std::fmt;
use std::time::Duration;

use serde::Serialize;

use super::evaluate::{Evaluation, deviation, mean};
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

    /// Whether the reward rose while the summaries drifted away from the human ones.
    pub fn looks_hacked(&self) -> bool {
        self.reward_after > self.reward_before && self.rouge_l_after < self.rouge_l_before - 1.0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{:<42}{:>9}{:>9}", "", "before", "after")?;
        for (name, before, after, decimals) in [
            ("mean reward", self.reward_before, self.reward_after, 2),
            (
                "above the reference's mean, %",
                100.0 * self.above_before,
                100.0 * self.above_after,
                0,
            ),
            ("KL to the reference, nats a summary", 0.0, self.kl, 2),
            (
                "ROUGE-L to the human summary",
                self.rouge_l_before,
                self.rouge_l_after,
                1,
            ),
            ("length, tokens", self.length_before, self.length_after, 1),
            (
                "finished, %",
                100.0 * self.finished_before,
                100.0 * self.finished_after,
                0,
            ),
        ] {
            writeln!(f, "{name:<42}{before:>9.decimals$}{after:>9.decimals$}")?;
        }
        writeln!(
            f,
            "reward: {:+.2} standard deviations of the reference's; {:.0} s in all",
            (self.reward_after - self.reward_before) / self.reward_std_before,
            self.seconds
        )?;
        if self.looks_hacked() {
            writeln!(
                f,
                "REWARD HACKING: the reward rose but ROUGE-L fell. The reward model likes these \
                 summaries more than people would; raise --kl-coef or lower --steps."
            )?;
        }
        Ok(())
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
