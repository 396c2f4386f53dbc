//! A report for a terminal.

use std::fmt;

use super::{Agreement, Bucket, PairReport};

impl fmt::Display for PairReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (low, high) = self.accuracy_interval;
        writeln!(f, "pairs                 {:>9}", self.pairs)?;
        if self.skipped.total() > 0 {
            writeln!(
                f,
                "left out              {:>9}  ({})",
                self.skipped.total(),
                self.skipped
            )?;
        }
        writeln!(
            f,
            "accuracy              {:>9}  (95% interval {} to {})",
            percent(Some(self.accuracy)),
            percent(Some(low)),
            percent(Some(high))
        )?;
        writeln!(f, "mean margin           {:>9.3}", self.mean_margin)?;
        writeln!(
            f,
            "log loss, nats        {:>9.3}  (a coin: 0.693)",
            self.log_loss
        )?;
        writeln!(f, "calibration error     {:>9.3}", self.calibration_error)?;
        buckets(f, "by distance of the scores", &self.by_score_margin)?;
        if !self.by_label_margin.is_empty() {
            buckets(f, "by the labellers' margin", &self.by_label_margin)?;
        }
        buckets(f, "by length", &self.by_length)?;
        buckets(f, "by stated probability (calibration)", &self.calibration)?;
        let length = &self.length;
        writeln!(f, "\nIs longer always better?")?;
        for (name, value) in [
            (
                "people preferred the longer answer",
                length.people_prefer_longer,
            ),
            ("the model does", length.model_prefers_longer),
            (
                "accuracy of the length rule alone",
                Some(length.length_rule_accuracy),
            ),
            (
                "the model's accuracy against that rule",
                length.accuracy_against_rule,
            ),
        ] {
            writeln!(f, "  {name:<44}{:>9}", percent(value))?;
        }
        let correlation = length
            .correlation
            .map_or("-".into(), |c| format!("{c:+.2}"));
        writeln!(
            f,
            "  {:<44}{correlation:>9}",
            "correlation of score and length differences"
        )?;
        writeln!(
            f,
            "  {:<44}{:>9}",
            "mean tokens, chosen / rejected",
            format!("{:.1} / {:.1}", length.mean_chosen, length.mean_rejected)
        )
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let number = |value: Option<f64>| value.map_or("-".into(), |v| format!("{v:.3}"));
        writeln!(
            f,
            "same preference       {:>9}",
            percent(Some(self.same_preference))
        )?;
        writeln!(f, "kappa                 {:>9}", number(self.kappa))?;
        writeln!(f, "correlation (Pearson) {:>9}", number(self.pearson))?;
        write!(f, "correlation (ranks)   {:>9}", number(self.spearman))
    }
}

fn buckets(f: &mut fmt::Formatter<'_>, title: &str, buckets: &[Bucket]) -> fmt::Result {
    writeln!(f, "\n{title:<44}{:>9}{:>11}", "pairs", "accuracy")?;
    for bucket in buckets.iter().filter(|b| b.pairs > 0) {
        let Bucket { name, pairs, .. } = bucket;
        writeln!(f, "  {name:<42}{pairs:>9}{:>11}", percent(bucket.accuracy))?;
    }
    Ok(())
}

fn percent(share: Option<f64>) -> String {
    share.map_or("-".into(), |share| format!("{:.1}%", 100.0 * share))
}
