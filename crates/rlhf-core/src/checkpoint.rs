//! Checkpoints that survive a kill at any moment.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::{Error, Replicas, Result};

/// Written last into every checkpoint: what it must hold.
const MANIFEST: &str = "checkpoint.json";
/// Folders with this prefix are being written or removed.
const UNFINISHED: &str = ".unfinished-";

/// A folder of checkpoints, one folder each: `step-00000120`, ...
///
/// A checkpoint is written into a temporary folder beside the others, flushed to the disk, and
/// renamed. A run that is killed or that loses power while it writes leaves the checkpoint
/// before it as the latest. What such a run leaves behind is removed by the next
/// [`save`](Self::save), so only one process may save into a folder at a time; any number may
/// read.
///
/// ```
/// use rlhf_core::{CheckpointStore, Error};
/// # let dir = std::env::temp_dir().join(format!("rlhf-core-doc-{}", std::process::id()));
///
/// let store = CheckpointStore::open(&dir, 2)?;
/// for step in [10, 20, 30] {
///     store.save(step, |folder| {
///         let path = folder.join("state.txt");
///         std::fs::write(&path, step.to_string()).map_err(Error::io("writing", path))
///     })?;
/// }
/// let latest = store.latest()?.expect("three were saved");
/// assert_eq!(latest.step, 30);
/// assert_eq!(std::fs::read_to_string(latest.path.join("state.txt")).unwrap(), "30");
/// # std::fs::remove_dir_all(&dir).unwrap();
/// # Ok::<(), Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct CheckpointStore {
    dir: PathBuf,
    keep: usize,
}

/// A complete checkpoint.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Checkpoint {
    /// Steps that were done when it was written.
    pub step: u64,
    /// Its folder.
    pub path: PathBuf,
}

#[derive(Serialize, Deserialize)]
struct Manifest {
    step: u64,
    files: Vec<ManifestFile>,
}

#[derive(Serialize, Deserialize)]
struct ManifestFile {
    path: PathBuf,
    bytes: u64,
}

/// A checkpoint's folder name. Saving a step once more makes a further revision of it, so that
/// the first is there until the second is complete.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Name {
    step: u64,
    revision: u32,
}

impl CheckpointStore {
    /// The store in `dir`, which is created if need be; the newest `keep` checkpoints stay.
    ///
    /// # Errors
    /// [`Error::InvalidConfig`] if `keep` is 0, [`Error::Io`].
    pub fn open(dir: impl Into<PathBuf>, keep: usize) -> Result<Self> {
        let dir = dir.into();
        if keep == 0 {
            let reason = "at least one checkpoint must stay";
            return Err(Error::config("checkpoints.keep", keep, reason));
        }
        fs::create_dir_all(&dir).map_err(Error::io("creating", &dir))?;
        Ok(Self { dir, keep })
    }

