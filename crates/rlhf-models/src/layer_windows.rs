//! Layers that look back only so far.

use rlhf_core::Error as CoreError;
use serde_json::{Map, Value, json};

use crate::Result;
use crate::config::Fields;

/// A window that some layers have, and some have not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Most tokens that a token looks at in such a layer, itself included.
    pub length: i64,
    /// Whether each layer is such a layer.
    pub layers: Vec<bool>,
}

impl SlidingWindow {
    /// Reads `layer_types`, or else asks `is_sliding` for each of so many layers. `None` where
    /// no layer has a window.
    pub(crate) fn from_fields(
        fields: &Fields,
        length: Option<i64>,
        layers: i64,
        is_sliding: impl Fn(i64) -> bool,
    ) -> Result<Option<Self>> {
        let types: Option<Vec<String>> = fields.get("layer_types")?;
        let sliding: Vec<bool> = match types {
            Some(types) => types
                .iter()
                .map(|kind| match kind.as_str() {
                    "sliding_attention" => Ok(true),
                    "full_attention" => Ok(false),
                    _ => {
                        let reason = "supported types: full_attention, sliding_attention";
                        Err(fields.invalid("layer_types", reason))
                    }
                })
                .collect::<Result<_>>()?,
            None => (0..layers).map(is_sliding).collect(),
        };
        if sliding.len() as i64 != layers {
            return Err(fields.invalid("layer_types", format!("the model has {layers} layers")));
        }
        match (length, sliding.contains(&true)) {
            (_, false) => Ok(None),
            (Some(length), true) => Ok(Some(Self {
                length,
                layers: sliding,
            })),
            (None, true) => Err(fields.invalid("sliding_window", "layer_types has such layers")),
        }
    }

    pub(crate) fn validate(&self, layers: i64) -> rlhf_core::Result<()> {
        if self.length < 1 {
            let reason = "a token looks at itself at least";
            return Err(CoreError::config("sliding_window", self.length, reason));
        }
        if self.layers.len() as i64 != layers {
            let reason = "it must be one for each of num_hidden_layers";
            return Err(CoreError::config("layer_types", self.layers.len(), reason));
        }
        Ok(())
    }

    /// The window of a layer.
    pub(crate) fn of(window: Option<&Self>, layer: i64) -> Option<i64> {
        let window = window?;
        let sliding = window.layers.get(layer as usize).copied();
        sliding.unwrap_or(false).then_some(window.length)
    }

    /// Writes `sliding_window` and `layer_types`.
    pub(crate) fn write(window: Option<&Self>, layers: i64, map: &mut Map<String, Value>) {
        let length = window.map(|window| window.length);
        let types: Vec<&str> = (0..layers)
            .map(|layer| match Self::of(window, layer) {
                Some(_) => "sliding_attention",
                None => "full_attention",
            })
            .collect();
        map.insert("sliding_window".into(), json!(length));
        map.insert("layer_types".into(), json!(types));
    }
}
