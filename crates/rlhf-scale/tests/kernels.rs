//! The kernels of decoding against libtorch's operations.
#![allow(clippy::unwrap_used, clippy::panic)]

use rlhf_scale::kernels::{self, CachedAttentionInput};
use rlhf_scale::recorded;
use tch::{Device, Kind, Tensor};

fn random(shape: &[i64], seed: f64, kind: Kind) -> Tensor {
    let count: i64 = shape.iter().product();
    let values = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.7 + seed;
    ((values.sin() * 1000.0).frac() * 2.0)
        .view(shape)
        .to_kind(kind)
}

/// Relative to the largest element; None where this processor has no kernel.
fn check(what: &str, got: Option<Tensor>, want: &Tensor, kind: Kind) {
    let Some(got) = got else {
        assert!(!has_kernels(), "{what}: no kernel");
        return;
    };
    assert_eq!((got.size(), got.kind()), (want.size(), kind), "{what}");
    let (got, want) = (got.to_kind(Kind::Double), want.to_kind(Kind::Double));
    let difference = (&got - &want).abs().max().double_value(&[]);
    let tolerance = if kind == Kind::Float { 2e-6 } else { 1e-2 };
    let scale = want.abs().max().double_value(&[]);
    assert!(
        difference <= tolerance * scale,
        "{what}: {difference} of {scale}"
    );
}

fn has_kernels() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[test]
fn products_of_any_number_of_rows() {
    let _guard = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        for (inputs, outputs) in [(64, 96), (67, 31), (5, 4), (576, 100)] {
            let weight = random(&[outputs, inputs], 0.3, kind);
            let bias = random(&[outputs], 0.5, kind);
            for rows in [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 32] {
                let x = random(&[rows, inputs], 0.1, kind);
                let wide = |t: &Tensor| t.to_kind(Kind::Double);
                for bias in [None, Some(&bias)] {
                    let want = wide(&x).linear(&wide(&weight), bias.map(wide).as_ref());
                    let got = kernels::linear(&x, &weight, bias).unwrap();
                    let what = format!("{kind:?} {rows} x {inputs} x {outputs}");
                    check(&what, got, &want, kind);
                }
            }
        }
    }
}

#[test]
fn a_row_does_not_depend_on_how_many_there_are() {
    let _guard = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        let (x, weight) = (random(&[32, 70], 0.1, kind), random(&[50, 70], 0.2, kind));
        let Some(all) = kernels::linear(&x, &weight, None).unwrap() else {
            continue;
        };
        for rows in 1..32 {
            for first in [0, 32 - rows] {
                let some = kernels::linear(&x.narrow(0, first, rows), &weight, None);
                assert!(some.unwrap().unwrap().equal(&all.narrow(0, first, rows)));
            }
        }
    }
}

#[test]
fn products_of_the_same_rows_are_what_each_is_alone() {
    let _guard = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        let x = random(&[8, 70], 0.1, kind);
        let weight = |outputs: i64| random(&[outputs, 70], outputs as f64, kind);
        let (a, b, c) = (weight(2), weight(50), weight(4000));
        let bias = random(&[50], 0.4, kind);
        let maps = [(&a, None), (&b, Some(&bias)), (&c, None)];
        let Some(together) = kernels::linears(&x, maps).unwrap() else {
            assert!(!has_kernels());
            continue;
        };
        for (got, (weight, bias)) in together.iter().zip(maps) {
            let alone = kernels::linear(&x, weight, bias).unwrap().unwrap();
            assert!(got.equal(&alone), "{kind:?} {:?}", got.size());
        }
    }
}

#[test]
fn rotary_positions() {
    let _guard = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        for (rows, heads, d, width) in [(1, 2, 64, 64), (5, 3, 64, 32), (70, 9, 20, 10)] {
            let x = random(&[rows, heads, d], 0.1, kind);
            let angles = random(&[rows, 1, width / 2], 0.2, Kind::Float);
            let cos = Tensor::cat(&[angles.cos(), angles.cos()], 2).to_kind(kind);
            let sin = Tensor::cat(&[-angles.sin(), angles.sin()], 2).to_kind(kind);
            // One operation after another, in the model's kind.
            let turning = x.narrow(2, 0, width);
            let turned = &turning * &cos + turning.roll(width / 2, 2) * &sin;
            let want = Tensor::cat(&[turned, x.narrow(2, width, d - width)], 2);
            let Some(got) = recorded::rotate(&x, &cos, &sin).unwrap() else {
                assert!(!has_kernels());
                continue;
            };
            let tolerance = if kind == Kind::Float { 1e-6 } else { 0.0 };
            let difference = (got - want).abs().max().double_value(&[]);
            assert!(difference <= tolerance, "{kind:?} {width}: {difference}");
        }
    }
    let x = random(&[2, 1, 8], 0.1, Kind::Float);
    let other = random(&[3, 1, 8], 0.1, Kind::Float);
    assert!(recorded::rotate(&x, &other, &other).unwrap().is_none());
}

#[test]
fn gates() {
    let _guard = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        for shape in [[1, 3], [7, 45], [40, 1536]] {
            let (gate, up) = (random(&shape, 0.1, kind) * 20.0, random(&shape, 0.3, kind));
            let wide = |t: &Tensor| t.to_kind(Kind::Double);
            let want = wide(&gate).silu() * wide(&up);
            let got = recorded::silu_gated(&gate, &up).unwrap();
            check(&format!("{kind:?} {shape:?}"), got, &want, kind);
        }
    }
    let extremes = Tensor::from_slice(&[-1e30f32, -100.0, -0.0, 0.0, 100.0, 1e30]);
    let ones = extremes.ones_like();
    if let Some(got) = recorded::silu_gated(&extremes, &ones).unwrap() {
        let got = Vec::<f32>::try_from(got).unwrap();
        assert!(got[0].abs() < 1e-4 && got[1].abs() < 1e-30, "{got:?}");
        assert_eq!(&got[2..], [0.0, 0.0, 100.0, 1e30]);
    }
    let nan = Tensor::from_slice(&[f32::NAN]);
    if let Some(got) = recorded::silu_gated(&nan, &nan).unwrap() {
        assert!(got.double_value(&[0]).is_nan());
    }
    assert!(recorded::silu_gated(&nan, &ones).unwrap().is_none());
}

