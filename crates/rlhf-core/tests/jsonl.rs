//! Metrics files through kills.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;

use rlhf_core::{Error, Event, JsonlObserver, Observer, Result, Stats};

fn write(observer: &mut JsonlObserver, phase: &'static str, steps: impl Iterator<Item = u64>) {
    for step in steps {
        let stats: Stats = [("loss", 1.0 / step as f64), ("ppo/kl", f64::NAN)]
            .into_iter()
            .collect();
        let event = Event {
            step,
            total_steps: Some(9),
            phase,
            stats: &stats,
        };
        assert!(observer.observe(&event).unwrap().is_continue());
    }
}

fn resumed(path: &Path, step: u64) -> Result<JsonlObserver> {
    JsonlObserver::resume(path, step)
}

#[test]
fn a_line_an_event() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    fs::write(&path, "of an older run").unwrap();
    write(&mut JsonlObserver::create(&path).unwrap(), "ppo", 1..=2);
    let expected = r#"{"phase":"ppo","step":1,"loss":1.0,"ppo/kl":"NaN"}
{"phase":"ppo","step":2,"loss":0.5,"ppo/kl":"NaN"}
"#;
    assert_eq!(fs::read_to_string(&path).unwrap(), expected);
}

#[test]
fn a_resumed_file_equals_an_uninterrupted_one() {
    let dir = tempfile::tempdir().unwrap();
    let whole = dir.path().join("whole.jsonl");
    write(&mut JsonlObserver::create(&whole).unwrap(), "ppo", 1..=6);
    let whole = fs::read(&whole).unwrap();
    let path = dir.path().join("metrics.jsonl");
    for killed_after in (0..=whole.len()).step_by(13) {
        fs::write(&path, &whole[..killed_after]).unwrap();
        // Checkpoints come after lines, so what was checkpointed has been written.
        let steps = whole[..killed_after]
            .iter()
            .filter(|b| **b == b'\n')
            .count() as u64;
        for checkpoint in [0, steps / 2, steps] {
            let mut observer = resumed(&path, checkpoint).unwrap();
            write(&mut observer, "ppo", checkpoint + 1..=6);
            assert_eq!(
                fs::read(&path).unwrap(),
                whole,
                "killed after {killed_after} bytes"
            );
        }
    }
    fs::remove_file(&path).unwrap();
    write(&mut resumed(&path, 0).unwrap(), "ppo", 1..=6);
    assert_eq!(fs::read(&path).unwrap(), whole);
}

#[test]
fn phases_before_the_resumed_one_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    let mut observer = JsonlObserver::create(&path).unwrap();
    write(&mut observer, "reward", 1..=9);
    write(&mut observer, "ppo", 1..=3);
    let expected = fs::read_to_string(&path).unwrap();
    write(&mut observer, "ppo", 4..=5);
    write(&mut observer, "evaluation", 1..=1);
    JsonlObserver::resume_phase(&path, "ppo", 3).unwrap();
    assert_eq!(fs::read_to_string(&path).unwrap(), expected);
}

#[test]
fn a_line_that_is_not_ours_is_reported_and_the_file_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("metrics.jsonl");
    for text in [
        "{\"phase\":\"ppo\",\"step\":1}\nnot json\n{\"phase\":\"ppo\",\"step\":2}\n",
        "{\"phase\":\"ppo\",\"step\":1}\n{\"step\":\"two\"}\n{\"phase\":\"ppo\",\"step\":2}\n",
    ] {
        fs::write(&path, text).unwrap();
        let Err(Error::Corrupt { reason, .. }) = resumed(&path, 0) else {
            panic!("read")
        };
        assert!(reason.starts_with("line 2 "), "{reason}");
        assert_eq!(fs::read_to_string(&path).unwrap(), text);
    }
    let nowhere = dir.path().join("no/folder/metrics.jsonl");
    assert!(matches!(
        JsonlObserver::create(nowhere),
        Err(Error::Io { .. })
    ));
}
