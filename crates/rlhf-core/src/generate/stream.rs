//! Text as it is written.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Generator;
use super::rows::{Row, Rows};
use crate::rng::RngStreams;
use crate::{Error, FinishReason, Policy, Result};

/// A piece of a response's text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextPiece {
    /// Which completion it belongs to, counted as in [`Generator::generate`].
    pub index: usize,
    /// Whole characters that follow those of the completion's earlier pieces; empty only in a
    /// last piece.
    pub text: String,
    /// Why the response ended, in its last piece; `None` before.
    pub finish: Option<FinishReason>,
}

/// The texts of responses, piece by piece. Nothing is computed before it is asked for; dropping
/// the stream ends the writing. After an error there is nothing more.
pub struct TextStream<'a> {
    rows: Rows<'a>,
    stop_strings: Vec<String>,
    /// Bytes given away, by completion.
    sent: Vec<usize>,
    ready: VecDeque<TextPiece>,
    failed: bool,
}

impl<'a, P: Policy + ?Sized> Generator<'a, P> {
    /// Writes responses to `prompts` and gives their texts away as they come. The pieces of a
    /// completion joined together are the text that [`generate`](Self::generate) gives it.
    ///
    /// # Errors
    /// Those of [`generate`](Self::generate): before anything is computed here, later ones from
    /// the iterator. [`Error::InvalidConfig`] without a detokenizer.
    pub fn stream(
        &self,
        prompts: &[Arc<[i64]>],
        rng: &RngStreams,
        first_index: u64,
    ) -> Result<TextStream<'a>> {
        if self.detokenizer.is_none() {
            let reason = "a stream of text needs one: see Generator::with_detokenizer";
            return Err(Error::config("detokenizer", "none", reason));
        }
        let samples = self.config.samples_per_prompt;
        Ok(TextStream {
            rows: self.rows(prompts, samples, rng, first_index)?,
            stop_strings: self.config.stop_strings.clone(),
            sent: vec![0; prompts.len() * samples],
            ready: VecDeque::new(),
            failed: false,
        })
    }
}

impl TextStream<'_> {
    fn piece(sent: &mut [usize], row: &Row, end: usize, done: bool) -> Option<TextPiece> {
        let sent = &mut sent[row.index];
        let text = row.text.so_far()[(*sent).min(end)..end].to_string();
        *sent = end.max(*sent);
        (done || !text.is_empty()).then(|| TextPiece {
            index: row.index,
            text,
            finish: done.then_some(row.finish),
        })
    }

    /// Writes on until there is a piece. Returns whether there is one.
    fn fill(&mut self) -> Result<bool> {
        while self.ready.is_empty() {
            let more = self.rows.advance()?;
            for row in self.rows.done.drain(..) {
                let end = row.text.stopped_at().unwrap_or(row.text.so_far().len());
                self.ready
                    .extend(Self::piece(&mut self.sent, &row, end, true));
            }
            for row in &self.rows.active {
                let end = row.text.settled(&self.stop_strings);
                self.ready
                    .extend(Self::piece(&mut self.sent, row, end, false));
            }
            if !more {
                break;
            }
        }
        Ok(!self.ready.is_empty())
    }
}

impl Iterator for TextStream<'_> {
    type Item = Result<TextPiece>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.failed {
            return None;
        }
        match self.fill() {
            Ok(_) => self.ready.pop_front().map(Ok),
            Err(error) => {
                self.failed = true;
                Some(Err(error))
            }
        }
    }
}
