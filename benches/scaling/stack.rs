//! A stack of transformer blocks under a checkpoint policy.

use rlhf::core::tch::{Device, Kind, Tensor};
use rlhf::scale::{CheckpointPolicy, GradientCheckpointing};
use serde::{Deserialize, Serialize};

use crate::Result;

/// A stack of blocks and its input.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub(crate) struct Stack {
    pub(crate) blocks: i64,
    pub(crate) width: i64,
    pub(crate) heads: i64,
    pub(crate) rows: i64,
    pub(crate) length: i64,
}

pub(crate) fn policy(how: &str) -> Result<GradientCheckpointing> {
    let policy: CheckpointPolicy = serde_json::from_value(how.into())?;
    Ok(policy.into())
}

/// Forward and backward through the stack; gradients add up, so none is allocated after the first.
pub(crate) fn stack_step(
    stack: Stack,
    checkpointing: GradientCheckpointing,
) -> Box<dyn FnMut() -> Result<()>> {
    let options = (Kind::Float, Device::Cpu);
    let (d, heads) = (stack.width, stack.heads);
    let parameter = |shape: &[i64]| (Tensor::randn(shape, options) * 0.02).set_requires_grad(true);
    let vector = |value: f64| Tensor::full([d], value, options).set_requires_grad(true);
    let weights: Vec<Vec<Tensor>> = (0..stack.blocks)
        .map(|_| {
            vec![
                vector(1.0),
                vector(0.0),
                parameter(&[3 * d, d]),
                parameter(&[d, d]),
                vector(1.0),
                vector(0.0),
                parameter(&[4 * d, d]),
                parameter(&[d, 4 * d]),
            ]
        })
        .collect();
    let input = Tensor::randn([stack.rows, stack.length, d], options);
    Box::new(move || {
        let blocks = weights.iter().map(|block| {
            let w: Vec<Tensor> = block.iter().map(Tensor::shallow_clone).collect();
            move |x: &Tensor| -> rlhf::scale::Result<Tensor> {
                let (b, t) = (x.size()[0], x.size()[1]);
                let qkv = x.layer_norm([d], Some(&w[0]), Some(&w[1]), 1e-5, true);
                let qkv = qkv.f_linear(&w[2], None::<&Tensor>)?;
                let qkv = qkv
                    .view([b, t, 3, heads, d / heads])
                    .permute([2, 0, 3, 1, 4]);
                let qkv = qkv.unbind(0);
                let attended = Tensor::f_scaled_dot_product_attention(
                    &qkv[0],
                    &qkv[1],
                    &qkv[2],
                    None::<&Tensor>,
                    0.0,
                    true,
                    None,
                    false,
                )?;
                let attended = attended.transpose(1, 2).reshape([b, t, d]);
                let x = x.f_add(&attended.f_linear(&w[3], None::<&Tensor>)?)?;
                let inner = x.layer_norm([d], Some(&w[4]), Some(&w[5]), 1e-5, true);
                let inner = inner.f_linear(&w[6], None::<&Tensor>)?.f_gelu("none")?;
                Ok(x.f_add(&inner.f_linear(&w[7], None::<&Tensor>)?)?)
            }
        });
        let output = checkpointing.run(blocks.collect(), &input)?;
        // In a statement of its own, so that the squares are not held during backward, as they are
        // not in Python.
        let loss = output.square().mean(Kind::Float);
        loss.f_backward()?;
        Ok(())
    })
}
