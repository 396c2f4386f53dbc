//! The optimiser: master copies, layouts, decay, learning rates.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use rlhf_scale::{AdamW, AdamWConfig, DecayRule, Error, UpdateConfig, Updater, set_grad};
use support::{CPU, bytes, config};
use tch::{Kind, Tensor};

#[test]
fn steps_below_bf16_resolution_add_up() {
    // At 1 a bf16 step is 2^-7 upwards and 2^-8 downwards; each update moves by about 1e-5.
    let weight = Tensor::ones([4], (Kind::BFloat16, CPU)).set_requires_grad(true);
    let config = UpdateConfig {
        optimizer: AdamWConfig {
            lr: 1e-5,
            ..AdamWConfig::default()
        },
        ..UpdateConfig::default()
    };
    let mut updater = Updater::new(vec![("w".into(), weight.shallow_clone())], &config).unwrap();
    for _ in 0..1000 {
        updater
            .update::<Error>(1, |_| Ok(weight.sum(Kind::Float)))
            .unwrap();
    }
    let moved = 1.0 - weight.double_value(&[0]);
    assert!(
        (moved - 0.01).abs() < 2f64.powi(-8),
        "moved by {moved}, wanted about 0.01"
    );
    assert_eq!(weight.kind(), Kind::BFloat16);
}

#[test]
fn bf16_weights_move_from_the_first_step_as_their_masters_do() {
    // A step is 1/780 of the distance between bf16 numbers below 1: to the nearest none would move.
    let weight = Tensor::ones([40_000], (Kind::BFloat16, CPU)).set_requires_grad(true);
    let config = UpdateConfig {
        optimizer: AdamWConfig {
            lr: 5e-6,
            ..AdamWConfig::default()
        },
        max_grad_norm: None,
        ..UpdateConfig::default()
    };
    let mut updater = Updater::new(vec![("w".into(), weight.shallow_clone())], &config).unwrap();
    let mut before = weight.to_kind(Kind::Double);
    for step in 1..=60 {
        updater
            .update::<Error>(1, |_| Ok(weight.sum(Kind::Float)))
            .unwrap();
        let now = weight.to_kind(Kind::Double);
        let wanted = 5e-6 * f64::from(step);
        let moved = 1.0 - now.mean(Kind::Double).double_value(&[]);
        // A binomial's deviation is at most 2^-8 / (2 * 200); an even spread does better.
        assert!(
            (moved - wanted).abs() < 2e-5,
            "{step}: {moved}, not {wanted}"
        );
        // No weight goes back and forth, none is further off than the next bf16 number.
        assert!(bool::try_from(now.le_tensor(&before).all()).unwrap());
        assert!((&now - (1.0 - wanted)).abs().max().double_value(&[]) <= 2f64.powi(-8));
        before = now;
    }
}

#[test]
fn what_is_a_bf16_number_stays_it() {
    let values = Tensor::randn([1000], (Kind::Float, CPU)).to_kind(Kind::BFloat16);
    let weight = values.copy().set_requires_grad(true);
    let mut updater = Updater::new(vec![("w".into(), weight.shallow_clone())], &config()).unwrap();
    updater
        .update::<Error>(1, |_| Ok((&weight * 0.0).sum(Kind::Float)))
        .unwrap();
    assert!(weight.equal(&values));
}

#[test]
fn untrainable_parameters_are_refused() {
    let new = |tensor: Tensor| Updater::new(vec![("w".into(), tensor)], &config()).unwrap_err();
    let leaf = || Tensor::ones([2, 3], (Kind::Float, CPU)).set_requires_grad(true);
    assert!(matches!(new(leaf() * 2.0), Error::NotTrainable { .. }));
    assert!(matches!(new(leaf().detach()), Error::NotTrainable { .. }));
    let gaps = Tensor::ones([4, 4], (Kind::Float, CPU))
        .narrow(1, 0, 2)
        .set_requires_grad(true);
    assert!(matches!(new(gaps), Error::NotDense { .. }));
    let complex = Tensor::ones([2], (Kind::ComplexFloat, CPU)).set_requires_grad(true);
    assert!(matches!(new(complex), Error::UnsupportedParameter { .. }));
    let twice = vec![("w".to_string(), leaf()), ("w".to_string(), leaf())];
    let error = Updater::new(twice, &config()).unwrap_err();
    assert!(matches!(error, Error::DuplicateName { .. }));
}

