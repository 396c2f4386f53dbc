//! A thousand rounds of everything that puts Rust closures into the graph leave no tensor and no
//! closure behind, whether they succeed, fail, panic or are given up.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use rlhf_scale::{
    CheckpointPolicy, Error, GradientCheckpointing, LinearLogprobsInput, Saved, checkpoint,
    clear_grads, core::LogprobOptions, custom_function, linear_logprobs, measure_memory,
};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);
const ROUNDS: usize = 1000;

fn leaf(shape: &[i64]) -> Tensor {
    Tensor::full(shape, 0.25, F32).set_requires_grad(true)
}

/// Bytes of tensors and handles of `token` that a thousand rounds leave, cycling through the ways
/// `0..ways` that a round may end.
fn left_behind(ways: usize, round: impl Fn(usize, &Arc<()>)) -> (u64, usize) {
    let token = Arc::new(());
    // What libtorch makes once and keeps is made here.
    (0..ways).for_each(|way| round(way, &token));
    let ((), memory) =
        measure_memory(|| (0..ROUNDS).for_each(|i| round(i % ways, &token))).unwrap();
    assert!(memory.peak > 0, "nothing was measured");
    (memory.kept, Arc::strong_count(&token) - 1)
}

/// How a closure of backward ends.
fn end(way: usize) -> Result<(), Error> {
    match way {
        0 => Ok(()),
        1 => Err(Error::NoGradients { parameters: 1 }),
        _ => panic!("on purpose"),
    }
}

/// Backward, and whether it went well; ways from 3 on do without.
fn finish(loss: Tensor, way: usize) {
    match way {
        0 => loss.backward(),
        1 | 2 => assert!(loss.f_backward().is_err()),
        _ => drop(loss),
    }
}

#[test]
fn custom_functions() {
    let round = |way: usize, token: &Arc<()>| {
        let x = leaf(&[64, 16]);
        let token = Arc::clone(token);
        let outputs = catch_unwind(AssertUnwindSafe(|| {
            custom_function(&[&x], |inputs| {
                end(if way >= 4 { way - 3 } else { 0 })?;
                let saved = Saved::new(&inputs[0])?;
                let output = inputs[0].f_square()?;
                let backward = move |grads: &[Option<Tensor>], _: &[bool]| {
                    let _token = &token;
                    end(way.min(3) % 3)?;
                    let grad = grads[0].as_ref().unwrap().f_mul(saved.get()?)?;
                    Ok::<_, Error>(vec![Some(grad * 2.0)])
                };
                Ok::<_, Error>((vec![output], backward))
            })
        }));
        match outputs {
            Ok(Ok(outputs)) => finish(outputs[0].sum(Kind::Float), way),
            _ => assert!(way >= 4),
        }
    };
    assert_eq!(left_behind(6, round), (0, 0));
}

#[test]
fn checkpoints() {
    let weight = leaf(&[16, 16]);
    let round = |way: usize, token: &Arc<()>| {
        let x = leaf(&[64, 16]);
        let (weight, calls) = (weight.shallow_clone(), Arc::new(std::sync::Mutex::new(0)));
        let token = Arc::clone(token);
        let captured = weight.shallow_clone();
        let outputs = catch_unwind(AssertUnwindSafe(|| {
            checkpoint(&[&x], move |inputs| {
                let _token = &token;
                let mut calls = calls.lock().unwrap_or_else(|e| e.into_inner());
                *calls += 1;
                if *calls == 2 || way >= 4 {
                    end(if way >= 4 { way - 3 } else { way % 3 })?;
                }
                Ok::<_, Error>(vec![inputs[0].f_matmul(&captured)?.f_tanh()?])
            })
        }));
        match outputs {
            Ok(Ok(outputs)) => finish(outputs[0].sum(Kind::Float), way),
            _ => assert!(way >= 4),
        }
        clear_grads(&[weight]).unwrap();
    };
    assert_eq!(left_behind(6, round), (0, 0));
}

#[test]
fn nested_checkpoints_of_a_stack() {
    let weights: Vec<Tensor> = (0..5).map(|_| leaf(&[16, 16])).collect();
    let round = |way: usize, token: &Arc<()>| {
        let x = leaf(&[32, 16]);
        let blocks = weights.iter().map(|weight| {
            let (weight, token) = (weight.shallow_clone(), Arc::clone(token));
            move |x: &Tensor| {
                let _token = &token;
                Ok::<_, Error>(x.f_add(&x.f_matmul(&weight)?.f_tanh()?)?)
            }
        });
        let stack = GradientCheckpointing::from(CheckpointPolicy::SquareRoot);
        let output = stack.run(blocks.collect(), &x).unwrap();
        let loss = output.sum(Kind::Float);
        match way {
            0 => loss.backward(),
            _ => drop(loss),
        }
        clear_grads(&weights).unwrap();
    };
    assert_eq!(left_behind(2, round), (0, 0));
}

#[test]
fn log_probabilities() {
    let weight = leaf(&[300, 16]);
    let round = |way: usize, _: &Arc<()>| {
        let hidden = leaf(&[96, 16]);
        let ids = Tensor::full(
            [96],
            if way == 4 { 300 } else { 7 },
            (Kind::Int64, Device::Cpu),
        );
        let own = weight.detach().copy().set_requires_grad(true);
        let input = LinearLogprobsInput {
            hidden: &hidden,
            weight: &own,
            bias: None,
            ids: &ids,
            softcap: None,
        };
        let options = LogprobOptions {
            entropy: way == 2,
            ..LogprobOptions::default()
        };
        let scores = linear_logprobs(input, &options, Some(40));
        let Ok(scores) = scores else {
            assert_eq!(way, 4);
            return;
        };
        let mut loss = scores.logprobs.sum(Kind::Float);
        if let Some(entropy) = scores.entropy {
            loss += entropy.sum(Kind::Float);
        }
        match way {
            0 | 2 => loss.backward(),
            1 => {
                // Changed between forward and backward.
                let _ = tch::no_grad(|| own.shallow_clone().g_add_scalar_(1.0));
                assert!(loss.f_backward().is_err());
            }
            _ => drop(loss),
        }
    };
    assert_eq!(left_behind(5, round), (0, 0));
}

/// The measure sees what it should: a graph that is forgotten, and a closure.
#[test]
fn a_planted_leak_is_seen() {
    let round = |way: usize, token: &Arc<()>| {
        let x = leaf(&[64, 16]);
        let token = Arc::clone(token);
        let outputs = checkpoint(&[&x], move |inputs| {
            let _token = &token;
            Ok::<_, Error>(vec![inputs[0].f_tanh()?])
        });
        if way == 1 {
            std::mem::forget(outputs);
        }
    };
    let (bytes, closures) = left_behind(100, round);
    // Ten of a thousand rounds, and one before them: its closure, but not its bytes.
    assert_eq!(closures, 11);
    assert!(bytes >= 10 * 64 * 16 * 4, "{bytes}");
}
