//! An update on several processes is that of one process, to rounding.
#![cfg(feature = "distributed")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::print_stdout, clippy::print_stderr)] // ranks talk to the test

use std::time::Duration;

use rlhf_scale::distributed::{
    DataParallel, GroupOptions, Operation, ProcessGroup, Sharding, Spawn, World,
};
use rlhf_scale::{
    AdamWConfig, Error, ParamGroup, Schedule, UpdateConfig, UpdateStats, Updater, checkpoint,
};
use tch::{Device, Kind, Tensor};

const STEPS: usize = 5;
const SHARDINGS: [Sharding; 3] = [Sharding::Nothing, Sharding::Optimizer, Sharding::Gradients];
/// Rows of each microbatch: as ragged as can be. The last rank of four has one.
const MICROBATCHES: [i64; 5] = [5, 1, 3, 2, 1];

/// Runs `work` on each of `processes` ranks.
fn on_ranks(processes: usize, name: &str, work: impl FnOnce(&ProcessGroup)) {
    if !Spawn::is_rank() {
        Spawn::test(processes, name).run().unwrap().check().unwrap();
        return;
    }
    let options = GroupOptions {
        limit: Duration::from_secs(60),
        ..GroupOptions::default()
    };
    work(&ProcessGroup::from_env(&options).unwrap());
}

fn sharing(sharding: Sharding) -> DataParallel {
    DataParallel {
        sharding,
        bucket_bytes: 1024, // several buckets
        ..DataParallel::default()
    }
}

/// A small network, some of whose weights are not always used.
struct Net {
    params: Vec<(String, Tensor)>,
    checkpointed: bool,
}

impl Net {
    fn new(kind: Kind, checkpointed: bool) -> Self {
        tch::manual_seed(1);
        let weight = |name: &str, shape: &[i64]| {
            let values = Tensor::randn(shape, (Kind::Float, Device::Cpu)) * 0.3;
            (
                name.to_string(),
                values.to_kind(kind).set_requires_grad(true),
            )
        };
        let mut params = vec![
            weight("a.weight", &[8, 40]),
            weight("a.bias", &[40]),
            weight("b.weight", &[40, 40]),
            weight("never", &[7]),
            weight("rare", &[3, 3]),
        ];
        // Dense, but not in the order of its indices.
        let turned = weight("c.weight", &[3, 40]).1.detach().tr();
        params.push(("c.weight".into(), turned.set_requires_grad(true)));
        Self {
            params,
            checkpointed,
        }
    }

    fn param(&self, name: &str) -> Tensor {
        let found = self.params.iter().find(|(n, _)| n == name);
        found.unwrap().1.shallow_clone()
    }

    /// The share of microbatch `i` in the mean over all rows.
    fn loss(&self, step: usize, i: usize) -> Result<Tensor, Error> {
        let kind = self.param("never").kind();
        let (start, rows) = (MICROBATCHES[..i].iter().sum::<i64>(), MICROBATCHES[i]);
        let all = MICROBATCHES.iter().sum::<i64>();
        let inputs = Tensor::arange(8 * all, (Kind::Float, Device::Cpu)).view([all, 8]);
        let inputs = (inputs * (0.37 + step as f64)).sin().narrow(0, start, rows);
        let [a, bias, b] = ["a.weight", "a.bias", "b.weight"].map(|name| self.param(name));
        let block = move |x: &[Tensor]| -> Result<Vec<Tensor>, Error> {
            Ok(vec![(x[0].matmul(&a) + &bias).tanh().matmul(&b).tanh()])
        };
        let inputs = inputs.to_kind(kind).set_requires_grad(self.checkpointed);
        let hidden = match self.checkpointed {
            true => checkpoint(&[&inputs], block)?.remove(0),
            false => block(&[inputs])?.remove(0),
        };
        let mut outputs = hidden.matmul(&self.param("c.weight"));
        if i == 0 && step != 1 {
            outputs = outputs.matmul(&self.param("rare"));
        }
        let losses = (outputs.to_kind(Kind::Float) - 0.5).square();
        Ok(losses.sum(Kind::Float) / all)
    }

