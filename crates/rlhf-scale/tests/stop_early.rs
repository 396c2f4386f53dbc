//! Checkpoints whose recomputation stops early: that it does, and what that must not change. What
//! holds for every checkpoint is in `checkpoint.rs`.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rlhf_scale::{Checkpoint, Error, clear_grads, custom_function};
use tch::{Device, Kind, Tensor};

/// No closure here draws random numbers, so tests need not take turns at the generator.
const STOPPING: Checkpoint = Checkpoint {
    offload: false,
    preserve_rng: false,
    stop_early: true,
};
const TO_THE_END: Checkpoint = Checkpoint {
    stop_early: false,
    ..STOPPING
};

fn leaf(shape: &[i64], number: f64) -> Tensor {
    let count = shape.iter().product::<i64>();
    let values = Tensor::arange(count, (Kind::Float, Device::Cpu)) * 1.7 + number * 0.9;
    (values.sin() * 0.5).view(shape).set_requires_grad(true)
}

fn take_grad(leaf: &Tensor) -> Tensor {
    let grad = leaf.grad().copy();
    clear_grads(&[leaf.shallow_clone()]).unwrap();
    grad
}

fn backward_error(loss: &Tensor) -> String {
    loss.f_backward().unwrap_err().to_string()
}

#[test]
fn what_follows_the_last_saved_tensor_is_not_done_again() {
    let (x, w) = (leaf(&[3, 4], 1.0), leaf(&[4, 4], 2.0));
    for (mode, expected) in [(STOPPING, [2, 1]), (TO_THE_END, [2, 2])] {
        let reached = Arc::new([AtomicUsize::new(0), AtomicUsize::new(0)]);
        let (counts, weight) = (Arc::clone(&reached), w.shallow_clone());
        let output = mode.run(&[&x], move |inputs| {
            counts[0].fetch_add(1, Ordering::SeqCst);
            let product = inputs[0].f_tanh()?.f_matmul(&weight)?;
            counts[1].fetch_add(1, Ordering::SeqCst);
            Ok::<_, Error>(vec![inputs[0].f_add(&product)?])
        });
        output.unwrap()[0].sum(Kind::Float).backward();
        assert_eq!([0, 1].map(|i| reached[i].load(Ordering::SeqCst)), expected);
        let plain = (&x + x.tanh().matmul(&w)).sum(Kind::Float);
        let grads = (take_grad(&x), take_grad(&w));
        plain.backward();
        assert_eq!(grads, (take_grad(&x), take_grad(&w)));
    }
}

/// A closure that calls operations that panic is stopped by a panic, which goes no further.
#[test]
fn a_closure_that_panics_on_errors_is_stopped_too() {
    let (x, w) = (leaf(&[3, 4], 3.0), leaf(&[4, 4], 4.0));
    let weight = w.shallow_clone();
    let output = STOPPING.run(&[&x], move |inputs| {
        Ok::<_, Error>(vec![inputs[0].tanh().matmul(&weight)])
    });
    output.unwrap()[0].sum(Kind::Float).backward();
    let grads = (take_grad(&x), take_grad(&w));
    x.tanh().matmul(&w).sum(Kind::Float).backward();
    assert_eq!(grads, (take_grad(&x), take_grad(&w)));
}

/// Twice the same input, which the closure has captured as well.
#[test]
fn an_input_may_come_in_several_ways() {
    let a = leaf(&[5], 5.0);
    for mode in [STOPPING, TO_THE_END] {
        let x = &a * 2.0;
        let captured = x.shallow_clone();
        let output = mode.run(&[&x, &x], move |inputs| {
            let product = inputs[0].f_mul(&inputs[1])?.f_mul(&captured)?;
            Ok::<_, Error>(vec![product.f_sin()?])
        });
        output.unwrap()[0].sum(Kind::Float).backward();
        let grad = take_grad(&a);
        let x = &a * 2.0;
        (&x * &x * &x).sin().sum(Kind::Float).backward();
        assert!(grad.allclose(&take_grad(&a), 1e-6, 1e-6, false));
    }
}

#[test]
fn a_graph_that_is_kept_is_recomputed_for_every_backward() {
    let x = leaf(&[6], 6.0);
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let outputs = STOPPING.run(&[&x], move |inputs| {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok::<_, Error>(vec![inputs[0].f_sin()?.f_exp()?])
    });
    let loss = outputs.unwrap()[0].sum(Kind::Float);
    let grad = |keep: bool| Tensor::f_run_backward(&[&loss], &[&x], keep, false).unwrap();
    let (first, second) = (grad(true), grad(false));
    assert_eq!(calls.load(Ordering::SeqCst), 3);
    assert_eq!(first, second);
    assert_eq!(first[0], (x.sin().exp() * x.cos()).detach());
    assert!(backward_error(&loss).contains("second time"));
}

