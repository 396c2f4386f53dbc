//! Where a prompt ends.

use crate::ChatMessage;

/// The prompt that two answers begin with, and what is left of them: TRL's `extract_prompt`.
///
/// The answers are split at the first character in which they differ, one earlier if a space
/// stands before it, because tokens begin with their space. Where one is the start of the other,
/// the last common character stays with the answers.
///
/// ```
/// use rlhf_models::data::split_prompt;
///
/// let parts = split_prompt("The sky is blue.", "The sky is green.");
/// assert_eq!(parts, ("The sky is", " blue.", " green."));
/// ```
pub fn split_prompt<'a>(chosen: &'a str, rejected: &'a str) -> (&'a str, &'a str, &'a str) {
    let mut at = 0;
    let mut last = 0;
    let mut differ = false;
    for ((i, a), b) in chosen.char_indices().zip(rejected.chars()) {
        if a != b {
            differ = true;
            break;
        }
        last = i;
        at = i + a.len_utf8();
    }
    if !differ || chosen[last..at] == *" " {
        at = last;
    }
    (&chosen[..at], &chosen[at..], &rejected[at..])
}

/// The same for conversations: messages that both have are the prompt, at most all but the last
/// of the shorter one.
pub(super) fn split_messages(
    mut chosen: Vec<ChatMessage>,
    mut rejected: Vec<ChatMessage>,
) -> (Vec<ChatMessage>, Vec<ChatMessage>, Vec<ChatMessage>) {
    let shorter = chosen.len().min(rejected.len());
    let pairs = chosen.iter().zip(&rejected);
    let common = pairs.take_while(|(a, b)| a == b).count();
    let at = common.min(shorter.saturating_sub(1));
    let answer = chosen.split_off(at);
    (chosen, answer, rejected.split_off(at))
}

/// Number of tokens that all lists begin with.
pub(super) fn common_prefix(first: &[i64], others: &[Vec<i64>]) -> usize {
    let with = |other: &Vec<i64>| first.iter().zip(other).take_while(|(a, b)| a == b).count();
    others.iter().map(with).min().unwrap_or(first.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_split_where_they_differ() {
        let cases = [
            (("ab x", "ab y"), ("ab", " x", " y")),
            (("abx", "aby"), ("ab", "x", "y")),
            (("x", "y"), ("", "x", "y")),
            (("ab", "abc"), ("a", "b", "bc")),
            (("ab", "ab"), ("a", "b", "b")),
            (("", "a"), ("", "", "a")),
            (("é x", "é y"), ("é", " x", " y")),
            (("éa", "èa"), ("", "éa", "èa")),
        ];
        for ((chosen, rejected), expected) in cases {
            assert_eq!(
                split_prompt(chosen, rejected),
                expected,
                "{chosen} {rejected}"
            );
        }
    }

    #[test]
    fn conversations_are_split_by_messages() {
        let turn = |role: &str, text: &str| ChatMessage::new(role, text);
        let chosen = vec![turn("user", "?"), turn("assistant", "a"), turn("user", "!")];
        let rejected = vec![turn("user", "?"), turn("assistant", "b")];
        let (prompt, c, r) = split_messages(chosen.clone(), rejected.clone());
        assert_eq!((prompt.len(), c.len(), r.len()), (1, 2, 1));
        let (prompt, c, r) = split_messages(rejected.clone(), rejected);
        assert_eq!((prompt.len(), c.len(), r.len()), (1, 1, 1));
    }
}
