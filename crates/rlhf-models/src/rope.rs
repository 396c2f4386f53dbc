//! Rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

use rlhf_core::{Error as CoreError, Result};
use rlhf_scale::recorded;
use serde_json::{Map, Value, json};
use tch::{Device, Kind, Tensor};

use crate::Error;
use crate::config::{Fields, MAX_SIZE};

mod frequencies;

use frequencies::frequencies;

/// How fast the pairs of a head's dimensions turn with the position.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// How a longer context than the one of pre-training is reached.
    pub scaling: RopeScaling,
}

/// Change of the frequencies for longer contexts.
#[derive(Debug, Clone, Copy, PartialEq)]
#[non_exhaustive]
pub enum RopeScaling {
    /// None.
    Default,
    /// All frequencies divided by one factor.
    Linear {
        /// The factor.
        factor: f64,
    },
    /// The base grows with the longest sequence of a batch, once it is longer than the original
    /// context ("dynamic NTK"). Results for such a batch depend on that length, as in
    /// transformers.
    Dynamic {
        /// How many times longer the context may be.
        factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
    /// Low frequencies divided by a factor, high ones kept, those between interpolated
    /// (Llama 3.1).
    Llama3 {
        /// Divides the low frequencies.
        factor: f64,
        /// Wavelengths above the original context over this are low frequencies.
        low_freq_factor: f64,
        /// Wavelengths below the original context over this are high frequencies.
        high_freq_factor: f64,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
    /// The like, with bands given in turns over the original context, and sharper attention
    /// (Peng et al. 2023, arXiv 2309.00071).
    Yarn {
        /// Divides the low frequencies.
        factor: f64,
        /// Multiplies cosines and sines.
        attention_factor: f64,
        /// Pairs that turn more often than this over the original context are kept.
        beta_fast: f64,
        /// Pairs that turn less often than this are divided.
        beta_slow: f64,
        /// Whether the bands begin and end at whole pairs.
        truncate: bool,
        /// Context length of pre-training.
        original_max_position_embeddings: f64,
    },
}

/// A head has no more dimensions than this.
const MAX_WIDTH: i64 = 1 << 16;

impl RopeConfig {
    /// Reads `rope_theta` (GPT-NeoX: `rotary_emb_base`) with `rope_scaling`, the layout of
    /// transformers 4, or else `rope_parameters`, that of transformers 5.
    pub(crate) fn from_fields(
        fields: &Fields,
        max_position_embeddings: i64,
    ) -> Result<Self, Error> {
        let Parameters { name, map } = Parameters::read(fields)?;
        let number = |key: &str| match map.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => value.as_f64().map(Some).ok_or_else(|| {
                let reason = format!("`{key}` must be a number");
                fields.invalid(name, reason)
            }),
        };
        let need = |key: &str| {
            number(key)?.ok_or_else(|| Error::MissingField {
                path: fields.path.clone(),
                field: format!("{name}.{key}"),
            })
        };
        let kind = map.get("rope_type").or_else(|| map.get("type"));
        let kind = match kind {
            None => "default",
            Some(kind) => kind.as_str().unwrap_or(""),
        };
        // What a file says beside the parameters goes before what it says in them.
        let original = || -> Result<f64, Error> {
            let key = "original_max_position_embeddings";
            let found = match fields.get(key)? {
                Some(found) => Some(found),
                None => number(key)?,
            };
            Ok(found.unwrap_or(max_position_embeddings as f64))
        };
        let scaling = match kind {
            "default" => RopeScaling::Default,
            "linear" => RopeScaling::Linear {
                factor: need("factor")?,
            },
            "dynamic" => RopeScaling::Dynamic {
                factor: need("factor")?,
                original_max_position_embeddings: max_position_embeddings as f64,
            },
            "llama3" => RopeScaling::Llama3 {
                factor: need("factor")?,
                low_freq_factor: need("low_freq_factor")?,
                high_freq_factor: need("high_freq_factor")?,
                original_max_position_embeddings: original()?,
            },
            "yarn" => {
                let original = original()?;
                let factor = match number("factor")? {
                    Some(factor) => factor,
                    None => max_position_embeddings as f64 / original,
                };
                let mscales = (number("mscale")?, number("mscale_all_dim")?);
                let attention_factor = number("attention_factor")?;
                RopeScaling::Yarn {
                    factor,
                    attention_factor: attention_factor
                        .unwrap_or_else(|| yarn_attention_factor(factor, mscales)),
                    beta_fast: number("beta_fast")?.filter(|&n| n != 0.0).unwrap_or(32.0),
                    beta_slow: number("beta_slow")?.filter(|&n| n != 0.0).unwrap_or(1.0),
                    truncate: map.get("truncate").and_then(Value::as_bool).unwrap_or(true),
                    original_max_position_embeddings: original,
                }
            }
            _ => {
                let reason = "supported types: default, linear, dynamic, llama3, yarn";
                return Err(fields.invalid(name, reason));
            }
        };
        let theta = match number("rope_theta")? {
            Some(theta) => Some(theta),
            None => fields.get("rope_theta")?.or(fields.get("rotary_emb_base")?),
        };
        // 10000 is what transformers takes where a config says nothing.
        let theta = theta.unwrap_or(10_000.0);
        Ok(Self { theta, scaling })
    }

    /// Fails for numbers that give no frequencies.
    pub(crate) fn validate(&self, width: i64) -> Result<()> {
        let positive = |field, value: f64| match value > 0.0 && value.is_finite() {
            true => Ok(()),
            false => Err(CoreError::config(field, value, "it must be above 0")),
        };
        if width > MAX_WIDTH {
            let reason = "no head is as wide as that";
            return Err(CoreError::config("head_dim", width, reason));
        }
        positive("rope_theta", self.theta)?;
        match self.scaling {
            RopeScaling::Default => Ok(()),
            RopeScaling::Linear { factor } => positive("rope_scaling.factor", factor),
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings: original,
            } => {
                positive("rope_scaling.factor", factor)?;
                positive("max_position_embeddings", original)
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings: original,
            } => {
                positive("rope_scaling.factor", factor)?;
                positive("rope_scaling.low_freq_factor", low)?;
                positive("rope_scaling.high_freq_factor", high)?;
                positive("rope_scaling.original_max_position_embeddings", original)
            }
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                original_max_position_embeddings: original,
                truncate: _,
            } => {
                positive("rope_scaling.factor", factor)?;
                positive("rope_scaling.attention_factor", attention_factor)?;
                positive("rope_scaling.beta_fast", beta_fast)?;
                positive("rope_scaling.beta_slow", beta_slow)?;
                positive("rope_scaling.original_max_position_embeddings", original)
            }
        }
    }

    /// Most tokens of a sequence of a model whose config says `max_position_embeddings`, which
    /// for some types of scaling is the context before it is scaled.
    pub(crate) fn max_length(&self, max_position_embeddings: i64) -> i64 {
        let scaled = match self.scaling {
            RopeScaling::Dynamic {
                factor,
                original_max_position_embeddings: original,
            }
            | RopeScaling::Yarn {
                factor,
                original_max_position_embeddings: original,
                ..
            } => (factor * original) as i64,
            _ => max_position_embeddings,
        };
        scaled.clamp(
            max_position_embeddings,
            MAX_SIZE.max(max_position_embeddings),
        )
    }

    /// The fields of transformers 4, which 5 reads too.
    pub(crate) fn write(&self, map: &mut Map<String, Value>) {
        map.insert("rope_theta".into(), json!(self.theta));
        let scaling = match self.scaling {
            RopeScaling::Default => Value::Null,
            RopeScaling::Linear { factor } => json!({"rope_type": "linear", "factor": factor}),
            RopeScaling::Dynamic { factor, .. } => {
                json!({"rope_type": "dynamic", "factor": factor})
            }
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings: original,
            } => json!({
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low_freq_factor,
                "high_freq_factor": high_freq_factor,
                "original_max_position_embeddings": original as i64,
            }),
            RopeScaling::Yarn {
                factor,
                attention_factor,
                beta_fast,
                beta_slow,
                truncate,
                original_max_position_embeddings: original,
            } => json!({
                "rope_type": "yarn",
                "factor": factor,
                "attention_factor": attention_factor,
                "beta_fast": beta_fast,
                "beta_slow": beta_slow,
                "truncate": truncate,
                "original_max_position_embeddings": original as i64,
            }),
        };
        map.insert("rope_scaling".into(), scaling);
    }
}

