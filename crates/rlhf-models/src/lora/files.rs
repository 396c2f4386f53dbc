//! Adapters on disk, in the layout of PEFT: `adapter_config.json` and
//! `adapter_model.safetensors`.

use std::path::Path;

use rlhf_scale::io::{read_tensors, save_tensors};
use serde::de::DeserializeOwned;
use serde_json::{Map, Value, json};
use tch::Tensor;

use super::build::{Adapters, last_parts};
use super::config::{LoraConfig, Modules};
use crate::checkpoint::write_atomic;
use crate::config::Fields;
use crate::weights::WeightMap;
use crate::{Error, Result};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// PEFT's own two layers around a model, `PeftModel.base_model` and `LoraModel.model`.
const PREFIX: &str = "base_model.model.";

/// Fields that change nothing of what an adapter computes, or that a reader has no use for.
const NOTES: [&str; 12] = [
    "peft_type",
    "peft_version",
    "task_type",
    "inference_mode",
    "revision",
    "auto_mapping",
    "parent_library",
    "megatron_core",
    "qalora_group_size",
    "runtime_config",
    // How the base's matrices are stored is known.
    "fan_in_fan_out",
    // Where the number of a block stands in a name is known.
    "layers_pattern",
];

/// An adapter's folder.
pub(super) struct AdapterFiles {
    pub(super) config: LoraConfig,
    /// Without PEFT's prefix.
    pub(super) weights: WeightMap,
    /// Whether an output layer that is tied to the embedding follows it when that is trained.
    pub(super) ties_saved_embedding: bool,
}

impl AdapterFiles {
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let fields = Fields::read(&dir.join(CONFIG))?;
        let (config, ties_saved_embedding) = config_of(&fields)?;
        let weights = read_tensors(&dir.join(WEIGHTS))?
            .into_iter()
            .map(|(name, tensor)| {
                let bare = name.strip_prefix(PREFIX).unwrap_or(&name);
                (bare.to_string(), tensor)
            })
            .collect();
        Ok(Self {
            config,
            weights,
            ties_saved_embedding,
        })
    }
}

fn config_of(fields: &Fields) -> Result<(LoraConfig, bool)> {
    let peft_type: String = fields.need("peft_type")?;
    if peft_type != "LORA" {
        return Err(fields.invalid("peft_type", "only LORA adapters are supported"));
    }
    let default = LoraConfig::default();
    let mut known: Vec<&str> = NOTES.to_vec();
    let mut optional = Optional {
        fields,
        known: &mut known,
    };
    let config = LoraConfig {
        rank: optional.get("r")?.unwrap_or(default.rank),
        alpha: optional.get("lora_alpha")?.unwrap_or(default.alpha),
        rslora: optional.get("use_rslora")?.unwrap_or(false),
        dropout: optional.get("lora_dropout")?.unwrap_or(0.0),
        target_modules: optional
            .get("target_modules")?
            .ok_or_else(|| Error::MissingField {
                path: fields.path.clone(),
                field: "target_modules".into(),
            })?,
        exclude_modules: optional
            .get::<Modules>("exclude_modules")?
            .filter(|modules| *modules != Modules::Named(Vec::new())),
        modules_to_save: optional.get("modules_to_save")?.unwrap_or_default(),
        layers_to_transform: optional
            .get::<OneOrMany>("layers_to_transform")?
            .map(OneOrMany::into_vec),
        rank_pattern: optional.get("rank_pattern")?.unwrap_or_default(),
        alpha_pattern: optional.get("alpha_pattern")?.unwrap_or_default(),
        base_model: optional.get("base_model_name_or_path")?,
    };
    let ties = optional.get("ensure_weight_tying")?.unwrap_or(false);
    // The others change the base's weights, and what was done to them is not in the folder.
    let init: Option<Value> = optional.get("init_lora_weights")?;
    let harmless = [json!("gaussian"), json!("eva"), json!("orthogonal")];
    if init.is_some_and(|init| !init.is_boolean() && !harmless.contains(&init)) {
        let reason = "adapters that were made with a changed base are not supported";
        return Err(fields.invalid("init_lora_weights", reason));
    }
    // What only helped to initialise.
    known.extend([
        "loftq_config",
        "eva_config",
        "corda_config",
        "lora_ga_config",
    ]);
    let unknown = fields
        .entries()
        .find(|(field, value)| !known.contains(&field.as_str()) && is_used(value));
    if let Some((field, _)) = unknown {
        return Err(fields.invalid(field, "this variant of LoRA is not supported"));
    }
    config.validate().map_err(|error| fields.because(error))?;
    Ok((config, ties))
}

