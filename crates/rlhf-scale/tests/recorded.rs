//! The recorded kernels of training, in f32 and bf16, against f64 and libtorch's autograd.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use rlhf_core::Segment;
use rlhf_scale::recorded::{self, CausalAttentionInput};
use rlhf_scale::{Checkpoint, Error};
use tch::{Device, Kind, Tensor};

/// Results and gradients are rounded once, in bf16 to 8 bits, and so are the operands of what comes next.
fn tolerance(kind: Kind) -> f64 {
    match kind {
        Kind::Float => 2e-6,
        _ => 8e-3,
    }
}

const KINDS: [Kind; 2] = [Kind::Float, Kind::BFloat16];

fn random(shape: &[i64], seed: f64) -> Tensor {
    let count: i64 = shape.iter().product();
    let values = Tensor::arange(count, (Kind::Double, Device::Cpu)) * 1.7 + seed;
    ((values.sin() * 1000.0).frac() * 2.0)
        .view(shape)
        .to_kind(Kind::BFloat16)
}

fn leaves(inputs: &[Tensor], kind: Kind) -> Vec<Tensor> {
    let leaf = |t: &Tensor| t.detach().copy().to_kind(kind).set_requires_grad(true);
    inputs.iter().map(leaf).collect()
}

/// Outputs, and the gradients of their sum with fixed weights.
fn run(
    inputs: &[Tensor],
    kind: Kind,
    f: &dyn Fn(&[Tensor]) -> Vec<Tensor>,
) -> (Vec<Tensor>, Vec<Tensor>) {
    let leaves = leaves(inputs, kind);
    let outputs = f(&leaves);
    let losses = outputs.iter().enumerate().map(|(i, output)| {
        let weights = random(&output.size(), 0.77 + i as f64).to_kind(kind);
        (output * weights).sum(Kind::Double)
    });
    losses.sum::<Tensor>().backward();
    (
        outputs.iter().map(Tensor::detach).collect(),
        leaves.iter().map(Tensor::grad).collect(),
    )
}

fn compare(
    what: &str,
    inputs: &[Tensor],
    ours: &dyn Fn(&[Tensor]) -> Vec<Tensor>,
    plain: &dyn Fn(&[Tensor]) -> Vec<Tensor>,
) {
    let (want_outputs, want_grads) = run(inputs, Kind::Double, plain);
    for kind in KINDS {
        let (outputs, grads) = run(inputs, kind, ours);
        let pairs = outputs.iter().zip(&want_outputs);
        for (i, (got, want)) in pairs.chain(grads.iter().zip(&want_grads)).enumerate() {
            assert_eq!((got.size(), got.kind()), (want.size(), kind), "{what} {i}");
            let scale = want.abs().max().double_value(&[]);
            let off = got.to_kind(Kind::Double) - want;
            let off = off.abs().max().double_value(&[]);
            assert!(
                off <= tolerance(kind) * scale,
                "{what}, {kind:?}, tensor {i}: {off} of {scale}"
            );
        }
    }
}

fn rms(x: &Tensor, weight: &Tensor) -> Tensor {
    let mean = x.square().mean_dim([-1i64].as_slice(), true, x.kind());
    x * (mean + 1e-5).rsqrt() * weight
}

#[test]
fn norms() {
    if !recorded::available(Kind::BFloat16) {
        return;
    }
    for shape in [vec![5, 64], vec![300, 50], vec![3, 2, 17]] {
        let width = shape[shape.len() - 1];
        let inputs = [
            random(&shape, 0.1),
            random(&[width], 0.2),
            random(&shape, 0.3),
        ];
        compare(
            "norm",
            &inputs[..2],
            &|t| vec![recorded::rms_norm(&t[0], &t[1], 1e-5).unwrap().unwrap()],
            &|t| vec![rms(&t[0], &t[1])],
        );
        compare(
            "norm of a sum",
            &inputs,
            &|t| {
                let both = recorded::add_rms_norm(&t[0], &t[2], &t[1], 1e-5);
                let (sum, normed) = both.unwrap().unwrap();
                vec![sum, normed]
            },
            &|t| {
                let sum = &t[0] + &t[2];
                vec![sum.shallow_clone(), rms(&sum, &t[1])]
            },
        );
        // Only one of the outputs has a gradient.
        compare(
            "norm of a sum, the sum unused",
            &inputs,
            &|t| {
                vec![
                    recorded::add_rms_norm(&t[0], &t[2], &t[1], 1e-5)
                        .unwrap()
                        .unwrap()
                        .1,
                ]
            },
            &|t| vec![rms(&(&t[0] + &t[2]), &t[1])],
        );
    }
    // A frozen scale.
    let x = random(&[4, 32], 0.1).set_requires_grad(true);
    let weight = random(&[32], 0.2);
    let y = recorded::rms_norm(&x, &weight, 1e-5).unwrap().unwrap();
    y.sum(Kind::Float).backward();
    assert!(x.grad().defined() && !weight.grad().defined());
}

