//! Text that grows by a token at a time.

use crate::{Detokenize, Result};

/// The text of a response while it is written.
///
/// A token need not be a whole character, and its text may depend on the token before it (a
/// leading space, say). So a few tokens are decoded again with every new one, and what is new is
/// taken over once it ends in a whole character.
#[derive(Default)]
pub(super) struct GrowingText {
    text: String,
    /// Tokens whose text is in `text`.
    read: usize,
    /// Tokens before these are not decoded again.
    anchor: usize,
    /// Where a stop string begins.
    stopped_at: Option<usize>,
    /// Bytes that have been searched for stop strings.
    searched: usize,
}

impl GrowingText {
    /// The whole characters so far, a stop string included.
    pub(super) fn so_far(&self) -> &str {
        &self.text
    }

    /// Where the stop string begins that ended the text.
    pub(super) fn stopped_at(&self) -> Option<usize> {
        self.stopped_at
    }

    /// Takes over what `ids`, all tokens so far, add to the text. An incomplete character waits
    /// for the next token, unless this is the end.
    pub(super) fn grow(&mut self, ids: &[i64], end: bool, d: &dyn Detokenize) -> Result<()> {
        let before = d.detokenize(&ids[self.anchor..self.read])?;
        let after = d.detokenize(&ids[self.anchor..])?;
        let incomplete = after.ends_with(char::REPLACEMENT_CHARACTER) && !end;
        match after.strip_prefix(before.as_str()) {
            Some(new) if !incomplete => {
                self.text.push_str(new);
                // A token without text, such as a special one, is no context for the next.
                if !new.is_empty() {
                    self.anchor = self.read;
                }
                self.read = ids.len();
            }
            _ => {}
        }
        Ok(())
    }

    /// Searches what is new for the earliest of `stops`.
    pub(super) fn look_for(&mut self, stops: &[String]) {
        let found = stops.iter().filter_map(|stop| {
            let from = self.searched.saturating_sub(stop.len() - 1);
            let from = (0..=from)
                .rev()
                .find(|&at| self.text.is_char_boundary(at))?;
            Some(from + self.text[from..].find(stop.as_str())?)
        });
        self.stopped_at = found.min();
        self.searched = self.text.len();
    }

    /// Bytes that no later token takes back: all but what may be the beginning of a stop string.
    pub(super) fn settled(&self, stops: &[String]) -> usize {
        if let Some(cut) = self.stopped_at {
            return cut;
        }
        let held = stops.iter().map(|stop| {
            let begins = |n: &usize| stop.is_char_boundary(*n) && self.text.ends_with(&stop[..*n]);
            (1..stop.len()).rev().find(begins).unwrap_or(0)
        });
        self.text.len() - held.max().unwrap_or(0)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    /// A token is a byte.
    fn bytes(ids: &[i64]) -> Result<String> {
        let bytes: Vec<u8> = ids.iter().map(|&id| id as u8).collect();
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn ids(text: &str) -> Vec<i64> {
        text.bytes().map(i64::from).collect()
    }

    #[test]
    fn characters_arrive_whole() {
        let text = "aé漢😀z";
        let ids = ids(text);
        let mut growing = GrowingText::default();
        for n in 1..=ids.len() {
            growing.grow(&ids[..n], n == ids.len(), &bytes).unwrap();
            assert!(text.starts_with(growing.so_far()), "{}", growing.so_far());
        }
        assert_eq!(growing.so_far(), text);
    }

    #[test]
    fn what_is_incomplete_at_the_end_is_shown_as_such() {
        let ids = ids("é");
        let mut growing = GrowingText::default();
        growing.grow(&ids[..1], false, &bytes).unwrap();
        assert_eq!(growing.so_far(), "");
        growing.grow(&ids[..1], true, &bytes).unwrap();
        assert_eq!(growing.so_far(), "\u{fffd}");
    }

    #[test]
    fn the_earliest_stop_string_cuts_and_its_beginnings_are_held_back() {
        let stops = ["\n\n".to_string(), "END".to_string()];
        let ids = ids("a\nb EN ENDx\n\n");
        let mut growing = GrowingText::default();
        let mut settled = Vec::new();
        for n in 1..=ids.len() {
            growing.grow(&ids[..n], false, &bytes).unwrap();
            growing.look_for(&stops);
            settled.push(growing.settled(&stops));
            if growing.stopped_at().is_some() {
                break;
            }
        }
        assert_eq!(settled, [1, 1, 3, 4, 4, 4, 7, 7, 7, 7]);
        assert_eq!(
            &growing.so_far()[..growing.stopped_at().unwrap()],
            "a\nb EN "
        );
    }
}