    fn updater(&self, config: &UpdateConfig) -> Updater {
        Updater::new(
            self.params
                .iter()
                .map(|(n, p)| (n.clone(), p.shallow_clone()))
                .collect(),
            config,
        )
        .unwrap()
    }

    fn step(&self, updater: &mut Updater, step: usize) -> UpdateStats {
        updater
            .update(MICROBATCHES.len(), |i| self.loss(step, i))
            .unwrap()
    }
}

fn config() -> UpdateConfig {
    UpdateConfig {
        optimizer: AdamWConfig {
            lr: 0.02,
            weight_decay: 0.1,
            groups: vec![ParamGroup {
                params: vec!["a.*".into()],
                lr: Some(0.01),
                weight_decay: None,
            }],
            ..AdamWConfig::default()
        },
        schedule: Schedule::linear(2, 20),
        max_grad_norm: Some(0.5), // clips
        ..UpdateConfig::default()
    }
}

/// Of bf16 weights one in a hundred may be its neighbour.
#[track_caller]
fn assert_close(what: &str, a: &Tensor, b: &Tensor, tolerance: f64) {
    let half = b.kind() == Kind::BFloat16;
    let [a, b] = [a, b].map(|t| t.to_kind(Kind::Double));
    if half {
        let beyond = (&a - &b).abs() - b.abs() * 2f64.powi(-7);
        assert!(beyond.max().double_value(&[]) <= 1e-6, "{what}: {beyond}");
        let others = a.ne_tensor(&b).sum(Kind::Int64).int64_value(&[]);
        assert!(others <= 1 + b.numel() as i64 / 100, "{what}: {others}");
        return;
    }
    let difference = (&a - &b).abs().max().double_value(&[]);
    let scale = b.abs().max().double_value(&[]).max(1e-3);
    assert!(
        difference <= tolerance * scale,
        "{what}: {difference:e} of {scale:e}"
    );
}

#[track_caller]
fn assert_same_run(what: &str, a: &[UpdateStats], b: &[UpdateStats], tolerance: f64) {
    for (a, b) in a.iter().zip(b) {
        assert!(
            (a.loss - b.loss).abs() <= tolerance * b.loss.abs(),
            "{what}: {a:?} {b:?}"
        );
        let norms = (a.grad_norm - b.grad_norm).abs();
        assert!(
            norms <= 10.0 * tolerance * b.grad_norm,
            "{what}: {a:?} {b:?}"
        );
        assert_eq!((a.lr, a.step), (b.lr, b.step));
    }
}

fn every_way_equals_one_process(group: &ProcessGroup) {
    let dir =
        std::env::temp_dir().join(format!("rlhf-dp-{}", std::env::var("MASTER_PORT").unwrap()));
    for (kind, checkpointed) in [
        (Kind::Float, false),
        (Kind::Float, true),
        (Kind::BFloat16, false),
    ] {
        // bf16 forward passes are the same; their sums differ in f32 rounding, by which a weight may
        // round to the other side.
        let tolerance = if kind == Kind::Float { 1e-5 } else { 1e-3 };
        let alone = Net::new(kind, checkpointed);
        let mut updater = alone.updater(&config());
        let expected: Vec<_> = (0..STEPS)
            .map(|step| alone.step(&mut updater, step))
            .collect();
        for sharding in SHARDINGS {
            let what = format!("{sharding:?} {kind:?} checkpointed: {checkpointed}");
            let world = World::of(group.clone(), &sharing(sharding)).unwrap();
            let net = Net::new(kind, checkpointed);
            if group.rank() > 0 {
                // The first rank's weights count.
                let _ = net.param("a.weight").detach().fill_(7.0);
            }
            let mut shared = net.updater(&config());
            let mut stats: Vec<_> = (0..3).map(|step| net.step(&mut shared, step)).collect();

            // Saved by all, it is the file of one process; and all go on from it.
            let folder = dir.join(&what);
            shared.save(&folder).unwrap();
            group.barrier().unwrap();
            let resumed = Net::new(kind, checkpointed);
            let mut updater_again = resumed.updater(&config());
            updater_again.load(&folder).unwrap();
            let again: Vec<_> = (3..STEPS)
                .map(|s| resumed.step(&mut updater_again, s))
                .collect();
            stats.extend((3..STEPS).map(|step| net.step(&mut shared, step)));
            assert_same_run(&what, &again, &stats[3..], tolerance);
            drop(world);
            let one = Net::new(kind, checkpointed);
            let mut updater_alone = one.updater(&config());
            updater_alone.load(&folder).unwrap();
            let end: Vec<_> = (3..STEPS)
                .map(|s| one.step(&mut updater_alone, s))
                .collect();
            assert_same_run(&what, &end, &stats[3..], tolerance);

            assert_same_run(&what, &stats, &expected, tolerance);
            for (name, weight) in &net.params {
                assert_close(
                    &format!("{what}: {name}"),
                    weight,
                    &alone.param(name),
                    tolerance,
                );
                assert_close(
                    &format!("{what}: {name} after loading"),
                    weight,
                    &resumed.param(name),
                    tolerance,
                );
            }
            // Every rank has the same bytes.
            for (name, weight) in &net.params {
                let all = group.all_gather(&weight.detach().contiguous()).unwrap();
                for rank in 0..group.size() as i64 {
                    assert!(all.get(rank).equal(&all.get(0)), "{what}: {name}");
                }
            }
        }
    }
    group.barrier().unwrap();
    if group.rank() == 0 {
        std::fs::remove_dir_all(dir).unwrap();
    }
}

