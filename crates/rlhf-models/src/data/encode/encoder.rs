//! Texts to token ids: special tokens, boundaries, lengths.

use rlhf_core::Sequence;
use serde_json::Value;

use super::{EncodeOptions, Outcome, Overlong};
use crate::data::Text;
use crate::data::prompt::common_prefix;
use crate::{ChatEnd, ChatMessage, ChatOptions, Error, Result, Tokenizer};

/// A prompt and its answers as token ids.
pub(crate) struct Joined {
    pub(crate) prompt: Vec<i64>,
    pub(crate) responses: Vec<Vec<i64>>,
    /// Tokens that the prompt has when it is encoded alone, and that an answer changes.
    pub(crate) changed: usize,
}

/// A tokenizer with options.
pub(crate) struct Encoder<'a> {
    pub(crate) tokenizer: &'a Tokenizer,
    options: &'a EncodeOptions,
}

impl<'a> Encoder<'a> {
    pub(crate) fn new(tokenizer: &'a Tokenizer, options: &'a EncodeOptions) -> Self {
        Self { tokenizer, options }
    }

    fn chat(&self, messages: &[ChatMessage], end: ChatEnd, tools: &[Value]) -> Result<Vec<i64>> {
        let options = ChatOptions {
            tools: tools.to_vec(),
            ..ChatOptions::ending(end)
        };
        self.tokenizer.encode_chat(messages, &options)
    }

    /// A text with the special tokens that belong around it; nothing is appended.
    pub(crate) fn text(&self, text: &Text, tools: &[Value]) -> Result<Vec<i64>> {
        match text {
            Text::Plain(text) => self.tokenizer.encode_with_special_tokens(text),
            Text::Chat(messages) => self.chat(messages, ChatEnd::Closed, tools),
        }
    }

    /// A prompt, open for an answer. A conversation whose last message is the assistant's is
    /// continued.
    pub(crate) fn prompt(&self, prompt: &Text, tools: &[Value]) -> Result<Vec<i64>> {
        match prompt {
            Text::Plain(text) => self.tokenizer.encode_with_special_tokens(text),
            Text::Chat(messages) => {
                let end = match messages.last().map(ChatMessage::role) {
                    Some("assistant") => ChatEnd::OpenFinalMessage,
                    _ => ChatEnd::GenerationPrompt,
                };
                self.chat(messages, end, tools)
            }
        }
    }

    /// A text all of which is learned.
    pub(crate) fn learned(&self, text: &Text, tools: &[Value]) -> Result<Vec<i64>> {
        let mut ids = self.text(text, tools)?;
        if matches!(text, Text::Plain(_)) {
            self.append_eos(&mut ids);
        }
        Ok(ids)
    }

    /// A prompt with each of its answers. What the prompt has in common with all of them is the
    /// prompt, whatever it is when encoded alone: TRL's rule.
    pub(crate) fn join(&self, prompt: &Text, answers: &[&Text], tools: &[Value]) -> Result<Joined> {
        let mut joined = Vec::with_capacity(answers.len());
        let mut prompt_ids = match prompt {
            Text::Plain(text) => self.tokenizer.encode_with_special_tokens(text)?,
            Text::Chat(messages) => self.chat(messages, ChatEnd::GenerationPrompt, tools)?,
        };
        for answer in answers {
            joined.push(match (prompt, answer) {
                (Text::Plain(prompt), Text::Plain(answer)) => {
                    let text = [prompt.as_str(), answer].concat();
                    let mut ids = self.tokenizer.encode_with_special_tokens(&text)?;
                    self.append_eos(&mut ids);
                    ids
                }
                (Text::Chat(prompt), Text::Chat(answer)) => {
                    let messages = [prompt.as_slice(), answer].concat();
                    self.chat(&messages, ChatEnd::Closed, tools)?
                }
                _ => return Err(Error::MixedText),
            });
        }
        let common = common_prefix(&prompt_ids, &joined);
        let changed = prompt_ids.len() - common;
        prompt_ids.truncate(common);
        for ids in &mut joined {
            ids.drain(..common);
        }
        Ok(Joined {
            prompt: prompt_ids,
            responses: joined,
            changed,
        })
    }

    fn append_eos(&self, ids: &mut Vec<i64>) {
        if self.options.append_eos
            && let Some(eos) = self.tokenizer.eos_token_id()
            && ids.last() != Some(&eos)
        {
            ids.push(eos);
        }
    }

    /// A text all of which is learned, as a sequence. Nothing predicts the first token, so that it
    /// is the prompt.
    pub(super) fn whole(&self, text: &Text, tools: &[Value]) -> Result<Outcome<Sequence>> {
        let ids = self.learned(text, tools)?;
        if ids.len() < 2 {
            return Ok(Outcome::Empty);
        }
        Ok(match self.fit_ids(ids, |ids| ids) {
            Outcome::Whole(mut ids) => Outcome::Whole(split_first(&mut ids)),
            Outcome::Cut(mut ids) if ids.len() > 1 => Outcome::Cut(split_first(&mut ids)),
            _ => Outcome::TooLong,
        })
    }

    /// Makes an example of a prompt and `N` answers, cut to the greatest length.
    pub(super) fn fit<T, const N: usize>(
        &self,
        joined: Joined,
        make: impl FnOnce(Vec<i64>, [Vec<i64>; N]) -> T,
    ) -> Outcome<T> {
        let Joined {
            mut prompt,
            responses,
            ..
        } = joined;
        let Ok(mut responses) = <[Vec<i64>; N]>::try_from(responses) else {
            return Outcome::Empty;
        };
        if let ([], [response]) = (prompt.as_slice(), responses.as_mut_slice())
            && response.len() > 1
        {
            // Nothing predicts the first token of all.
            prompt.push(response.remove(0));
        }
        if prompt.is_empty() || responses.iter().any(Vec::is_empty) {
            return Outcome::Empty;
        }
        let longest = responses.iter().map(Vec::len).max().unwrap_or(0);
        let max = self.options.max_tokens.unwrap_or(usize::MAX);
        if prompt.len() + longest <= max {
            return Outcome::Whole(make(prompt, responses));
        }
        match self.options.overlong {
            Overlong::Drop => return Outcome::TooLong,
            Overlong::KeepStart => {
                if prompt.len() >= max {
                    return Outcome::TooLong;
                }
                for response in &mut responses {
                    response.truncate(max - prompt.len());
                }
            }
            Overlong::KeepEnd => {
                if longest >= max {
                    return Outcome::TooLong;
                }
                prompt.drain(..prompt.len() + longest - max);
            }
        }
        Outcome::Cut(make(prompt, responses))
    }

    /// Makes an example of one list of ids, cut to the greatest length.
    pub(super) fn fit_ids<T>(
        &self,
        mut ids: Vec<i64>,
        make: impl FnOnce(Vec<i64>) -> T,
    ) -> Outcome<T> {
        let max = self.options.max_tokens.unwrap_or(usize::MAX);
        if ids.is_empty() {
            return Outcome::Empty;
        }
        if ids.len() <= max {
            return Outcome::Whole(make(ids));
        }
        match self.options.overlong {
            Overlong::Drop => return Outcome::TooLong,
            _ if max == 0 => return Outcome::TooLong,
            Overlong::KeepStart => ids.truncate(max),
            Overlong::KeepEnd => drop(ids.drain(..ids.len() - max)),
        }
        Outcome::Cut(make(ids))
    }
}

fn split_first(ids: &mut Vec<i64>) -> Sequence {
    let response = ids.split_off(1);
    Sequence::new(std::mem::take(ids), response)
}
