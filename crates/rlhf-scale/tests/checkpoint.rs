//! Checkpointed computations against plain ones: equal to the last bit.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rlhf_scale::{Checkpoint, CheckpointPolicy, Error, GradientCheckpointing, clear_grads};
use tch::{Device, Kind, Tensor};

const F32: (Kind, Device) = (Kind::Float, Device::Cpu);

/// libtorch's generator is global, and a checkpoint reads and restores it: tests take turns.
fn turn() -> MutexGuard<'static, ()> {
    static GENERATOR: Mutex<()> = Mutex::new(());
    GENERATOR.lock().unwrap_or_else(PoisonError::into_inner)
}

/// To the end, and stopping early.
const MODES: [Checkpoint; 2] = [
    Checkpoint {
        offload: false,
        preserve_rng: true,
        stop_early: false,
    },
    Checkpoint {
        offload: false,
        preserve_rng: true,
        stop_early: true,
    },
];

/// Different values in every element and every leaf, without the generator.
fn leaf(shape: &[i64]) -> Tensor {
    static LEAVES: AtomicUsize = AtomicUsize::new(1);
    let number = LEAVES.fetch_add(1, Ordering::SeqCst) as f64;
    let values = Tensor::arange(shape.iter().product::<i64>(), F32) * 1.7 + number * 0.9;
    (values.sin() * 0.5).view(shape).set_requires_grad(true)
}

/// The gradients of leaves, which are cleared.
fn take_grads(leaves: &[&Tensor]) -> Vec<Tensor> {
    let grads = leaves.iter().map(|leaf| leaf.grad().copy()).collect();
    clear_grads(
        &leaves
            .iter()
            .map(|leaf| leaf.shallow_clone())
            .collect::<Vec<_>>(),
    )
    .unwrap();
    grads
}

fn assert_equal(got: &[Tensor], expected: &[Tensor]) {
    assert_eq!(got.len(), expected.len());
    for (i, (got, expected)) in got.iter().zip(expected).enumerate() {
        assert!(got.equal(expected), "tensor {i} differs");
    }
}

type Block = Box<dyn Fn(&Tensor) -> Result<Tensor, Error> + Send>;

/// A residual block with dropout.
fn block(weight: &Tensor) -> Block {
    let weight = weight.shallow_clone();
    Box::new(move |x| Ok(x.f_add(&x.f_matmul(&weight)?.f_gelu("none")?.f_dropout(0.3, true)?)?))
}

#[test]
fn every_policy_gives_the_same_bits_with_dropout() {
    let _turn = turn();
    let input = leaf(&[6, 16]);
    let weights: Vec<Tensor> = (0..7).map(|_| leaf(&[16, 16])).collect();
    let leaves: Vec<&Tensor> = weights.iter().chain([&input]).collect();
    let run = |checkpointing: GradientCheckpointing| {
        tch::manual_seed(2);
        let blocks = weights.iter().map(block).collect();
        let output = checkpointing.run(blocks, &(&input * 2.0)).unwrap();
        output.square().mean(Kind::Float).backward();
        let mut result = take_grads(&leaves);
        result.push(output.detach());
        // The generator is where a plain run leaves it.
        result.push(Tensor::rand([3], F32));
        result
    };
    let plain = run(CheckpointPolicy::None.into());
    for policy in [
        CheckpointPolicy::EveryBlock,
        CheckpointPolicy::EveryKth(3),
        CheckpointPolicy::EveryKth(100),
        CheckpointPolicy::SquareRoot,
    ] {
        for offload in [false, true] {
            assert_equal(&run(GradientCheckpointing { policy, offload }), &plain);
        }
    }
}

