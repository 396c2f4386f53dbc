//! Chunked log-probabilities against the plain computation.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use rlhf_scale::core::LogprobOptions;
use rlhf_scale::{LinearLogprobs, LinearLogprobsInput, clear_grads, linear_logprobs};
use tch::{Device, Kind, Tensor};

const TOKENS: i64 = 37;
/// Fewer than the tokens: some logits are computed again.
const HIDDEN: i64 = 24;
const VOCAB: i64 = 301;

struct Layer {
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    ids: Tensor,
    softcap: Option<f64>,
}

impl Layer {
    fn new(kind: Kind) -> Self {
        Self::of_width(HIDDEN, kind)
    }

    fn of_width(width: i64, kind: Kind) -> Self {
        Self::of_size([TOKENS, width, VOCAB], kind)
    }

    fn of_size([tokens, width, vocab]: [i64; 3], kind: Kind) -> Self {
        tch::manual_seed(11);
        let normal = |shape: &[i64], scale: f64| {
            let values = Tensor::randn(shape, (Kind::Double, Device::Cpu)) * scale;
            values.to_kind(kind).set_requires_grad(true)
        };
        Self {
            hidden: normal(&[tokens, width], 1.5),
            weight: normal(&[vocab, width], 24f64.sqrt() / (width as f64).sqrt()),
            bias: normal(&[vocab], 1.0),
            ids: Tensor::randint(vocab, [tokens], (Kind::Int64, Device::Cpu)),
            softcap: None,
        }
    }

    fn input(&self, bias: bool) -> LinearLogprobsInput<'_> {
        LinearLogprobsInput {
            hidden: &self.hidden,
            weight: &self.weight,
            bias: bias.then_some(&self.bias),
            ids: &self.ids,
            softcap: self.softcap,
        }
    }

    fn leaves(&self) -> [Tensor; 3] {
        [&self.hidden, &self.weight, &self.bias].map(Tensor::shallow_clone)
    }

    /// The gradients of hidden states, weight and bias, which are cleared.
    fn take_grads(&self) -> Vec<Option<Tensor>> {
        let leaves = self.leaves();
        let grad = |leaf: &Tensor| Some(leaf.grad()).filter(Tensor::defined).map(|g| g.copy());
        let grads = leaves.iter().map(grad).collect();
        clear_grads(&leaves).unwrap();
        grads
    }
}

/// All logits at once, in f64.
fn plain(input: LinearLogprobsInput<'_>, temperature: f64) -> LinearLogprobs {
    let wide = |t: &Tensor| t.to_kind(Kind::Double);
    let logits = wide(input.hidden).linear(&wide(input.weight), input.bias.map(wide).as_ref());
    let logits = match input.softcap {
        Some(cap) => (logits / cap).tanh() * cap,
        None => logits,
    };
    let all = (logits / temperature).log_softmax(-1, Kind::Double);
    let ids = input.ids.unsqueeze(1);
    LinearLogprobs {
        logprobs: all.gather(1, &ids, false).squeeze_dim(1),
        entropy: Some(-(all.exp() * &all).sum_dim_intlist([-1i64].as_slice(), false, Kind::Double)),
    }
}

/// Some function of the outputs with a different gradient for every token.
fn loss(scores: &LinearLogprobs, with_entropy: bool) -> Tensor {
    let kind = scores.logprobs.kind();
    let tokens = scores.logprobs.size()[0];
    let factors = (Tensor::arange(tokens, (kind, Device::Cpu)) - 9.0) / 7.0;
    let loss = (&scores.logprobs * &factors).sum(kind);
    match &scores.entropy {
        Some(entropy) if with_entropy => loss + (entropy.square() * factors.cos()).sum(kind),
        _ => loss,
    }
}

/// Largest difference relative to the largest element.
fn relative_error(got: &Tensor, expected: &Tensor) -> f64 {
    let expected = expected.to_kind(Kind::Double);
    let difference = (got.to_kind(Kind::Double) - &expected).abs().max();
    (difference / expected.abs().max()).double_value(&[])
}

