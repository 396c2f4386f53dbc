//! Token losses with their gradients made in forward against the plain computation.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::ops::Range;

use rlhf_scale::core::LogprobOptions;
use rlhf_scale::{
    Error, LinearLogprobs, LinearLogprobsInput, backward, clear_grads, linear_logprobs,
    linear_token_loss,
};
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 37;
/// All tokens are one group, of which some logits are computed again.
const HIDDEN: i64 = 24;
/// So few that they are several groups.
const NARROW: i64 = 8;
const VOCAB: i64 = 301;

struct Layer {
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
}

/// What a case varies.
#[derive(Debug, Clone, Copy)]
struct Case {
    temperature: f64,
    entropy: bool,
    bias: bool,
    softcap: Option<f64>,
    chunk: Option<usize>,
    /// The gradient that arrives at the loss.
    upstream: f64,
}

const CASE: Case = Case {
    temperature: 1.0,
    entropy: false,
    bias: true,
    softcap: None,
    chunk: Some(10),
    upstream: 1.0,
};

impl Layer {
    fn new(kind: Kind) -> Self {
        Self::of_width(HIDDEN, kind)
    }

    fn of_width(width: i64, kind: Kind) -> Self {
        // Not drawn: other tests of this process may draw at the same time.
        let values = |shape: &[i64], step: f64| {
            let count = shape.iter().product::<i64>();
            let angles = Tensor::arange(count, (Kind::Double, Device::Cpu)) * step;
            let values = angles.sin().view(shape).to_kind(kind);
            values.set_requires_grad(true)
        };
        Self {
            hidden: values(&[TOKENS, width], 1.7) * 1.5,
            weight: values(&[VOCAB, width], 2.3),
            bias: values(&[VOCAB], 0.7),
            ids: (Tensor::arange(TOKENS, (Kind::Int64, Device::Cpu)) * 53).remainder(VOCAB),
        }
        .detached()
    }

    /// Leaves.
    fn detached(self) -> Self {
        let leaf = |t: &Tensor| t.detach().set_requires_grad(true);
        Self {
            hidden: leaf(&self.hidden),
            weight: leaf(&self.weight),
            bias: leaf(&self.bias),
            ids: self.ids,
        }
    }

    fn input(&self, case: Case) -> LinearLogprobsInput<'_> {
        LinearLogprobsInput {
            hidden: &self.hidden,
            weight: &self.weight,
            bias: case.bias.then_some(&self.bias),
            ids: &self.ids,
            softcap: case.softcap,
        }
    }

    fn take_grads(&self) -> Vec<Option<Tensor>> {
        let leaves = [&self.hidden, &self.weight, &self.bias].map(Tensor::shallow_clone);
        let grad = |leaf: &Tensor| Some(leaf.grad()).filter(Tensor::defined).map(|g| g.copy());
        let grads = leaves.iter().map(grad).collect();
        clear_grads(&leaves).unwrap();
        grads
    }
}

/// All logits at once, in f64.
fn plain(layer: &Layer, case: Case) -> LinearLogprobs {
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    let bias = case.bias.then(|| wide(&layer.bias));
    let logits = wide(&layer.hidden).linear(&wide(&layer.weight), bias.as_ref());
    let logits = match case.softcap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    };
    let all = (logits / case.temperature).log_softmax(-1, Kind::Double);
    let ids = layer.ids.unsqueeze(1);
    LinearLogprobs {
        logprobs: all.gather(1, &ids, false).squeeze_dim(1),
        entropy: case
            .entropy
            .then(|| -(all.exp() * &all).sum_dim_intlist([-1i64].as_slice(), false, Kind::Double)),
    }
}

/// A clipped objective of PPO's form with other constants for every token, and an entropy term.
fn objective(scores: &LinearLogprobs, rows: Range<i64>) -> Tensor {
    let kind = scores.logprobs.kind();
    let index = Tensor::arange_start(rows.start, rows.end, (kind, Device::Cpu));
    let (advantages, old) = ((&index * 0.9).cos(), (&index * 0.3).sin() - 5.0);
    let ratio = ((&scores.logprobs - old) * 0.1).exp();
    let clipped = ratio.clamp(0.8, 1.2) * &advantages;
    let policy = (ratio * &advantages).minimum(&clipped).sum(kind) / TOKENS as f64;
    match &scores.entropy {
        Some(entropy) => policy + (entropy.square() * index.cos()).sum(kind) / TOKENS as f64,
        None => policy,
    }
}