#[test]
fn rotary_positions() {
    if !recorded::available(Kind::BFloat16) {
        return;
    }
    for (rows, heads, d, width) in [(1, 2, 64, 64), (5, 3, 64, 32), (70, 9, 20, 10)] {
        let angles = random(&[rows, 1, width / 2], 0.2).to_kind(Kind::Float);
        let cos = Tensor::cat(&[angles.cos(), angles.cos()], 2).to_kind(Kind::BFloat16);
        let sin = Tensor::cat(&[-angles.sin(), angles.sin()], 2).to_kind(Kind::BFloat16);
        compare(
            "rotation",
            &[random(&[rows, heads, d], 0.1)],
            &|t| {
                let [cos, sin] = [&cos, &sin].map(|t_| t_.to_kind(t[0].kind()));
                vec![recorded::rotate(&t[0], &cos, &sin).unwrap().unwrap()]
            },
            &|t| {
                let (cos, sin) = (cos.to_kind(Kind::Double), sin.to_kind(Kind::Double));
                let turning = t[0].narrow(2, 0, width);
                let turned = &turning * &cos + turning.roll(width / 2, 2) * &sin;
                vec![Tensor::cat(&[turned, t[0].narrow(2, width, d - width)], 2)]
            },
        );
    }
}

#[test]
fn gates() {
    if !recorded::available(Kind::BFloat16) {
        return;
    }
    for shape in [[1, 3], [7, 45], [40, 1536]] {
        compare(
            "gate",
            &[random(&shape, 0.1) * 5.0, random(&shape, 0.3)],
            &|t| vec![recorded::silu_gated(&t[0], &t[1]).unwrap().unwrap()],
            &|t| vec![t[0].silu() * &t[1]],
        );
    }
    // Where e^-x overflows, gradients are 0 and 1, not NaN.
    let gate = Tensor::from_slice(&[-1e30f32, -100.0, 0.0, 100.0, 1e30])
        .to_kind(Kind::BFloat16)
        .set_requires_grad(true);
    let up = gate.ones_like();
    let y = recorded::silu_gated(&gate, &up).unwrap().unwrap();
    y.sum(Kind::Float).backward();
    let grad = Vec::<f32>::try_from(gate.grad().to_kind(Kind::Float)).unwrap();
    assert!(grad[0].abs() < 1e-6 && grad[1].abs() < 1e-6, "{grad:?}");
    assert_eq!(&grad[2..], [0.5, 1.0, 1.0]);
}

fn after(rows: std::ops::Range<i64>, prefix: std::ops::Range<i64>) -> Segment {
    Segment {
        rows,
        prefix: Some(prefix),
    }
}

/// Attention of the whole run, with a mask of what each row sees.
fn attended(t: &[Tensor], segments: &[Segment], scale: f64, window: Option<i64>) -> Tensor {
    let [rows, heads, d] = <[i64; 3]>::try_from(t[0].size()).unwrap();
    let mask = Tensor::zeros([rows, rows], (Kind::Bool, Device::Cpu));
    for segment in segments {
        let prefix = segment.prefix.clone().unwrap_or(0..0);
        for row in segment.rows.clone() {
            let mut seen: Vec<i64> = prefix.clone().chain(segment.rows.start..=row).collect();
            let keep = window.map_or(seen.len(), |w| (w as usize).min(seen.len()));
            seen.drain(..seen.len() - keep);
            for key in seen {
                let _ = mask.get(row).get(key).fill_(1);
            }
        }
    }
    let group = heads / t[1].size()[1];
    let heads_first = |t: &Tensor| t.transpose(0, 1);
    let wide = |t: &Tensor| heads_first(t).repeat_interleave_self_int(group, 0, None);
    let scores = heads_first(&t[0]).matmul(&wide(&t[1]).transpose(1, 2)) * scale;
    let scores = scores.masked_fill(&mask.logical_not(), f64::NEG_INFINITY);
    let output = scores.softmax(-1, t[0].kind()).matmul(&wide(&t[2]));
    heads_first(&output).reshape([rows, heads * d])
}

