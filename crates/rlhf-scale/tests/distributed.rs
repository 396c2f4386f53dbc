//! Process groups, on real processes of this machine.
#![cfg(feature = "distributed")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(clippy::print_stdout, clippy::print_stderr)] // ranks talk to the test

use std::time::{Duration, Instant};

use rlhf_scale::core::{Collective, Reduction};
use rlhf_scale::distributed::{
    GroupOptions, Mesh, MeshShape, Operation, ProcessGroup, ReduceOp, Rendezvous, Spawn, StoreHost,
};
use rlhf_scale::{Error, tch};
use tch::{Device, Kind, Tensor};

const CPU: Device = Device::Cpu;

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

fn numbers(tensor: &Tensor) -> Vec<f64> {
    Vec::try_from(tensor.to_kind(Kind::Double).reshape(-1)).unwrap()
}

#[test]
fn operations_do_what_they_say() {
    on_ranks(3, "operations_do_what_they_say", |group| {
        let (rank, size) = (group.rank() as i64, group.size() as i64);
        for kind in [
            Kind::Float,
            Kind::BFloat16,
            Kind::Half,
            Kind::Double,
            Kind::Int64,
        ] {
            let own = || Tensor::arange(4, (kind, CPU)) + rank;
            let sum = own();
            group.all_reduce(&sum, ReduceOp::Sum).unwrap();
            assert_eq!(numbers(&sum), [3., 6., 9., 12.], "{kind:?}");
            let greatest = own();
            group.all_reduce(&greatest, ReduceOp::Max).unwrap();
            assert_eq!(numbers(&greatest), [2., 3., 4., 5.], "{kind:?}");
            let theirs = own();
            group.broadcast(&theirs, 1).unwrap();
            assert_eq!(numbers(&theirs), [1., 2., 3., 4.], "{kind:?}");
            let all = group.all_gather(&own().narrow(0, 0, 2)).unwrap();
            assert_eq!(all.size(), [size, 2]);
            assert_eq!(numbers(&all), [0., 1., 1., 2., 2., 3.], "{kind:?}");
            let parts = (Tensor::arange(6, (kind, CPU)) * (rank + 1)).view([3, 2]);
            let part = group.reduce_scatter(&parts).unwrap();
            let first = (12 * rank) as f64;
            assert_eq!(part.kind(), kind);
            assert_eq!(numbers(&part), [first, first + 6.0], "{kind:?}");
        }
        // Rank r sends r + s rows to rank s.
        let to: Vec<usize> = (0..3).map(|s| rank as usize + s).collect();
        let rows = to.iter().sum::<usize>() as i64;
        let sent = Tensor::full([rows, 2], rank, (Kind::Float, CPU));
        let got = group.all_to_all(&sent, &to, &to).unwrap();
        let want: Vec<f64> = (0..3).flat_map(|r| vec![r as f64; 2 * to[r]]).collect();
        assert_eq!(numbers(&got), want);
        // Round in a circle, both ways under way at once.
        let (next, previous) = ((rank + 1) % size, (rank + size - 1) % size);
        let from = Tensor::zeros([5], (Kind::Float, CPU));
        let own = Tensor::full([5], rank, (Kind::Float, CPU));
        let receiving = group.recv_start(&from, previous as usize, 7).unwrap();
        group.send(&own, next as usize, 7).unwrap();
        receiving.wait().unwrap();
        assert_eq!(numbers(&from), [previous as f64; 5]);
        group.barrier().unwrap();
    });
}

#[test]
fn a_model_on_several_ranks_has_what_it_asks_for() {
    let name = "a_model_on_several_ranks_has_what_it_asks_for";
    on_ranks(2, name, |group| {
        let group: &dyn Collective = group;
        let (rank, other) = (group.rank(), 1 - group.rank());
        let own = Tensor::full([2, 3], rank as i64 + 1, (Kind::BFloat16, CPU));
        let all = group.all_gather(&own.tr()).unwrap();
        assert_eq!((all.len(), all[1].size()), (2, vec![3, 2]));
        assert_eq!(numbers(&all[1]), [2.; 6]);
        // Both send, many times, before either receives; what is sent may be changed at once.
        for i in 0..100 {
            let mut message = Tensor::full([50], 100 * rank as i64 + i, (Kind::Float, CPU));
            group.send(&message, other).unwrap();
            let _ = message.fill_(-1.0);
            if i < 50 {
                continue;
            }
            for sent in [2 * (i - 50), 2 * (i - 50) + 1] {
                let got = Tensor::zeros([50], (Kind::Float, CPU));
                group.receive(&got, other).unwrap();
                assert_eq!(numbers(&got), [(100 * other as i64 + sent) as f64; 50]);
            }
        }
        group.all_reduce(&own, Reduction::Max).unwrap();
        assert_eq!(numbers(&own), [2.; 6]);
    });
}

