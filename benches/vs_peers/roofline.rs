//! What a step must compute at least, and how quickly this machine multiplies.

use std::time::{Duration, Instant};

use rlhf::core::tch::{Device, Kind, Tensor, no_grad};
use rlhf::core::{PackedBatch, Parameters, SequenceBatch};
use rlhf::scale::kernels;
use serde::{Deserialize, Serialize};

/// The arithmetic of a step in matrix products.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cost {
    /// Multiplications and additions of the packed layout.
    pub(crate) flops: f64,
    /// What is computed token by token beside that.
    pub(crate) decoding: Decoding,
    /// Rows of the largest product, `N`, and the two other dimensions.
    shape: [i64; 3],
}

/// Steps of decoding: each reads all weights, and multiplies them with one row a sequence.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(crate) struct Decoding {
    /// Weights read.
    pub(crate) bytes: f64,
    /// Multiplications and additions.
    pub(crate) flops: f64,
}

/// The sizes of a model that its costs follow from, read off its weights.
pub(crate) struct Sizes {
    /// Elements of all matrices that every token is multiplied with.
    matrices: f64,
    layers: f64,
    hidden: i64,
    widest: i64,
}

impl Sizes {
    pub(crate) fn of(model: &dyn Parameters, hidden: i64) -> Self {
        let (mut matrices, mut layers, mut widest) = (0.0, 0, hidden);
        for (name, weight) in model.named_parameters() {
            // Embeddings are looked up and heads see few tokens: what counts is numbered.
            let layer = name.split('.').find_map(|part| part.parse::<i64>().ok());
            if let (Some(layer), [rows, columns]) = (layer, weight.size().as_slice()) {
                matrices += (rows * columns) as f64;
                layers = layers.max(layer + 1);
                widest = widest.max(*rows).max(*columns);
            }
        }
        Self {
            matrices,
            layers: layers as f64,
            hidden,
            widest,
        }
    }

    /// Elements of the matrices that every token is multiplied with, the head aside.
    pub(crate) fn matrices(&self) -> f64 {
        self.matrices
    }

    /// A forward pass over `batch` and the outputs of `outputs` classes at `rows` of its rows.
    pub(crate) fn forward(&self, batch: &SequenceBatch, rows: usize, outputs: i64) -> Cost {
        let packed = batch.packed(Device::Cpu);
        let linear = 2.0 * self.matrices * packed.tokens() as f64;
        let attention = 4.0 * self.hidden as f64 * self.layers * attended(&packed);
        let head = 2.0 * (rows as i64 * self.hidden * outputs) as f64;
        Cost {
            flops: linear + attention + head,
            decoding: Decoding::default(),
            shape: [packed.tokens(), self.hidden, self.widest],
        }
    }
}

impl Cost {
    /// Forward and backward: a product of the forward pass has two in the backward pass.
    pub(crate) fn trained(self) -> Self {
        self.times(3.0)
    }

    /// Followed by decoding.
    pub(crate) fn then(self, decoding: Decoding) -> Self {
        Self { decoding, ..self }
    }

    /// With the products of another pass, whose shape is not looked at.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self {
            flops: self.flops + other.flops,
            ..self
        }
    }

    pub(crate) fn times(self, factor: f64) -> Self {
        Self {
            flops: factor * self.flops,
            ..self
        }
    }
}

/// Pairs of a query and a key that it looks at.
fn attended(packed: &PackedBatch) -> f64 {
    let pairs = |own: i64, prefix: i64| own * (own + 1) / 2 + own * prefix;
    let segments = packed.segments.iter().map(|segment| {
        let prefix = segment.prefix.as_ref().map_or(0, |p| p.end - p.start);
        pairs(segment.len(), prefix)
    });
    segments.sum::<i64>() as f64
}

/// Flops a second of the forward product of the model's widest layer, by libtorch or by the kernels here,
/// whichever is quicker: the best of a third of a second each.
pub(crate) fn gemm_rate(cost: Cost, kind: Kind) -> f64 {
    let [rows, inputs, outputs] = cost.shape;
    let x = Tensor::randn([rows, inputs], (Kind::Float, Device::Cpu)).to_kind(kind);
    let weight = Tensor::randn([outputs, inputs], (Kind::Float, Device::Cpu)).to_kind(kind);
    let fastest = |multiply: &dyn Fn()| {
        let begin = Instant::now();
        let mut best = f64::INFINITY;
        while begin.elapsed() < Duration::from_millis(330) {
            let start = Instant::now();
            multiply();
            best = best.min(start.elapsed().as_secs_f64());
        }
        best
    };
    let seconds = no_grad(|| {
        let libtorch = fastest(&|| {
            let _ = x.linear(&weight, None::<&Tensor>);
        });
        match kernels::multiplies(kind) {
            true => libtorch.min(fastest(&|| {
                let _ = kernels::linear(&x, &weight, None);
            })),
            false => libtorch,
        }
    });
    2.0 * (rows * inputs * outputs) as f64 / seconds
}

/// Bytes a second of reading 256 MiB: the best of a fifth of a second.
pub(crate) fn bandwidth() -> f64 {
    let values = Tensor::ones([64 << 20], (Kind::Float, Device::Cpu));
    let begin = Instant::now();
    let mut best = f64::INFINITY;
    while begin.elapsed() < Duration::from_millis(200) {
        let start = Instant::now();
        let _ = values.sum(Kind::Float);
        best = best.min(start.elapsed().as_secs_f64());
    }
    (256 << 20) as f64 / best
}