fn ours(t: &[Tensor], segments: &[Segment], scale: f64, window: Option<i64>) -> Option<Tensor> {
    recorded::causal_attention(&CausalAttentionInput {
        query: &t[0],
        key: &t[1],
        value: &t[2],
        segments,
        scale,
        window,
    })
    .unwrap()
}

fn runs() -> Vec<(i64, Vec<Segment>)> {
    vec![
        (37, vec![Segment::whole(0..37)]),
        (1, vec![Segment::whole(0..1)]),
        (26, [0..5, 5..22, 22..26].map(Segment::whole).to_vec()),
        // Two answers to a prompt, another sequence, and one more answer to a part of the first.
        (
            90,
            vec![
                Segment::whole(0..33),
                after(33..50, 0..30),
                after(50..51, 0..30),
                Segment::whole(51..70),
                after(70..90, 3..20),
            ],
        ),
    ]
}

#[test]
fn attention() {
    if !recorded::available(Kind::BFloat16) {
        return;
    }
    for (rows, segments) in runs() {
        for (heads, kv_heads, d) in [(2, 2, 16), (6, 2, 64), (3, 1, 80)] {
            for window in [None, Some(1), Some(7), Some(20)] {
                let inputs = [
                    random(&[rows, heads, d], 0.1),
                    random(&[rows, kv_heads, d], 0.2),
                    random(&[rows, kv_heads, d], 0.3),
                ];
                compare(
                    &format!("{rows} rows, {heads} of {d}, window {window:?}"),
                    &inputs,
                    &|t| vec![ours(t, &segments, 0.2, window).unwrap()],
                    &|t| vec![attended(t, &segments, 0.2, window)],
                );
            }
        }
    }
}

#[test]
fn attention_reads_parts_of_a_product_where_they_lie() {
    if !recorded::available(Kind::BFloat16) {
        return;
    }
    let segments = [0..9, 9..20].map(Segment::whole);
    let parts = |t: &Tensor| -> Vec<Tensor> {
        let parts = t.split_with_sizes([64, 32, 32].as_slice(), 1);
        parts.iter().map(|t| t.view([20, -1, 32])).collect()
    };
    compare(
        "one product",
        &[random(&[20, 128], 0.1)],
        &|t| vec![ours(&parts(&t[0]), &segments, 0.3, None).unwrap()],
        &|t| vec![attended(&parts(&t[0]), &segments, 0.3, None)],
    );
}

#[test]
fn the_bits_depend_on_nothing_else() {
    if !recorded::available(Kind::BFloat16) {
        return;
    }
    let (rows, segments) = runs().swap_remove(3);
    let inputs = [
        random(&[rows, 6, 64], 0.1),
        random(&[rows, 2, 64], 0.2),
        random(&[rows, 2, 64], 0.3),
    ];
    let attention = |t: &[Tensor]| vec![ours(t, &segments, 0.2, None).unwrap()];
    let norm_inputs = [random(&[700, 80], 0.1), random(&[80], 0.2)];
    let norm = |t: &[Tensor]| vec![recorded::rms_norm(&t[0], &t[1], 1e-5).unwrap().unwrap()];
    let threads = tch::get_num_threads();
    let mut found = Vec::new();
    for count in [1, 2, 3] {
        tch::set_num_threads(count);
        let (a, b) = run(&inputs, Kind::BFloat16, &attention);
        let (c, d) = run(&norm_inputs, Kind::BFloat16, &norm);
        found.push([a, b, c, d].into_iter().flatten().collect::<Vec<Tensor>>());
    }
    tch::set_num_threads(threads);
    for other in &found[1..] {
        assert!(found[0].iter().zip(other).all(|(a, b)| a.equal(b)));
    }
    // Without gradients they are the same.
    let _guard = tch::no_grad_guard();
    assert!(attention(&inputs)[0].equal(&found[0][0]));
    let plain = norm(&norm_inputs).remove(0);
    assert!(plain.equal(&found[0][4]));
    // A sequence alone.
    let alone: Vec<Tensor> = inputs.iter().map(|t| t.narrow(0, 51, 19)).collect();
    let alone = ours(&alone, &[Segment::whole(0..19)], 0.2, None).unwrap();
    assert!(alone.equal(&found[0][0].narrow(0, 51, 19)));
}