    /// The folder that holds the checkpoints.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Writes a checkpoint: `write` puts files and folders into the folder it is given. Older
    /// checkpoints beyond those to keep are removed afterwards; damaged ones and what is not
    /// ours are left alone.
    ///
    /// Where several processes train together ([`Replicas::current`]) all of them call it, since
    /// a state may be spread over them. What the first writes is the checkpoint; the others write
    /// into a folder for what is temporary, which is removed. It is complete when this returns.
    ///
    /// # Errors
    /// Whatever `write` returns, and [`Error::Io`]. The checkpoints are as they were then.
    pub fn save<E: From<Error> + std::fmt::Display>(
        &self,
        step: u64,
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Checkpoint, E> {
        let replicas = Replicas::current();
        if replicas.run_size() == 1 {
            let prepared = self.prepare(step)?;
            return self.save_here(prepared, write);
        }
        if replicas.is_first() {
            // Whatever may fail here alone comes before and after what is done together.
            let prepared = replicas.agree(self.prepare(step).map_err(E::from))?;
            let saved = self.save_here(prepared, write);
            return replicas.agree(saved);
        }
        let scratch = scratch(replicas.run_rank());
        let made = fs::create_dir_all(&scratch).map_err(Error::io("creating", &scratch));
        replicas.agree(made.map_err(E::from))?;
        let written = write(&scratch);
        let _ = fs::remove_dir_all(&scratch); // the system cleans up behind us
        replicas.agree(written)?;
        Ok(self.latest()?.unwrap_or(Checkpoint {
            step,
            path: self.dir.clone(),
        }))
    }

    /// The folder to write into, and the name that it will get.
    fn prepare(&self, step: u64) -> Result<(Name, PathBuf)> {
        self.remove_leftovers()?;
        let names = self.names()?;
        let name = Name {
            step,
            revision: names
                .iter()
                .filter(|n| n.step == step)
                .map(|n| n.revision + 1)
                .max()
                .unwrap_or(0),
        };
        let unfinished = self.dir.join(format!("{UNFINISHED}{name}"));
        fs::create_dir(&unfinished).map_err(Error::io("creating", &unfinished))?;
        Ok((name, unfinished))
    }

    fn save_here<E: From<Error>>(
        &self,
        (name, unfinished): (Name, PathBuf),
        write: impl FnOnce(&Path) -> Result<(), E>,
    ) -> Result<Checkpoint, E> {
        let step = name.step;
        if let Err(error) = write(&unfinished) {
            // The writer's error is what matters; what stays here the next save removes.
            let _ = fs::remove_dir_all(&unfinished);
            return Err(error);
        }
        seal(step, &unfinished)?;
        let path = self.dir.join(name.to_string());
        fs::rename(&unfinished, &path).map_err(Error::io("finishing", &path))?;
        sync_folder(&self.dir)?;
        self.remove_old(name)?;
        Ok(Checkpoint { step, path })
    }

    /// The newest checkpoint, or `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`] if the newest lacks something that it was written with.
    /// It is not passed over in silence, since an older one loses work: move it away to use
    /// that.
    pub fn latest(&self) -> Result<Option<Checkpoint>> {
        let Some(name) = self.names()?.into_iter().max() else {
            return Ok(None);
        };
        let path = self.dir.join(name.to_string());
        check(name.step, &path)?;
        let step = name.step;
        Ok(Some(Checkpoint { step, path }))
    }

    /// Our folders, oldest first.
    fn names(&self) -> Result<Vec<Name>> {
        let mut names: Vec<Name> = entries(&self.dir)?
            .iter()
            .filter(|path| path.is_dir())
            .filter_map(|path| path.file_name()?.to_str()?.parse().ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    fn remove_leftovers(&self) -> Result<()> {
        for path in entries(&self.dir)? {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            let ours = name.strip_prefix(UNFINISHED);
            if ours.is_some_and(|name| name.parse::<Name>().is_ok()) {
                fs::remove_dir_all(&path).map_err(Error::io("removing", &path))?;
            }
        }
        Ok(())
    }

    fn remove_old(&self, saved: Name) -> Result<()> {
        let mut intact: Vec<Name> = self
            .names()?
            .into_iter()
            .filter(|name| check(name.step, &self.dir.join(name.to_string())).is_ok())
            .collect();
        let replaced = |name: &Name| name.step == saved.step && *name != saved;
        let mut removed: Vec<Name> = intact.iter().copied().filter(replaced).collect();
        intact.retain(|name| !replaced(name));
        let surplus = intact.len().saturating_sub(self.keep);
        // After going back to an earlier step, what was saved now need not be the newest.
        removed.extend(intact[..surplus].iter().filter(|name| **name != saved));
        for name in removed {
            // Renamed first: a removal that is cut short must not look like damage.
            let path = self.dir.join(name.to_string());
            let aside = self.dir.join(format!("{UNFINISHED}{name}"));
            fs::rename(&path, &aside).map_err(Error::io("removing", &path))?;
            fs::remove_dir_all(&aside).map_err(Error::io("removing", &aside))?;
        }
        Ok(())
    }
}

/// Where the process `rank` of several puts what nobody keeps.
fn scratch(rank: usize) -> PathBuf {
    let name = format!("rlhf-checkpoint-{}-{rank}", std::process::id());
    std::env::temp_dir().join(name)
}

/// Writes the manifest and flushes everything to the disk.
fn seal(step: u64, folder: &Path) -> Result<()> {
    let mut files = Vec::new();
    let mut folders = vec![folder.to_path_buf()];
    let mut next = 0;
    while let Some(current) = folders.get(next).cloned() {
        next += 1;
        for path in entries(&current)? {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let file = File::open(&path).map_err(Error::io("opening", &path))?;
            file.sync_all().map_err(Error::io("flushing", &path))?;
            let metadata = file.metadata().map_err(Error::io("reading", &path))?;
            let relative = path.strip_prefix(folder).unwrap_or(&path);
            files.push(ManifestFile {
                path: relative.to_path_buf(),
                bytes: metadata.len(),
            });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let path = folder.join(MANIFEST);
    let json = serde_json::to_vec_pretty(&Manifest { step, files })
        .map_err(|error| Error::io("writing", &path)(error.into()))?;
    fs::write(&path, json)
        .and_then(|()| File::open(&path)?.sync_all())
        .map_err(Error::io("writing", &path))?;
    folders
        .iter()
        .rev()
        .try_for_each(|folder| sync_folder(folder))
}

/// Fails unless the folder holds what its manifest says.
fn check(step: u64, folder: &Path) -> Result<()> {
    let corrupt = |reason: String| Error::Corrupt {
        path: folder.to_path_buf(),
        reason,
    };
    let path = folder.join(MANIFEST);
    let json = fs::read(&path).map_err(|error| corrupt(format!("{MANIFEST}: {error}")))?;
    let manifest: Manifest =
        serde_json::from_slice(&json).map_err(|error| corrupt(format!("{MANIFEST}: {error}")))?;
    if manifest.step != step {
        let reason = format!("{MANIFEST} speaks of step {}", manifest.step);
        return Err(corrupt(reason));
    }
    for ManifestFile { path, bytes } in manifest.files {
        let found = fs::metadata(folder.join(&path))
            .map_err(|error| corrupt(format!("{}: {error}", path.display())))?
            .len();
        if found != bytes {
            let name = path.display();
            return Err(corrupt(format!(
                "{name} has {found} bytes instead of {bytes}"
            )));
        }
    }
    Ok(())
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>> {
    fs::read_dir(dir)
        .and_then(|entries| entries.map(|entry| Ok(entry?.path())).collect())
        .map_err(Error::io("reading", dir))
}

/// A rename is on the disk only when its folder is. Systems that cannot open folders order this
/// themselves.
fn sync_folder(dir: &Path) -> Result<()> {
    if cfg!(unix) {
        File::open(dir)
            .and_then(|folder| folder.sync_all())
            .map_err(Error::io("flushing", dir))?;
    }
    Ok(())
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "step-{:08}", self.step)?;
        match self.revision {
            0 => Ok(()),
            revision => write!(f, ".{revision}"),
        }
    }
}

impl std::str::FromStr for Name {
    type Err = NotOurs;

    fn from_str(text: &str) -> Result<Self, NotOurs> {
        let number = text.strip_prefix("step-").ok_or(NotOurs)?;
        let (step, revision) = number.split_once('.').unwrap_or((number, "0"));
        let name = Name {
            step: step.parse().map_err(|_| NotOurs)?,
            revision: revision.parse().map_err(|_| NotOurs)?,
        };
        // One spelling only: anything else was not written by us.
        (name.to_string() == text).then_some(name).ok_or(NotOurs)
    }
}

/// A folder that this store did not make.
#[derive(Debug)]
struct NotOurs;
