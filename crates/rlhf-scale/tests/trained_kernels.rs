//! The kernels of training against libtorch's operations in f64: values, and gradients of everything.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use rlhf_scale::{kernels, recorded};
use tch::{Device, Kind, Tensor};

/// The number of threads is the process's.
fn with_threads(threads: i32) -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    let guard = LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    tch::set_num_threads(threads);
    guard
}

fn has_kernels() -> bool {
    #[cfg(target_arch = "x86_64")]
    return is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
    #[cfg(not(target_arch = "x86_64"))]
    false
}

fn random(shape: &[i64], seed: f64) -> Tensor {
    let count: i64 = shape.iter().product();
    let values = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.7 + seed;
    ((values.sin() * 1000.0).frac() * 2.0)
        .view(shape)
        .to_kind(Kind::Float)
}

/// Leaves with the same values.
fn leaves(tensors: &[&Tensor], kind: Kind) -> Vec<Tensor> {
    let leaf = |t: &&Tensor| t.to_kind(kind).copy().set_requires_grad(true);
    tensors.iter().map(leaf).collect()
}

/// The outputs, and the gradients of a sum of them that weighs every element differently.
fn trained(inputs: &[Tensor], run: impl FnOnce(&[Tensor]) -> Vec<Tensor>) -> Vec<Tensor> {
    let mut outputs = run(inputs);
    let weighed = outputs.iter().zip(1..).map(|(output, i)| {
        let weights = random(&output.size(), 0.7 * f64::from(i)).to_kind(output.kind());
        (output * weights).sum(output.kind())
    });
    weighed.reduce(|a, b| a + b).unwrap().backward();
    outputs.extend(inputs.iter().map(Tensor::grad).filter(Tensor::defined));
    outputs.iter().map(Tensor::detach).collect()
}

/// Equal up to what f32 rounds, relative to the largest element; sums of `terms` terms.
fn check(what: &str, got: &[Tensor], want: &[Tensor], terms: i64) {
    assert_eq!(got.len(), want.len());
    for (i, (got, want)) in got.iter().zip(want).enumerate() {
        assert_eq!(got.size(), want.size(), "{what}, {i}");
        if want.numel() == 0 {
            continue;
        }
        let difference = (got.to_kind(Kind::Double) - want).abs().max();
        let difference = difference.double_value(&[]) / want.abs().max().double_value(&[]);
        let tolerance = 2e-7 * (4.0 + (terms as f64).sqrt());
        assert!(difference <= tolerance, "{what}, {i}: {difference}");
    }
}

#[test]
fn linear_layers_of_every_shape() {
    for threads in [1, 3] {
        let _guard = with_threads(threads);
        for (rows, inputs, outputs) in [
            (1, 1, 1),
            (5, 3, 7),
            (14, 16, 32),
            (33, 40, 70),
            (100, 900, 65),
            (129, 1700, 34),
            (2200, 70, 50),
            (300, 64, 400),
            // Rows that all begin at one place of a page.
            (45, 1024, 40),
        ] {
            let (x, bias) = (random(&[rows, inputs], 0.1), random(&[outputs], 0.3));
            for in_out in [false, true] {
                let shape = if in_out {
                    [inputs, outputs]
                } else {
                    [outputs, inputs]
                };
                let weight = random(&shape, 0.2);
                let ours = leaves(&[&x, &weight, &bias], Kind::Float);
                let layer = if in_out {
                    kernels::linear_in_out
                } else {
                    kernels::linear
                };
                if layer(&x, &weight, None).unwrap().is_none() {
                    assert!(!has_kernels());
                    return;
                }
                let got = trained(&ours, |t| {
                    vec![layer(&t[0], &t[1], Some(&t[2])).unwrap().unwrap()]
                });
                let want = trained(&leaves(&[&x, &weight, &bias], Kind::Double), |t| {
                    let weight = if in_out {
                        t[1].transpose(0, 1)
                    } else {
                        t[1].shallow_clone()
                    };
                    vec![t[0].linear(&weight, Some(&t[2]))]
                });
                let what = format!("{rows} x {inputs} x {outputs}, {in_out}, {threads} threads");
                check(&what, &got, &want, rows.max(inputs).max(outputs));
            }
        }
    }
}

