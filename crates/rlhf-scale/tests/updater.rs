//! The contract of `Updater`: accumulation, failed steps, resumption, master copies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::Path;

use rlhf_scale::{
    AdamW, AdamWConfig, DecayRule, Error, Schedule, TensorProblem, UpdateConfig, UpdateStats,
    Updater, clear_grads, clip_grad_norm, io, set_grad,
};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

/// A two-layer network on fixed data.
struct Net {
    params: Vec<(String, Tensor)>,
}

impl Net {
    fn new(kind: Kind) -> Self {
        let ramp = |shape: [i64; 2], scale: f64| {
            let numel = shape[0] * shape[1];
            ((Tensor::arange(numel, (Kind::Float, CPU)) * scale).sin() * 0.5).view(shape)
        };
        let params = [
            ("a.weight", ramp([3, 4], 0.7)),
            ("a.bias", ramp([1, 4], 0.3).view([4])),
            ("b.weight", ramp([4, 2], 1.3)),
        ];
        Self {
            params: params
                .into_iter()
                .map(|(name, tensor)| {
                    (
                        name.to_string(),
                        tensor.to_kind(kind).set_requires_grad(true),
                    )
                })
                .collect(),
        }
    }

    fn get(&self, name: &str) -> &Tensor {
        &self.params.iter().find(|(n, _)| n == name).unwrap().1
    }

    /// Sum of squared errors of rows `start..start + count`, divided by eight.
    fn loss(&self, step: u64, start: i64, count: i64) -> Tensor {
        let kind = self.get("a.weight").kind();
        let inputs = ((Tensor::arange(24, (Kind::Float, CPU)) + 5.0 * step as f64) * 0.9).cos();
        let rows = inputs.view([8, 3]).narrow(0, start, count).to_kind(kind);
        let hidden = (rows.matmul(self.get("a.weight")) + self.get("a.bias")).tanh();
        let output = hidden.matmul(self.get("b.weight"));
        (output.to_kind(Kind::Float) - 1.0)
            .square()
            .sum(Kind::Float)
            / 8.0
    }

    fn aliases(&self) -> Vec<(String, Tensor)> {
        let alias = |(name, tensor): &(String, Tensor)| (name.clone(), tensor.shallow_clone());
        self.params.iter().map(alias).collect()
    }

    fn bytes(&self) -> Vec<Vec<u8>> {
        self.params
            .iter()
            .map(|(_, tensor)| bytes(tensor))
            .collect()
    }

    fn grads_defined(&self) -> bool {
        self.params
            .iter()
            .any(|(_, tensor)| tensor.grad().defined())
    }
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut bytes = vec![0; tensor.numel() * tensor.kind().elt_size_in_bytes()];
    tensor.copy_data_u8(&mut bytes, tensor.numel());
    bytes
}

fn config() -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr: 0.05,
            weight_decay: 0.1,
            ..AdamWConfig::default()
        },
        schedule: Schedule::linear(2, 10),
        max_grad_norm: Some(0.5),
    }
}

fn train(net: &Net, updater: &mut Updater, microbatches: usize) -> UpdateStats {
    let rows = 8 / microbatches as i64;
    let step = updater.step();
    updater
        .update::<Error>(microbatches, |i| Ok(net.loss(step, rows * i as i64, rows)))
        .unwrap()
}

#[test]
fn microbatches_add_up_to_the_batch() {
    let (whole, split) = (Net::new(Kind::Float), Net::new(Kind::Float));
    let mut of_whole = Updater::new(whole.aliases(), &config()).unwrap();
    let mut of_split = Updater::new(split.aliases(), &config()).unwrap();
    for _ in 0..4 {
        let (a, b) = (
            train(&whole, &mut of_whole, 1),
            train(&split, &mut of_split, 4),
        );
        assert!((a.loss - b.loss).abs() < 1e-6 && (a.grad_norm - b.grad_norm).abs() < 1e-6);
    }
    for ((name, a), (_, b)) in whole.params.iter().zip(&split.params) {
        let difference = (a - b).abs().max().double_value(&[]);
        assert!(difference < 1e-6, "{name}: {difference}");
    }
}

