//! Which layers have adapters, and of what size.

use std::collections::BTreeMap;

use regex::Regex;
use rlhf_core::{Error as CoreError, Result};
use serde::{Deserialize, Serialize};

/// Options of LoRA adapters.
///
/// Modules go by the names that they have in the checkpoint. A name stands for every module that
/// it is the end of: `q_proj` for `model.layers.0.self_attn.q_proj` and its like in other layers.
///
/// ```
/// use rlhf_models::{LoraConfig, Modules};
///
/// let config = LoraConfig {
///     rank: 16,
///     alpha: 32.0,
///     target_modules: Modules::named(["q_proj", "v_proj"]),
///     ..LoraConfig::default()
/// };
/// config.validate()?;
/// # Ok::<(), rlhf_models::core::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoraConfig {
    /// `r`: the rank of the adapters (`r` in PEFT).
    pub rank: i64,
    /// `α`: what an adapter adds is multiplied by `α / r` (`lora_alpha` in PEFT).
    pub alpha: f64,
    /// Whether it is multiplied by `α / √r` instead, which keeps large ranks from learning too
    /// slowly (Kalajdzievski 2023, arXiv 2312.03732; `use_rslora` in PEFT).
    pub rslora: bool,
    /// Probability with which each input of an adapter is dropped in training (`lora_dropout`).
    ///
    /// TRL trains SFT with it and switches it off in DPO, PPO and reward training, where the
    /// policy is compared with itself or with a reference.
    pub dropout: f64,
    /// The linear layers that have an adapter.
    pub target_modules: Modules,
    /// Those that have none all the same.
    pub exclude_modules: Option<Modules>,
    /// Modules that are trained whole, in a copy beside the frozen original: a norm, the
    /// embedding, an output layer. The head of a classifier or a value model always is.
    pub modules_to_save: Vec<String>,
    /// Numbers of the blocks that have adapters; `None` for all.
    pub layers_to_transform: Option<Vec<i64>>,
    /// Ranks of modules that have another one, by a regular expression for the end of the name.
    pub rank_pattern: BTreeMap<String, i64>,
    /// The same for `α`.
    pub alpha_pattern: BTreeMap<String, f64>,
    /// What the adapters belong to, a folder or a name of the Hugging Face hub; only noted in
    /// the adapter's folder (`base_model_name_or_path` in PEFT).
    pub base_model: Option<String>,
}

impl Default for LoraConfig {
    /// PEFT's rank of 8, `α` of 8 and no dropout, on every linear layer of the blocks (Dettmers et
    /// al. 2023, arXiv 2305.14314, found that all of them are needed); PEFT itself takes those of
    /// the attention only.
    fn default() -> Self {
        Self {
            rank: 8,
            alpha: 8.0,
            rslora: false,
            dropout: 0.0,
            target_modules: Modules::AllLinear,
            exclude_modules: None,
            modules_to_save: Vec::new(),
            layers_to_transform: None,
            rank_pattern: BTreeMap::new(),
            alpha_pattern: BTreeMap::new(),
            base_model: None,
        }
    }
}

/// Some modules of a model. In JSON a list of names, or a string: `"all-linear"`, or else a
/// regular expression.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Spelling", into = "Spelling")]
pub enum Modules {
    /// Every linear layer of the blocks; neither embedding nor head.
    AllLinear,
    /// Those whose names end so.
    Named(Vec<String>),
    /// Those whose whole name the regular expression matches.
    Pattern(String),
}

impl Modules {
    /// Those whose names end so.
    pub fn named<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self::Named(names.into_iter().map(Into::into).collect())
    }
}

#[derive(Serialize, Deserialize)]
#[serde(untagged)]
enum Spelling {
    List(Vec<String>),
    Text(String),
}

impl From<Spelling> for Modules {
    fn from(spelling: Spelling) -> Self {
        match spelling {
            Spelling::List(names) => Self::Named(names),
            Spelling::Text(text) if text == "all-linear" => Self::AllLinear,
            Spelling::Text(text) => Self::Pattern(text),
        }
    }
}

impl From<Modules> for Spelling {
    fn from(modules: Modules) -> Self {
        match modules {
            Modules::AllLinear => Self::Text("all-linear".into()),
            Modules::Named(names) => Self::List(names),
            Modules::Pattern(text) => Self::Text(text),
        }
    }
}

impl LoraConfig {
    /// Checks every field. Whether the modules exist is seen when the adapters are made.
    ///
    /// # Errors
    /// [`InvalidConfig`](CoreError::InvalidConfig), naming the field.
    pub fn validate(&self) -> Result<()> {
        Selection::new(self).map(drop)
    }

