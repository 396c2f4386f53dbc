//! Averaged weights: the formula, their place in the model, files.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use rlhf_scale::{Ema, EmaConfig, Error, UpdateConfig, Updater, io};
use support::{CPU, Net, bytes, config, train};
use tch::{Kind, Tensor};

fn averaging(ema: EmaConfig) -> UpdateConfig {
    UpdateConfig {
        ema: Some(ema),
        ..config()
    }
}

fn values(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.detach().to_kind(Kind::Double).view([-1])).unwrap()
}

/// Every parameter's values, in the order of names.
fn all_values(named: &[(String, Tensor)]) -> Vec<f64> {
    let mut sorted: Vec<_> = named.iter().collect();
    sorted.sort_by(|a, b| a.0.cmp(&b.0));
    sorted
        .iter()
        .flat_map(|(_, tensor)| values(tensor))
        .collect()
}

#[test]
fn the_updater_keeps_the_average_that_the_formula_gives() {
    let cases = [
        (
            EmaConfig {
                decay: 0.7,
                start_step: 2,
                warmup: false,
            },
            [0.0, 0.0, 0.0, 0.7, 0.7, 0.7],
        ),
        (
            EmaConfig {
                decay: 0.24,
                start_step: 0,
                warmup: true,
            },
            [0.0, 2.0 / 11.0, 3.0 / 12.0 - 0.01, 0.24, 0.24, 0.24],
        ),
    ];
    for (ema, decays) in cases {
        let net = Net::new(Kind::Float);
        let mut updater = Updater::new(net.aliases(), &averaging(ema)).unwrap();
        let mut expected = all_values(&net.params);
        for decay in decays {
            train(&net, &mut updater, 1);
            let now = all_values(&net.params);
            for (e, p) in expected.iter_mut().zip(now) {
                *e = decay * *e + (1.0 - decay) * p;
            }
            let averages = updater.ema().unwrap().averages();
            for (actual, expected) in all_values(averages).iter().zip(&expected) {
                assert!((actual - expected).abs() < 1e-6, "{actual} {expected}");
            }
        }
        assert_eq!(updater.ema().unwrap().updates(), 6);
    }
}

#[test]
fn averages_of_16_bit_models_are_of_the_masters() {
    // Each step is far below bf16's resolution at 1: the rounded weights alone would not move.
    let weight = Tensor::ones([1], (Kind::BFloat16, CPU)).set_requires_grad(true);
    let mut config = averaging(EmaConfig {
        decay: 0.5,
        ..EmaConfig::default()
    });
    config.optimizer.lr = 1e-5;
    config.schedule = Default::default();
    let params = vec![("w".to_string(), weight.shallow_clone())];
    let mut updater = Updater::new(params, &config).unwrap();
    for _ in 0..20 {
        updater
            .update::<Error>(1, |_| Ok(weight.sum(Kind::Float)))
            .unwrap();
    }
    assert_eq!(weight.double_value(&[0]), 1.0);
    let average = &updater.ema().unwrap().averages()[0].1;
    assert_eq!(average.kind(), Kind::Float);
    let moved = 1.0 - average.double_value(&[0]);
    assert!(moved > 1e-4 && moved < 2e-4, "{moved}");
}

#[test]
fn applied_averages_give_way_to_the_weights_again() {
    for kind in [Kind::Float, Kind::BFloat16] {
        let (net, undisturbed) = (Net::new(kind), Net::new(kind));
        let config = averaging(EmaConfig {
            decay: 0.9,
            ..EmaConfig::default()
        });
        let mut updater = Updater::new(net.aliases(), &config).unwrap();
        let mut other = Updater::new(undisturbed.aliases(), &config).unwrap();
        for _ in 0..4 {
            train(&net, &mut updater, 1);
            train(&undisturbed, &mut other, 1);
        }
        let before = net.bytes();
        let ema = updater.ema().unwrap();
        let applied = ema.apply().unwrap();
        for (name, average) in ema.averages() {
            assert_eq!(
                bytes(net.get(name)),
                bytes(&average.to_kind(kind)),
                "{name}"
            );
        }
        assert_ne!(net.bytes(), before);
        applied.restore().unwrap();
        assert_eq!(net.bytes(), before);
        {
            let _applied = ema.apply().unwrap();
            assert_ne!(net.bytes(), before);
        }
        assert_eq!(net.bytes(), before);
        train(&net, &mut updater, 1);
        train(&undisturbed, &mut other, 1);
        assert_eq!(net.bytes(), undisturbed.bytes());
    }
}

#[test]
fn nothing_is_trained_or_saved_while_averages_are_applied() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &averaging(EmaConfig::default())).unwrap();
    train(&net, &mut updater, 1);
    let applied = updater.ema().unwrap().apply().unwrap();
    let refused = |error: Error| assert!(matches!(error, Error::EmaApplied), "{error}");
    refused(updater.ema().unwrap().apply().unwrap_err());
    refused(updater.save(dir.path()).unwrap_err());
    std::mem::forget(applied);
    let error = updater
        .update::<Error>(1, |_| Ok(net.loss(0, 0, 8)))
        .unwrap_err();
    refused(error);
}

#[test]
fn standalone_averages_survive_a_file() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("average.safetensors");
    let net = Net::new(Kind::Half);
    let config = EmaConfig {
        decay: 0.9,
        start_step: 1,
        warmup: false,
    };
    let mut ema = Ema::new(net.aliases(), &config).unwrap();
    let step = |ema: &mut Ema| {
        for (_, param) in &net.params {
            let _ = tch::no_grad(|| param.shallow_clone().f_mul_scalar_(0.5)).unwrap();
        }
        ema.update().unwrap();
    };
    (0..3).for_each(|_| step(&mut ema));
    ema.save(&path).unwrap();
    let mut other = Ema::new(net.aliases(), &config).unwrap();
    other.load(&path).unwrap();
    assert_eq!(other.updates(), 3);
    step(&mut ema);
    other.update().unwrap();
    for ((name, a), (_, b)) in ema.averages().iter().zip(other.averages()) {
        assert_eq!((a.kind(), bytes(a)), (Kind::Float, bytes(b)), "{name}");
    }
    assert_eq!(io::read_tensors(&path).unwrap().len(), 4);
    let mut stranger = Ema::new(net.aliases().split_off(1), &config).unwrap();
    assert!(matches!(
        stranger.load(&path),
        Err(Error::TensorFile { .. })
    ));
}

#[test]
fn integers_are_not_averaged() {
    let count = vec![("n".to_string(), Tensor::from(3i64))];
    let error = Ema::new(count, &EmaConfig::default()).unwrap_err();
    assert!(matches!(
        error,
        Error::UnsupportedParameter {
            kind: Kind::Int64,
            ..
        }
    ));
}
