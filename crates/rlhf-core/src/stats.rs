//! Numbers about a training step.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Metrics of one step: paths such as `ppo/policy/clipfrac`, in alphabetical order, to numbers.
///
/// Serialised as a map. JSON has no word for numbers that are not finite, so those are written
/// as the strings `"NaN"`, `"Infinity"` and `"-Infinity"`, which `float` in Python, `Number` in
/// JavaScript and `str::parse` in Rust all understand.
///
/// ```
/// let mut stats = rlhf_core::Stats::new();
/// stats.insert("ppo/kl", 0.25);
/// stats.insert("ppo/entropy", f64::NAN);
/// assert_eq!(serde_json::to_string(&stats)?, r#"{"ppo/entropy":"NaN","ppo/kl":0.25}"#);
/// # Ok::<(), serde_json::Error>(())
/// ```
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Stats(BTreeMap<String, f64>);

impl Stats {
    /// No metric yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a metric, and returns what it was before.
    pub fn insert(&mut self, metric: impl Into<String>, value: f64) -> Option<f64> {
        self.0.insert(metric.into(), value)
    }

    /// The value of a metric.
    pub fn get(&self, metric: &str) -> Option<f64> {
        self.0.get(metric).copied()
    }

    /// All metrics, in alphabetical order.
    pub fn iter(&self) -> impl Iterator<Item = (&str, f64)> {
        self.0
            .iter()
            .map(|(metric, &value)| (metric.as_str(), value))
    }

    /// Number of metrics.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is no metric.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<K: Into<String>> FromIterator<(K, f64)> for Stats {
    fn from_iter<I: IntoIterator<Item = (K, f64)>>(metrics: I) -> Self {
        Self(metrics.into_iter().map(|(k, v)| (k.into(), v)).collect())
    }
}

impl<K: Into<String>> Extend<(K, f64)> for Stats {
    fn extend<I: IntoIterator<Item = (K, f64)>>(&mut self, metrics: I) {
        self.0
            .extend(metrics.into_iter().map(|(k, v)| (k.into(), v)));
    }
}

impl IntoIterator for Stats {
    type Item = (String, f64);
    type IntoIter = std::collections::btree_map::IntoIter<String, f64>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// A line for each metric, the values aligned.
impl fmt::Display for Stats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = self.0.keys().map(|k| k.chars().count()).max().unwrap_or(0);
        for (i, (metric, value)) in self.iter().enumerate() {
            let end_of_last = if i == 0 { "" } else { "\n" };
            write!(f, "{end_of_last}{metric:<width$}  {:>10}", Short(value))?;
        }
        Ok(())
    }
}

/// A number in at most ten characters: five significant digits.
pub(crate) struct Short(pub(crate) f64);

impl fmt::Display for Short {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let magnitude = self.0.abs();
        let text = if self.0 == self.0.trunc() && magnitude < 1e6 {
            format!("{:.0}", self.0)
        } else if (1e-3..1e5).contains(&magnitude) {
            let decimals = 4 - magnitude.log10().floor() as i32;
            format!("{:.*}", decimals.clamp(0, 6) as usize, self.0)
        } else if self.0.is_finite() {
            format!("{:.3e}", self.0)
        } else {
            self.0.to_string()
        };
        f.pad(&text)
    }
}

impl Serialize for Stats {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter().map(|(metric, value)| (metric, Number(value))))
    }
}

impl<'de> Deserialize<'de> for Stats {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let map = BTreeMap::<String, Number>::deserialize(deserializer)?;
        Ok(map.into_iter().map(|(metric, n)| (metric, n.0)).collect())
    }
}

/// A number that survives JSON, whatever it is.
struct Number(f64);

impl Serialize for Number {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        match self.0 {
            value if value.is_nan() => serializer.serialize_str("NaN"),
            f64::INFINITY => serializer.serialize_str("Infinity"),
            f64::NEG_INFINITY => serializer.serialize_str("-Infinity"),
            value => serializer.serialize_f64(value),
        }
    }
}

impl<'de> Deserialize<'de> for Number {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged)]
        enum Written {
            Number(f64),
            Word(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Number(value) => Ok(Self(value)),
            Written::Word(word) => word.parse().map(Self).map_err(serde::de::Error::custom),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn numbers_survive_json() {
        let stats: Stats = [
            ("a", 0.1),
            ("b", f64::INFINITY),
            ("c", f64::NEG_INFINITY),
            ("d", -3e-9),
        ]
        .into_iter()
        .collect();
        let json = serde_json::to_string(&stats).unwrap();
        assert_eq!(
            json,
            r#"{"a":0.1,"b":"Infinity","c":"-Infinity","d":-3e-9}"#
        );
        assert_eq!(serde_json::from_str::<Stats>(&json).unwrap(), stats);
        let nan: Stats = serde_json::from_str(r#"{"a":"NaN"}"#).unwrap();
        assert!(nan.get("a").unwrap().is_nan());
    }

    #[test]
    fn lines_are_aligned() {
        let stats: Stats = [("ppo/kl", 1.0 / 3.0), ("ppo/policy/clipfrac", 12.0)]
            .into_iter()
            .collect();
        assert_eq!(
            stats.to_string(),
            "ppo/kl                  0.33333\nppo/policy/clipfrac          12"
        );
    }

    #[test]
    fn five_digits() {
        for (value, text) in [
            (123.456_789, "123.46"),
            (-0.012_345_678, "-0.012346"),
            (3e-7, "3.000e-7"),
            (f64::NAN, "NaN"),
            (1_234_567.8, "1.235e6"),
            (0.0, "0"),
        ] {
            assert_eq!(Short(value).to_string(), text);
        }
    }
}