    fn check_numbers(&self) -> Result<()> {
        let ranks = self.rank_pattern.values().chain([&self.rank]);
        if let Some(rank) = ranks.copied().find(|&rank| rank < 1) {
            return Err(CoreError::config("rank", rank, "it must be at least 1"));
        }
        let alphas = self.alpha_pattern.values().chain([&self.alpha]);
        if let Some(alpha) = alphas.copied().find(|a| !a.is_finite() || *a <= 0.0) {
            let reason = "a positive number is needed";
            return Err(CoreError::config("alpha", alpha, reason));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            let reason = "it must lie in [0, 1)";
            return Err(CoreError::config("dropout", self.dropout, reason));
        }
        if self.exclude_modules == Some(Modules::AllLinear) {
            let reason = "there would be no adapter";
            return Err(CoreError::config("exclude_modules", "all-linear", reason));
        }
        Ok(())
    }

    /// What an adapter of that rank and `α` is multiplied by.
    pub(super) fn scaling(&self, rank: i64, alpha: f64) -> f64 {
        match self.rslora {
            true => alpha / (rank as f64).sqrt(),
            false => alpha / rank as f64,
        }
    }
}

/// A [`LoraConfig`] ready to be asked about names.
pub(super) struct Selection {
    pub(super) config: LoraConfig,
    targets: Matcher,
    excluded: Option<Matcher>,
    ranks: Vec<(Regex, i64)>,
    alphas: Vec<(Regex, f64)>,
}

enum Matcher {
    All,
    Names(Vec<String>),
    Pattern(Regex),
}

impl Selection {
    pub(super) fn new(config: &LoraConfig) -> Result<Self> {
        config.check_numbers()?;
        let excluded = config.exclude_modules.as_ref();
        Ok(Self {
            targets: Matcher::new("target_modules", &config.target_modules)?,
            excluded: excluded
                .map(|modules| Matcher::new("exclude_modules", modules))
                .transpose()?,
            ranks: compiled("rank_pattern", &config.rank_pattern)?,
            alphas: compiled("alpha_pattern", &config.alpha_pattern)?,
            config: config.clone(),
        })
    }

    /// Whether the linear layer has an adapter.
    pub(super) fn adapts(&self, module: &str) -> bool {
        let excluded = self.excluded.as_ref();
        let layers = self.config.layers_to_transform.as_ref();
        self.targets.matches(module)
            && !excluded.is_some_and(|excluded| excluded.matches(module))
            && layers.is_none_or(|wanted| layer(module).is_some_and(|n| wanted.contains(&n)))
            && !self.is_saved(module)
    }

    /// Whether a module is trained whole.
    pub(super) fn is_saved(&self, module: &str) -> bool {
        let saved = &self.config.modules_to_save;
        saved.iter().any(|name| is_end(name, module))
    }

    /// Rank and `α` of the module's adapter.
    pub(super) fn size(&self, module: &str) -> (i64, f64) {
        let rank = self.ranks.iter().find(|(regex, _)| regex.is_match(module));
        let alpha = self.alphas.iter().find(|(regex, _)| regex.is_match(module));
        (
            rank.map_or(self.config.rank, |(_, rank)| *rank),
            alpha.map_or(self.config.alpha, |(_, alpha)| *alpha),
        )
    }

    /// What was asked for and fits none of `modules`.
    pub(super) fn unmatched(&self, modules: &[String]) -> Vec<String> {
        let fits = |name: &&String| !modules.iter().any(|module| is_end(name, module));
        match &self.targets {
            Matcher::Names(names) => names.iter().filter(fits).cloned().collect(),
            Matcher::Pattern(regex) if !modules.iter().any(|m| regex.is_match(m)) => {
                vec![regex.as_str().into()]
            }
            Matcher::All | Matcher::Pattern(_) => Vec::new(),
        }
    }
}

impl Matcher {
    fn new(field: &'static str, modules: &Modules) -> Result<Self> {
        Ok(match modules {
            Modules::AllLinear => Self::All,
            Modules::Named(names) if names.is_empty() => {
                return Err(CoreError::config(field, "[]", "at least one is needed"));
            }
            Modules::Named(names) => Self::Names(names.clone()),
            Modules::Pattern(text) => Self::Pattern(anchored(field, text, "^(?:", ")$")?),
        })
    }

    fn matches(&self, module: &str) -> bool {
        match self {
            Self::All => true,
            Self::Names(names) => names.iter().any(|name| is_end(name, module)),
            Self::Pattern(regex) => regex.is_match(module),
        }
    }
}