#[test]
fn a_transposed_parameter_trains_as_its_contiguous_twin() {
    let values = || (Tensor::arange(6, (Kind::Float, CPU)) * 0.1).view([2, 3]);
    let plain = values().set_requires_grad(true);
    let transposed = values().tr().contiguous().tr().set_requires_grad(true);
    assert_eq!(transposed.stride(), [1, 2]);
    for weight in [&plain, &transposed] {
        let params = vec![("w".to_string(), weight.shallow_clone())];
        let mut updater = Updater::new(params, &config()).unwrap();
        let factors = Tensor::arange(6, (Kind::Float, CPU)).view([2, 3]) - 2.5;
        for _ in 0..3 {
            updater
                .update::<Error>(1, |_| Ok((weight * &factors).square().sum(Kind::Float)))
                .unwrap();
        }
    }
    assert_eq!(bytes(&plain), bytes(&transposed));
}

#[test]
fn a_gradient_laid_out_otherwise_reaches_the_right_elements() {
    // The fused kernel walks storage: without care, weight (i, j) would get gradient (j, i).
    let grad = (Tensor::arange(6, (Kind::Float, CPU)) - 2.0).view([2, 3]);
    let stepped = |weight: Tensor| {
        let weight = weight.set_requires_grad(true);
        set_grad(&weight, Some(&grad)).unwrap();
        let params = vec![("w".to_string(), weight.shallow_clone())];
        AdamW::new(params, &AdamWConfig::default())
            .unwrap()
            .step(1.0)
            .unwrap();
        bytes(&weight)
    };
    let zeros = |shape: [i64; 2]| Tensor::zeros(shape, (Kind::Float, CPU));
    assert_eq!(stepped(zeros([2, 3])), stepped(zeros([3, 2]).tr()));
}

#[test]
fn refreshed_masters_follow_a_parameter_changed_by_hand() {
    let weight = Tensor::ones([2], (Kind::BFloat16, CPU)).set_requires_grad(true);
    let params = vec![("w".to_string(), weight.shallow_clone())];
    let mut optimizer = AdamW::new(params, &AdamWConfig::default()).unwrap();
    let _ = tch::no_grad(|| weight.shallow_clone().fill_(8.0));
    optimizer.refresh_masters().unwrap();
    set_grad(&weight, Some(&Tensor::ones([2], (Kind::BFloat16, CPU)))).unwrap();
    optimizer.step(1.0).unwrap();
    assert_eq!(weight.double_value(&[0]), 8.0);
    let master = &optimizer
        .state()
        .into_iter()
        .find(|(name, _)| name == "master.w")
        .unwrap()
        .1;
    assert!((master.double_value(&[0]) - (8.0 - 5e-5)).abs() < 1e-6);
}

#[test]
fn weight_decay_follows_the_rule() {
    let decayed = |no_decay: DecayRule| {
        ["matrix", "vector"].map(|name| {
            let shape: &[i64] = if name == "matrix" { &[1, 1] } else { &[1] };
            let weight = Tensor::ones(shape, (Kind::Float, CPU)).set_requires_grad(true);
            let config = AdamWConfig {
                lr: 0.1,
                weight_decay: 0.5,
                no_decay,
                ..AdamWConfig::default()
            };
            let params = vec![(name.to_string(), weight.shallow_clone())];
            set_grad(&weight, Some(&weight.zeros_like())).unwrap();
            AdamW::new(params, &config).unwrap().step(1.0).unwrap();
            weight.double_value(&vec![0; shape.len()]) < 1.0
        })
    };
    assert_eq!(decayed(DecayRule::Vectors), [true, false]);
    assert_eq!(decayed(DecayRule::Nothing), [true, true]);
    assert_eq!(decayed(DecayRule::Everything), [false, false]);
}

#[test]
fn the_learning_rate_factor_scales_the_step() {
    let moved = |factor: f64| {
        let weight = Tensor::zeros([1], (Kind::Float, CPU)).set_requires_grad(true);
        set_grad(&weight, Some(&weight.ones_like())).unwrap();
        let params = vec![("w".to_string(), weight.shallow_clone())];
        let config = AdamWConfig {
            lr: 0.5,
            ..AdamWConfig::default()
        };
        AdamW::new(params, &config).unwrap().step(factor).unwrap();
        weight.double_value(&[0])
    };
    // Adam's first step is one learning rate long.
    assert!((moved(1.0) + 0.5).abs() < 1e-6);
    assert!((moved(0.25) + 0.125).abs() < 1e-6);
    assert_eq!(moved(0.0), 0.0);
}
