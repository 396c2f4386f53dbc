//! A process of a run is killed: the others end with an error, and fewer go on from the checkpoint.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rlhf::core::{
    CheckpointConfig, CheckpointStore, EpochConfig, Event, JsonlObserver, Parameters, Replicas,
    Tensor,
};
use rlhf::models::CheckpointPolicy;
use rlhf::scale::distributed::{DataParallel, Sharding, Spawn, World};
use rlhf::sft::{SftConfig, SftTrainer};

use super::{epochs, learn, model, options, texts};

/// Trains with checkpoints and metrics in `dir`, from what is there; `pace` is slept each step.
fn resumable(dir: &Path, pace: Duration) -> rlhf::Result<Vec<(String, Tensor)>> {
    let mut config = SftConfig::default();
    learn(&mut config.update, 1e-3);
    let mut trainer = SftTrainer::new(model("gpt2", CheckpointPolicy::None), config)?;
    let epochs = EpochConfig {
        max_steps: Some(40),
        checkpoints: Some(CheckpointConfig {
            dir: dir.join("checkpoints"),
            every: 2,
            keep: 2,
        }),
        ..epochs()
    };
    let metrics = JsonlObserver::resume(dir.join("metrics.jsonl"), epochs.resumed_step()?)?;
    let slow = move |_: &Event<'_>| {
        std::thread::sleep(pace);
        Ok(ControlFlow::Continue(()))
    };
    trainer.train(&texts(), &epochs, &mut [Box::new(metrics), Box::new(slow)])?;
    Ok(trainer.into_model().named_parameters())
}

fn steps_in(dir: &Path) -> Vec<u64> {
    let text = std::fs::read_to_string(dir.join("metrics.jsonl")).unwrap();
    let step = |line: &str| -> u64 {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        line["step"].as_u64().unwrap()
    };
    text.lines().map(step).collect()
}

/// The folder of a test, for its ranks too.
fn shared_folder() -> PathBuf {
    std::env::var_os("RLHF_TEST_DIR").unwrap().into()
}

#[test]
fn a_killed_run_goes_on_with_fewer_processes() {
    let name = "killed::a_killed_run_goes_on_with_fewer_processes";
    killed_and_resumed(name, Sharding::Nothing, Sharding::Gradients);
}

#[test]
fn a_killed_sharded_run_goes_on_unsharded() {
    let name = "killed::a_killed_sharded_run_goes_on_unsharded";
    killed_and_resumed(name, Sharding::Gradients, Sharding::Nothing);
}

fn killed_and_resumed(name: &str, first: Sharding, second: Sharding) {
    if Spawn::is_rank() {
        let dir = shared_folder();
        let sharding = match dir.join("resuming").exists() {
            true => second,
            false => first,
        };
        let sharing = DataParallel {
            sharding,
            ..options(8)
        };
        let world = World::join(&sharing).unwrap();
        let pace = Duration::from_millis(if world.group().size() == 3 { 60 } else { 0 });
        match resumable(&dir, pace) {
            Ok(weights) => {
                if world.is_first() {
                    Tensor::write_safetensors(
                        &weights.iter().map(|(n, w)| (n, w)).collect::<Vec<_>>(),
                        dir.join("end.safetensors"),
                    )
                    .unwrap();
                }
            }
            Err(error) => println!("ENDED: {error}"),
        }
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let ranks = |processes| {
        Spawn::test(processes, name)
            .env("RLHF_TEST_DIR", dir)
            .grace(Duration::from_secs(20))
    };
    let mut running = ranks(3).start().unwrap();
    let start = Instant::now();
    let store = CheckpointStore::open(dir.join("checkpoints"), 2).unwrap();
    while store
        .latest()
        .unwrap()
        .is_none_or(|checkpoint| checkpoint.step < 6)
    {
        std::thread::sleep(Duration::from_millis(20));
        assert!(start.elapsed() < Duration::from_secs(60));
    }
    running.kill(1).unwrap();
    let killed = Instant::now();
    let report = running.wait().unwrap();
    assert!(
        killed.elapsed() < Duration::from_secs(16),
        "{:?}",
        killed.elapsed()
    );
    for end in report.ends.iter().filter(|end| end.rank != 1) {
        assert!(
            end.stdout.contains("rank 1 is gone"),
            "{}{}",
            end.stdout,
            end.stderr
        );
    }
    // Whole, or this would fail.
    let step = store.latest().unwrap().unwrap().step;
    assert!((6..40).contains(&step), "{step}");

    let report = ranks(2).run().unwrap();
    report.check().unwrap();
    assert!(
        !report.ends[0].stdout.contains("ENDED"),
        "{}",
        report.ends[0].stdout
    );
    // Written once, by one: each step has one line.
    assert_eq!(steps_in(dir), (1..=40).collect::<Vec<_>>());

    let whole = tempfile::tempdir().unwrap();
    assert_eq!(Replicas::current().size(), 1);
    let alone = resumable(whole.path(), Duration::ZERO).unwrap();
    let shared = Tensor::read_safetensors(dir.join("end.safetensors")).unwrap();
    assert_eq!(shared.len(), alone.len());
    for (name, weight) in shared {
        let (_, other) = alone.iter().find(|(n, _)| *n == name).unwrap();
        let off = (weight - other).abs().max().double_value(&[]);
        assert!(off < 1e-4, "{name} is off by {off:e}"); // forty steps of rounding
    }
}
