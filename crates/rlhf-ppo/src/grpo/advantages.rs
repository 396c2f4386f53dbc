//! Advantages from the rewards of several answers to each prompt.

use rlhf_core::{Error, Result};

use super::choices::{AdvantageScale, Baseline};

/// Added to a deviation before it divides, as in TRL.
pub const STD_EPSILON: f64 = 1e-4;

/// What [`group_advantages`] reads: one number for each answer, the answers to one prompt being
/// neighbours.
#[derive(Debug, Clone, Copy)]
pub struct GroupAdvantagesInput<'a> {
    /// Rewards.
    pub rewards: &'a [f64],
    /// Which answers count. The others are in no mean and no deviation, and have advantage 0;
    /// their rewards may be anything.
    pub counted: &'a [bool],
    /// Answers to each prompt, `G`.
    pub group_size: usize,
    /// What a reward is compared with.
    pub baseline: Baseline,
    /// What the difference is divided by.
    pub scale: AdvantageScale,
}

/// What [`group_advantages`] returns.
#[derive(Debug, Clone, PartialEq)]
pub struct GroupAdvantages {
    /// One for each answer.
    pub advantages: Vec<f64>,
    /// Unbiased deviation of each group's rewards; 0 where fewer than two answers count.
    pub group_std: Vec<f64>,
}

/// `A = (r − baseline) / scale` of each answer.
///
/// A group with fewer than two answers that count says nothing: its advantages are 0. So are
/// those of a group whose rewards are all the same, unless advantages are whitened.
///
/// # Errors
/// [`Error::LengthMismatch`] unless there are whole groups and one flag for each reward;
/// [`Error::InvalidConfig`] if `group_size` is 0.
pub fn group_advantages(input: &GroupAdvantagesInput<'_>) -> Result<GroupAdvantages> {
    let GroupAdvantagesInput {
        rewards,
        counted,
        group_size,
        ..
    } = *input;
    check_groups(rewards.len(), counted, group_size)?;
    let groups = rewards.chunks(group_size).zip(counted.chunks(group_size));
    let mut advantages = Vec::with_capacity(rewards.len());
    let mut group_std = Vec::new();
    for (rewards, counted) in groups {
        let Moments { n, mean, std } = Moments::of(rewards, counted);
        // Leave-one-out: r − (n·mean − r)/(n − 1) = (r − mean)·n/(n − 1).
        let factor = match input.baseline {
            _ if n < 2.0 => 0.0,
            Baseline::GroupMean => 1.0,
            Baseline::LeaveOneOut => n / (n - 1.0),
        };
        let divisor = match input.scale {
            AdvantageScale::Group => std + STD_EPSILON,
            _ => 1.0,
        };
        advantages.extend(
            rewards
                .iter()
                .zip(counted)
                .map(|(r, counted)| match counted {
                    true => (r - mean) * factor / divisor,
                    false => 0.0,
                }),
        );
        group_std.push(std);
    }
    match input.scale {
        AdvantageScale::Batch => {
            let divisor = Moments::of(rewards, counted).std + STD_EPSILON;
            advantages.iter_mut().for_each(|a| *a /= divisor);
        }
        AdvantageScale::Whitened => advantages = whitened(&advantages, counted),
        AdvantageScale::Group | AdvantageScale::None => {}
    }
    Ok(GroupAdvantages {
        advantages,
        group_std,
    })
}

/// Mean and unbiased deviation of what counts.
struct Moments {
    n: f64,
    mean: f64,
    std: f64,
}

impl Moments {
    fn of(values: &[f64], counted: &[bool]) -> Self {
        let counted = || {
            values
                .iter()
                .zip(counted)
                .filter(|(_, c)| **c)
                .map(|(v, _)| *v)
        };
        let n = counted().count() as f64;
        let mean = counted().sum::<f64>() / n.max(1.0);
        let squares: f64 = counted().map(|v| (v - mean).powi(2)).sum();
        // Equal rewards have no deviation, whatever their mean was rounded to.
        let equal = counted().all(|v| counted().next() == Some(v));
        let std = match n >= 2.0 && !equal {
            true => (squares / (n - 1.0)).sqrt(),
            false => 0.0,
        };
        let mean = match equal {
            true => counted().next().unwrap_or(0.0),
            false => mean,
        };
        Self { n, mean, std }
    }
}