#[test]
fn two_processes_are_one() {
    on_ranks(2, "two_processes_are_one", every_way_equals_one_process);
}

#[test]
fn four_processes_are_one() {
    on_ranks(4, "four_processes_are_one", every_way_equals_one_process);
}

#[test]
fn bytes_of_a_step_are_those_of_the_formula() {
    on_ranks(4, "bytes_of_a_step_are_those_of_the_formula", |group| {
        for sharding in SHARDINGS {
            let options = DataParallel {
                sharding,
                bucket_bytes: 1 << 20, // one bucket, so that little is filled up
                ..DataParallel::default()
            };
            let _world = World::of(group.clone(), &options).unwrap();
            let net = Net::new(Kind::Float, false);
            let mut updater = net.updater(&config());
            net.step(&mut updater, 0);
            let before = group.traffic();
            net.step(&mut updater, 1);
            let traffic = group.traffic() - before;
            let sent = |operation| traffic[operation].bytes_sent;
            let numbers: usize = net.params.iter().map(|(_, p)| p.numel()).sum();
            let bytes = 4 * numbers as u64;
            let part = 4 * numbers.div_ceil(4) as u64; // of one rank
            let (reduced, scattered, gathered) = match sharding {
                Sharding::Nothing => (2 * 3 * bytes / 4, 0, 0),
                Sharding::Optimizer => (2 * 3 * bytes / 4, 0, 3 * part),
                Sharding::Gradients => (0, 3 * part, 3 * part),
            };
            assert_eq!(sent(Operation::AllReduce), reduced, "{sharding:?}");
            assert_eq!(sent(Operation::ReduceScatter), scattered, "{sharding:?}");
            // Losses and flags travel by all-gathers of some bytes.
            let rest = sent(Operation::AllGather) - gathered;
            assert!(rest < 400, "{sharding:?}: {rest}");
            assert_eq!(sent(Operation::Broadcast), 0);
        }
    });
}

