//! What an update does: accumulation, clipping, step, schedule.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

mod support;

use rlhf_scale::{AdamW, Error, Updater, clear_grads, clip_grad_norm};
use support::{CPU, Net, config, train};
use tch::{Kind, Tensor};

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

/// The gradients of a single microbatch stay bf16; the update is that of their f32 sum with nothing.
#[test]
fn one_microbatch_of_bf16_is_the_same_as_a_sum() {
    let updated = |microbatches: usize| {
        let net = Net::new(Kind::BFloat16);
        let mut updater = Updater::new(net.aliases(), &config()).unwrap();
        let stats: Vec<_> = (0..3)
            .map(|step| {
                updater
                    .update::<Error>(microbatches, |i| {
                        let share = if i == 0 { 1.0 } else { 0.0 };
                        Ok(net.loss(step, 0, 8) * share)
                    })
                    .unwrap()
            })
            .map(|stats| (stats.loss, stats.grad_norm, stats.step))
            .collect();
        (stats, net.params)
    };
    let ((alone, weights), (summed, of_sums)) = (updated(1), updated(2));
    assert_eq!(alone, summed);
    for ((name, a), (_, b)) in weights.iter().zip(&of_sums) {
        assert_eq!(a, b, "{name}");
    }
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