fn relative_error(got: &Tensor, expected: &Tensor) -> f64 {
    let expected = expected.to_kind(Kind::Double);
    let difference = (got.to_kind(Kind::Double) - &expected).abs().max();
    (difference / expected.abs().max()).double_value(&[])
}

fn compare(layer: &Layer, case: Case, tolerance: f64) {
    let upstream = |kind| Tensor::full(&[] as &[i64], case.upstream, (kind, Device::Cpu));
    let scores = plain(layer, case);
    let expected = objective(&scores, 0..TOKENS);
    backward(&[expected.shallow_clone()], &[upstream(Kind::Double)]).unwrap();
    let expected_grads = layer.take_grads();

    let options = LogprobOptions {
        temperature: case.temperature,
        entropy: case.entropy,
    };
    let got = linear_token_loss(layer.input(case), &options, case.chunk, |scores, rows| {
        Ok::<_, Error>(objective(scores, rows))
    })
    .unwrap();
    assert!(!got.logprobs.requires_grad());
    backward(&[got.loss.shallow_clone()], &[upstream(Kind::Float)]).unwrap();
    let grads = layer.take_grads();

    let close = |what: &str, got: &Tensor, expected: &Tensor| {
        let error = relative_error(got, expected);
        assert!(error < tolerance, "{what} is off by {error} ({case:?})");
    };
    close("logprobs", &got.logprobs, &scores.logprobs);
    // A sum of both signs.
    let error = relative_error(&got.loss, &expected);
    assert!(error < 3.0 * tolerance, "loss is off by {error} ({case:?})");
    assert_eq!(got.entropy.is_some(), case.entropy);
    if let (Some(got), Some(expected)) = (&got.entropy, &scores.entropy) {
        close("entropy", got, expected);
    }
    for (i, (got, expected)) in grads.iter().zip(&expected_grads).enumerate() {
        match (got, expected) {
            (Some(got), Some(expected)) => close(&format!("gradient {i}"), got, expected),
            (None, None) => {}
            _ => panic!("gradient {i}: {got:?}, not {expected:?} ({case:?})"),
        }
    }
}

#[test]
fn losses_and_gradients_are_those_of_the_plain_computation() {
    for (width, entropy) in [
        (HIDDEN, false),
        (HIDDEN, true),
        (NARROW, false),
        (NARROW, true),
        // As many logits as gradients: nothing is computed again.
        (TOKENS, false),
    ] {
        let layer = Layer::of_width(width, Kind::Float);
        for softcap in [None, Some(4.0)] {
            for (temperature, bias, chunk, upstream) in [
                (1.0, false, None, 1.0),
                (0.7, false, Some(1), -2.5),
                (1.3, true, Some(10), 0.3),
                (1.0, true, Some(1000), 1.0),
            ] {
                let case = Case {
                    temperature,
                    entropy,
                    bias,
                    softcap,
                    chunk,
                    upstream,
                };
                compare(&layer, case, 1e-5);
            }
        }
    }
}

#[test]
fn what_is_frozen_gets_no_gradient() {
    for frozen in 0..14 {
        let (width, frozen) = ([HIDDEN, NARROW][frozen / 7], frozen % 7);
        let layer = Layer::of_width(width, Kind::Float);
        for (bit, tensor) in [&layer.hidden, &layer.weight, &layer.bias]
            .iter()
            .enumerate()
        {
            let _ = tensor.set_requires_grad(frozen >> bit & 1 == 0);
        }
        compare(&layer, CASE, 1e-5);
    }
}

/// The error is that of one rounding of the logits, and of their gradients. An entropy's gradient
/// makes more of the former, so that is held to the one of `linear_logprobs`, whose logits are the
/// same.
#[test]
fn sixteen_bit_layers_sum_in_f32() {
    for (kind, width, tolerance) in [
        (Kind::BFloat16, HIDDEN, 3e-2),
        (Kind::BFloat16, NARROW, 3e-2),
        (Kind::Half, HIDDEN, 4e-3),
    ] {
        let layer = Layer::of_width(width, kind);
        compare(&layer, CASE, tolerance);

        let options = LogprobOptions {
            temperature: 1.0,
            entropy: true,
        };
        let scores = linear_logprobs(layer.input(CASE), &options, Some(10)).unwrap();
        objective(&scores, 0..TOKENS).backward();
        let expected = layer.take_grads();
        let got = linear_token_loss(layer.input(CASE), &options, Some(10), |scores, rows| {
            Ok::<_, Error>(objective(scores, rows))
        });
        got.unwrap().loss.backward();
        for (i, (got, expected)) in layer.take_grads().iter().zip(&expected).enumerate() {
            let error = relative_error(got.as_ref().unwrap(), expected.as_ref().unwrap());
            assert!(
                error < tolerance,
                "gradient {i} is off by {error} ({kind:?})"
            );
        }
    }
}