#[test]
fn microbatches_of_bf16_accumulate_in_f32() {
    // 1 + 512 gradients of 2^-9: bf16 sums stay at 1 because each addend is below half a unit.
    let weight = Tensor::zeros([2], (Kind::BFloat16, CPU)).set_requires_grad(true);
    let mut updater = Updater::new(vec![("w".into(), weight.shallow_clone())], &config()).unwrap();
    let stats = updater
        .update::<Error>(513, |i| {
            let scale = if i == 0 { 1.0 } else { 2f64.powi(-9) };
            Ok((&weight * scale).sum(Kind::Float))
        })
        .unwrap();
    let expected = 2.0 * 2f64.sqrt();
    assert!(
        (stats.grad_norm - expected).abs() < 1e-6,
        "{}",
        stats.grad_norm
    );
}

#[test]
fn stats_say_what_happened() {
    let net = Net::new(Kind::Float);
    let loss = net.loss(0, 0, 8);
    let grads = Tensor::run_backward(
        &[&loss],
        &[net.get("a.weight"), net.get("a.bias"), net.get("b.weight")],
        false,
        false,
    );
    let norm: f64 = grads
        .iter()
        .map(|grad| {
            grad.to_kind(Kind::Double)
                .square()
                .sum(Kind::Double)
                .double_value(&[])
        })
        .sum::<f64>()
        .sqrt();
    assert!(
        norm > 0.5,
        "the clipping must act for this test to mean something"
    );
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    let stats = train(&net, &mut updater, 1);
    assert!((stats.loss - loss.double_value(&[])).abs() < 1e-7);
    assert!((stats.grad_norm - norm).abs() < 1e-6, "before clipping");
    assert_eq!((stats.lr, stats.step), (0.0, 1));
    assert_eq!(updater.lr(), 0.025);
    assert!(!net.grads_defined());
}

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

#[test]
fn parameters_without_a_gradient_are_skipped() {
    let net = Net::new(Kind::Float);
    let idle = Tensor::ones([2, 2], (Kind::Float, CPU)).set_requires_grad(true);
    let mut params = net.aliases();
    params.push(("idle".into(), idle.shallow_clone()));
    let mut updater = Updater::new(params, &config()).unwrap();
    for _ in 0..3 {
        train(&net, &mut updater, 1);
    }
    // Not even weight decay touches it.
    assert_eq!(Vec::<f32>::try_from(idle.view([4])).unwrap(), [1.0; 4]);
}

#[test]
fn leftover_gradients_are_dropped() {
    let (clean, dirty) = (Net::new(Kind::Float), Net::new(Kind::Float));
    let mut of_clean = Updater::new(clean.aliases(), &config()).unwrap();
    let mut of_dirty = Updater::new(dirty.aliases(), &config()).unwrap();
    dirty.loss(3, 0, 8).backward();
    for _ in 0..2 {
        assert_eq!(
            train(&clean, &mut of_clean, 1),
            train(&dirty, &mut of_dirty, 1)
        );
    }
    assert_eq!(clean.bytes(), dirty.bytes());
}

fn resumed_equals_straight(kind: Kind) {
    let dir = tempfile::tempdir().unwrap();
    let straight = Net::new(kind);
    let mut of_straight = Updater::new(straight.aliases(), &config()).unwrap();
    let straight_stats: Vec<_> = (0..5)
        .map(|_| train(&straight, &mut of_straight, 2))
        .collect();

    let first = Net::new(kind);
    let mut of_first = Updater::new(first.aliases(), &config()).unwrap();
    for _ in 0..3 {
        train(&first, &mut of_first, 2);
    }
    of_first.save(&dir.path().join("new/folder")).unwrap();

    let second = Net::new(kind);
    let mut of_second = Updater::new(second.aliases(), &config()).unwrap();
    train(&second, &mut of_second, 1); // a state that load has to overwrite
    of_second.load(&dir.path().join("new/folder")).unwrap();
    assert_eq!(second.bytes(), first.bytes());
    let stats: Vec<_> = (0..2).map(|_| train(&second, &mut of_second, 2)).collect();
    assert_eq!(stats, straight_stats[3..]);
    assert_eq!(second.bytes(), straight.bytes());
}

#[test]
fn a_resumed_run_equals_an_uninterrupted_one() {
    resumed_equals_straight(Kind::Float);
}