/// Everything that [`linear_logprobs`] can be asked for, against the plain computation.
fn compare(
    layer: &Layer,
    options: LogprobOptions,
    bias: bool,
    chunk: Option<usize>,
    tolerance: f64,
) {
    let cap = layer.softcap;
    let context = format!("{options:?}, bias {bias}, cap {cap:?}, chunks of {chunk:?}");
    let expected = plain(layer.input(bias), options.temperature);
    loss(&expected, options.entropy).backward();
    let expected_grads = layer.take_grads();

    let got = linear_logprobs(layer.input(bias), &options, chunk).unwrap();
    assert_eq!(got.logprobs.kind(), Kind::Float);
    assert_eq!(got.entropy.is_some(), options.entropy);
    loss(&got, options.entropy).backward();
    let grads = layer.take_grads();

    let close = |what: &str, got: &Tensor, expected: &Tensor| {
        let error = relative_error(got, expected);
        assert!(error < tolerance, "{what} is off by {error} ({context})");
    };
    close("logprobs", &got.logprobs, &expected.logprobs);
    if let (Some(got), Some(expected)) = (&got.entropy, &expected.entropy) {
        close("entropy", got, expected);
    }
    for (i, (got, expected)) in grads.iter().zip(&expected_grads).enumerate() {
        match (got, expected) {
            (Some(got), Some(expected)) => close(&format!("gradient {i}"), got, expected),
            (None, None) => {}
            _ => panic!("gradient {i}: {got:?}, not {expected:?} ({context})"),
        }
    }
}

/// A product of many tokens is summed in parts: what it reads must last until all are done, though logits, their
/// gradients and the weight's have one memory.
#[test]
fn many_tokens_are_no_different() {
    for (size, chunk) in [
        // The first block's gradients lie where the weight's first rows belong, and some blocks find no room.
        ([1000, 300, 640], 100),
        ([1000, 700, 640], 100),
        // Everything finds room; the last rows belong where the last blocks' gradients would be.
        ([900, 1000, 640], 90),
    ] {
        let layer = Layer::of_size(size, Kind::Float);
        let options = LogprobOptions::default();
        compare(&layer, options, false, Some(chunk), 1e-5);
    }
}

#[test]
fn values_and_gradients_are_those_of_the_plain_computation() {
    // Logits reach 20 or so: the cap bends all of them.
    for (width, softcap, entropy) in [
        (HIDDEN, None, false),
        (HIDDEN, None, true),
        (HIDDEN, Some(6.0), false),
        (HIDDEN, Some(6.0), true),
        // As many logits as gradients: nothing is computed again.
        (TOKENS, None, true),
        (2 * TOKENS, Some(6.0), true),
        (3, None, false),
    ] {
        let mut layer = Layer::of_width(width, Kind::Float);
        layer.softcap = softcap;
        for (temperature, bias, chunk) in [
            (1.0, false, None),
            (0.7, false, Some(1)),
            (1.3, true, Some(10)),
            (1.0, true, Some(1000)),
        ] {
            let options = LogprobOptions {
                temperature,
                entropy,
            };
            compare(&layer, options, bias, chunk, 1e-5);
        }
    }
}

#[test]
fn a_frozen_output_layer_gets_no_gradient() {
    let layer = Layer::new(Kind::Float);
    let _ = layer.weight.set_requires_grad(false);
    let _ = layer.bias.set_requires_grad(false);
    for entropy in [false, true] {
        for bias in [false, true] {
            let options = LogprobOptions {
                temperature: 0.8,
                entropy,
            };
            compare(&layer, options, bias, Some(8), 1e-5);
        }
    }
    let layer = Layer {
        softcap: Some(6.0),
        ..layer
    };
    compare(&layer, LogprobOptions::default(), true, Some(8), 1e-5);
}

#[test]
fn frozen_hidden_states_get_no_gradient() {
    let layer = Layer::new(Kind::Float);
    let _ = layer.hidden.set_requires_grad(false);
    compare(&layer, LogprobOptions::default(), true, Some(8), 1e-5);
}

/// The logits are rounded to 16 bits, sums and softmax are not: the error is that of one rounding.
#[test]
fn sixteen_bit_layers_sum_in_f32() {
    for (kind, tolerance) in [(Kind::BFloat16, 3e-2), (Kind::Half, 4e-3)] {
        let layer = Layer::new(kind);
        for frozen in [false, true] {
            let _ = layer.weight.set_requires_grad(!frozen);
            let _ = layer.bias.set_requires_grad(!frozen);
            compare(&layer, LogprobOptions::default(), true, Some(5), tolerance);
        }
    }
}