#[test]
fn there_is_no_second_derivative() {
    let x = leaf(&[6], 6.5);
    let outputs = STOPPING.run(&[&x], |inputs| Ok::<_, Error>(vec![inputs[0].f_sin()?]));
    let loss = outputs.unwrap()[0].sum(Kind::Float);
    let error = Tensor::f_run_backward(&[&loss], &[&x], true, true).unwrap_err();
    assert!(error.to_string().contains("no second derivative"));
}

/// Checkpoints of both forms inside each other, three deep.
#[test]
fn checkpoints_of_both_forms_nest() {
    let (x, w) = (leaf(&[3, 4], 7.0), leaf(&[4, 4], 8.0));
    let step = |x: &Tensor, w: &Tensor| x.f_add(&x.f_matmul(w)?.f_gelu("none")?);
    let plain = {
        let mut y = &x * 1.0;
        for _ in 0..6 {
            y = step(&y, &w).unwrap();
        }
        y.square().sum(Kind::Float).backward();
        (take_grad(&x), take_grad(&w))
    };
    for bits in 0..8 {
        let mode = move |level: i32| match bits >> level & 1 {
            1 => STOPPING,
            _ => TO_THE_END,
        };
        let weight = w.shallow_clone();
        let outputs = mode(0).run(&[&(&x * 1.0)], move |inputs| {
            let mut y = step(&inputs[0], &weight)?;
            for _ in 0..2 {
                let weight = weight.shallow_clone();
                let outputs = mode(1).run(&[&y], move |inputs| {
                    let y = step(&inputs[0], &weight)?;
                    let weight = weight.shallow_clone();
                    mode(2).run(&[&y], move |inputs| {
                        Ok::<_, Error>(vec![step(&inputs[0], &weight)?])
                    })
                });
                y = outputs?.remove(0);
            }
            Ok::<_, Error>(vec![step(&y, &weight)?])
        });
        outputs.unwrap()[0].square().sum(Kind::Float).backward();
        let grads = (take_grad(&x), take_grad(&w));
        // A weight that is used often gets the same sum in another order where a checkpoint adds up
        // its own part first.
        for (got, expected) in [(&grads.0, &plain.0), (&grads.1, &plain.1)] {
            let close = got.allclose(expected, 1e-5, 1e-6, false);
            assert!(close, "modes {bits:03b}");
        }
        if bits == 7 {
            assert_eq!(grads, plain);
        }
    }
}

/// What a function with a backward of its own keeps is its own; around it all is as ever.
#[test]
fn custom_functions_inside() {
    let x = leaf(&[4], 9.0);
    let outputs = STOPPING.run(&[&x], |inputs| {
        let doubled = custom_function(&[&inputs[0].f_exp()?], |inputs| {
            let backward = |grads: &[Option<Tensor>], _: &[bool]| -> Result<_, Error> {
                Ok(vec![grads[0].as_ref().map(|grad| grad * 2.0)])
            };
            Ok::<_, Error>((vec![inputs[0].f_mul_scalar(2.0)?], backward))
        })?;
        Ok::<_, Error>(vec![doubled[0].f_sin()?])
    });
    outputs.unwrap()[0].sum(Kind::Float).backward();
    let grad = take_grad(&x);
    (x.exp() * 2.0).sin().sum(Kind::Float).backward();
    assert!(grad.allclose(&take_grad(&x), 1e-6, 1e-6, false));
}

/// The value that backward needs must be the one that was saved.
#[test]
fn a_saved_tensor_that_the_closure_changes_is_noticed() {
    let x = leaf(&[4], 10.0);
    let outputs = STOPPING.run(&[&x], |inputs| {
        let mut exp = inputs[0].f_exp()?;
        let product = exp.f_mul(&exp)?;
        let _ = exp.f_add_scalar_(1.0)?;
        Ok::<_, Error>(vec![product.f_sin()?])
    });
    let error = backward_error(&outputs.unwrap()[0].sum(Kind::Float));
    assert!(error.contains("inplace operation"), "{error}");
}

/// Another captured parameter of the same shape, and a saved tensor more.
#[test]
fn another_graph_is_noticed_by_where_its_tensors_come_from() {
    let (x, one, two) = (
        leaf(&[3, 4], 11.0),
        leaf(&[4, 4], 12.0),
        leaf(&[4, 4], 13.0),
    );
    for transposed in [false, true] {
        let calls = AtomicUsize::new(0);
        let (one, two) = (one.shallow_clone(), two.shallow_clone());
        let outputs = STOPPING.run(&[&x], move |inputs| {
            let weight = match calls.fetch_add(1, Ordering::SeqCst) {
                0 => &one,
                _ => &two,
            };
            let output = match transposed {
                true => inputs[0].f_linear(weight, None::<&Tensor>)?,
                false => inputs[0].f_matmul(weight)?,
            };
            Ok::<_, Error>(vec![output])
        });
        let error = backward_error(&outputs.unwrap()[0].sum(Kind::Float));
        assert!(error.contains("built another graph"), "{error}");
    }
}
