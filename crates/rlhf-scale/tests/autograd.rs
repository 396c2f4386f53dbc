//! Functions whose forward and backward are Rust closures.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use rlhf_scale::{Error, Saved, checkpoint, custom_function};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

fn leaf(shape: &[i64], seed: i64) -> Tensor {
    tch::manual_seed(seed);
    Tensor::randn(shape, F32).set_requires_grad(true)
}

/// The gradient of a leaf, which is cleared.
fn take_grad(leaf: &Tensor) -> Tensor {
    let grad = leaf.grad().copy();
    rlhf_scale::clear_grads(&[leaf.shallow_clone()]).unwrap();
    grad
}

/// `a · b` and `a + b` by hand.
fn product_and_sum(a: &Tensor, b: &Tensor) -> (Tensor, Tensor) {
    let mut outputs = custom_function(&[a, b], |inputs| {
        let (a, b) = (Saved::new(&inputs[0])?, Saved::new(&inputs[1])?);
        let outputs = vec![&inputs[0] * &inputs[1], &inputs[0] + &inputs[1]];
        let backward = move |grads: &[Option<Tensor>], needed: &[bool]| -> Result<_, Error> {
            let through = |factor: &Saved| -> Result<_, Error> {
                let scaled = |g: &Tensor| Ok::<_, Error>(g * factor.get()?);
                let product = grads[0].as_ref().map(scaled);
                let sum = grads[1].as_ref().map(Tensor::shallow_clone);
                Ok(match (product.transpose()?, sum) {
                    (Some(product), Some(sum)) => Some(product + sum),
                    (one, other) => one.or(other),
                })
            };
            Ok(vec![
                if needed[0] { through(&b)? } else { None },
                if needed[1] { through(&a)? } else { None },
            ])
        };
        Ok::<_, Error>((outputs, backward))
    })
    .unwrap();
    let sum = outputs.remove(1);
    (outputs.remove(0), sum)
}

#[test]
fn gradients_are_those_of_the_plain_operations() {
    let (a, b) = (leaf(&[3, 4], 1), leaf(&[3, 4], 2));
    let run = |by_hand: bool| {
        // Both inputs are results themselves, and one leaf is used outside too.
        let (x, y) = (a.tanh(), &b * 3.0);
        let (product, sum) = match by_hand {
            true => product_and_sum(&x, &y),
            false => (&x * &y, &x + &y),
        };
        let loss = (product.exp() * sum.sigmoid() * &a).sum(Kind::Float);
        loss.backward();
        (take_grad(&a), take_grad(&b))
    };
    let (by_hand, plain) = (run(true), run(false));
    assert!(by_hand.0.allclose(&plain.0, 1e-6, 1e-7, false));
    assert!(by_hand.1.allclose(&plain.1, 1e-6, 1e-7, false));
}

#[test]
fn an_unused_output_has_no_gradient_and_an_unneeded_input_is_not_asked_for() {
    let a = leaf(&[2], 1);
    let constant = Tensor::ones([2], F32);
    let seen = Arc::new(std::sync::Mutex::new(Vec::new()));
    let noted = Arc::clone(&seen);
    let outputs = custom_function(&[&a, &constant], |inputs| {
        let outputs = vec![
            &inputs[0] * 2.0,
            &inputs[0] * 5.0,
            inputs[0].argmax(-1, false),
        ];
        let backward = move |grads: &[Option<Tensor>], needed: &[bool]| -> Result<_, Error> {
            let defined: Vec<bool> = grads.iter().map(Option::is_some).collect();
            noted.lock().unwrap().push((defined, needed.to_vec()));
            Ok(vec![grads[1].as_ref().map(|g| g * 5.0), None])
        };
        Ok::<_, Error>((outputs, backward))
    })
    .unwrap();
    assert!(outputs[0].requires_grad() && !outputs[2].requires_grad());
    outputs[1].sum(Kind::Float).backward();
    assert_eq!(Vec::<f32>::try_from(take_grad(&a)).unwrap(), [5.0, 5.0]);
    let seen = seen.lock().unwrap();
    assert_eq!(*seen, [(vec![false, true, false], vec![true, false])]);
}

#[test]
fn without_gradients_the_outputs_are_plain() {
    let a = leaf(&[2], 1);
    let constant = Tensor::ones([2], F32);
    let under_no_grad = tch::no_grad(|| product_and_sum(&a, &constant).0);
    assert!(!under_no_grad.requires_grad());
    assert!(!product_and_sum(&constant, &constant).0.requires_grad());
}