/// A number among the parameters of the rotary positions.
pub(crate) fn rope_number(fields: &Fields, key: &str) -> Result<Option<f64>, Error> {
    Ok(Parameters::read(fields)?
        .map
        .get(key)
        .and_then(Value::as_f64))
}

/// `rope_parameters` or `rope_scaling`, whichever a file has.
struct Parameters {
    name: &'static str,
    map: Map<String, Value>,
}

impl Parameters {
    fn read(fields: &Fields) -> Result<Self, Error> {
        for name in ["rope_scaling", "rope_parameters"] {
            let map: Map<String, Value> = fields.get(name)?.unwrap_or_default();
            if !map.is_empty() {
                return Ok(Self { name, map });
            }
        }
        Ok(Self {
            name: "rope_parameters",
            map: Map::new(),
        })
    }
}

/// What attention is sharpened by where a file does not say: the more, the longer the context.
fn yarn_attention_factor(factor: f64, mscales: (Option<f64>, Option<f64>)) -> f64 {
    let mscale = |mscale: f64| match factor <= 1.0 {
        true => 1.0,
        false => 0.1 * mscale * factor.ln() + 1.0,
    };
    match mscales {
        (Some(one), Some(all)) if one != 0.0 && all != 0.0 => mscale(one) / mscale(all),
        _ => mscale(1.0),
    }
}

