//! Memory that runs out in the midst of a step: an error, and nothing has changed.
//!
//! The limit is the whole process's, so this file has one test.
#![cfg(target_os = "linux")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(
    unsafe_code,
    reason = "the limit of a process's memory is set through libc"
)]

use rlhf_scale::{Ema, EmaConfig, Error, UpdateConfig, Updater, core::Error as CoreError};
use tch::{Device, Kind, Tensor};

/// Elements of the large parameter: 40 MiB in bf16, 80 in f32, more than malloc has reserved, so that
/// it asks the system.
const LARGE: i64 = 20 << 20;

/// Runs `f` while the process may grow by `bytes`.
fn with_room<T>(bytes: u64, f: impl FnOnce() -> T) -> T {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|l| l.starts_with("VmSize:")).unwrap();
    let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
    let mut before = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: a struct of ours to write to.
    assert_eq!(unsafe { libc::getrlimit(libc::RLIMIT_AS, &mut before) }, 0);
    let set = |rlim_cur| {
        let limit = libc::rlimit { rlim_cur, ..before };
        // SAFETY: a struct of ours to read.
        assert_eq!(unsafe { libc::setrlimit(libc::RLIMIT_AS, &limit) }, 0);
    };
    set(1024 * kib + bytes);
    let result = f();
    set(before.rlim_cur);
    result
}

fn params() -> Vec<(String, Tensor)> {
    let param = |name: &str, count: i64| {
        let tensor = Tensor::ones([count], (Kind::BFloat16, Device::Cpu));
        (name.to_string(), tensor.set_requires_grad(true))
    };
    vec![param("a", 8), param("b", LARGE)]
}

fn aliases(params: &[(String, Tensor)]) -> Vec<(String, Tensor)> {
    params
        .iter()
        .map(|(n, p)| (n.clone(), p.shallow_clone()))
        .collect()
}

fn is_out_of_memory(error: &Error) -> bool {
    matches!(error, Error::Core(CoreError::Tensor { message }) if message.contains("memory"))
}

/// A few numbers of every tensor.
fn sample(tensors: &[(String, Tensor)]) -> Vec<f64> {
    let sample = |(_, t): &(String, Tensor)| {
        let _guard = tch::no_grad_guard();
        [t.double_value(&[0]), t.double_value(&[t.size()[0] - 1])]
    };
    tensors.iter().flat_map(sample).collect()
}

#[test]
fn nothing_changes() {
    // Averages of 16-bit weights are f32, so an update of theirs copies; the first fits, the second
    // does not.
    let weights = params();
    let config = EmaConfig {
        decay: 0.5,
        warmup: false,
        ..EmaConfig::default()
    };
    let mut ema = Ema::new(aliases(&weights), &config).unwrap();
    ema.update().unwrap();
    for (_, weight) in &weights {
        let _ = tch::no_grad(|| weight.shallow_clone().fill_(3.0));
    }
    let error = with_room(40 << 20, || ema.update()).unwrap_err();
    assert!(is_out_of_memory(&error), "{error}");
    assert_eq!(sample(ema.averages()), [1.0; 4], "an average moved");
    assert_eq!(ema.updates(), 1);
    ema.update().unwrap();
    assert_eq!(sample(ema.averages()), [2.0; 4]);
    drop(ema);

    // The sum of several gradients is f32, too.
    let weights = params();
    let config = UpdateConfig {
        ema: Some(config),
        ..UpdateConfig::default()
    };
    let mut updater = Updater::new(aliases(&weights), &config).unwrap();
    let loss = || {
        let total = |(_, weight): &(String, Tensor)| weight.sum(Kind::Float);
        weights.iter().map(total).sum::<Tensor>()
    };
    let ready = loss();
    let before = sample(&weights);
    let error = with_room(60 << 20, || {
        updater.update::<Error>(2, |_| Ok(ready.shallow_clone()))
    })
    .unwrap_err();
    assert!(is_out_of_memory(&error), "{error}");
    assert_eq!(sample(&weights), before);
    assert!(weights.iter().all(|(_, weight)| !weight.grad().defined()));
    assert_eq!((updater.step(), updater.ema().unwrap().updates()), (0, 0));
    assert_eq!(sample(updater.ema().unwrap().averages()), [1.0; 4]);
    updater.update::<Error>(1, |_| Ok(loss())).unwrap();
    assert_eq!((updater.step(), updater.ema().unwrap().updates()), (1, 1));
    assert_ne!(sample(updater.ema().unwrap().averages()), [1.0; 4]);
}
