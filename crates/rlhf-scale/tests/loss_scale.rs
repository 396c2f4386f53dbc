//! Loss scaling through the updater: GradScaler's course, and what a skipped update leaves alone.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use rlhf_scale::{
    AdamWConfig, EmaConfig, Error, LossScale, Precision, Schedule, UpdateConfig, UpdateStats,
    Updater,
};
use serde_json::Value;
use support::{CPU, Net, bytes, config, train};
use tch::{Kind, Tensor};

/// The configuration of `support::config` with this loss scaling.
fn scaled(loss_scale: LossScale) -> UpdateConfig {
    UpdateConfig {
        loss_scale: Some(loss_scale),
        ..config()
    }
}

/// Zero, with an infinite slope in the parameter.
fn steep(param: &Tensor) -> Tensor {
    (param.sum(Kind::Float) * 0.0).sqrt()
}

/// Weights and optimiser state, byte for byte.
fn snapshot(updater: &Updater, dir: &std::path::Path) -> Vec<Vec<u8>> {
    updater.save(dir).unwrap();
    ["parameters", "optimizer", "ema"]
        .map(|name| std::fs::read(dir.join(format!("{name}.safetensors"))).unwrap_or_default())
        .into()
}

/// Reference values made by running PyTorch 2.11's `GradScaler` with SGD.
#[test]
fn the_course_is_that_of_grad_scaler() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/goldens/optim/grad_scaler/case.json"
    );
    let case: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let (params, tolerance) = (&case["params"], &case["tolerance"]["param_abs"]);
    let config = UpdateConfig {
        // No memory of gradients, and an epsilon that outweighs them: p ← p - 0.1 g, as SGD.
        optimizer: AdamWConfig {
            lr: 1e7,
            beta1: 0.0,
            beta2: 0.0,
            eps: 1e8,
            ..AdamWConfig::default()
        },
        schedule: Schedule::constant(),
        max_grad_norm: Some(1.0),
        ..scaled(LossScale {
            initial: params["init_scale"].as_f64().unwrap(),
            growth_factor: params["growth_factor"].as_f64().unwrap(),
            backoff_factor: params["backoff_factor"].as_f64().unwrap(),
            growth_interval: params["growth_interval"].as_u64().unwrap(),
            ..LossScale::default()
        })
    };
    let weight = Tensor::ones([3], (Kind::Float, CPU)).set_requires_grad(true);
    let slope = Tensor::from_slice(&[1f32, -2.0, 0.5]);
    let mut updater = Updater::new(vec![("p".into(), weight.shallow_clone())], &config).unwrap();

    let steps = case["expect"]["steps"].as_array().unwrap();
    assert_eq!(steps.len(), 30);
    for (i, expected) in steps.iter().enumerate() {
        let stats = updater
            .update::<Error>(1, |_| {
                let loss = (&weight * &slope).sum(Kind::Float);
                Ok(if expected["non_finite"] == true {
                    loss + steep(&weight)
                } else {
                    loss
                })
            })
            .unwrap();
        assert_eq!(stats.loss_scale, expected["scale_used"].as_f64(), "{i}");
        assert_eq!(Value::from(!stats.skipped), expected["stepped"], "{i}");
        match expected["unscaled_grad_norm"].as_f64() {
            Some(norm) => assert!((stats.grad_norm - norm).abs() < 1e-6, "{i}"),
            None => assert_eq!(stats.grad_norm, f64::INFINITY, "{i}"),
        }
        let scaler = updater.loss_scaler().unwrap();
        assert_eq!(
            Some(scaler.scale()),
            expected["scale_after"].as_f64(),
            "{i}"
        );
        let tracker = expected["growth_tracker"].as_u64();
        assert_eq!(Some(scaler.growth_tracker()), tracker, "{i}");
        let difference = weight.double_value(&[0]) - expected["param0"].as_f64().unwrap();
        assert!(difference.abs() < tolerance.as_f64().unwrap(), "{i}");
    }
    let skipped = params["non_finite_steps"].as_array().unwrap().len() as u64;
    assert_eq!(updater.loss_scaler().unwrap().skipped_steps(), skipped);
    assert_eq!(updater.step(), 30 - skipped);
}

#[test]
fn a_power_of_two_changes_no_bit() {
    let (plain, other) = (Net::new(Kind::Float), Net::new(Kind::Float));
    let mut of_plain = Updater::new(plain.aliases(), &config()).unwrap();
    let mut of_other = Updater::new(other.aliases(), &scaled(LossScale::default())).unwrap();
    for _ in 0..5 {
        let expected = UpdateStats {
            loss_scale: Some(65536.0),
            ..train(&plain, &mut of_plain, 2)
        };
        assert_eq!(train(&other, &mut of_other, 2), expected);
    }
    assert_eq!(plain.bytes(), other.bytes());
}

#[test]
fn gradients_too_small_for_f16_arrive() {
    let stats = |config: &UpdateConfig| {
        let weight = Tensor::ones([4], (Kind::Half, CPU)).set_requires_grad(true);
        let params = vec![("w".to_string(), weight.shallow_clone())];
        let mut updater = Updater::new(params, config).unwrap();
        let stats = updater
            .update::<Error>(2, |_| {
                Ok(weight.to_kind(Kind::Float).sum(Kind::Float) * 1e-8)
            })
            .unwrap();
        (stats, weight.double_value(&[0]))
    };
    let plain = UpdateConfig {
        optimizer: AdamWConfig {
            lr: 0.5,
            ..AdamWConfig::default()
        },
        ..UpdateConfig::default()
    };
    assert_eq!(
        stats(&plain).0.grad_norm,
        0.0,
        "the test needs an underflow"
    );
    let (stats, weight) = stats(&plain.for_precision(Precision::F16));
    // Four elements, two microbatches: √4 · 2 · 1e-8, to f16's precision.
    assert!(
        (stats.grad_norm / 4e-8 - 1.0).abs() < 1e-3,
        "{}",
        stats.grad_norm
    );
    assert!(!stats.skipped && weight < 0.9, "{weight}");
}