#[test]
fn layers_of_the_same_rows() {
    let _guard = with_threads(2);
    // The gradients of the larger two are more rows than are packed at once.
    for (first, second) in [(40, 9), (700, 601)] {
        // Rows of a wider matrix, and one layer that no loss reads.
        let inputs = [
            &random(&[50, 100], 0.1),
            &random(&[first, 60], 0.2),
            &random(&[second, 60], 0.3),
            &random(&[70, 60], 0.4),
            &random(&[second], 0.5),
        ];
        let plain = |t: &[Tensor]| {
            let x = t[0].narrow(1, 20, 60);
            vec![
                x.linear(&t[1], None::<&Tensor>),
                x.linear(&t[2], Some(&t[4])),
            ]
        };
        let ours = leaves(&inputs, Kind::Float);
        let got = trained(&ours, |t| {
            let x = t[0].narrow(1, 20, 60);
            let maps = [(&t[1], None), (&t[2], Some(&t[4])), (&t[3], None)];
            match kernels::linears(&x, maps).unwrap() {
                Some([first, second, _]) => vec![first, second],
                None => {
                    assert!(!has_kernels());
                    plain(t)
                }
            }
        });
        let want = trained(&leaves(&inputs, Kind::Double), plain);
        // What no loss reads has none.
        assert!(!ours[3].grad().defined());
        check("three layers", &got, &want, first.max(100));
    }
}

/// Adapters train rows through layers that are frozen, and frozen rows stop at the first that is not.
#[test]
fn frozen_weights_and_rows_get_no_gradient() {
    let _guard = with_threads(1);
    let (x, weight) = (random(&[20, 30], 0.1), random(&[40, 30], 0.2));
    for (x_learns, weight_learns) in [(true, false), (false, true)] {
        let x = x.copy().set_requires_grad(x_learns);
        let weight = weight.copy().set_requires_grad(weight_learns);
        let Some(y) = kernels::linear(&x, &weight, None).unwrap() else {
            assert!(!has_kernels());
            return;
        };
        y.sum(Kind::Float).backward();
        assert_eq!(x.grad().defined(), x_learns);
        assert_eq!(weight.grad().defined(), weight_learns);
        let ones = Tensor::ones([20, 40], (Kind::Float, Device::Cpu));
        let (got, want) = match x_learns {
            true => (x.grad(), ones.matmul(&weight)),
            false => (weight.grad(), ones.transpose(0, 1).matmul(&x)),
        };
        check("frozen", &[got], &[want.to_kind(Kind::Double)], 40);
    }
}

/// The same bytes whatever is beside a row, and however many threads there are.
#[test]
fn nothing_depends_on_neighbours_or_threads() {
    let (x, weight) = (random(&[700, 300], 0.1), random(&[130, 300], 0.2));
    let run = |threads| {
        let _guard = with_threads(threads);
        trained(
            &leaves(&[&x, &weight], Kind::Float),
            |t| match kernels::linear(&t[0], &t[1], None).unwrap() {
                Some(y) => vec![
                    recorded::rms_norm(&y, &random(&[130], 0.3), 1e-5)
                        .unwrap()
                        .unwrap(),
                ],
                None => {
                    vec![Tensor::zeros([1], (Kind::Float, Device::Cpu)) * t[0].sum(Kind::Float)]
                }
            },
        )
    };
    let (one, four) = (run(1), run(4));
    assert!(
        one.iter()
            .zip(&four)
            .all(|(a, b)| a.equal(b) || !has_kernels())
    );
    let _guard = with_threads(2);
    let _no_grad = tch::no_grad_guard();
    let Some(all) = kernels::linear(&x, &weight, None).unwrap() else {
        return;
    };
    for (first, rows) in [(0, 33), (13, 50), (699 - 40, 41)] {
        let some = kernels::linear(&x.narrow(0, first, rows), &weight, None);
        assert!(some.unwrap().unwrap().equal(&all.narrow(0, first, rows)));
    }
}