/// Whether `name` is `module`, or the end of it after a dot.
pub(super) fn is_end(name: &str, module: &str) -> bool {
    let rest = module.strip_suffix(name);
    rest.is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The number of the block that a module is in.
fn layer(module: &str) -> Option<i64> {
    module.split('.').find_map(|part| part.parse().ok())
}

fn compiled<T: Copy>(
    field: &'static str,
    patterns: &BTreeMap<String, T>,
) -> Result<Vec<(Regex, T)>> {
    patterns
        .iter()
        .map(|(text, value)| Ok((anchored(field, text, r"^(?:.*\.)?(?:", ")$")?, *value)))
        .collect()
}

fn anchored(field: &'static str, text: &str, before: &str, after: &str) -> Result<Regex> {
    Regex::new(&format!("{before}{text}{after}"))
        .map_err(|_| CoreError::config(field, text, "it is not a regular expression"))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    const QUERY: &str = "model.layers.11.self_attn.q_proj";
    const DOWN: &str = "model.layers.1.mlp.down_proj";

    fn selection(config: LoraConfig) -> Selection {
        Selection::new(&config).unwrap()
    }

    #[test]
    fn names_are_whole_parts_of_a_path() {
        let chosen = selection(LoraConfig {
            target_modules: Modules::named(["q_proj", "mlp.down_proj", "roj"]),
            ..LoraConfig::default()
        });
        assert!(chosen.adapts(QUERY) && chosen.adapts(DOWN));
        assert!(!chosen.adapts("model.layers.0.self_attn.k_proj"));
        assert_eq!(chosen.unmatched(&[QUERY.into()]), ["mlp.down_proj", "roj"]);
    }

    #[test]
    fn patterns_match_whole_names() {
        let chosen = selection(LoraConfig {
            target_modules: Modules::Pattern(r"model\.layers\.\d+\.self_attn\.(q|k)_proj".into()),
            ..LoraConfig::default()
        });
        assert!(chosen.adapts(QUERY) && !chosen.adapts(DOWN));
        assert!(!chosen.adapts(&format!("{QUERY}.more")));
        assert_eq!(chosen.unmatched(&[DOWN.into()]).len(), 1);
    }

    #[test]
    fn exclusions_layers_and_whole_modules_have_no_adapter() {
        let chosen = selection(LoraConfig {
            exclude_modules: Some(Modules::named(["down_proj"])),
            layers_to_transform: Some(vec![1, 11]),
            modules_to_save: vec!["score".into()],
            ..LoraConfig::default()
        });
        assert!(chosen.adapts(QUERY) && !chosen.adapts(DOWN));
        assert!(!chosen.adapts("model.layers.2.self_attn.q_proj"));
        assert!(!chosen.adapts("score") && chosen.is_saved("score"));
    }

    #[test]
    fn ranks_and_alphas_of_single_modules() {
        let chosen = selection(LoraConfig {
            rank_pattern: [("down_proj".to_string(), 2)].into(),
            alpha_pattern: [(r"layers\.11\..*".to_string(), 5.0)].into(),
            ..LoraConfig::default()
        });
        assert_eq!(chosen.size(QUERY), (8, 5.0));
        assert_eq!(chosen.size(DOWN), (2, 8.0));
    }

    #[test]
    fn scalings() {
        let plain = LoraConfig::default();
        assert_eq!(plain.scaling(4, 16.0), 4.0);
        let rslora = LoraConfig {
            rslora: true,
            ..plain
        };
        assert_eq!(rslora.scaling(4, 16.0), 8.0);
    }

    #[test]
    fn json_as_peft_spells_it() {
        let modules = |json: &str| serde_json::from_str::<Modules>(json).unwrap();
        assert_eq!(modules(r#""all-linear""#), Modules::AllLinear);
        assert_eq!(modules(r#"["a"]"#), Modules::named(["a"]));
        assert_eq!(modules(r#"".*a""#), Modules::Pattern(".*a".into()));
        let config = LoraConfig::default();
        let text = serde_json::to_string(&config).unwrap();
        assert_eq!(serde_json::from_str::<LoraConfig>(&text).unwrap(), config);
    }

    #[test]
    fn values_that_cannot_be() {
        type Spoil = fn(&mut LoraConfig);
        let bad: [(&str, Spoil); 7] = [
            ("rank", |c| c.rank = 0),
            ("rank", |c| c.rank_pattern = [("a".into(), -1)].into()),
            ("alpha", |c| c.alpha = f64::NAN),
            ("dropout", |c| c.dropout = 1.0),
            ("target_modules", |c| {
                c.target_modules = Modules::Named(vec![])
            }),
            ("target_modules", |c| {
                c.target_modules = Modules::Pattern("(".into())
            }),
            ("exclude_modules", |c| {
                c.exclude_modules = Some(Modules::AllLinear)
            }),
        ];
        for (field, spoil) in bad {
            let mut config = LoraConfig::default();
            spoil(&mut config);
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(field), "{error}");
        }
    }
}
