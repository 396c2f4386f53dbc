//! An update that fails changes nothing.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use rlhf_scale::{Error, Updater};
use support::{CPU, Net, config, train};
use tch::{Kind, Tensor};

/// Runs a good update, a bad one that must fail, and a good one; weights, moments, schedule and the
/// next update must be as if the bad one had not been.
fn fails_without_trace(bad: impl Fn(&Net, usize) -> Result<Tensor, Error>) -> Error {
    let (net, undisturbed) = (Net::new(Kind::Float), Net::new(Kind::Float));
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    let mut other = Updater::new(undisturbed.aliases(), &config()).unwrap();
    for _ in 0..3 {
        train(&net, &mut updater, 2);
        train(&undisturbed, &mut other, 2);
    }
    let before = net.bytes();
    let error = updater.update(2, |i| bad(&net, i)).unwrap_err();
    assert_eq!(net.bytes(), before, "a failed step moved a weight");
    assert!(!net.grads_defined(), "a failed step left a gradient");
    assert_eq!(
        train(&net, &mut updater, 2),
        train(&undisturbed, &mut other, 2)
    );
    assert_eq!(net.bytes(), undisturbed.bytes());
    error
}

#[test]
fn an_error_of_the_closure_changes_nothing() {
    let error = fails_without_trace(|net, i| match i {
        0 => Ok(net.loss(7, 0, 4)),
        _ => Err(Error::NoGradients { parameters: 77 }),
    });
    assert!(matches!(error, Error::NoGradients { parameters: 77 }));
}

#[test]
fn a_nan_loss_changes_nothing() {
    let error = fails_without_trace(|net, i| {
        let loss = net.loss(7, 0, 4);
        Ok(if i == 1 { loss * f64::NAN } else { loss })
    });
    assert!(
        matches!(error, Error::NonFiniteLoss { loss, microbatch: 1 } if loss.is_nan()),
        "{error}"
    );
}

#[test]
fn a_gradient_that_is_not_finite_changes_nothing_and_is_named() {
    // The root's slope at zero is infinite while its value is finite.
    let error = fails_without_trace(|net, i| {
        let root = |name: &str| (net.get(name).sum(Kind::Float) * 0.0).sqrt();
        let loss = net.loss(7, 0, 4);
        Ok(if i == 0 {
            loss + root("b.weight") + root("a.weight")
        } else {
            loss
        })
    });
    match error {
        Error::NonFiniteGradient { parameter, loss } => {
            assert_eq!(parameter, "a.weight");
            assert!(loss.is_finite());
        }
        other => panic!("{other}"),
    }
}

#[test]
fn an_overflowing_norm_changes_nothing() {
    let error = fails_without_trace(|net, _| Ok(net.loss(7, 0, 4) * 1e25));
    assert!(
        matches!(error, Error::NormOverflow { loss } if loss > 1e20),
        "{error}"
    );
}

#[test]
fn unusable_losses_are_typed_errors() {
    let error = fails_without_trace(|net, _| Ok(net.get("a.weight") * 1.0));
    assert!(matches!(&error, Error::LossShape { microbatch: 0, shape } if *shape == [3, 4]));
    let error = fails_without_trace(|net, _| Ok(tch::no_grad(|| net.loss(7, 0, 4))));
    assert!(matches!(error, Error::LossWithoutGraph { microbatch: 0 }));
    let stranger = Tensor::ones([1], (Kind::Float, CPU)).set_requires_grad(true);
    let error = fails_without_trace(|_, _| Ok(&stranger * 2.0));
    assert!(matches!(error, Error::NoGradients { parameters: 3 }));
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    let error = updater.update::<Error>(0, |_| unreachable!()).unwrap_err();
    assert!(error.to_string().contains("empty"), "{error}");
}

#[test]
fn a_backward_that_fails_changes_nothing() {
    let error = fails_without_trace(|net, i| {
        let loss = net.loss(7, 0, 4);
        if i == 1 {
            loss.backward(); // frees the graph, so that the updater's own backward is refused
        }
        Ok(loss)
    });
    let message = error.to_string();
    assert!(message.contains("second time"), "{message}");
    assert!(!message.contains("Exception raised from"), "{message}");
}
