//! Parameters with a learning rate or weight decay of their own.

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// Parameters that [`AdamW`](crate::AdamW) treats apart from the others, chosen by name.
///
/// A parameter belongs to the first group with a pattern that fits its name; one that fits none has
/// the learning rate and weight decay of the config. A pattern fits a whole name; `*` stands for
/// any characters, dots included, also for none.
///
/// ```
/// use rlhf_scale::{AdamW, AdamWConfig, Error, ParamGroup};
/// use tch::{Device, Kind, Tensor};
///
/// # fn main() -> Result<(), Error> {
/// let weight = || Tensor::zeros([1], (Kind::Float, Device::Cpu)).set_requires_grad(true);
/// let (head, body, frozen) = (weight(), weight(), weight());
/// let config = AdamWConfig {
///     lr: 0.1,
///     groups: vec![
///         ParamGroup { params: vec!["head.*".into()], lr: Some(1.0), ..ParamGroup::default() },
///         ParamGroup { params: vec!["*.0.weight".into()], lr: Some(0.0), ..ParamGroup::default() },
///     ],
///     ..AdamWConfig::default()
/// };
/// let named = [("head.weight", &head), ("layers.1.weight", &body), ("layers.0.weight", &frozen)];
/// let mut optimizer = AdamW::new(
///     named.map(|(name, weight)| (name.to_string(), weight.shallow_clone())).into(),
///     &config,
/// )?;
/// (&head + &body + &frozen).backward();
/// optimizer.step(1.0)?;
/// // Adam's first step is one learning rate long.
/// assert!((head.double_value(&[0]) + 1.0).abs() < 1e-6);
/// assert!((body.double_value(&[0]) + 0.1).abs() < 1e-6);
/// assert_eq!(frozen.double_value(&[0]), 0.0);
/// # Ok(())
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct ParamGroup {
    /// Patterns of names. One that fits no parameter is an error.
    pub params: Vec<String>,
    /// Learning rate at a schedule factor of 1; `None` for that of the config. 0 keeps the
    /// parameters as they are.
    pub lr: Option<f64>,
    /// Weight decay of every parameter of the group, whatever
    /// [`no_decay`](crate::AdamWConfig::no_decay) says; `None` for what the config says.
    pub weight_decay: Option<f64>,
}

impl ParamGroup {
    /// Checks every field.
    ///
    /// # Errors
    /// Names the field and the values that are allowed.
    pub fn validate(&self) -> Result<()> {
        if self.params.is_empty() {
            let reason = "must have at least one pattern";
            return Err(CoreError::config("optimizer.groups.params", "[]", reason).into());
        }
        let numbers = [
            ("optimizer.groups.lr", self.lr),
            ("optimizer.groups.weight_decay", self.weight_decay),
        ];
        for (field, value) in numbers {
            match value {
                Some(value) if !(value.is_finite() && value >= 0.0) => {
                    let reason = "must be finite and not negative";
                    return Err(CoreError::config(field, value, reason).into());
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether a parameter of this name fits one of the patterns.
    pub fn matches(&self, name: &str) -> bool {
        self.params.iter().any(|pattern| fits(pattern, name))
    }
}

/// The group of each name, by index.
///
/// # Errors
/// A pattern that fits no name, or a group all of whose names are in groups before it.
pub(crate) fn assign(groups: &[ParamGroup], names: &[&str]) -> Result<Vec<Option<usize>>> {
    let unused = |pattern: &&String| !names.iter().any(|name| fits(pattern, name));
    if let Some(pattern) = groups.iter().flat_map(|g| &g.params).find(unused) {
        return Err(Error::UnmatchedPattern {
            pattern: pattern.clone(),
        });
    }
    let assigned: Vec<Option<usize>> = names
        .iter()
        .map(|name| groups.iter().position(|group| group.matches(name)))
        .collect();
    match (0..groups.len()).find(|&group| !assigned.contains(&Some(group))) {
        Some(group) => Err(Error::ShadowedGroup {
            group,
            patterns: groups[group].params.clone(),
        }),
        None => Ok(assigned),
    }
}

/// Whether `name` is `pattern` with something in the place of every `*`.
fn fits(pattern: &str, name: &str) -> bool {
    let Some((start, rest)) = pattern.split_once('*') else {
        return pattern == name;
    };
    let Some(mut name) = name.strip_prefix(start) else {
        return false;
    };
    let (middle, end) = rest.rsplit_once('*').unwrap_or(("", rest));
    // The leftmost place is never worse: it leaves the most for what follows.
    for part in middle.split('*') {
        match name.find(part) {
            Some(at) => name = &name[at + part.len()..],
            None => return false,
        }
    }
    name.ends_with(end)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    #[test]
    fn patterns() {
        let fitting = [
            ("a.weight", "a.weight"),
            ("*", ""),
            ("*", "a.b.c"),
            ("a.*", "a.b.c"),
            ("*.bias", "a.b.bias"),
            ("h.*.ln_*.weight", "h.11.ln_1.weight"),
            ("a*a", "aa"),
            ("*ab*ab", "xababab"),
            ("**", "x"),
        ];
        for (pattern, name) in fitting {
            assert!(fits(pattern, name), "{pattern} {name}");
        }
        let other = [
            ("a.weight", "a.weight2"),
            ("weight", "a.weight"),
            ("a.*", "b.a.c"),
            ("a*a", "a"),
            ("*ab*ab", "xab"),
            ("*.bias", "bias"),
            ("a*b*c", "acb"),
        ];
        for (pattern, name) in other {
            assert!(!fits(pattern, name), "{pattern} {name}");
        }
    }

    fn group(patterns: &[&str]) -> ParamGroup {
        ParamGroup {
            params: patterns.iter().map(|p| p.to_string()).collect(),
            ..ParamGroup::default()
        }
    }

    #[test]
    fn the_first_group_wins() {
        let groups = [group(&["a.*"]), group(&["*.x", "b.y"])];
        let assigned = assign(&groups, &["a.x", "b.x", "b.y", "b.z"]).unwrap();
        assert_eq!(assigned, [Some(0), Some(1), Some(1), None]);
    }

    #[test]
    fn useless_patterns_and_groups_are_errors() {
        let names = ["a.x", "b.x"];
        let error = assign(&[group(&["a.*", "c.*"])], &names).unwrap_err();
        assert!(error.to_string().contains("\"c.*\""), "{error}");
        let error = assign(&[group(&["*"]), group(&["b.*"])], &names).unwrap_err();
        assert!(matches!(error, Error::ShadowedGroup { group: 1, .. }));
    }

    #[test]
    fn invalid_fields_are_named() {
        let valid = group(&["*"]);
        valid.validate().unwrap();
        let message = |group: ParamGroup| group.validate().unwrap_err().to_string();
        assert!(message(group(&[])).starts_with("optimizer.groups.params = "));
        let lr = Some(-1.0);
        let text = message(ParamGroup {
            lr,
            ..valid.clone()
        });
        assert!(text.starts_with("optimizer.groups.lr = "), "{text}");
        let weight_decay = Some(f64::NAN);
        let text = message(ParamGroup {
            weight_decay,
            ..valid
        });
        assert!(
            text.starts_with("optimizer.groups.weight_decay = "),
            "{text}"
        );
    }
}