#[test]
fn f16_overflows_lower_the_scale_until_the_gradients_fit() {
    let weight = Tensor::zeros([1], (Kind::Half, CPU)).set_requires_grad(true);
    let params = vec![("w".to_string(), weight.shallow_clone())];
    let config = UpdateConfig::default().for_precision(Precision::F16);
    let mut updater = Updater::new(params, &config).unwrap();
    let mut update = || {
        updater
            .update::<Error>(1, |_| Ok((&weight * 10.0).sum(Kind::Float)))
            .unwrap()
    };
    // 10 · 2^16 … 10 · 2^13 are above 65504, 10 · 2^12 is not.
    for count in 1..=4 {
        let stats = update();
        assert!(stats.skipped);
        assert_eq!((stats.step, stats.skipped_steps), (0, count));
    }
    let stats = update();
    assert_eq!((stats.skipped, stats.loss_scale), (false, Some(4096.0)));
    assert_eq!(
        (stats.grad_norm, stats.step, stats.skipped_steps),
        (10.0, 1, 4)
    );
}

#[test]
fn one_microbatch_that_overflows_is_enough_and_nothing_moves() {
    for kind in [Kind::Float, Kind::Half, Kind::BFloat16] {
        for bad in 0..3 {
            let dir = tempfile::tempdir().unwrap();
            let net = Net::new(kind);
            let mut config = scaled(LossScale {
                initial: 1024.0,
                growth_interval: 2,
                ..LossScale::default()
            });
            config.ema = Some(EmaConfig::default());
            let mut updater = Updater::new(net.aliases(), &config).unwrap();
            for _ in 0..3 {
                train(&net, &mut updater, 2);
            }
            let (before, lr) = (snapshot(&updater, dir.path()), updater.lr());
            assert_eq!(updater.loss_scaler().unwrap().scale(), 2048.0);
            let stats = updater
                .update::<Error>(3, |i| {
                    let loss = net.loss(7, 0, 4);
                    Ok(if i == bad {
                        loss + steep(net.get("a.bias"))
                    } else {
                        loss
                    })
                })
                .unwrap();
            assert!(stats.skipped && stats.loss.is_finite(), "{kind:?}");
            assert_eq!((stats.step, stats.lr, updater.lr()), (3, lr, lr));
            assert_eq!(snapshot(&updater, dir.path()), before, "{kind:?}");
            assert!(!net.grads_defined());
            let scaler = updater.loss_scaler().unwrap();
            assert_eq!((scaler.scale(), scaler.growth_tracker()), (1024.0, 0));
            assert!(!train(&net, &mut updater, 2).skipped);
        }
    }
}

#[test]
fn a_loss_that_is_not_finite_is_an_error_whatever_the_scale() {
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &scaled(LossScale::default())).unwrap();
    let before = (net.bytes(), updater.loss_scaler().cloned());
    let error = updater
        .update::<Error>(1, |_| Ok(net.loss(0, 0, 4) * f64::INFINITY))
        .unwrap_err();
    assert!(matches!(error, Error::NonFiniteLoss { microbatch: 0, .. }));
    assert_eq!((net.bytes(), updater.loss_scaler().cloned()), before);
}

#[test]
fn a_loss_that_only_its_scale_would_overflow_is_fine() {
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &scaled(LossScale::default())).unwrap();
    let stats = updater
        .update::<Error>(1, |_| Ok(net.loss(0, 0, 4) + 1e37))
        .unwrap();
    assert!(!stats.skipped && stats.grad_norm.is_finite());
}

#[test]
fn skipping_ends_at_the_floor_with_the_parameter_named() {
    let floored = LossScale {
        initial: 4.0,
        floor: 1.0,
        ..LossScale::default()
    };
    for (loss_scale, skips, last) in [(floored, 2, 1.0), (LossScale::fixed(8.0), 0, 8.0)] {
        let net = Net::new(Kind::Float);
        let mut updater = Updater::new(net.aliases(), &scaled(loss_scale)).unwrap();
        let before = net.bytes();
        let mut update =
            || updater.update::<Error>(1, |_| Ok(net.loss(0, 0, 4) + steep(net.get("b.weight"))));
        for _ in 0..skips {
            assert!(update().unwrap().skipped);
        }
        match update().unwrap_err() {
            Error::LossScaleExhausted {
                parameter, scale, ..
            } => assert_eq!((parameter.as_str(), scale), ("b.weight", last)),
            error => panic!("{error}"),
        }
        assert_eq!((net.bytes(), updater.step()), (before, 0));
        let scaler = updater.loss_scaler().unwrap();
        assert_eq!((scaler.scale(), scaler.skipped_steps()), (last, skips));
        // The error changed nothing: a good batch trains.
        assert!(!train(&net, &mut updater, 1).skipped);
    }
}

#[test]
fn without_loss_scaling_a_bad_gradient_stays_an_error() {
    let net = Net::new(Kind::Half);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    let error = updater
        .update::<Error>(1, |_| Ok(net.loss(0, 0, 4) + steep(net.get("b.weight"))))
        .unwrap_err();
    assert!(matches!(error, Error::NonFiniteGradient { parameter, .. } if parameter == "b.weight"));
    assert!(bytes(net.get("b.weight")) == bytes(Net::new(Kind::Half).get("b.weight")));
}
