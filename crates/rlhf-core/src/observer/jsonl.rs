//! A line of JSON for every step.

use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Event, Observer};
use crate::{Error, Replicas, Result, Stats};

/// Writes `{"phase":"ppo","step":3,"ppo/kl":0.25,…}` for every event: one line each, written
/// before [`observe`](Observer::observe) returns, so that a killed run loses none.
///
/// Of several processes that train together the first writes; the others' observers leave the file
/// alone.
///
/// Nothing in a line depends on when or how often the run was started, except what the stats
/// themselves say of time. Numbers that are not finite are written as [`Stats`] says.
#[derive(Debug)]
pub struct JsonlObserver {
    path: PathBuf,
    /// `None` where another process of the run writes.
    file: Option<File>,
}

#[derive(Serialize)]
struct Line<'a> {
    phase: &'a str,
    step: u64,
    #[serde(flatten)]
    stats: &'a Stats,
}

/// What resuming needs to know of a line.
#[derive(Deserialize)]
struct Position {
    phase: String,
    step: u64,
}

impl JsonlObserver {
    /// Starts a new file, in place of one that is there.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create(path: impl Into<PathBuf>) -> Result<Self> {
        let path = path.into();
        if !Replicas::current().is_first() {
            return Ok(Self { path, file: None });
        }
        File::create(&path).map_err(Error::io("creating", &path))?;
        Self::append(path)
    }

    /// Goes on with the file of a run that is resumed after `step`: lines of later steps, which
    /// will be written again, are dropped. A half-written last line is dropped too. A file that
    /// is not there is started.
    ///
    /// For a file with the lines of several phases, each with steps of its own, see
    /// [`resume_phase`](Self::resume_phase).
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Corrupt`], naming the line, if one that is not the last is not
    /// ours. The file is as it was then.
    pub fn resume(path: impl Into<PathBuf>, step: u64) -> Result<Self> {
        Self::resume_where(path.into(), |lines| {
            lines.retain(|(position, _)| position.step <= step);
        })
    }

    /// Goes on with the file of a run that is resumed in `phase` after `step`: the first line of
    /// that phase with a later step is dropped, and all that follow it.
    ///
    /// # Errors
    /// Those of [`resume`](Self::resume).
    pub fn resume_phase(path: impl Into<PathBuf>, phase: &str, step: u64) -> Result<Self> {
        Self::resume_where(path.into(), |lines| {
            let later = |(p, _): &(Position, &str)| p.phase == phase && p.step > step;
            let end = lines.iter().position(later).unwrap_or(lines.len());
            lines.truncate(end);
        })
    }

    fn resume_where(path: PathBuf, keep: impl FnOnce(&mut Vec<(Position, &str)>)) -> Result<Self> {
        if !Replicas::current().is_first() {
            return Ok(Self { path, file: None });
        }
        if path.exists() {
            // Bytes, because a line may break off inside a character.
            let bytes = fs::read(&path).map_err(Error::io("reading", &path))?;
            let text = String::from_utf8_lossy(&bytes);
            let mut lines = parse(&text, &path)?;
            keep(&mut lines);
            let mut kept = String::with_capacity(text.len());
            for (_, line) in lines {
                kept.push_str(line);
                kept.push('\n');
            }
            replace(&path, kept.as_bytes())?;
        }
        Self::append(path)
    }

    fn append(path: PathBuf) -> Result<Self> {
        let file = OpenOptions::new()
            .append(true)
            .create(true)
            .open(&path)
            .map_err(Error::io("opening", &path))?;
        let file = Some(file);
        Ok(Self { path, file })
    }
}

impl Observer for JsonlObserver {
    fn observe(&mut self, event: &Event<'_>) -> Result<ControlFlow<()>> {
        let Some(file) = &mut self.file else {
            return Ok(ControlFlow::Continue(()));
        };
        let mut line = serde_json::to_vec(&Line {
            phase: event.phase,
            step: event.step,
            stats: event.stats,
        })
        .map_err(|error| Error::io("writing", &self.path)(error.into()))?;
        line.push(b'\n');
        // One call, so that a kill leaves at most one line half-written.
        file.write_all(&line)
            .map_err(Error::io("writing", &self.path))?;
        Ok(ControlFlow::Continue(()))
    }
}

fn parse<'t>(text: &'t str, path: &Path) -> Result<Vec<(Position, &'t str)>> {
    let mut lines = Vec::new();
    let last = text.lines().count();
    for (number, line) in (1..).zip(text.lines()) {
        match serde_json::from_str(line) {
            Ok(position) => lines.push((position, line)),
            Err(_) if number == last => {}
            Err(error) => {
                return Err(Error::Corrupt {
                    path: path.to_path_buf(),
                    reason: format!("line {number} is not a line of metrics: {error}"),
                });
            }
        }
    }
    Ok(lines)
}

/// Replaces the file at once: whoever reads it sees the old content or the new.
fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_os_string();
    name.push(".resuming");
    let beside = path.with_file_name(name);
    let written = File::create(&beside).and_then(|mut file| {
        file.write_all(content)?;
        file.sync_all()
    });
    written.map_err(Error::io("writing", &beside))?;
    fs::rename(&beside, path).map_err(Error::io("replacing", path))
}