#[test]
fn bytes_are_counted_by_the_formulas() {
    on_ranks(4, "bytes_are_counted_by_the_formulas", |group| {
        let tensor = Tensor::ones([4, 250], (Kind::Float, CPU)); // 4000 bytes
        let before = group.traffic();
        group.all_reduce(&tensor, ReduceOp::Sum).unwrap();
        let _ = group.reduce_scatter(&tensor).unwrap();
        let _ = group.all_gather(&tensor.get(0)).unwrap();
        group.broadcast(&tensor, 0).unwrap();
        let _ = group.all_to_all(&tensor, &[1; 4], &[1; 4]).unwrap();
        group.barrier().unwrap();
        let traffic = group.traffic() - before;
        let sent = |operation| traffic[operation].bytes_sent;
        assert_eq!(sent(Operation::AllReduce), 6000);
        assert_eq!(sent(Operation::ReduceScatter), 3000);
        assert_eq!(sent(Operation::AllGather), 3000);
        assert_eq!(sent(Operation::AllToAll), 3000);
        let root = if group.rank() == 0 { 12000 } else { 0 };
        assert_eq!(sent(Operation::Broadcast), root);
        assert_eq!(traffic.bytes_sent(), 15000 + root);
        assert_eq!(traffic[Operation::Barrier].calls, 1);
    });
}

#[test]
fn a_mesh_has_groups_along_each_direction() {
    on_ranks(4, "a_mesh_has_groups_along_each_direction", |world| {
        let shape = MeshShape {
            data: 2,
            pipeline: 1,
            tensor: 2,
        };
        let mesh = Mesh::new(world, shape).unwrap();
        let rank = world.rank();
        assert_eq!(mesh.tensor().ranks(), [rank & 2, (rank & 2) + 1]);
        assert_eq!(mesh.data().ranks(), [rank & 1, (rank & 1) + 2]);
        assert_eq!(mesh.pipeline().ranks(), [rank]);
        let sum = |group: &ProcessGroup| {
            let own = Tensor::from(rank as f32);
            group.all_reduce(&own, ReduceOp::Sum).unwrap();
            numbers(&own)[0] as usize
        };
        assert_eq!(sum(mesh.tensor()), 2 * (rank & 2) + 1);
        assert_eq!(sum(mesh.data()), 2 * (rank & 1) + 2);
        assert_eq!(sum(mesh.pipeline()), rank);
        // The same members once more, in another order: a group of its own.
        let turned = world.subgroup(&[3, 2, 1, 0]).unwrap();
        assert_eq!(turned.rank(), 3 - rank);
        let all = turned.all_gather(&Tensor::from(rank as f32)).unwrap();
        assert_eq!(numbers(&all), [3., 2., 1., 0.]);
    });
}

#[test]
fn what_cannot_be_sent_is_refused_and_the_group_stays_whole() {
    let name = "what_cannot_be_sent_is_refused_and_the_group_stays_whole";
    on_ranks(2, name, |group| {
        let refused = |result: Result<(), Error>, part: &str| {
            let message = result.unwrap_err().to_string();
            assert!(message.contains(part), "{message}");
        };
        let matrix = Tensor::ones([2, 3], (Kind::Float, CPU));
        refused(
            group.all_reduce(&matrix.tr(), ReduceOp::Sum),
            "not contiguous",
        );
        let flags = matrix.gt(0.0);
        refused(group.all_reduce(&flags, ReduceOp::Sum), "kind Bool");
        refused(group.broadcast(&matrix, 2), "no rank 2");
        refused(group.send(&matrix, group.rank(), 0), "this process");
        refused(group.reduce_scatter(&matrix.get(0)).map(drop), "no row");
        refused(group.all_to_all(&matrix, &[1], &[1]).map(drop), "rows to");
        refused(group.subgroup(&[1 - group.rank()]).map(drop), "not among");
        group.barrier().unwrap();
    });
}

#[test]
fn who_never_comes_is_named() {
    let options = GroupOptions {
        limit: Duration::from_secs(3),
        ..GroupOptions::default()
    };
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    drop(listener);
    let place = |rank| Rendezvous {
        rank,
        size: 3,
        local_rank: 0,
        host: "127.0.0.1".into(),
        port,
        store: StoreHost::FirstRank,
    };
    let start = Instant::now();
    // Two of three, in two threads.
    let second = std::thread::spawn({
        let (place, options) = (place(2), options.clone());
        move || {
            ProcessGroup::connect(place, &options)
                .unwrap_err()
                .to_string()
        }
    });
    let first = ProcessGroup::connect(place(0), &options).unwrap_err();
    assert!(
        matches!(&first, Error::Rendezvous { ranks, .. } if ranks == &[1]),
        "{first}"
    );
    assert!(
        first.to_string().contains("rank 1 was not there"),
        "{first}"
    );
    assert!(
        second
            .join()
            .unwrap()
            .contains("rank 2 of 3 could not join")
    );
    assert!(start.elapsed() < Duration::from_secs(30));
}