#[test]
fn checkpoints_compute_the_same_again() {
    if !recorded::available(Kind::BFloat16) {
        return;
    }
    let segments = vec![Segment::whole(0..30), after(30..50, 0..30)];
    let inputs = [
        random(&[50, 64], 0.1),
        random(&[64], 0.2),
        random(&[50, 64], 0.3),
    ];
    let block = move |t: &[Tensor]| -> Result<Vec<Tensor>, Error> {
        let (sum, normed) = recorded::add_rms_norm(&t[0], &t[2], &t[1], 1e-5)?.unwrap();
        let heads = normed.f_view([50, 4, 16])?;
        let attended = recorded::causal_attention(&CausalAttentionInput {
            query: &heads,
            key: &heads,
            value: &heads,
            segments: &segments,
            scale: 0.25,
            window: None,
        })?
        .unwrap();
        let gated = recorded::silu_gated(&attended, &normed)?.unwrap();
        Ok(vec![sum.f_add(&gated)?.f_matmul(&gated.f_tr()?)?])
    };
    let (outputs, grads) = run(&inputs, Kind::BFloat16, &|t| block(t).unwrap());
    for stop_early in [false, true] {
        let checkpoint = Checkpoint {
            stop_early,
            ..Checkpoint::default()
        };
        let (again, grads_again) = run(&inputs, Kind::BFloat16, &|t| {
            let refs: Vec<&Tensor> = t.iter().collect();
            checkpoint.run(&refs, block.clone()).unwrap()
        });
        assert!(outputs[0].equal(&again[0]), "{stop_early}");
        for (a, b) in grads.iter().zip(&grads_again) {
            assert!(a.equal(b), "{stop_early}");
        }
    }
}

#[test]
fn where_they_do_not_apply_they_say_so() {
    let x = random(&[4, 2, 16], 0.1);
    let whole = [Segment::whole(0..4)];
    let [f64s, short, odd] = [
        x.to_kind(Kind::Double),
        x.narrow(0, 0, 3),
        x.narrow(2, 0, 15),
    ];
    let attend = |t: &Tensor, segments: &[Segment]| {
        ours(&[t, t, t].map(Tensor::shallow_clone), segments, 1.0, None)
    };
    assert!(attend(&f64s, &whole).is_none() && attend(&odd, &whole).is_none());
    assert!(attend(&short, &whole).is_none());
    assert!(attend(&x, &[Segment::whole(0..2)]).is_none());
    assert!(attend(&x, &[Segment::whole(0..2), Segment::whole(1..4)]).is_none());
    assert!(attend(&x, &[Segment::whole(0..2), after(2..4, 1..3)]).is_none());
    let weight = random(&[16], 0.1);
    assert!(recorded::rms_norm(&f64s, &weight, 1e-5).unwrap().is_none());
    assert!(recorded::rms_norm(&odd, &weight, 1e-5).unwrap().is_none());
    assert!(recorded::silu_gated(&x, &short).unwrap().is_none());
    assert!(recorded::rotate(&x, &short, &short).unwrap().is_none());
    if recorded::available(Kind::BFloat16) {
        let x = random(&[4, 16], 0.1).set_requires_grad(true);
        let y = recorded::silu_gated(&x, &x).unwrap().unwrap();
        let grads = Tensor::f_run_backward(&[y.sum(Kind::Float)], &[&x], true, true);
        let error = grads.unwrap_err().to_string();
        assert!(error.contains("no second derivative"), "{error}");
    }
}