#[test]
fn a_resumed_bf16_run_keeps_its_masters() {
    resumed_equals_straight(Kind::BFloat16);
}

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
fn another_configuration_is_refused_by_field() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    train(&net, &mut updater, 1);
    updater.save(dir.path()).unwrap();
    let field_of = |config: UpdateConfig| {
        let mut other = Updater::new(net.aliases(), &config).unwrap();
        match other.load(dir.path()).unwrap_err() {
            Error::ConfigMismatch { field, .. } => field,
            error => panic!("{error}"),
        }
    };
    let mut changed = config();
    changed.optimizer.beta2 = 0.95;
    assert_eq!(field_of(changed), "optimizer.beta2");
    let mut changed = config();
    changed.schedule = Schedule::cosine(2, 10);
    assert_eq!(field_of(changed), "schedule.kind");
    let mut changed = config();
    changed.max_grad_norm = None;
    assert_eq!(field_of(changed), "max_grad_norm");
}

#[test]
fn other_parameters_are_refused_all_at_once_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    train(&net, &mut updater, 1);
    updater.save(dir.path()).unwrap();

    let other = Net::new(Kind::Float);
    let mut params = other.aliases();
    params[0].0 = "renamed".into();
    params[1].1 = Tensor::zeros([5], (Kind::Float, CPU)).set_requires_grad(true);
    let mut of_other = Updater::new(params, &config()).unwrap();
    let before = other.bytes();
    match of_other.load(dir.path()).unwrap_err() {
        Error::TensorFile { path, problems } => {
            assert!(path.ends_with("parameters.safetensors"));
            assert_eq!(problems.len(), 3, "{problems:?}");
            assert!(problems.contains(&TensorProblem::Missing {
                name: "renamed".into()
            }));
            assert!(problems.contains(&TensorProblem::Unexpected {
                name: "a.weight".into()
            }));
        }
        error => panic!("{error}"),
    }
    assert_eq!(other.bytes(), before);
}

#[test]
fn a_damaged_optimizer_file_leaves_the_parameters_alone() {
    let dir = tempfile::tempdir().unwrap();
    let net = Net::new(Kind::Float);
    let mut updater = Updater::new(net.aliases(), &config()).unwrap();
    train(&net, &mut updater, 1);
    updater.save(dir.path()).unwrap();
    for _ in 0..2 {
        train(&net, &mut updater, 1);
    }
    let path = dir.path().join("optimizer.safetensors");
    let whole = std::fs::read(&path).unwrap();
    std::fs::write(&path, &whole[..whole.len() - 4]).unwrap();
    let before = net.bytes();
    let error = updater.load(dir.path()).unwrap_err();
    assert!(
        error.to_string().contains("optimizer.safetensors"),
        "{error}"
    );
    assert_eq!((net.bytes(), updater.step()), (before, 3));
    std::fs::write(&path, &whole).unwrap();
    updater.load(dir.path()).unwrap();
    assert_eq!(updater.step(), 1);
    assert!(updater.load(Path::new("no/such/folder")).is_err());
    assert_eq!(io::read_tensors(&path).unwrap().len(), 9);
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
fn an_update_is_backward_clip_step_and_schedule() {
    let (net, by_hand) = (Net::new(Kind::Float), Net::new(Kind::Float));
    let config = config();
    let mut updater = Updater::new(net.aliases(), &config).unwrap();
    let mut params = by_hand.aliases();
    params.sort_by(|a, b| a.0.cmp(&b.0));
    let tensors: Vec<Tensor> = params.iter().map(|(_, t)| t.shallow_clone()).collect();
    let mut optimizer = AdamW::new(params, &config.optimizer).unwrap();
    for step in 0..5 {
        let stats = train(&net, &mut updater, 1);
        by_hand.loss(step, 0, 8).backward();
        let norm = clip_grad_norm(&tensors, config.max_grad_norm.unwrap()).unwrap();
        let factor = config.schedule.factor(step);
        optimizer.step(factor).unwrap();
        clear_grads(&tensors).unwrap();
        assert_eq!(
            (stats.grad_norm, stats.lr),
            (norm, config.optimizer.lr * factor)
        );
        assert_eq!(net.bytes(), by_hand.bytes(), "step {step}");
    }
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