/// Ranks work until one of them is killed, or stopped; the others say which.
fn the_others_name_it(
    name: &str,
    lost: usize,
    harm: impl FnOnce(&mut rlhf_scale::distributed::Running),
) {
    let dir = tempfile::tempdir().unwrap();
    let mut running = Spawn::test(3, name)
        .env("RLHF_TEST_DIR", dir.path())
        .grace(Duration::from_secs(12))
        .start()
        .unwrap();
    let begun = Instant::now();
    while (0..3).any(|rank| !dir.path().join(rank.to_string()).exists()) {
        std::thread::sleep(Duration::from_millis(20));
        assert!(begun.elapsed() < Duration::from_secs(60), "they never met");
    }
    std::thread::sleep(Duration::from_millis(300)); // they work
    harm(&mut running);
    let start = Instant::now();
    let report = running.wait().unwrap();
    assert!(start.elapsed() < Duration::from_secs(30));
    for end in report.ends {
        if end.rank == lost {
            assert!(!end.status.success());
        } else {
            let said = format!("LOST {lost}");
            assert!(end.stdout.contains(&said), "{}{}", end.stdout, end.stderr);
            assert_eq!(end.status.code(), Some(NAMED), "{}", end.stderr);
        }
    }
}

/// Exit status of a rank that has named another. It is no success, so that the launcher ends a rank
/// that was stopped.
const NAMED: i32 = 3;

fn signal(id: u32, name: &str) {
    let mut kill = std::process::Command::new("kill");
    let kill = kill.args([name, &id.to_string()]);
    let _ = kill.stderr(std::process::Stdio::null()).status();
}

/// Works until something is wrong.
fn work_until_lost() {
    let options = GroupOptions {
        limit: Duration::from_secs(8),
        ..GroupOptions::default()
    };
    let group = ProcessGroup::from_env(&options).unwrap();
    let dir = std::path::PathBuf::from(std::env::var_os("RLHF_TEST_DIR").unwrap());
    std::fs::write(dir.join(group.rank().to_string()), "").unwrap();
    let tensor = Tensor::zeros([1000], (Kind::Float, CPU));
    loop {
        match group.all_reduce(&tensor, ReduceOp::Sum) {
            Ok(()) => {}
            Err(Error::RanksLost { ranks, .. }) => {
                println!("LOST {}", ranks[0]);
                assert_eq!(ranks.len(), 1);
                let again = group.barrier();
                assert!(matches!(again, Err(Error::GroupBroken { .. })), "{again:?}");
                std::process::exit(NAMED);
            }
            Err(other) => panic!("{other}"),
        }
    }
}

#[test]
fn a_killed_rank_is_named() {
    match Spawn::is_rank() {
        true => work_until_lost(),
        false => the_others_name_it("a_killed_rank_is_named", 1, |r| r.kill(1).unwrap()),
    }
}

#[test]
fn a_killed_first_rank_is_named() {
    match Spawn::is_rank() {
        true => work_until_lost(),
        false => the_others_name_it("a_killed_first_rank_is_named", 0, |r| r.kill(0).unwrap()),
    }
}

#[test]
fn a_stopped_rank_is_named() {
    match Spawn::is_rank() {
        true => work_until_lost(),
        false => the_others_name_it("a_stopped_rank_is_named", 2, |r| {
            signal(r.ids()[2], "-STOP")
        }),
    }
}

#[test]
fn a_busy_rank_ends_the_wait_and_is_named() {
    let name = "a_busy_rank_ends_the_wait_and_is_named";
    if !Spawn::is_rank() {
        let report = Spawn::test(2, name).run().unwrap();
        report.check().unwrap();
        return;
    }
    let options = GroupOptions {
        limit: Duration::from_secs(2),
        ..GroupOptions::default()
    };
    let group = ProcessGroup::from_env(&options).unwrap();
    group.barrier().unwrap();
    if group.rank() == 1 {
        std::thread::sleep(Duration::from_secs(6));
        return;
    }
    let start = Instant::now();
    let error = group.barrier().unwrap_err();
    assert!(
        matches!(&error, Error::OperationTimeout { ranks, .. } if ranks == &[1]),
        "{error}"
    );
    assert!(start.elapsed() < Duration::from_secs(8));
}