/// Frozen weights with low-rank updates that train: only those get gradients.
#[test]
fn low_rank_adapters_on_frozen_weights() {
    let _turn = turn();
    let input = leaf(&[6, 16]).detach();
    let frozen: Vec<Tensor> = (0..5).map(|_| leaf(&[16, 16]).detach()).collect();
    let adapters: Vec<[Tensor; 2]> = (0..5).map(|_| [leaf(&[16, 2]), leaf(&[2, 16])]).collect();
    let leaves: Vec<&Tensor> = adapters.iter().flatten().collect();
    let run = |policy: CheckpointPolicy| {
        tch::manual_seed(5);
        let blocks = frozen.iter().zip(&adapters).map(|(weight, [down, up])| {
            let weight = weight.shallow_clone();
            let (down, up) = (down.shallow_clone(), up.shallow_clone());
            move |x: &Tensor| -> Result<Tensor, Error> {
                let update = x.f_dropout(0.2, true)?.f_matmul(&down)?.f_matmul(&up)?;
                Ok(x.f_add(&x.f_matmul(&weight)?.f_add(&update)?.f_tanh()?)?)
            }
        });
        let output = GradientCheckpointing::from(policy)
            .run(blocks.collect(), &input)
            .unwrap();
        output.square().mean(Kind::Float).backward();
        assert!(!frozen[0].grad().defined());
        take_grads(&leaves)
    };
    let plain = run(CheckpointPolicy::None);
    for policy in [CheckpointPolicy::EveryBlock, CheckpointPolicy::SquareRoot] {
        assert_equal(&run(policy), &plain);
    }
}

#[test]
fn dropout_differs_when_the_generator_is_not_restored() {
    let _turn = turn();
    let input = leaf(&[64, 64]);
    let run = |mode: Checkpoint, preserve_rng: bool| {
        tch::manual_seed(3);
        let options = Checkpoint {
            preserve_rng,
            ..mode
        };
        let dropped = options.run(&[&input], |inputs| {
            Ok::<_, Error>(vec![inputs[0].f_dropout(0.5, true)?])
        });
        let output = dropped.unwrap().remove(0);
        output.sum(Kind::Float).backward();
        // Where an element was dropped its gradient is 0.
        let kept = output.ne(0.0);
        take_grads(&[&input])[0].ne(0.0).eq_tensor(&kept).all()
    };
    for mode in MODES {
        assert!(bool::try_from(run(mode, true)).unwrap());
        assert!(!bool::try_from(run(mode, false)).unwrap());
    }
}

/// Several inputs and outputs, inputs and outputs without gradients, a captured leaf, a captured
/// result, and a leaf that is used outside as well.
#[test]
fn captured_tensors_get_their_gradients() {
    let _turn = turn();
    let (a, b, w, v) = (leaf(&[5, 8]), leaf(&[5, 8]), leaf(&[8, 8]), leaf(&[8, 8]));
    let ids = Tensor::from_slice(&[1i64, 0, 7, 3, 3]);
    let leaves = [&a, &b, &w, &v];
    let run = |mode: Option<Checkpoint>| {
        let captured = (&v * 2.0).tanh();
        let body = {
            let (w, captured) = (w.shallow_clone(), captured.shallow_clone());
            move |inputs: &[Tensor]| -> Result<Vec<Tensor>, Error> {
                let mixed = inputs[0].f_matmul(&w)?.f_matmul(&captured)? * &inputs[1];
                let picked = mixed.f_gather(1, &inputs[2].unsqueeze(1), false)?;
                let best = mixed.f_argmax(-1, false)?;
                Ok(vec![mixed, picked, best, inputs[0].shallow_clone()])
            }
        };
        let outputs = match mode {
            Some(mode) => mode.run(&[&a, &b, &ids], body).unwrap(),
            None => body(&[a.shallow_clone(), b.shallow_clone(), ids.shallow_clone()]).unwrap(),
        };
        assert!(!outputs[2].requires_grad());
        let loss = outputs[0].square().sum(Kind::Float) + outputs[1].exp().sum(Kind::Float);
        (loss + (captured + &outputs[3].sum(Kind::Float)).sum(Kind::Float)).backward();
        take_grads(&leaves)
    };
    for mode in MODES {
        assert_equal(&run(Some(mode)), &run(None));
    }
}

