//! Tests in which another process runs: the test itself again, or an example.

#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

/// The example of that name, which cargo builds before it runs the tests.
pub fn example(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    let profile = test.parent().and_then(Path::parent).unwrap();
    profile.join("examples").join(name)
}

/// What a process that succeeded has written.
#[track_caller]
pub fn text(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}\n{errors}");
    text
}

/// Where a child of [`kill_until_done`] runs; `None` in a process that is none.
pub fn folder_of_child() -> Option<PathBuf> {
    std::env::var_os(FOLDER).map(PathBuf::from)
}

const FOLDER: &str = "RLHF_TEST_KILLED_RUN";

/// Runs the test of that name of this program in a process of its own, which finds `dir` with
/// [`folder_of_child`], and kills it after each of `lives`, until one ends by itself.
#[track_caller]
pub fn kill_until_done(test: &str, dir: &Path, lives: impl IntoIterator<Item = Duration>) {
    let mut kills = 0;
    for life in lives {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", test, "--test-threads=1"])
            .env(FOLDER, dir)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(life);
        if let Some(status) = child.try_wait().unwrap() {
            assert!(status.success(), "a resumed run failed");
            assert!(kills > 0, "the run was over before it could be killed");
            return;
        }
        child.kill().unwrap(); // SIGKILL
        child.wait().unwrap();
        kills += 1;
    }
    panic!("the run does not get done: {kills} kills");
}