/// A gradient far below what f16 can hold arrives all the same, once a loss scale has raised it.
#[test]
fn small_gradients_of_f16_layers_do_not_vanish() {
    let layer = Layer::new(Kind::Half);
    let grads = |factor: f64, upstream: f64| {
        let loss = linear_token_loss(
            layer.input(CASE),
            &LogprobOptions::default(),
            None,
            |scores, _| Ok::<_, Error>(scores.logprobs.sum(Kind::Float) * factor),
        );
        let upstream = Tensor::from(upstream as f32);
        backward(&[loss.unwrap().loss], &[upstream]).unwrap();
        layer.take_grads()
    };
    let (small, plain) = (grads(1e-9, 1e9), grads(1.0, 1.0));
    for (small, plain) in small.iter().zip(&plain) {
        let error = relative_error(small.as_ref().unwrap(), plain.as_ref().unwrap());
        assert!(error < 2e-3, "off by {error}");
    }
}

/// A group whose tokens are all masked, say.
#[test]
fn groups_that_add_nothing_have_no_gradient() {
    let layer = Layer::of_width(NARROW, Kind::Float);
    let loss = linear_token_loss(
        layer.input(CASE),
        &LogprobOptions::default(),
        Some(10),
        |scores, rows| {
            Ok::<_, Error>(match rows.start {
                10 => scores.logprobs.sum(Kind::Float),
                20 => scores.logprobs.sum(Kind::Float) * 0.0,
                _ => Tensor::zeros(&[] as &[i64], (Kind::Float, Device::Cpu)),
            })
        },
    );
    loss.unwrap().loss.backward();
    let grads = layer.take_grads();
    let expected = plain(&layer, CASE).logprobs.narrow(0, 10, 10);
    expected.sum(Kind::Double).backward();
    for (got, expected) in grads.iter().zip(&layer.take_grads()) {
        let error = relative_error(got.as_ref().unwrap(), expected.as_ref().unwrap());
        assert!(error < 1e-5, "off by {error}");
    }
}

/// One group, whose room for the gradient is not left as it was found.
#[test]
fn a_loss_without_gradient_gives_zeros() {
    let layer = Layer::new(Kind::Float);
    let nothing = |_: &LinearLogprobs, _| -> Result<_, Error> {
        Ok(Tensor::zeros(&[] as &[i64], (Kind::Float, Device::Cpu)))
    };
    let options = LogprobOptions::default();
    let output = linear_token_loss(layer.input(CASE), &options, None, nothing).unwrap();
    output.loss.backward();
    for grad in layer.take_grads() {
        assert_eq!(grad.unwrap().abs().max().double_value(&[]), 0.0);
    }
}

#[test]
fn without_gradients_the_loss_is_plain() {
    let layer = Layer::new(Kind::Float);
    let options = LogprobOptions::default();
    let loss = |scores: &LinearLogprobs, rows| Ok::<_, Error>(objective(scores, rows));
    let got = tch::no_grad(|| linear_token_loss(layer.input(CASE), &options, None, loss)).unwrap();
    assert!(!got.loss.requires_grad());
    let expected = objective(&plain(&layer, CASE), 0..TOKENS);
    assert!(relative_error(&got.loss, &expected) < 1e-5);
}

#[test]
fn failures_are_errors() {
    let layer = Layer::new(Kind::Float);
    let options = LogprobOptions::default();
    let loss = |scores: &LinearLogprobs, rows| Ok::<_, Error>(objective(scores, rows));
    let error = linear_token_loss(layer.input(CASE), &options, Some(0), loss).unwrap_err();
    assert!(error.to_string().contains("chunk_rows = 0"), "{error}");
    let failing = |_: &LinearLogprobs, _| Err(Error::NoGradients { parameters: 3 });
    let error = linear_token_loss(layer.input(CASE), &options, None, failing).unwrap_err();
    assert!(
        error.to_string().contains("none of the 3 parameters"),
        "{error}"
    );

    let got = linear_token_loss(layer.input(CASE), &options, None, loss).unwrap();
    let run = |keep| Tensor::f_run_backward(&[&got.loss], &[&layer.hidden], keep, false);
    run(true).unwrap();
    let error = run(false).unwrap_err();
    assert!(error.to_string().contains("second time"), "{error}");
}