/// The rotary positions of a model, or none.
pub(crate) struct Rope(Option<Turning>);

struct Turning {
    config: RopeConfig,
    /// `[width / 2]`, radians per position, for contexts up to the original one.
    frequencies: Tensor,
    /// Dimensions of a head that turn.
    width: i64,
}

/// Cosines and sines for the tokens of a run, `[N, 1, width]` each, the sines of the first half
/// negative; nothing for a model without rotary positions.
pub(crate) struct Rotation(Option<(Tensor, Tensor)>);

impl Rope {
    /// Of heads whose first `width` dimensions turn.
    pub(crate) fn new(config: &RopeConfig, width: i64, device: Device) -> Result<Self> {
        Ok(Self(Some(Turning {
            frequencies: frequencies(config, width, 0)?.f_to_device(device)?,
            config: config.clone(),
            width,
        })))
    }

    /// No rotary positions.
    pub(crate) fn none() -> Self {
        Self(None)
    }

    /// Angles are computed in f32, then rounded to the model's kind, as transformers does.
    pub(crate) fn rotation(&self, positions: &Tensor, kind: Kind) -> Result<Rotation> {
        let Some(turning) = &self.0 else {
            return Ok(Rotation(None));
        };
        let longer;
        let frequencies = match turning.beyond(positions)? {
            Some(frequencies) => {
                longer = frequencies;
                &longer
            }
            None => &turning.frequencies,
        };
        let half = positions
            .f_to_kind(Kind::Float)?
            .unsqueeze(-1)
            .f_mul(frequencies)?;
        let half = half.unsqueeze(1);
        let (cos, sin) = (half.f_cos()?, half.f_sin()?);
        let mut cos = Tensor::f_cat(&[&cos, &cos], -1)?;
        let mut sin = Tensor::f_cat(&[&sin.f_neg()?, &sin], -1)?;
        if let RopeScaling::Yarn {
            attention_factor, ..
        } = turning.config.scaling
        {
            cos = cos.f_mul_scalar(attention_factor)?;
            sin = sin.f_mul_scalar(attention_factor)?;
        }
        Ok(Rotation(Some((cos.f_to_kind(kind)?, sin.f_to_kind(kind)?))))
    }
}

impl Turning {
    /// The frequencies of a run beyond the original context, where they depend on its length.
    fn beyond(&self, positions: &Tensor) -> Result<Option<Tensor>> {
        let RopeScaling::Dynamic {
            original_max_position_embeddings: original,
            ..
        } = self.config.scaling
        else {
            return Ok(None);
        };
        if positions.numel() == 0 {
            return Ok(None);
        }
        let length = i64::try_from(&positions.f_max()?)? + 1;
        if length as f64 <= original {
            return Ok(None);
        }
        let frequencies = frequencies(&self.config, self.width, length)?;
        Ok(Some(frequencies.f_to_device(positions.device())?))
    }
}

impl Rotation {
    /// The same tensors under another handle.
    pub(crate) fn share(&self) -> Self {
        let share = |(cos, sin): &(Tensor, Tensor)| (cos.shallow_clone(), sin.shallow_clone());
        Self(self.0.as_ref().map(share))
    }

    /// Turns the first dimensions of `[N, heads, d]`, as many as the model's rotary positions
    /// have; of those, dimension `i` is paired with the one half their number after it.
    pub(crate) fn apply(&self, x: &Tensor) -> Result<Tensor> {
        let Some((cos, sin)) = &self.0 else {
            return Ok(x.shallow_clone());
        };
        if let Some(turned) = recorded::rotate(x, cos, sin).map_err(CoreError::from)? {
            return Ok(turned);
        }
        let (width, whole) = (cos.size()[2], x.size()[2]);
        if width < whole {
            let parts = x.f_split_with_sizes([width, whole - width].as_slice(), 2)?;
            return Ok(Tensor::f_cat(
                &[turned(&parts[0], cos, sin)?, parts[1].shallow_clone()],
                2,
            )?);
        }
        turned(x, cos, sin)
    }
}

fn turned(x: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    // The halves change places in one operation, whose gradient is one too; the sign is the
    // sines'.
    let crossed = x.f_roll(x.size()[2] / 2, 2)?;
    Ok(x.f_mul(cos)?.f_add(&crossed.f_mul(sin)?)?)
}