#[test]
fn norms() {
    for threads in [1, 3] {
        let _guard = with_threads(threads);
        for (rows, width) in [(1, 16), (5, 64), (300, 50), (130, 577)] {
            let inputs = [&random(&[rows, width], 0.1), &random(&[width], 0.2)];
            let got = trained(&leaves(&inputs, Kind::Float), |t| {
                let got = recorded::rms_norm(&t[0], &t[1], 1e-3).unwrap();
                assert!(got.is_some() || !has_kernels());
                vec![got.unwrap_or_else(|| norm(&t[0], &t[1]))]
            });
            let want = trained(&leaves(&inputs, Kind::Double), |t| vec![norm(&t[0], &t[1])]);
            check(&format!("{rows} x {width}"), &got, &want, rows.max(width));
        }
    }
}

fn norm(x: &Tensor, weight: &Tensor) -> Tensor {
    let mean = x.square().mean_dim([-1i64].as_slice(), true, x.kind());
    x * (mean + 1e-3).rsqrt() * weight
}

#[test]
fn they_can_be_turned_off() {
    let _guard = with_threads(1);
    let x = random(&[40, 30], 0.1);
    kernels::set_training(false);
    assert!(kernels::linear(&x, &x, None).unwrap().is_none());
    assert!(recorded::silu_gated(&x, &x).unwrap().is_none());
    kernels::set_training(true);
    assert_eq!(
        recorded::silu_gated(&x, &x).unwrap().is_some(),
        has_kernels()
    );
}

#[test]
fn rotary_positions() {
    let _guard = with_threads(2);
    for (rows, heads, d, width) in [(1, 2, 64, 64), (5, 3, 64, 32), (700, 9, 20, 10)] {
        let x = random(&[rows, heads, d], 0.1);
        let angles = random(&[rows, 1, width / 2], 0.2);
        let cos = Tensor::cat(&[angles.cos(), angles.cos()], 2);
        let sin = Tensor::cat(&[-angles.sin(), angles.sin()], 2);
        let rotate = |x: &Tensor| {
            let turning = x.narrow(2, 0, width);
            let kind = x.kind();
            let turned =
                &turning * cos.to_kind(kind) + turning.roll(width / 2, 2) * sin.to_kind(kind);
            Tensor::cat(&[turned, x.narrow(2, width, d - width)], 2)
        };
        let got = trained(&leaves(&[&x], Kind::Float), |t| {
            let got = recorded::rotate(&t[0], &cos, &sin).unwrap();
            assert!(got.is_some() || !has_kernels());
            vec![got.unwrap_or_else(|| rotate(&t[0]))]
        });
        let want = trained(&leaves(&[&x], Kind::Double), |t| vec![rotate(&t[0])]);
        check(&format!("{rows} x {heads} x {d}, {width}"), &got, &want, 2);
    }
}

#[test]
fn gates() {
    let _guard = with_threads(2);
    for shape in [[1, 3], [7, 45], [40, 1536]] {
        let inputs = [&(random(&shape, 0.1) * 10.0), &random(&shape, 0.3)];
        let got = trained(&leaves(&inputs, Kind::Float), |t| {
            let got = recorded::silu_gated(&t[0], &t[1]).unwrap();
            assert!(got.is_some() || !has_kernels());
            vec![got.unwrap_or_else(|| t[0].silu() * &t[1])]
        });
        let want = trained(&leaves(&inputs, Kind::Double), |t| {
            vec![t[0].silu() * &t[1]]
        });
        check(&format!("{shape:?}"), &got, &want, 4);
    }
}
