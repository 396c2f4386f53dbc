//! Processes as rewards: they end, whatever they do.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::time::{Duration, Instant};

use rlhf_reward::core::{
    Completions, Error as CoreError, RewardModel, Sequence, SequenceBatch, Text,
};
use rlhf_reward::program;
use rlhf_reward::programs::{Input, ProcessReward, TextReward, Verdict};

const LONG: Duration = Duration::from_secs(60);

/// The tests hand the script to a shell themselves; the library never does.
fn shell(script: &str, limit: Duration) -> ProcessReward {
    ProcessReward::new("sh", ["-c", script], limit).unwrap()
}

#[test]
fn exit_status_and_numbers() {
    let grep = ProcessReward::new("grep", ["-q", "needle"], LONG)
        .unwrap()
        .with_failure(-1.0);
    assert_eq!(grep.reward("", "hay needle hay").unwrap(), 1.0);
    assert_eq!(grep.reward("", "hay").unwrap(), -1.0);
    let count = shell("wc -c", LONG).with_verdict(Verdict::LastNumber);
    // Nothing of the answer is read by a shell.
    let answer = "$(exit 1); `false` \"'\u{0}";
    assert_eq!(count.reward("", answer).unwrap(), answer.len() as f64);
    let silent = shell("cat > /dev/null", LONG)
        .with_verdict(Verdict::LastNumber)
        .with_failure(-2.0);
    assert_eq!(silent.reward("", "5").unwrap(), -2.0);
    let failing = shell("echo 5; exit 3", LONG).with_verdict(Verdict::LastNumber);
    assert_eq!(failing.reward("", "").unwrap(), 0.0);
    let json = shell("cat", LONG)
        .with_input(Input::Json)
        .with_verdict(Verdict::LastNumber);
    assert_eq!(json.reward("one\n2", "is 3").unwrap(), 3.0);
}

#[test]
fn a_program_that_does_not_read_or_does_not_stop_writing() {
    let answer = "x".repeat(1 << 20); // more than a pipe holds
    assert_eq!(shell("exit 0", LONG).reward("", &answer).unwrap(), 1.0);
    let babble = shell("i=0; while [ $i -lt 3000 ]; do echo 1234567890123456789012345678901234567890; i=$((i+1)); done; echo 7", LONG)
        .with_verdict(Verdict::LastNumber);
    assert_eq!(
        babble
            .clone()
            .with_max_output(1 << 20)
            .reward("", "")
            .unwrap(),
        7.0
    );
    assert_eq!(babble.with_max_output(1 << 10).reward("", "").unwrap(), 0.0);
}

#[test]
fn the_whole_group_is_killed_when_time_is_up() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("alive");
    // A grandchild that would write later, and that holds the pipe.
    let script = format!("(sleep 2; echo late > {}) & sleep 600", file.display());
    let start = Instant::now();
    let reward = shell(&script, Duration::from_millis(300)).with_failure(-1.0);
    assert_eq!(reward.reward("", "").unwrap(), -1.0);
    assert!(
        start.elapsed() < Duration::from_secs(60),
        "{:?}",
        start.elapsed()
    );
    std::thread::sleep(Duration::from_secs(3));
    assert!(!file.exists(), "a grandchild outlived the limit");
}

#[test]
fn what_a_program_leaves_behind_is_killed_too() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("alive");
    let script = format!("(sleep 2; echo late > {}) & exit 0", file.display());
    assert_eq!(shell(&script, LONG).reward("", "").unwrap(), 1.0);
    std::thread::sleep(Duration::from_secs(3));
    assert!(!file.exists(), "a grandchild outlived its parent");
}

#[test]
fn the_environment_is_empty_but_for_the_path() {
    let lines = shell(
        "env | grep -c -v -e ^PATH= -e ^PWD= -e ^SHLVL= -e ^_= ; true",
        LONG,
    )
    .with_verdict(Verdict::LastNumber);
    assert_eq!(lines.reward("", "").unwrap(), 0.0);
}

#[test]
fn a_program_that_is_not_there_is_an_error_and_a_batch_runs_in_parallel() {
    let absent = ProcessReward::new("/nowhere/judge", [""; 0], LONG).unwrap();
    assert!(matches!(absent.reward("", ""), Err(CoreError::Io { .. })));
    assert!(ProcessReward::new("true", [""; 0], Duration::ZERO).is_err());

    let batch = (0..8).map(|i| Sequence::new([i], [i])).collect();
    let texts = (0..8).map(|i| Text {
        prompt: "p".into(),
        response: "x".repeat(i),
    });
    let completions = Completions::written(SequenceBatch::new(batch).unwrap())
        .with_texts(texts.collect())
        .unwrap();
    let count = program(shell("wc -c", LONG).with_verdict(Verdict::LastNumber));
    let scores = Vec::<f64>::try_from(count.score(&completions).unwrap()).unwrap();
    assert_eq!(scores, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]);
}