/// `(x − mean) / (std + ε)` of what counts, 0 of the rest, and of one that counts alone.
pub(crate) fn whitened(values: &[f64], counted: &[bool]) -> Vec<f64> {
    let Moments { mean, std, .. } = Moments::of(values, counted);
    let scaled = |(v, counted): (&f64, &bool)| match counted {
        true => (v - mean) / (std + STD_EPSILON),
        false => 0.0,
    };
    values.iter().zip(counted).map(scaled).collect()
}

pub(crate) fn check_groups(answers: usize, counted: &[bool], group_size: usize) -> Result<()> {
    if group_size == 0 {
        return Err(Error::config("group_size", 0, "at least 1 is needed"));
    }
    let (right, right_len) = match counted.len() == answers {
        true if answers.is_multiple_of(group_size) => return Ok(()),
        true => (
            "so many whole groups",
            answers.div_ceil(group_size) * group_size,
        ),
        false => ("the flags that say which count", counted.len()),
    };
    Err(Error::LengthMismatch {
        left: "the rewards",
        left_len: answers,
        right,
        right_len,
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn advantages(
        rewards: &[f64],
        counted: &[bool],
        baseline: Baseline,
        scale: AdvantageScale,
    ) -> Vec<f64> {
        let input = GroupAdvantagesInput {
            rewards,
            counted,
            group_size: 2,
            baseline,
            scale,
        };
        group_advantages(&input).unwrap().advantages
    }

    fn close(got: &[f64], want: &[f64]) {
        assert_eq!(got.len(), want.len());
        assert!(
            got.iter().zip(want).all(|(g, w)| (g - w).abs() < 1e-12),
            "{got:?} is not {want:?}"
        );
    }

    #[test]
    fn by_hand() {
        let (rewards, all) = ([1.0, 3.0, 5.0, 5.0], [true; 4]);
        let of = |baseline, scale| advantages(&rewards, &all, baseline, scale);
        let (mean, out) = (Baseline::GroupMean, Baseline::LeaveOneOut);
        close(&of(mean, AdvantageScale::None), &[-1.0, 1.0, 0.0, 0.0]);
        close(&of(out, AdvantageScale::None), &[-2.0, 2.0, 0.0, 0.0]);
        let group = 2f64.sqrt() + STD_EPSILON;
        close(
            &of(mean, AdvantageScale::Group),
            &[-1.0 / group, 1.0 / group, 0.0, 0.0],
        );
        // 1, 3, 5, 5: mean 3.5, squares 6.25 + 0.25 + 2.25 + 2.25 = 11.
        let batch = (11f64 / 3.0).sqrt() + STD_EPSILON;
        close(
            &of(mean, AdvantageScale::Batch),
            &[-1.0 / batch, 1.0 / batch, 0.0, 0.0],
        );
        // −1, 1, 0, 0: mean 0, squares 2.
        let white = (2f64 / 3.0).sqrt() + STD_EPSILON;
        close(
            &of(mean, AdvantageScale::Whitened),
            &[-1.0 / white, 1.0 / white, 0.0, 0.0],
        );
    }

    #[test]
    fn what_does_not_count_changes_nothing_and_alone_is_nothing() {
        let counted = [true, true, true, false];
        for scale in [AdvantageScale::None, AdvantageScale::Batch] {
            let of = |last| {
                advantages(
                    &[1.0, 3.0, 4.0, last],
                    &counted,
                    Baseline::LeaveOneOut,
                    scale,
                )
            };
            assert_eq!(of(7.0), of(-1e9));
            assert_eq!(of(f64::NAN)[2..], [0.0, 0.0]);
            assert!(of(7.0)[0] < 0.0);
        }
    }

    #[test]
    fn equal_rewards_have_no_deviation_whatever_they_are() {
        // 0.1 + 0.1 + 0.1 is not 0.3: a mean that is rounded must not make advantages.
        let input = GroupAdvantagesInput {
            rewards: &[0.1; 3],
            counted: &[true; 3],
            group_size: 3,
            baseline: Baseline::GroupMean,
            scale: AdvantageScale::Group,
        };
        let out = group_advantages(&input).unwrap();
        assert_eq!((out.advantages, out.group_std), (vec![0.0; 3], vec![0.0]));
    }

    #[test]
    fn groups_must_be_whole() {
        let input = GroupAdvantagesInput {
            rewards: &[0.0; 3],
            counted: &[true; 3],
            group_size: 2,
            baseline: Baseline::GroupMean,
            scale: AdvantageScale::None,
        };
        let broken = |input| matches!(group_advantages(&input), Err(Error::LengthMismatch { .. }));
        assert!(broken(input));
        assert!(broken(GroupAdvantagesInput {
            counted: &[true; 2],
            group_size: 3,
            ..input
        }));
    }
}