#[test]
fn without_gradients_the_scores_are_plain() {
    let layer = Layer::new(Kind::Float);
    let options = LogprobOptions::default();
    let scores = tch::no_grad(|| linear_logprobs(layer.input(false), &options, None)).unwrap();
    assert!(!scores.logprobs.requires_grad());
    let expected = plain(layer.input(false), 1.0);
    assert!(relative_error(&scores.logprobs, &expected.logprobs) < 1e-5);
}

/// The first backward takes what forward kept of the logits; the second does without.
#[test]
fn a_second_backward_gives_the_same() {
    let layer = Layer::of_width(TOKENS, Kind::Float);
    let scores = linear_logprobs(layer.input(true), &LogprobOptions::default(), Some(10)).unwrap();
    let loss = loss(&scores, false);
    let leaves = layer.leaves();
    let run = |keep| Tensor::f_run_backward(&[&loss], &leaves.each_ref(), keep, false).unwrap();
    for (first, second) in run(true).iter().zip(&run(false)) {
        assert!(relative_error(second, first) < 1e-5);
    }
}

/// A broken weight is seen: it does not vanish in the sum of some other block.
#[test]
fn what_is_not_a_number_stays_so() {
    for entropy in [false, true] {
        for kind in [Kind::Float, Kind::BFloat16] {
            let layer = Layer::new(kind);
            let broken = layer.weight.detach();
            let _ = broken.get(20).get(3).fill_(f64::NAN);
            let input = LinearLogprobsInput {
                weight: &broken,
                ..layer.input(false)
            };
            let options = LogprobOptions {
                entropy,
                ..LogprobOptions::default()
            };
            let scores = linear_logprobs(input, &options, Some(1)).unwrap();
            let all = std::iter::once(scores.logprobs).chain(scores.entropy);
            for values in all {
                assert!(bool::try_from(values.isnan().all()).unwrap());
            }
        }
    }
}

#[test]
fn large_logits_do_not_overflow() {
    let hidden = Tensor::from_slice2(&[[1000f32, 0.0]]).set_requires_grad(true);
    let weight = Tensor::from_slice2(&[[1f32, 0.0], [0.0, 1.0], [0.9, 0.0]]);
    let ids = Tensor::from_slice(&[2i64]);
    let input = LinearLogprobsInput {
        hidden: &hidden,
        weight: &weight,
        bias: None,
        ids: &ids,
        softcap: None,
    };
    let options = LogprobOptions {
        entropy: true,
        ..LogprobOptions::default()
    };
    let scores = linear_logprobs(input, &options, None).unwrap();
    assert!((scores.logprobs.double_value(&[0]) + 100.0).abs() < 1e-3);
    assert!(scores.entropy.as_ref().unwrap().double_value(&[0]).abs() < 1e-6);
    loss_of_one(&scores).backward();
    assert!(bool::try_from(hidden.grad().isfinite().all()).unwrap());
}

fn loss_of_one(scores: &LinearLogprobs) -> Tensor {
    scores.logprobs.sum(Kind::Float) + scores.entropy.as_ref().unwrap().sum(Kind::Float)
}

#[test]
fn operands_that_do_not_fit_are_named() {
    let layer = Layer::new(Kind::Float);
    let fails = |input: LinearLogprobsInput<'_>, chunk, expected: &str| {
        let error = linear_logprobs(input, &LogprobOptions::default(), chunk).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    let narrow = layer.weight.narrow(1, 0, 5);
    let weight = LinearLogprobsInput {
        weight: &narrow,
        ..layer.input(false)
    };
    fails(
        weight,
        None,
        "hidden [M, H] is [37, 24] but weight [V, H] is [301, 5]",
    );
    let few = layer.ids.narrow(0, 0, 3);
    let ids = LinearLogprobsInput {
        ids: &few,
        ..layer.input(false)
    };
    fails(ids, None, "ids [M] is [3] but hidden [M, H] is [37, 24]");
    let half = layer.hidden.to_kind(Kind::Half);
    let kinds = LinearLogprobsInput {
        hidden: &half,
        ..layer.input(false)
    };
    fails(kinds, None, "hidden is Half, weight Float");
    fails(layer.input(false), Some(0), "chunk_rows = 0");
    let cap = LinearLogprobsInput {
        softcap: Some(0.0),
        ..layer.input(false)
    };
    fails(cap, None, "softcap = 0");
    let beyond = &layer.ids + VOCAB;
    let outside = LinearLogprobsInput {
        ids: &beyond,
        ..layer.input(false)
    };
    fails(outside, None, "out of bounds");
}
