//! A terminal session.

use std::collections::VecDeque;
use std::io::{BufRead, Write};

use rand::Rng;
use rlhf_core::{Error as CoreError, RngStreams};

use super::{Choice, FeedbackLog, Question};
use crate::Result;

/// How questions are shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AskOptions {
    /// Seed of which answer is on the left. A question has the same side in every session.
    pub seed: u64,
    /// Columns of the terminal.
    pub width: usize,
}

/// Why a session ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// There is no question left.
    AllAnswered,
    /// The person has had enough.
    Quit,
    /// The input ended.
    EndOfInput,
}

/// What came of a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SessionReport {
    /// Why it ended.
    pub end: End,
    /// Choices made and not taken back.
    pub answered: i64,
    /// Questions that remain.
    pub left: usize,
}

/// Asks the questions that the log has no answer to, in their order, and records each choice
/// before the next question is shown.
///
/// Commands are lines: `l` (left), `r` (right), `t` (tie), `s` (skip), `b` (back: the latest choice
/// is taken back and asked again, of an earlier session too), `q` (quit), or the words themselves,
/// in any case. Both answers are shown side by side; which is on the left is random, so that a
/// habit of the eye does not become a preference for one model. Control characters in the texts
/// are not sent to the terminal.
///
/// # Errors
/// A log that cannot be written; an input or output that fails.
pub fn ask(
    questions: &[Question],
    log: &mut FeedbackLog,
    input: &mut dyn BufRead,
    output: &mut dyn Write,
    options: AskOptions,
) -> Result<SessionReport> {
    let mut left: VecDeque<&Question> = questions.iter().filter(|q| !log.is_answered(q)).collect();
    let mut answered = 0;
    let end = loop {
        // The same two answers may have been sampled twice.
        while left
            .front()
            .is_some_and(|question| log.is_answered(question))
        {
            left.pop_front();
        }
        let Some(&question) = left.front() else {
            break End::AllAnswered;
        };
        let swapped = RngStreams::new(options.seed)
            .stream("feedback/side", question.id())
            .random();
        show(question, swapped, left.len(), output, options.width)?;
        match command(input, output)? {
            Command::Quit => break End::Quit,
            Command::EndOfInput => break End::EndOfInput,
            Command::Back => {
                let known = log
                    .last()
                    .and_then(|id| questions.iter().find(|q| q.id() == id));
                match known {
                    Some(previous) => {
                        log.undo()?;
                        answered -= 1;
                        left.push_front(previous);
                    }
                    None => say(
                        output,
                        "There is no choice of these questions to go back to.",
                    )?,
                }
            }
            Command::Choose(side) => {
                let choice = match (side, swapped) {
                    (Side::Left, false) | (Side::Right, true) => Choice::First,
                    (Side::Right, false) | (Side::Left, true) => Choice::Second,
                    (Side::Neither, _) => Choice::Tie,
                    (Side::Unknown, _) => Choice::Skip,
                };
                log.record(question, choice)?;
                answered += 1;
                left.pop_front();
            }
        }
    };
    Ok(SessionReport {
        end,
        answered,
        left: left.len(),
    })
}

enum Command {
    Choose(Side),
    Back,
    Quit,
    EndOfInput,
}

enum Side {
    Left,
    Right,
    Neither,
    Unknown,
}

fn command(input: &mut dyn BufRead, output: &mut dyn Write) -> Result<Command> {
    loop {
        say_inline(output, "left, right, tie, skip, back or quit? ")?;
        let mut line = Vec::new();
        // Bytes: a stray one that is not UTF-8 is a wrong command, not an error.
        let count = input.read_until(b'\n', &mut line);
        if count.map_err(CoreError::io("reading", "the input"))? == 0 {
            return Ok(Command::EndOfInput);
        }
        let line = String::from_utf8_lossy(&line).trim().to_lowercase();
        return Ok(match line.as_str() {
            "l" | "left" => Command::Choose(Side::Left),
            "r" | "right" => Command::Choose(Side::Right),
            "t" | "tie" => Command::Choose(Side::Neither),
            "s" | "skip" => Command::Choose(Side::Unknown),
            "b" | "back" => Command::Back,
            "q" | "quit" => Command::Quit,
            _ => continue,
        });
    }
}

fn show(
    question: &Question,
    swapped: bool,
    left: usize,
    output: &mut dyn Write,
    width: usize,
) -> Result<()> {
    const GAP: &str = " | ";
    let width = width.clamp(24, 400);
    let column = (width - GAP.len()) / 2;
    let [first, second] = &question.answers;
    let sides = if swapped {
        [second, first]
    } else {
        [first, second]
    };
    let mut text = format!("\n{}\n{left} to go\n\n", "=".repeat(width));
    for line in wrapped(&question.prompt, width) {
        text += &format!("{line}\n");
    }
    text += &format!("\n{:<column$}{GAP}{}\n", "LEFT", "RIGHT");
    text += &format!(
        "{}{}\n",
        "-".repeat(column + 1),
        "-".repeat(width - column - 1)
    );
    let [a, b] = sides.map(|side| wrapped(side, column));
    for row in 0..a.len().max(b.len()) {
        let cell = |lines: &[String]| lines.get(row).cloned().unwrap_or_default();
        let line = format!("{:<column$}{GAP}{}", cell(&a), cell(&b));
        text += &format!("{}\n", line.trim_end());
    }
    say(output, &text)
}

/// Lines of at most `width` characters, broken between words where possible.
fn wrapped(text: &str, width: usize) -> Vec<String> {
    let mut lines = Vec::new();
    for paragraph in text.trim().split('\n') {
        let mut line = String::new();
        let mut length = 0;
        for word in paragraph.split_whitespace() {
            let word: Vec<char> = word
                .chars()
                .map(|c| if c.is_control() { '\u{fffd}' } else { c })
                .collect();
            for piece in word.chunks(width) {
                if length > 0 && length + 1 + piece.len() > width {
                    lines.push(std::mem::take(&mut line));
                    length = 0;
                }
                if length > 0 {
                    line.push(' ');
                    length += 1;
                }
                line.extend(piece);
                length += piece.len();
            }
        }
        lines.push(line);
    }
    lines
}

fn say(output: &mut dyn Write, text: &str) -> Result<()> {
    say_inline(output, &format!("{text}\n"))
}

fn say_inline(output: &mut dyn Write, text: &str) -> Result<()> {
    let written = output
        .write_all(text.as_bytes())
        .and_then(|()| output.flush());
    Ok(written.map_err(CoreError::io("writing", "the output"))?)
}
