//! A scripted terminal session with the example itself: asked, killed, asked again.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "support/child_process.rs"]
mod child_process;

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use child_process::{example, text};
use rlhf::models::data::{PreferencePair, read_jsonl};

/// Types `script` into the example and waits for its end.
fn play(dir: &Path, script: &[u8]) -> Output {
    let mut child = Command::new(example("collect_preferences"))
        .args(["--policy", "tests/goldens/models/gpt2", "--count", "4"])
        .args(["--max-new-tokens", "6", "--seed", "5", "--width", "60"])
        .arg("--prompts")
        .arg(dir.join("prompts.jsonl"))
        .arg("--out")
        .arg(dir.join("feedback.jsonl"))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(script).unwrap();
    child.wait_with_output().unwrap()
}

#[test]
fn a_session_is_resumed_where_it_was_left() {
    let dir = tempfile::tempdir().unwrap();
    let prompts = ["The quick", "A dog", "Who", "Once"].map(|p| format!("{{\"prompt\": \"{p}\"}}"));
    std::fs::write(dir.path().join("prompts.jsonl"), prompts.join("\n")).unwrap();
    let feedback = dir.path().join("feedback.jsonl");

    // Two choices, one of them taken back and made again; then the terminal is closed.
    let first = text(&play(dir.path(), b"l\nr\nback\nleft\n"));
    assert!(first.contains("The input ended: 2 choices"), "{first}");
    let pairs: Vec<PreferencePair> = read_jsonl(&feedback).unwrap();
    assert_eq!(pairs.len(), 2);
    let before = std::fs::read(&feedback).unwrap();

    // A crash tore the second line.
    std::fs::write(&feedback, &before[..before.len() - 7]).unwrap();
    let second = text(&play(dir.path(), b"l\nt\nq\n"));
    assert!(second.contains("removed a torn line"), "{second}");
    assert!(second.contains("2 preferences and 1 ties"), "{second}");
    // The same answers are sampled again: the lost question comes first, and has the same sides.
    assert_eq!(read_jsonl::<PreferencePair>(&feedback).unwrap(), pairs);

    let third = text(&play(dir.path(), b"r\nl\nl\nl\nl\n"));
    assert!(third.contains("Done"), "{third}");
    let pairs: Vec<PreferencePair> = read_jsonl(&feedback).unwrap();
    let undecided = std::fs::read_to_string(dir.path().join("feedback.undecided.jsonl")).unwrap();
    assert_eq!(undecided.lines().count(), 1);
    assert!(pairs.len() >= 2 && pairs.iter().all(|pair| pair.chosen != pair.rejected));
    let again = text(&play(dir.path(), b"l\n"));
    assert!(again.contains("Done: 0 choices"), "{again}");
}