/// Reads fields and notes which.
struct Optional<'a, 'k> {
    fields: &'a Fields,
    known: &'k mut Vec<&'static str>,
}

impl Optional<'_, '_> {
    fn get<T: DeserializeOwned>(&mut self, field: &'static str) -> Result<Option<T>> {
        self.known.push(field);
        self.fields.get(field)
    }
}

/// A number or a list of them.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(i64),
    Many(Vec<i64>),
}

impl OneOrMany {
    fn into_vec(self) -> Vec<i64> {
        match self {
            Self::One(number) => vec![number],
            Self::Many(numbers) => numbers,
        }
    }
}

/// Whether a value says more than that a feature is off.
fn is_used(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => text != "none",
        Value::Array(items) => !items.is_empty(),
        Value::Object(fields) => !fields.is_empty(),
        Value::Bool(true) | Value::Number(_) => true,
    }
}

/// Writes the folder of adapters with these weights. Each file is complete or not there.
pub(super) fn write(
    dir: &Path,
    adapters: &Adapters,
    weights: Vec<(String, Tensor)>,
    task_type: &str,
    ties_saved_embedding: bool,
) -> Result<()> {
    std::fs::create_dir_all(dir).map_err(Error::io("creating", dir))?;
    let weights: Vec<_> = weights
        .into_iter()
        .map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor))
        .collect();
    save_tensors(&dir.join(WEIGHTS), &weights)?;
    let path = dir.join(CONFIG);
    let config = Value::Object(to_json(adapters, task_type, ties_saved_embedding));
    let text = serde_json::to_string_pretty(&config).map_err(|source| Error::Json {
        path: path.clone(),
        source,
    })?;
    write_atomic(&path, (text + "\n").as_bytes())
}

fn to_json(adapters: &Adapters, task_type: &str, ties_saved_embedding: bool) -> Map<String, Value> {
    let config = &adapters.config;
    let targets = match &config.target_modules {
        // PEFT would look for them anew, and find others in a classifier.
        Modules::AllLinear => Modules::Named(last_parts(adapters.modules())),
        named => named.clone(),
    };
    let saved = &config.modules_to_save;
    let mut map = Map::new();
    for (field, value) in [
        ("peft_type", json!("LORA")),
        ("task_type", json!(task_type)),
        ("base_model_name_or_path", json!(config.base_model)),
        ("inference_mode", json!(true)),
        ("r", json!(config.rank)),
        ("lora_alpha", number(config.alpha)),
        ("use_rslora", json!(config.rslora)),
        ("lora_dropout", json!(config.dropout)),
        ("target_modules", json!(targets)),
        ("exclude_modules", json!(config.exclude_modules)),
        (
            "modules_to_save",
            json!((!saved.is_empty()).then_some(saved)),
        ),
        ("layers_to_transform", json!(config.layers_to_transform)),
        ("rank_pattern", json!(config.rank_pattern)),
        (
            "alpha_pattern",
            config
                .alpha_pattern
                .iter()
                .map(|(pattern, alpha)| (pattern.clone(), number(*alpha)))
                .collect(),
        ),
        ("fan_in_fan_out", json!(adapters.is_fan_in_fan_out())),
        ("ensure_weight_tying", json!(ties_saved_embedding)),
        ("bias", json!("none")),
        ("init_lora_weights", json!(true)),
        ("use_dora", json!(false)),
    ] {
        map.insert(field.into(), value);
    }
    map
}

/// PEFT's `α` is an integer where it can be.
fn number(value: f64) -> Value {
    match value.fract() == 0.0 && value.abs() < 1e15 {
        true => json!(value as i64),
        false => json!(value),
    }
}
