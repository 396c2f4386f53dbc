//! Checkpoints through kills, failures and foreign folders.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::fs;
use std::path::Path;

use rlhf_core::{CheckpointStore, Error, Result};

fn store(dir: &Path, keep: usize) -> CheckpointStore {
    CheckpointStore::open(dir, keep).unwrap()
}

/// Writes a file and a folder with a file.
fn content(text: &str) -> impl FnOnce(&Path) -> Result<()> {
    move |folder| {
        fs::create_dir(folder.join("policy")).unwrap();
        fs::write(folder.join("policy/weights"), text).unwrap();
        fs::write(folder.join("state.json"), "{}").unwrap();
        Ok(())
    }
}

fn saved(store: &CheckpointStore, step: u64) {
    store.save(step, content(&step.to_string())).unwrap();
}

fn latest(store: &CheckpointStore) -> (u64, String) {
    let latest = store.latest().unwrap().unwrap();
    let text = fs::read_to_string(latest.path.join("policy/weights")).unwrap();
    (latest.step, text)
}

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn the_newest_stay() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir.path().join("not/yet/there"), 2);
    assert_eq!(store.latest().unwrap(), None);
    for step in [1, 9, 10, 11] {
        saved(&store, step);
        assert_eq!(latest(&store), (step, step.to_string()));
    }
    assert_eq!(names(store.dir()), ["step-00000010", "step-00000011"]);
}

#[test]
fn a_writer_that_fails_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 1);
    saved(&store, 1);
    let error = store.save(2, |folder| {
        content("half")(folder)?;
        Err(Error::config("a", 1, "b"))
    });
    assert!(matches!(error, Err(Error::InvalidConfig { .. })));
    assert_eq!(latest(&store), (1, "1".into()));
    assert_eq!(names(dir.path()), ["step-00000001"]);
}

#[test]
fn what_a_killed_run_leaves_is_neither_used_nor_kept() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 3);
    saved(&store, 1);
    // As a kill inside the writer leaves it; the other is somebody else's.
    fs::create_dir_all(dir.path().join(".unfinished-step-00000002/policy")).unwrap();
    fs::write(
        dir.path().join(".unfinished-step-00000002/policy/weights"),
        "ha",
    )
    .unwrap();
    fs::create_dir(dir.path().join(".unfinished-business")).unwrap();
    assert_eq!(latest(&store), (1, "1".into()));
    saved(&store, 2);
    assert_eq!(latest(&store), (2, "2".into()));
    let expected = [".unfinished-business", "step-00000001", "step-00000002"];
    assert_eq!(names(dir.path()), expected);
}

#[test]
fn a_panicking_writer_leaves_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 1);
    saved(&store, 1);
    let write = |folder: &Path| -> Result<()> {
        content("half")(folder)?;
        panic!("killed");
    };
    let caught = std::panic::catch_unwind(|| store.save(2, write));
    assert!(caught.is_err());
    assert_eq!(latest(&store), (1, "1".into()));
    saved(&store, 2);
    assert_eq!(latest(&store), (2, "2".into()));
}

#[test]
fn saving_a_step_again_replaces_it() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 2);
    saved(&store, 1);
    saved(&store, 2);
    store.save(2, content("again")).unwrap();
    assert_eq!(latest(&store), (2, "again".into()));
    store.save(2, content("and again")).unwrap();
    assert_eq!(latest(&store), (2, "and again".into()));
    assert_eq!(names(dir.path()), ["step-00000001", "step-00000002.2"]);
}

#[test]
fn what_was_saved_last_stays_even_if_it_is_not_the_newest() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 1);
    saved(&store, 20);
    saved(&store, 10);
    assert_eq!(names(dir.path()), ["step-00000010", "step-00000020"]);
}

#[test]
fn foreign_folders_and_files_are_left_alone() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(dir.path(), 1);
    for name in ["step-final", "step-7", "notes"] {
        fs::create_dir(dir.path().join(name)).unwrap();
    }
    fs::write(dir.path().join("step-00000099"), "a file").unwrap();
    assert_eq!(store.latest().unwrap(), None);
    saved(&store, 1);
    saved(&store, 2);
    assert_eq!(latest(&store), (2, "2".into()));
    let expected = [
        "notes",
        "step-00000002",
        "step-00000099",
        "step-7",
        "step-final",
    ];
    assert_eq!(names(dir.path()), expected);
}

#[test]
fn a_damaged_checkpoint_is_reported_and_not_removed() {
    type Damage = (&'static str, fn(&Path));
    let damages: [Damage; 4] = [
        ("policy/weights has 1 bytes", |p| {
            fs::write(p.join("policy/weights"), "x").unwrap()
        }),
        ("policy/weights", |p| {
            fs::remove_file(p.join("policy/weights")).unwrap()
        }),
        ("checkpoint.json", |p| {
            fs::remove_file(p.join("checkpoint.json")).unwrap()
        }),
        ("checkpoint.json", |p| {
            fs::write(p.join("checkpoint.json"), "{").unwrap()
        }),
    ];
    for (said, damage) in damages {
        let dir = tempfile::tempdir().unwrap();
        let store = store(dir.path(), 1);
        store.save(30, content("thirty")).unwrap();
        let path = store.latest().unwrap().unwrap().path;
        damage(&path);
        match store.latest() {
            Err(Error::Corrupt { path: at, reason }) => {
                assert_eq!(at, path);
                assert!(reason.contains(said), "{reason}");
            }
            other => panic!("{other:?}"),
        }
        saved(&store, 31);
        assert_eq!(latest(&store), (31, "31".into()));
        assert_eq!(names(dir.path()), ["step-00000030", "step-00000031"]);
    }
}

#[test]
fn at_least_one_must_stay() {
    let dir = tempfile::tempdir().unwrap();
    let error = CheckpointStore::open(dir.path(), 0).unwrap_err();
    assert!(matches!(
        error,
        Error::InvalidConfig {
            field: "checkpoints.keep",
            ..
        }
    ));
}
