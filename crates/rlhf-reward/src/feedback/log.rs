//! Choices in files that survive a crash.

use std::collections::HashSet;
use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use rlhf_core::Error as CoreError;
use serde::{Deserialize, Serialize};

use super::{Choice, Question, question_id};
use crate::Result;

/// A line of the file of preferences.
#[derive(Debug, Serialize, Deserialize)]
struct Decided {
    prompt: String,
    chosen: String,
    rejected: String,
    /// Position among all choices; 0 for lines that somebody else wrote.
    #[serde(default)]
    number: u64,
}

/// A line of the file of questions without a preference.
#[derive(Debug, Serialize, Deserialize)]
struct Undecided {
    prompt: String,
    answers: [String; 2],
    choice: Choice,
    number: u64,
}

/// What was found at the end of a file that a crash had left behind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Recovery {
    /// A line was torn: it and its choice are gone.
    Removed {
        /// The file.
        path: PathBuf,
        /// Bytes that were cut off.
        bytes: usize,
    },
    /// The last line lacked nothing but its end, which was added.
    Completed {
        /// The file.
        path: PathBuf,
    },
}

/// The choices that were made so far.
///
/// Preferences go to the file that the log is opened with, one JSON object a line with `prompt`,
/// `chosen` and `rejected`. Ties and skipped questions, which no trainer of pairs can read, go to
/// a file beside it, `NAME.undecided.jsonl`. Every choice is one line, appended and flushed to the
/// disk before the next question, so a crash loses at most the choice that was being written; a
/// torn last line is removed when the log is opened again. The file is locked as long as the log
/// is open, so that two sessions do not write to it at once.
#[derive(Debug)]
pub struct FeedbackLog {
    decided: Lines,
    undecided: Lines,
    answered: HashSet<u64>,
    next_number: u64,
    recoveries: Vec<Recovery>,
}

impl FeedbackLog {
    /// Opens or creates the files, and mends what a crash left behind.
    ///
    /// # Errors
    /// A file that cannot be opened, read or locked; a line other than the last that is no choice
    /// ([`CoreError::Corrupt`], naming it).
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let mut decided = Lines::open(path, true)?;
        let mut undecided = Lines::open(&undecided_path(path), false)?;
        decided.read(|line: Decided| {
            let question = question_id(&line.prompt, &line.chosen, &line.rejected);
            (line.number, question)
        })?;
        undecided.read(|line: Undecided| {
            let [one, other] = &line.answers;
            (line.number, question_id(&line.prompt, one, other))
        })?;
        let all = decided.entries.iter().chain(&undecided.entries);
        let answered = all.map(|entry| entry.question).collect();
        let recoveries = [decided.recovery.take(), undecided.recovery.take()];
        let last = |lines: &Lines| lines.entries.iter().map(|e| e.number).max();
        let last_number = last(&decided).max(last(&undecided)).unwrap_or(0);
        Ok(Self {
            decided,
            undecided,
            answered,
            next_number: last_number + 1,
            recoveries: recoveries.into_iter().flatten().collect(),
        })
    }

    /// Appends a choice. It is on the disk when this returns.
    ///
    /// # Errors
    /// A file that cannot be written. The choice is not recorded then.
    pub fn record(&mut self, question: &Question, choice: Choice) -> Result<()> {
        let (prompt, number) = (question.prompt.clone(), self.next_number);
        let [first, second] = question.answers.clone();
        let id = question.id();
        let decided = |chosen, rejected| Decided {
            prompt: prompt.clone(),
            chosen,
            rejected,
            number,
        };
        match choice {
            Choice::First => self.decided.append(&decided(first, second), number, id)?,
            Choice::Second => self.decided.append(&decided(second, first), number, id)?,
            Choice::Tie | Choice::Skip => {
                let line = Undecided {
                    prompt,
                    answers: [first, second],
                    choice,
                    number,
                };
                self.undecided.append(&line, number, id)?;
            }
        }
        self.answered.insert(id);
        self.next_number += 1;
        Ok(())
    }

    /// The question ([`Question::id`]) of the latest choice that a log has recorded, this one or
    /// one before it.
    pub fn last(&self) -> Option<u64> {
        let last = self.latest_file().entries.last()?;
        (last.number > 0).then_some(last.question)
    }

    /// Takes the latest choice back, and says which question it answered. Lines that somebody
    /// else wrote stay.
    ///
    /// # Errors
    /// A file that cannot be written.
    pub fn undo(&mut self) -> Result<Option<u64>> {
        let Some(question) = self.last() else {
            return Ok(None);
        };
        let latest = match self.decided_is_latest() {
            true => &mut self.decided,
            false => &mut self.undecided,
        };
        latest.remove_last()?;
        self.answered.remove(&question);
        Ok(Some(question))
    }

    /// Whether a question need not be asked any more.
    pub fn is_answered(&self, question: &Question) -> bool {
        self.answered.contains(&question.id())
    }

    /// Preferences, of any session.
    pub fn preferences(&self) -> usize {
        self.decided.entries.len()
    }

    /// Ties and skipped questions, of any session.
    pub fn undecided(&self) -> usize {
        self.undecided.entries.len()
    }

    /// What opening the log has mended.
    pub fn recoveries(&self) -> &[Recovery] {
        &self.recoveries
    }

    fn decided_is_latest(&self) -> bool {
        let number = |lines: &Lines| lines.entries.last().map_or(0, |e| e.number);
        number(&self.decided) >= number(&self.undecided)
    }

    fn latest_file(&self) -> &Lines {
        match self.decided_is_latest() {
            true => &self.decided,
            false => &self.undecided,
        }
    }
}

