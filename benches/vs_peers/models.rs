//! The models that the tasks train.

use rlhf::core::tch::Kind;
use rlhf::models::{CausalLm, LoadOptions};
use rlhf::scale::{AdamWConfig, UpdateConfig};

use crate::{Dtype, Result, Work};

impl Dtype {
    pub(crate) fn kind(self) -> Kind {
        match self {
            Self::Float32 => Kind::Float,
            Self::Bfloat16 => Kind::BFloat16,
        }
    }
}

pub(crate) fn language_model(work: &Work) -> Result<CausalLm> {
    let options = LoadOptions {
        kind: Some(work.dtype.kind()),
        ..LoadOptions::default()
    };
    Ok(CausalLm::from_pretrained(&work.model, &options)?)
}

/// AdamW with the learning rate that the peer gets; clipping and the rest are the defaults of both.
pub(crate) fn update() -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr: 1e-6,
            ..AdamWConfig::default()
        },
        ..UpdateConfig::default()
    }
}
