//! Memory that large tensors leave to later ones: what is in them stays theirs, nothing is counted
//! twice, and no more is kept than was in use.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::panic)]

use std::sync::{Mutex, MutexGuard, PoisonError};

use rlhf_scale::{measure_memory, release_memory, reuse_memory};
use tch::{Device, Kind, Tensor};

const MIB: u64 = 1 << 20;

/// What is measured is the process's.
fn alone() -> MutexGuard<'static, ()> {
    static LOCK: Mutex<()> = Mutex::new(());
    reuse_memory().unwrap();
    // A test that failed says so itself.
    LOCK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Memory that is no file's: libraries are read in as they are used.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("RssAnon:")).unwrap();
    1024 * line
        .split_whitespace()
        .nth(1)
        .unwrap()
        .parse::<u64>()
        .unwrap()
}

fn filled(bytes: u64, value: i64) -> Tensor {
    Tensor::full([bytes as i64], value, (Kind::Uint8, Device::Cpu))
}

/// Tensors of all sizes come and go on several threads, and none is written over.
#[test]
fn nobody_else_writes_to_a_tensor() {
    let _alone = alone();
    std::thread::scope(|scope| {
        for thread in 0..4 {
            scope.spawn(move || {
                // A multiplicative generator (Park and Miller) is random enough.
                let mut state = thread + 1;
                let mut random = move |below: u64| {
                    state = state * 48271 % 0x7fff_ffff;
                    state % below
                };
                let mut live: Vec<(Tensor, u64, i64)> = Vec::new();
                for _ in 0..300 {
                    if live.len() > 6 || (!live.is_empty() && random(5) < 2) {
                        let one = random(live.len() as u64) as usize;
                        let (tensor, bytes, value) = live.swap_remove(one);
                        let right = tensor.eq(value).sum(Kind::Int64).int64_value(&[]);
                        assert_eq!(right, bytes as i64);
                    } else {
                        let bytes = MIB / 2 + random(9 * MIB);
                        let value = random(256) as i64;
                        live.push((filled(bytes, value), bytes, value));
                    }
                }
            });
        }
    });
}

#[test]
fn what_one_leaves_the_next_takes() {
    let _alone = alone();
    release_memory().unwrap();
    let place = |tensor: &Tensor| tensor.data_ptr() as usize;
    let first = filled(40 * MIB, 1);
    let at = place(&first);
    assert_eq!(at % 64, 0);
    drop(first);
    // In the same place: two halves, then the whole again.
    let (a, b) = (filled(20 * MIB, 2), filled(20 * MIB, 3));
    assert!([&a, &b].map(place).contains(&at));
    assert_ne!(place(&a), place(&b));
    drop((b, a));
    assert_eq!(place(&filled(40 * MIB, 4)), at);
}

#[test]
fn no_more_is_kept_than_was_in_use() {
    let _alone = alone();
    release_memory().unwrap();
    let before = resident();
    // Ever larger: none fits where its predecessor was.
    for step in 0..8 {
        drop(filled((130 + 10 * step) * MIB, 1));
    }
    let kept = resident().saturating_sub(before);
    assert!(kept <= (200 + 32 + 8) * MIB, "{} MiB", kept / MIB);
    release_memory().unwrap();
    let left = resident().saturating_sub(before);
    assert!(left < 16 * MIB, "{} MiB are left", left / MIB);
}

/// Holes that no later tensor fits in do not add to what is resident.
#[test]
fn holes_go_back_to_the_system() {
    let _alone = alone();
    release_memory().unwrap();
    let before = resident();
    let mut tensors: Vec<Option<Tensor>> = (0..64).map(|_| Some(filled(4 * MIB, 1))).collect();
    tensors.iter_mut().step_by(2).for_each(|t| *t = None);
    // 128 MiB are free, in holes of 4.
    let larger: Vec<Tensor> = (0..20).map(|_| filled(6 * MIB, 2)).collect();
    let all = resident().saturating_sub(before);
    assert!(all <= (256 + 32 + 8) * MIB, "{} MiB", all / MIB);
    let sum = |t: &Tensor| t.sum(Kind::Int64).int64_value(&[]) as u64;
    assert_eq!(larger.iter().map(sum).sum::<u64>(), 20 * 6 * MIB * 2);
    // What went comes again, and what stayed is what it was.
    let again: Vec<Tensor> = (0..2).map(|_| filled(4 * MIB, 3)).collect();
    assert_eq!(again.iter().map(sum).sum::<u64>(), 2 * 4 * MIB * 3);
    let stayed = tensors.iter().flatten().map(sum);
    assert_eq!(stayed.sum::<u64>(), 32 * 4 * MIB);
}

/// So do the unused pages of segments that are in use elsewhere, where that is asked for.
#[test]
fn a_tensor_does_not_keep_its_neighbours_memory() {
    let _alone = alone();
    release_memory().unwrap();
    let before = resident();
    let tensors: Vec<Tensor> = (0..16).map(|_| filled(4 * MIB, 1)).collect();
    let one = tensors.into_iter().nth(7).unwrap();
    release_memory().unwrap();
    let left = resident().saturating_sub(before);
    assert!(left < 16 * MIB, "{} MiB are left", left / MIB);
    assert_eq!(one.max().int64_value(&[]), 1);
}

#[test]
fn tensors_are_counted_as_ever() {
    let _alone = alone();
    let (kept, memory) = measure_memory(|| {
        drop(filled(3 * MIB, 1));
        filled(2 * MIB + 1, 1)
    })
    .unwrap();
    assert_eq!((memory.peak, memory.kept), (3 * MIB, 2 * MIB + 1));
    drop(kept);
}

#[test]
fn more_than_there_is_is_an_error() {
    let _alone = alone();
    let message = Tensor::f_empty([1i64 << 60], (Kind::Uint8, Device::Cpu))
        .unwrap_err()
        .to_string();
    assert!(message.contains("not enough memory"), "{message}");
    // And the allocator works on.
    assert_eq!(filled(2 * MIB, 7).max().int64_value(&[]), 7);
}