#[test]
fn norms() {
    let _guard = tch::no_grad_guard();
    for kind in [Kind::Float, Kind::BFloat16] {
        for (shape, width) in [(vec![5, 64], 64), (vec![300, 50], 50), (vec![3, 2, 50], 50)] {
            let (x, weight) = (random(&shape, 0.1, kind), random(&[width], 0.2, kind));
            let wide = x.to_kind(Kind::Double);
            let mean = wide
                .square()
                .mean_dim([-1i64].as_slice(), true, Kind::Double);
            let want = wide * (mean + 1e-5).rsqrt() * weight.to_kind(Kind::Double);
            check(
                "norm",
                recorded::rms_norm(&x, &weight, 1e-5).unwrap(),
                &want,
                kind,
            );
        }
    }
}

/// Row by row, with whole tensors.
fn attended(input: &CachedAttentionInput) -> Tensor {
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    let (heads, kv_heads) = (input.query.size()[1], input.key.size()[1]);
    let rows: Vec<Tensor> = (0..)
        .zip(input.lengths)
        .map(|(row, &length)| {
            let first = input.window.map_or(0, |w| (length + 1 - w).max(0));
            let seen = |cache: &Tensor, new: &Tensor| {
                let old = wide(cache).get(row).narrow(1, 0, length);
                let all = Tensor::cat(&[old, wide(new).get(row).unsqueeze(1)], 1);
                all.narrow(1, first, length + 1 - first)
                    .repeat_interleave_self_int(heads / kv_heads, 0, None)
            };
            let products = wide(input.query)
                .get(row)
                .unsqueeze(1)
                .matmul(&seen(input.keys, input.key).transpose(1, 2))
                * input.scale;
            let products = match input.softcap {
                Some(cap) => (products / cap).tanh() * cap,
                None => products,
            };
            let weights = products.softmax(-1, Kind::Double);
            weights.matmul(&seen(input.values, input.value)).view(-1)
        })
        .collect();
    Tensor::stack(&rows, 0)
}

#[test]
fn attention_to_a_cache() {
    let _guard = tch::no_grad_guard();
    let lengths = [0, 1, 15, 16, 37];
    for kind in [Kind::Float, Kind::BFloat16] {
        for (window, softcap) in [(None, None), (Some(5), None), (Some(20), Some(3.0))] {
            let (keys, values) = (
                random(&[6, 2, 40, 32], 0.3, kind),
                random(&[6, 2, 40, 32], 0.4, kind),
            );
            let (key, value) = (
                random(&[5, 2, 32], 0.5, kind),
                random(&[5, 2, 32], 0.6, kind),
            );
            let input = CachedAttentionInput {
                query: &random(&[5, 6, 32], 0.2, kind),
                key: &key,
                value: &value,
                keys: &keys,
                values: &values,
                lengths: &lengths,
                scale: 0.3,
                window,
                softcap,
            };
            let want = attended(&input);
            let got = kernels::cached_attention(&input).unwrap();
            let ran = got.is_some();
            check(
                &format!("{kind:?}, {window:?}, {softcap:?}"),
                got,
                &want,
                kind,
            );
            for (row, &length) in (0..).zip(&lengths).filter(|_| ran) {
                let written = keys.get(row).select(1, length);
                assert!(written.equal(&key.get(row)), "key of row {row}");
                let written = values.get(row).select(1, length);
                assert!(written.equal(&value.get(row)), "value of row {row}");
            }
        }
    }
    // A full cache is refused, and so are lengths that do not fit the rows.
    let one = random(&[1, 1, 16], 0.1, Kind::Float);
    let cache = random(&[1, 1, 4, 16], 0.2, Kind::Float);
    let input = |lengths| CachedAttentionInput {
        query: &one,
        key: &one,
        value: &one,
        keys: &cache,
        values: &cache,
        lengths,
        scale: 1.0,
        window: None,
        softcap: None,
    };
    assert!(kernels::cached_attention(&input(&[4])).unwrap().is_none());
    assert!(kernels::cached_attention(&input(&[-1])).unwrap().is_none());
    assert!(kernels::cached_attention(&input(&[1, 1])).is_err());
}

#[test]
fn what_has_no_kernel_is_left_to_libtorch() {
    let x = random(&[2, 16], 0.1, Kind::Float);
    let weight = random(&[3, 16], 0.2, Kind::Float);
    let double = weight.to_kind(Kind::Double);
    assert!(kernels::linear(&x, &double, None).unwrap().is_none());
    let [x, weight] = [x, weight].map(|t| t.to_kind(Kind::BFloat16).set_requires_grad(true));
    // Many rows of bf16, and gradients, are libtorch's where the processor multiplies them as such.
    let ours = kernels::multiplies(Kind::BFloat16);
    assert_eq!(kernels::linear(&x, &weight, None).unwrap().is_some(), ours);
    let _guard = tch::no_grad_guard();
    let many = random(&[33, 16], 0.1, Kind::BFloat16);
    assert_eq!(
        kernels::linear(&many, &weight, None).unwrap().is_some(),
        ours
    );
}