fn undecided_path(path: &Path) -> PathBuf {
    let stem = path.file_stem().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!("{stem}.undecided.jsonl"))
}

/// One file of lines.
#[derive(Debug)]
struct Lines {
    path: PathBuf,
    file: File,
    entries: Vec<Entry>,
    /// Bytes of complete lines.
    end: u64,
    recovery: Option<Recovery>,
}

#[derive(Debug, Clone, Copy)]
struct Entry {
    start: u64,
    number: u64,
    question: u64,
}

impl Lines {
    fn open(path: &Path, lock: bool) -> Result<Self> {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        std::fs::create_dir_all(parent).map_err(CoreError::io("creating", parent))?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(path)
            .map_err(CoreError::io("opening", path))?;
        if lock {
            let locked = file.try_lock().map_err(std::io::Error::from);
            locked.map_err(CoreError::io("locking", path))?;
        }
        // A file is only there after a crash if its folder says so.
        let folder = File::open(parent).and_then(|folder| folder.sync_all());
        folder.map_err(CoreError::io("flushing", parent))?;
        Ok(Self {
            path: path.into(),
            file,
            entries: Vec::new(),
            end: 0,
            recovery: None,
        })
    }

    /// Reads all lines; `entry` gives the number and the question of each.
    fn read<T: for<'a> Deserialize<'a>>(
        &mut self,
        mut entry: impl FnMut(T) -> (u64, u64),
    ) -> Result<()> {
        let mut bytes = Vec::new();
        let read = self.file.read_to_end(&mut bytes);
        read.map_err(CoreError::io("reading", &self.path))?;
        let mut start = 0;
        for (index, line) in bytes.split_inclusive(|&b| b == b'\n').enumerate() {
            let complete = line.ends_with(b"\n");
            if line.trim_ascii().is_empty() && complete {
                start += line.len();
                self.end = start as u64;
                continue;
            }
            match serde_json::from_slice::<T>(line) {
                Ok(parsed) => {
                    let (number, question) = entry(parsed);
                    self.entries.push(Entry {
                        start: start as u64,
                        number,
                        question,
                    });
                    self.end = (start + line.len()) as u64;
                    if !complete {
                        self.write_at_end(b"\n")?;
                        self.end += 1;
                        let path = self.path.clone();
                        self.recovery = Some(Recovery::Completed { path });
                    }
                }
                Err(_) if !complete => {
                    self.end = start as u64;
                    self.cut()?;
                    self.recovery = Some(Recovery::Removed {
                        path: self.path.clone(),
                        bytes: line.len(),
                    });
                }
                Err(error) => {
                    return Err(CoreError::Corrupt {
                        path: self.path.clone(),
                        reason: format!("line {}: {error}", index + 1),
                    }
                    .into());
                }
            }
            start += line.len();
            if complete {
                self.end = start as u64;
            }
        }
        Ok(())
    }

    fn append(&mut self, line: &impl Serialize, number: u64, question: u64) -> Result<()> {
        let mut bytes = serde_json::to_vec(line).map_err(CoreError::model)?;
        bytes.push(b'\n');
        if let Err(error) = self.write_at_end(&bytes) {
            // Half a line must not stay in front of the next one.
            let _ = self.cut();
            return Err(error);
        }
        let start = self.end;
        self.entries.push(Entry {
            start,
            number,
            question,
        });
        self.end += bytes.len() as u64;
        Ok(())
    }

    fn write_at_end(&mut self, bytes: &[u8]) -> Result<()> {
        let mut write = || {
            self.file.seek(SeekFrom::Start(self.end))?;
            self.file.write_all(bytes)?;
            self.file.sync_data()
        };
        Ok(write().map_err(CoreError::io("writing", &self.path))?)
    }

    fn remove_last(&mut self) -> Result<()> {
        if let Some(entry) = self.entries.last() {
            self.end = entry.start;
            self.cut()?;
            self.entries.pop();
        }
        Ok(())
    }

    /// Cuts the file after its last complete line.
    fn cut(&mut self) -> Result<()> {
        let cut = self
            .file
            .set_len(self.end)
            .and_then(|()| self.file.sync_data());
        Ok(cut.map_err(CoreError::io("writing", &self.path))?)
    }
}
