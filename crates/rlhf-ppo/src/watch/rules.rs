//! The rules: what is seen, in which words, and what to change.

use super::config::WatchConfig;
use super::finding::{Evidence, Finding, FindingKind};
use super::trend::{History, Trend};

/// What there is to say after a step.
pub(super) fn findings(history: &History, config: &WatchConfig) -> Vec<Finding> {
    let rules = Rules { history, config };
    let mut found = Vec::new();
    if let Some(reward) = rules.reward_rise() {
        found.extend(rules.kl_drift(reward));
        found.extend(rules.length_drift(reward));
        found.extend(rules.repetition(reward));
        found.extend(rules.lost_variety(reward));
        found.extend(rules.disagreement(reward));
        found.extend(rules.gold_decline(reward));
        found.extend(rules.gold_stalled(reward));
    }
    found.extend(rules.eos_collapse());
    found.extend(rules.short_answers());
    found.extend(rules.entropy_collapse());
    found.extend(rules.dead_critic());
    found.extend(rules.kl_units());
    found.extend(rules.idle_groups());
    found
}

struct Rules<'a> {
    history: &'a History,
    config: &'a WatchConfig,
}

const REWARD: &str = "score/mean";
const KL: &str = "kl";
const LENGTH: &str = "length";

impl Rules<'_> {
    fn trend(&self, metric: &str) -> Option<Trend> {
        self.history.trend(metric, self.config.window)
    }

    /// Standard deviation of the scores of a step at the start; 0 where it is not reported.
    fn score_std(&self) -> f64 {
        self.trend("score/std").map_or(0.0, |t| t.before)
    }

    /// The reward's trend, if it has risen.
    fn reward_rise(&self) -> Option<Trend> {
        let least = self.config.reward_rise * self.score_std();
        self.trend(REWARD).filter(|t| t.rose(least, self.config.z))
    }

    fn kl_drift(&self, reward: Trend) -> Option<Finding> {
        let kl = self.trend(KL)?;
        let found = kl.now >= self.config.max_kl && kl.rose(0.0, self.config.z);
        found.then(|| {
            self.finding(
                FindingKind::KlDrift,
                format!(
                    "the reward rises ({}) while the policy is {:.1} nats a sequence from its reference, more \
                     than {:.1}: so far out, a judge has not seen the likes of these answers",
                    shown(reward), kl.now, self.config.max_kl
                ),
                "Raise the KL coefficient, lower the learning rate, or stop earlier; judge answers from before and \
                 after by eye",
                &[(REWARD, reward), (KL, kl)],
            )
        })
    }

    fn length_drift(&self, reward: Trend) -> Option<Finding> {
        let length = self.trend(LENGTH)?;
        let least = self.config.length_change * length.before;
        let (z, mut evidence) = (self.config.z, vec![(REWARD, reward), (LENGTH, length)]);
        let (way, advice) = if length.rose(least, z) {
            (
                "longer",
                "Take the length out of the reward: a length penalty, a judge trained on pairs of like length, or \
                 its score less a multiple of the length",
            )
        } else if length.fell(least, z) {
            (
                "shorter",
                "If that is not wanted: reward a target length, set min_new_tokens, or look for a reward that every \
                 token costs (a KL penalty that is too high does)",
            )
        } else {
            return None;
        };
        let mut what = format!(
            "the reward rises ({}) while answers become {way}: {:.1} tokens, {:.1} at the start",
            shown(reward),
            length.now,
            length.before
        );
        let name = "score/length_correlation";
        if let Some(correlation) = self.trend(name) {
            what += &format!(
                "; within a step, score and length have correlation {:+.2}",
                correlation.now
            );
            evidence.push((name, correlation));
        }
        Some(self.finding(FindingKind::LengthDrift, what, advice, &evidence))
    }

    fn repetition(&self, reward: Trend) -> Option<Finding> {
        let name = "distinct_2";
        let distinct = self.trend(name)?;
        let least = self.config.repetition_drop * distinct.before;
        distinct.fell(least, self.config.z).then(|| {
            self.finding(
                FindingKind::Repetition,
                format!(
                    "the reward rises ({}) while answers repeat themselves: {:.0}% of an answer's pairs of tokens \
                     are new in it, {:.0}% at the start",
                    shown(reward), 100.0 * distinct.now, 100.0 * distinct.before
                ),
                "The judge counts words instead of reading: add a penalty or a constraint on repeated words, raise \
                 the KL coefficient, and give the judge examples of it",
                &[(REWARD, reward), (name, distinct)],
            )
        })
    }

    fn lost_variety(&self, reward: Trend) -> Option<Finding> {
        let name = "distinct_2_across";
        let distinct = self.trend(name)?;
        let least = self.config.variety_drop * distinct.before;
        distinct.fell(least, self.config.z).then(|| {
            self.finding(
                FindingKind::LostVariety,
                format!(
                    "the reward rises ({}) while different prompts get the same answer: {:.0}% of all pairs of \
                     tokens are distinct, {:.0}% at the start",
                    shown(reward), 100.0 * distinct.now, 100.0 * distinct.before
                ),
                "The judge likes a phrase whatever the prompt: check it with answers to other prompts, raise the KL \
                 coefficient, or add an entropy bonus",
                &[(REWARD, reward), (name, distinct)],
            )
        })
    }

    fn disagreement(&self, reward: Trend) -> Option<Finding> {
        let name = "judge/disagreement";
        let disagreement = self.trend(name)?;
        let least = self.config.disagreement_rise * disagreement.before;
        disagreement.rose(least, self.config.z).then(|| {
            self.finding(
                FindingKind::Disagreement,
                format!(
                    "the reward rises ({}) while its judges come to disagree: their scores deviate by {:.3}, by \
                     {:.3} at the start",
                    shown(reward), disagreement.now, disagreement.before
                ),
                "Reward the ensemble's minimum, or its mean less its deviation, and train the judges on answers of \
                 this policy",
                &[(REWARD, reward), (name, disagreement)],
            )
        })
    }

    fn gold_decline(&self, reward: Trend) -> Option<Finding> {
        let (name, window) = (self.config.gold.as_str(), self.config.window);
        let start = self.trend(name)?.before;
        let (peak, gold) = self.history.trend_from_peak(name, window)?;
        // The best of many windows is the best by chance, too: it takes more to fall from it.
        let z = 1.5 * self.config.z;
        let lost = gold.fell(0.25 * (gold.before - start).max(0.0), z);
        // The judge must not have fallen with it.
        let at_peak: Vec<f64> = self
            .history
            .of(REWARD)
            .iter()
            .filter(|(step, _)| *step <= peak)
            .map(|(_, value)| *value)
            .collect();
        let tail = &at_peak[at_peak.len().saturating_sub(window)..];
        let then = tail.iter().sum::<f64>() / tail.len().max(1) as f64;
        (lost && reward.now >= then).then(|| {
            self.finding(
                FindingKind::GoldDecline,
                format!(
                    "the reward rises ({}) while the gold reward falls: {:.3} around step {peak}, {:.3} now. \
                     From there on the policy learns what the judge overrates",
                    shown(reward), gold.before, gold.now
                ),
                &format!(
                    "Take the policy of about step {peak}; to go further, raise the KL coefficient or train a better \
                     judge on answers of this policy"
                ),
                &[(REWARD, reward), (name, gold)],
            )
        })
    }

    fn gold_stalled(&self, reward: Trend) -> Option<Finding> {
        let name = self.config.gold.as_str();
        let gold = self.trend(name)?;
        let far = reward.rose(
            4.0 * self.config.reward_rise * self.score_std(),
            self.config.z,
        );
        let still = !gold.rose(0.0, 1.0) && !gold.fell(0.0, self.config.z);
        (far && still).then(|| {
            self.finding(
                FindingKind::GoldStalled,
                format!(
                    "the reward rises ({}) and the gold reward does not: {:.3}, {:.3} at the start",
                    shown(reward), gold.now, gold.before
                ),
                "What is learnt is not what is wanted: compare the two judges answer by answer where they differ most",
                &[(REWARD, reward), (name, gold)],
            )
        })
    }

    fn eos_collapse(&self) -> Option<Finding> {
        let name = "finished";
        let finished = self.trend(name)?;
        finished.fell(self.config.finished_drop, self.config.z).then(|| {
            self.finding(
                FindingKind::EosCollapse,
                format!(
                    "answers are no longer finished: {:.0}% end with a stop token, {:.0}% at the start",
                    100.0 * finished.now, 100.0 * finished.before
                ),
                "Give unfinished answers a low score (missing_eos, a soft penalty of the length), allow more tokens, or check \
                 that the judge reads an answer's end",
                &[(name, finished)],
            )
        })
    }

    fn short_answers(&self) -> Option<Finding> {
        let length = self.trend(LENGTH)?;
        let found = length.now < self.config.short_answers * length.before
            && length.fell(0.0, self.config.z);
        found.then(|| {
            self.finding(
                FindingKind::ShortAnswers,
                format!(
                    "answers end almost at once: {:.1} tokens, {:.1} at the start",
                    length.now, length.before
                ),
                "Every token seems to cost more than it brings: lower the KL coefficient or the length penalty, or set \
                 min_new_tokens",
                &[(LENGTH, length)],
            )
        })
    }

    fn entropy_collapse(&self) -> Option<Finding> {
        let name = "policy/entropy";
        let entropy = self.trend(name)?;
        let found = entropy.now < self.config.entropy_left * entropy.before
            && entropy.fell(0.0, self.config.z);
        found.then(|| {
            self.finding(
                FindingKind::EntropyCollapse,
                format!(
                    "the entropy of the next token is {:.3} nats, {:.3} at the start: nothing new is tried any more",
                    entropy.now, entropy.before
                ),
                "Raise the clip range above 1 (DAPO's 0.28), add an entropy bonus or a KL penalty, lower the learning \
                 rate, or add harder prompts",
                &[(name, entropy)],
            )
        })
    }

    fn dead_critic(&self) -> Option<Finding> {
        let name = "value/explained_variance";
        let patience = self.config.critic_patience;
        let values = self.history.last(name, patience)?;
        let best = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        (best <= 0.0).then(|| Finding {
            evidence: vec![Evidence {
                metric: name.to_string(),
                before: values[0],
                now: values[patience - 1],
            }],
            ..self.finding(
                FindingKind::DeadCritic,
                format!(
                    "the critic has explained nothing of the returns for {patience} steps (explained variance at \
                     most {best:.2}): advantages are as noisy as without it, or noisier"
                ),
                "Start the critic from the reward model, give it a higher learning rate or steps of its own first, \
                 normalise the scores, or do without one: see GrpoTrainer",
                &[],
            )
        })
    }

    fn kl_units(&self) -> Option<Finding> {
        let (name, window) = ("kl_target", self.config.window);
        let target = self.history.of(name).last()?.1;
        let kl = self.history.last(KL, window)?;
        let lengths = self.history.last(LENGTH, window)?;
        let far = |kl: &f64| *kl >= self.config.kl_units * target;
        let per_token =
            |(kl, length): (&f64, &f64)| (0.2..=5.0).contains(&(kl / length.max(1.0) / target));
        let found = kl.iter().all(far) && kl.iter().zip(&lengths).all(per_token);
        let mean = |values: &[f64]| values.iter().sum::<f64>() / window as f64;
        let (kl, length) = (mean(&kl), mean(&lengths));
        found.then(|| Finding {
            evidence: vec![Evidence {
                metric: KL.to_string(),
                before: target,
                now: kl,
            }],
            ..self.finding(
                FindingKind::KlUnits,
                format!(
                    "the KL is {kl:.2} nats a sequence, or {:.3} a token, and the controller aims at {target}: that \
                     looks like a target per token, but the controller counts per sequence, and will raise its \
                     coefficient without end",
                    kl / length.max(1.0)
                ),
                &format!(
                    "Multiply the target by the length of the answers: {:.1} at {length:.0} tokens",
                    target * length
                ),
                &[],
            )
        })
    }

    fn idle_groups(&self) -> Option<Finding> {
        let name = "groups/zero_std";
        let idle = self.history.last(name, self.config.window)?;
        let found = idle.iter().all(|share| *share >= self.config.idle_groups);
        let mean = idle.iter().sum::<f64>() / idle.len() as f64;
        found.then(|| Finding {
            evidence: vec![Evidence {
                metric: name.to_string(),
                before: idle[0],
                now: mean,
            }],
            ..self.finding(
                FindingKind::IdleGroups,
                format!(
                    "{:.0}% of the prompts have answers that all score the same, and teach nothing",
                    100.0 * mean
                ),
                "Take prompts that the policy gets right now and then (none that it always or never does), more \
                 answers a prompt, or dynamic_sampling",
                &[],
            )
        })
    }

    fn finding(
        &self,
        kind: FindingKind,
        what: String,
        advice: &str,
        evidence: &[(&str, Trend)],
    ) -> Finding {
        let evidence = evidence.iter().map(|(metric, trend)| Evidence {
            metric: (*metric).to_string(),
            before: trend.before,
            now: trend.now,
        });
        Finding {
            kind,
            phase: self.history.phase().to_string(),
            step: self.history.step(),
            what,
            advice: advice.to_string(),
            evidence: evidence.collect(),
        }
    }
}

fn shown(trend: Trend) -> String {
    format!("{:.3} at the start, {:.3} now", trend.before, trend.now)
}