#[test]
fn only_some_outputs_may_be_used() {
    let _turn = turn();
    let a = leaf(&[4]);
    let run = |mode: Option<Checkpoint>| {
        let body = |inputs: &[Tensor]| Ok::<_, Error>(vec![inputs[0].exp(), inputs[0].sin()]);
        let outputs = match mode {
            Some(mode) => mode.run(&[&a], body).unwrap(),
            None => body(&[a.shallow_clone()]).unwrap(),
        };
        outputs[1].sum(Kind::Float).backward();
        take_grads(&[&a])
    };
    for mode in MODES {
        assert_equal(&run(Some(mode)), &run(None));
    }
}

#[test]
fn without_gradients_nothing_is_recorded() {
    let _turn = turn();
    for mode in MODES {
        let calls = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&calls);
        let body = move |inputs: &[Tensor]| {
            counted.fetch_add(1, Ordering::SeqCst);
            Ok::<_, Error>(vec![inputs[0].exp()])
        };
        let outputs = tch::no_grad(|| mode.run(&[&leaf(&[2])], body.clone())).unwrap();
        assert!(!outputs[0].requires_grad());
        let outputs = mode.run(&[&Tensor::ones([2], F32)], body).unwrap();
        assert!(!outputs[0].requires_grad());
        assert_eq!(calls.load(Ordering::SeqCst), 2);
        assert_eq!(Arc::strong_count(&calls), 1, "no closure was kept");
    }
}

fn backward_error(loss: Tensor) -> String {
    rlhf_scale::backward(&[loss], &[Tensor::ones([], F32)])
        .unwrap_err()
        .to_string()
}

/// A closure that is plain in forward and something else in backward.
fn twofold(
    mode: Checkpoint,
    input: &Tensor,
    later: impl Fn(&Tensor) -> Result<Tensor, Error> + Send + 'static,
) -> Tensor {
    let calls = AtomicUsize::new(0);
    let outputs = mode.run(&[input], move |inputs| {
        let first = calls.fetch_add(1, Ordering::SeqCst) == 0;
        let output = if first {
            inputs[0].exp()
        } else {
            later(&inputs[0])?
        };
        Ok::<_, Error>(vec![output])
    });
    outputs.unwrap().remove(0).sum(Kind::Float)
}

#[test]
fn failures_in_the_recomputation_are_errors_and_leave_the_process_usable() {
    let _turn = turn();
    let a = leaf(&[2]);
    let other = leaf(&[2]);
    for mode in MODES {
        let error = backward_error(twofold(mode, &a, |_| panic!("lost")));
        assert!(error.contains("panicked: lost"), "{error}");
        let error = backward_error(twofold(mode, &a, |_| {
            Err(Error::NoGradients { parameters: 2 })
        }));
        assert!(error.contains("none of the 2 parameters"), "{error}");
        let captured = other.shallow_clone();
        let error = backward_error(twofold(mode, &a, move |x| Ok(x.f_mul(&captured)?)));
        assert!(error.contains("built another graph"), "{error}");
        let error = backward_error(twofold(mode, &a, |x| Ok(x.detach())));
        let expected = match mode.stop_early {
            true => "built another graph",
            false => "output 0 of a checkpointed closure",
        };
        assert!(error.contains(expected), "{error}");

        let _ = tch::no_grad(|| other.shallow_clone().g_add_scalar_(1.0));
        twofold(mode, &a, |x| Ok(x.f_exp()?)).backward();
        assert_equal(&take_grads(&[&a]), &[a.exp().detach()]);
    }
    let error = backward_error(twofold(MODES[0], &a, |x| Ok(x.exp().sum(Kind::Float))));
    assert!(
        error.contains("output 0 of a checkpointed closure"),
        "{error}"
    );
}

