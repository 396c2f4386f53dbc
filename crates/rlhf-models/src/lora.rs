//! LoRA: low-rank adapters beside frozen weights (Hu et al. 2021, arXiv 2106.09685).
//!
//! A linear layer `y = W x` becomes `y = W x + s · B A x`, with `A` of shape `[r, in]` and `B` of
//! shape `[out, r]`; `W` stays what it is and has no gradient. Models whose layers are built by
//! [`Linear`](crate::layers::Linear) have nothing to do with it: the
//! [`Builder`](crate::weights::Builder) gives a layer its adapter by the layer's name.

mod adapter;
mod build;
mod config;
mod files;
mod models;

pub(crate) use adapter::Adapter;
pub(crate) use build::{AdapterBuilder, Adapters, copied};
pub use config::{LoraConfig, Modules};
pub(crate) use models::{CAUSAL_LM, Rebuild, SEQ_CLS, adapted};