#[test]
fn functions_nest_in_functions_and_in_checkpoints() {
    let (a, b) = (leaf(&[5], 3), leaf(&[5], 4));
    // A custom function whose backward runs a graph of its own, custom functions in it.
    let nested = |x: &Tensor, y: &Tensor| {
        let mut outputs = custom_function(&[x, y], |inputs| {
            let (x, y) = (Saved::new(&inputs[0])?, Saved::new(&inputs[1])?);
            let output = product_and_sum(&inputs[0], &inputs[1]).0.exp();
            let backward = move |grads: &[Option<Tensor>], _: &[bool]| -> Result<_, Error> {
                let leaf = |saved: &Saved| -> Result<Tensor, Error> {
                    Ok(saved.get()?.detach().set_requires_grad(true))
                };
                let (x, y) = (leaf(&x)?, leaf(&y)?);
                let output = tch::with_grad(|| product_and_sum(&x, &y).0.exp());
                let grad = grads[0].as_ref().unwrap().shallow_clone();
                rlhf_scale::backward(&[output], &[grad])?;
                Ok(vec![Some(x.grad()), Some(y.grad())])
            };
            Ok::<_, Error>((vec![output], backward))
        })
        .unwrap();
        outputs.remove(0)
    };
    (&a * &b).exp().sum(Kind::Float).backward();
    let expected = (take_grad(&a), take_grad(&b));
    nested(&a, &b).sum(Kind::Float).backward();
    let in_function = (take_grad(&a), take_grad(&b));
    let captured = b.shallow_clone();
    let outputs = checkpoint(&[&a], move |inputs| {
        Ok::<_, Error>(vec![nested(&inputs[0], &captured)])
    })
    .unwrap();
    outputs[0].sum(Kind::Float).backward();
    let in_checkpoint = (take_grad(&a), take_grad(&b));
    for got in [in_function, in_checkpoint] {
        assert!(got.0.allclose(&expected.0, 1e-6, 1e-7, false));
        assert!(got.1.allclose(&expected.1, 1e-6, 1e-7, false));
    }
}

/// A function of one input with this backward.
fn with_backward(
    x: &Tensor,
    backward: impl Fn() -> Result<Vec<Option<Tensor>>, Error> + Send + 'static,
) -> Tensor {
    let mut outputs = custom_function(&[x], |inputs| {
        let output = &inputs[0] * 1.0;
        Ok::<_, Error>((vec![output], move |_: &[Option<Tensor>], _: &[bool]| {
            backward()
        }))
    })
    .unwrap();
    outputs.remove(0).sum(Kind::Float)
}

#[test]
fn failures_in_backward_are_errors_and_leave_the_process_usable() {
    let a = leaf(&[2], 1);
    let text = |loss: Tensor| {
        let one = Tensor::ones([], F32);
        rlhf_scale::backward(&[loss], &[one])
            .unwrap_err()
            .to_string()
    };
    let loss = with_backward(&a, || panic!("out of {}", "luck"));
    assert!(text(loss).contains("panicked: out of luck"));
    let loss = with_backward(&a, || Err(Error::NoGradients { parameters: 7 }));
    assert!(text(loss).contains("none of the 7 parameters has a gradient"));
    let loss = with_backward(&a, || Ok(vec![]));
    assert!(text(loss).contains("returned 0 tensors; it should return 1"));
    let loss = with_backward(&a, || Ok(vec![Some(Tensor::zeros([3], F32))]));
    assert!(text(loss).contains("[3]"), "a gradient of a wrong shape");

    a.square().sum(Kind::Float).backward();
    assert!(take_grad(&a).equal(&(&a * 2.0).detach()));
}

#[test]
fn an_error_of_forward_comes_out_as_it_is() {
    let a = leaf(&[2], 1);
    type Backward = fn(&[Option<Tensor>], &[bool]) -> Result<Vec<Option<Tensor>>, Error>;
    let outcome = custom_function(&[&a], |_| {
        Err::<(Vec<Tensor>, Backward), _>(Error::NoGradients { parameters: 3 })
    });
    assert!(matches!(outcome, Err(Error::NoGradients { parameters: 3 })));
    assert!((&a * 1.0).requires_grad(), "recording is on again");
}

#[test]
fn a_saved_tensor_that_changed_is_noticed() {
    let (a, b) = (leaf(&[2], 1), leaf(&[2], 2));
    let (product, _) = product_and_sum(&a, &b);
    let mut alias = b.detach();
    let _ = alias.g_add_scalar_(1.0);
    let one = Tensor::ones([], F32);
    let error = rlhf_scale::backward(&[product.sum(Kind::Float)], &[one]).unwrap_err();
    assert!(
        error.to_string().contains("changed in place 1 times"),
        "{error}"
    );
}

#[test]
fn backward_runs_once_and_frees_the_closure() {
    let a = leaf(&[2], 1);
    let calls = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&calls);
    let loss = with_backward(&a, move || {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(vec![None])
    });
    assert_eq!(Arc::strong_count(&calls), 2);
    loss.backward();
    assert_eq!(calls.load(Ordering::SeqCst), 1);
    assert_eq!(Arc::strong_count(&calls), 1, "freed by backward");
    assert!(loss.f_backward().is_err());

    let counted = Arc::clone(&calls);
    drop(with_backward(&a, move || {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok(vec![None])
    }));
    assert_eq!(
        Arc::strong_count(&calls),
        1,
        "freed with a graph that never ran"
    );
}

#[test]
fn backward_may_run_on_another_thread() {
    let (a, b) = (leaf(&[4], 1), leaf(&[4], 2));
    let loss = product_and_sum(&a, &b).0.sum(Kind::Float);
    std::thread::spawn(move || loss.backward()).join().unwrap();
    assert!(take_grad(&a).equal(&b.detach()));
}