#[test]
fn a_panic_in_forward_unwinds() {
    let _turn = turn();
    let a = leaf(&[2]);
    for mode in MODES {
        let outcome = std::panic::catch_unwind(|| {
            mode.run(&[&a], |_: &[Tensor]| -> Result<Vec<Tensor>, Error> {
                panic!("at once")
            })
        });
        let panic = outcome.unwrap_err();
        assert_eq!(panic.downcast_ref::<&str>(), Some(&"at once"));
        // Nothing is watched any longer.
        a.square().sum(Kind::Float).backward();
        assert_equal(&take_grads(&[&a]), &[(&a * 2.0).detach()]);
    }
}

#[test]
fn changes_in_place_are_noticed() {
    let _turn = turn();
    let (a, w) = (leaf(&[2]), leaf(&[2]));
    for mode in MODES {
        let loss = |input: &Tensor| {
            let captured = w.shallow_clone();
            let outputs = mode.run(&[input], move |inputs| {
                Ok::<_, Error>(vec![inputs[0].f_mul(&captured)?.f_exp()?])
            });
            outputs.unwrap().remove(0).sum(Kind::Float)
        };
        let product = &a * 1.0;
        let changed_input = loss(&product);
        let _ = tch::no_grad(|| product.shallow_clone().g_add_scalar_(1.0));
        assert!(backward_error(changed_input).contains("modified by an inplace operation"));

        let changed_weight = loss(&a);
        let _ = tch::no_grad(|| w.shallow_clone().g_add_scalar_(1.0));
        let error = backward_error(changed_weight);
        assert!(
            error.contains("parameter that a checkpointed closure uses"),
            "{error}"
        );
    }
}

#[test]
fn backward_may_run_once_and_on_another_thread() {
    let _turn = turn();
    let a = leaf(&[3]);
    for mode in MODES {
        let token = Arc::new(());
        let held = Arc::clone(&token);
        let outputs = mode.run(&[&a], move |inputs| {
            let _ = &held;
            Ok::<_, Error>(vec![inputs[0].f_sin()?])
        });
        let loss = outputs.unwrap().remove(0).sum(Kind::Float);
        let again = loss.shallow_clone();
        std::thread::spawn(move || loss.backward()).join().unwrap();
        assert_equal(&take_grads(&[&a]), &[a.cos().detach()]);
        assert_eq!(Arc::strong_count(&token), 1, "backward freed the closure");
        assert!(backward_error(again).contains("second time"));
    }
}

/// Resident memory of this process in KiB.
#[cfg(target_os = "linux")]
fn resident_kib() -> i64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// Each round would leave 64 KiB behind if anything of it leaked.
#[cfg(target_os = "linux")]
#[test]
fn a_thousand_checkpoints_leave_nothing_behind() {
    let _turn = turn();
    let weight = leaf(&[16, 16]);
    let round = |i: usize| {
        let input = leaf(&[1024, 16]);
        let captured = weight.shallow_clone();
        let outputs = MODES[i % 2].run(&[&input], move |inputs| {
            Ok::<_, Error>(vec![inputs[0].f_matmul(&captured)?.f_tanh()?])
        });
        let loss = outputs.unwrap().remove(0).sum(Kind::Float);
        match i % 3 {
            0 => loss.backward(),
            1 => drop(loss),
            _ => {
                let _ = tch::no_grad(|| weight.shallow_clone().g_add_scalar_(0.0));
                assert!(loss.f_backward().is_err());
            }
        }
        clear_grads(&[weight.shallow_clone()]).unwrap();
    };
    for i in 0..300 {
        round(i);
    }
    let before = resident_kib();
    for i in 0..1000 {
        round(i);
    }
    let grown = resident_kib() - before;
    assert!(grown < 8 * 1024, "{grown} KiB more after 1,000 rounds");
}