#[test]
fn a_failure_of_one_is_everybodys_and_changes_nothing() {
    let name = "a_failure_of_one_is_everybodys_and_changes_nothing";
    on_ranks(2, name, |group| {
        for sharding in SHARDINGS {
            let _world = World::of(group.clone(), &sharing(sharding)).unwrap();
            let net = Net::new(Kind::Float, false);
            let mut updater = net.updater(&config());
            net.step(&mut updater, 0);
            let before: Vec<Tensor> = net.params.iter().map(|(_, p)| p.copy()).collect();
            // Microbatch 4 is rank 1's.
            let failed = updater.update(MICROBATCHES.len(), |i| match i {
                4 => Err(Error::SecondBackward),
                _ => net.loss(1, i),
            });
            match (group.rank(), failed.unwrap_err()) {
                (1, Error::SecondBackward) => {}
                (0, Error::Core(rlhf_scale::core::Error::Peer { rank: 1, message })) => {
                    assert!(message.contains("second time"), "{message}");
                }
                (rank, other) => panic!("rank {rank}: {other}"),
            }
            // A number that is not finite is seen by all.
            let nan =
                |i: usize| Ok::<_, Error>(net.loss(1, i)? * if i == 3 { f64::NAN } else { 1.0 });
            let error = updater.update(MICROBATCHES.len(), nan).unwrap_err();
            assert!(
                matches!(error, Error::NonFiniteLoss { microbatch: 3, .. }),
                "{error}"
            );
            let broken = |i: usize| -> Result<Tensor, Error> {
                let zero = net.param("b.weight").square().sum(Kind::Float) * 0.0;
                // The gradient of a square root at 0.
                Ok(net.loss(1, i)? + if i == 4 { zero.sqrt() } else { zero })
            };
            let error = updater.update(MICROBATCHES.len(), broken).unwrap_err();
            assert!(
                matches!(&error, Error::NonFiniteGradient { parameter, .. } if parameter == "b.weight"),
                "{error}"
            );
            for ((name, after), before) in net.params.iter().zip(before) {
                assert!(after.equal(&before), "{name} changed");
                assert!(!after.grad().defined(), "{name} has a gradient");
            }
            // And the next step is as if nothing had been.
            let next = net.step(&mut updater, 1);
            assert_eq!(next.step, 2);
            let other = Net::new(Kind::Float, false);
            let mut untroubled = other.updater(&config());
            other.step(&mut untroubled, 0);
            assert_eq!(other.step(&mut untroubled, 1), next, "{sharding:?}");
        }
    });
}

#[test]
fn another_model_is_refused() {
    on_ranks(2, "another_model_is_refused", |group| {
        let _world = World::of(group.clone(), &DataParallel::default()).unwrap();
        let size = 3 + group.rank() as i64;
        let weight = Tensor::zeros([size], (Kind::Float, Device::Cpu)).set_requires_grad(true);
        let made = Updater::new(vec![("weight".into(), weight)], &UpdateConfig::default());
        let error = made.unwrap_err();
        assert!(matches!(error, Error::PeerFailed { .. }), "{error}");
    });
}

#[test]
fn sums_travel_while_backward_goes_on() {
    on_ranks(2, "sums_travel_while_backward_goes_on", |group| {
        let options = DataParallel {
            bucket_bytes: 1 << 20,
            ..DataParallel::default()
        };
        let _world = World::of(group.clone(), &options).unwrap();
        let weights: Vec<Tensor> = (0..12)
            .map(|_| {
                (Tensor::randn([384, 384], (Kind::Float, Device::Cpu)) / 20.0)
                    .set_requires_grad(true)
            })
            .collect();
        let named = weights.iter().enumerate();
        let named = named
            .map(|(i, w)| (format!("{i:02}"), w.shallow_clone()))
            .collect();
        let mut updater = Updater::new(named, &UpdateConfig::default()).unwrap();
        let inputs = Tensor::ones([256, 384], (Kind::Float, Device::Cpu));
        for _ in 0..3 {
            let loss = |_| -> Result<Tensor, Error> {
                let outputs = weights
                    .iter()
                    .fold(inputs.shallow_clone(), |x, w| x.matmul(w).tanh());
                Ok(outputs.square().mean(Kind::Float))
            };
            updater.update(2, loss).unwrap();
        }
        let trace = updater.overlap().unwrap();
        assert!(trace.buckets.len() >= 4, "{trace:?}");
        let bytes: u64 = trace.buckets.iter().map(|bucket| bucket.bytes).sum();
        assert_eq!(bytes, 12 * 384 * 384 * 4);
        // Buckets leave one by one while backward makes the next; whether they have arrived by then
        // depends on who else uses this machine.
        let left: Vec<f64> = trace.buckets.iter().map(|b| b.started_s).collect();
        assert!(left.windows(2).all(|pair| pair[0] < pair[1]), "{trace:?}");
        assert!(
            left[0] < trace.backward_s && left[3] < trace.backward_s,
            "{trace:?}"
        );
        if group.rank() == 0 {
            println!("{trace:#?}");
        }
    });
}
