//! Tokenizers of the Hugging Face hub.

mod files;
mod outline;
mod settings;

use std::path::Path;

use rayon::prelude::*;
use rlhf_core::Detokenize;
use tokenizers::{Encoding, PostProcessor, TruncationDirection};

use crate::chat_template::{ChatMessage, ChatOptions, ChatTemplates};
use crate::checkpoint::write_atomic;
use crate::{Error, ModelConfig, Result};

/// Text to token ids and back.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<i64>,
    eos: Option<i64>,
    pad: Option<i64>,
    stop: Vec<i64>,
    vocab_size: usize,
    templates: Option<ChatTemplates>,
    /// As read, to be written beside a trained model: a path within the folder, and bytes.
    files: Vec<(String, Vec<u8>)>,
}

/// The end of a text at which tokens are cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// The start is cut off, the end is kept.
    Left,
    /// The end is cut off, the start is kept.
    Right,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder, and where there are: `tokenizer_config.json` (special
    /// tokens, `add_bos_token`, chat templates), `chat_template.jinja` and
    /// `additional_chat_templates/*.jinja`, `generation_config.json` (stop tokens).
    ///
    /// Truncation and padding that the file asks for are switched off: batches are ragged here,
    /// and what is cut off is said at each call.
    ///
    /// # Errors
    /// A file that is absent, damaged, or larger than any tokenizer's
    /// ([`Error::FileTooLarge`]); a chat template with a syntax error.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let files = files::read(dir)?;
        let path = dir.join(files::TOKENIZER);
        let wrap = |source| Error::Tokenizer {
            path: path.clone(),
            source,
        };
        let json = files.first().map_or(&[][..], |(_, bytes)| bytes);
        outline::check(json).map_err(|source| Error::Json {
            path: path.clone(),
            source,
        })?;
        let mut inner = tokenizers::Tokenizer::from_bytes(json).map_err(wrap)?;
        inner.with_padding(None);
        inner.with_truncation(None).map_err(wrap)?;
        let largest = inner.get_vocab(true).values().copied().max();
        let mut tokenizer = Self {
            vocab_size: largest.map_or(0, |id| id as usize + 1),
            inner,
            bos: None,
            eos: None,
            pad: None,
            stop: Vec::new(),
            templates: None,
            files,
        };
        tokenizer.read_settings(dir)?;
        Ok(tokenizer)
    }

    /// The ids of a text, with no special tokens added. Special tokens that the text spells out
    /// (`<|endoftext|>`) become their ids.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        Ok(ids(&self.encoding(text, false)?))
    }

    /// The ids of a text with the special tokens that the tokenizer adds around one, such as a
    /// BOS token.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<i64>> {
        Ok(ids(&self.encoding(text, true)?))
    }

    /// [`encode`](Self::encode) of many texts, on all cores; the order is kept.
    ///
    /// # Errors
    /// The tokenizer's own, of the first text that has one.
    pub fn encode_batch<S: AsRef<str> + Sync>(&self, texts: &[S]) -> Result<Vec<Vec<i64>>> {
        let encode = |text: &S| self.encode(text.as_ref());
        texts.par_iter().map(encode).collect()
    }

    /// [`encode_with_special_tokens`](Self::encode_with_special_tokens) of many texts, on all
    /// cores; the order is kept.
    ///
    /// # Errors
    /// The tokenizer's own, of the first text that has one.
    pub fn encode_batch_with_special_tokens<S: AsRef<str> + Sync>(
        &self,
        texts: &[S],
    ) -> Result<Vec<Vec<i64>>> {
        let encode = |text: &S| self.encode_with_special_tokens(text.as_ref());
        texts.par_iter().map(encode).collect()
    }

    /// [`encode_with_special_tokens`](Self::encode_with_special_tokens), cut to `max_tokens`. The
    /// special tokens count and stay; the text between them is cut, as in transformers.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode_truncated(&self, text: &str, max_tokens: usize, cut: Side) -> Result<Vec<i64>> {
        let added = self
            .inner
            .get_post_processor()
            .map_or(0, |processor| processor.added_tokens(false));
        let mut encoding = self.encoding(text, false)?;
        let direction = match cut {
            Side::Left => TruncationDirection::Left,
            Side::Right => TruncationDirection::Right,
        };
        encoding.truncate(max_tokens.saturating_sub(added), 0, direction);
        let encoding = self
            .inner
            .post_process(encoding, None, true)
            .map_err(|source| Error::Encode { source })?;
        let mut ids = ids(&encoding);
        // Where not even the special tokens fit.
        ids.truncate(max_tokens);
        Ok(ids)
    }

    fn encoding(&self, text: &str, special: bool) -> Result<Encoding> {
        self.inner
            .encode_fast(text, special)
            .map_err(|source| Error::Encode { source })
    }

    /// The text of ids. Ids that a model has but no token uses stand for nothing, as in
    /// transformers.
    ///
    /// # Errors
    /// [`Error::InvalidId`] for a negative id, and the tokenizer's own.
    pub fn decode(&self, ids: &[i64], skip_special: bool) -> Result<String> {
        let ids = ids
            .iter()
            .map(|&id| u32::try_from(id).map_err(|_| Error::InvalidId { id }))
            .collect::<Result<Vec<u32>>>()?;
        self.inner
            .decode(&ids, skip_special)
            .map_err(|source| Error::Decode { source })
    }

    /// Begins a text.
    pub fn bos_token_id(&self) -> Option<i64> {
        self.bos
    }

    /// Ends a text.
    pub fn eos_token_id(&self) -> Option<i64> {
        self.eos
    }

    /// Fills rows of a padded batch.
    pub fn pad_token_id(&self) -> Option<i64> {
        self.pad
    }

    /// Every id at which generation stops: the EOS token and those of `generation_config.json`.
    pub fn stop_token_ids(&self) -> &[i64] {
        &self.stop
    }

    /// The id of a token, by its exact spelling in the vocabulary.
    pub fn token_to_id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// A token's spelling in the vocabulary.
    pub fn id_to_token(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(id.try_into().ok()?)
    }

    /// Whether [`decode`](Self::decode) leaves this token out when it skips special tokens.
    pub fn is_special(&self, id: i64) -> bool {
        self.id_to_token(id)
            .is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// One more than the largest id.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Fails if this tokenizer has ids that a model has no embedding for.
    ///
    /// # Errors
    /// [`Error::VocabularyTooSmall`].
    pub fn check_fits(&self, config: &ModelConfig) -> Result<()> {
        if self.vocab_size as i64 <= config.vocab_size() {
            return Ok(());
        }
        Err(Error::VocabularyTooSmall {
            largest_id: self.vocab_size as i64 - 1,
            vocab_size: config.vocab_size(),
        })
    }

    /// Whether there is a chat template.
    pub fn has_chat_template(&self) -> bool {
        self.templates.is_some()
    }

    /// Names of the chat templates; a single one is called `default`.
    pub fn chat_template_names(&self) -> &[String] {
        self.templates.as_ref().map_or(&[], ChatTemplates::names)
    }

    /// A conversation as the text that the model was trained on.
    ///
    /// ```
    /// use rlhf_models::{ChatEnd, ChatMessage, ChatOptions, Tokenizer};
    ///
    /// # fn main() -> rlhf_models::Result<()> {
    /// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/goldens/tokenizers/chatml");
    /// let tokenizer = Tokenizer::from_dir(folder)?;
    /// let messages = [ChatMessage::new("user", "Hi!")];
    /// let options = ChatOptions::ending(ChatEnd::GenerationPrompt);
    /// let text = tokenizer.apply_chat_template(&messages, &options)?;
    /// assert!(text.ends_with("<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// A template is a program that came with the model. It is stopped after a number of steps
    /// and a length of text that no real one reaches. What it builds in a variable by doubling a
    /// string again and again is not bounded: read the templates of strangers before use.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`], [`Error::NoSuchTemplate`], [`Error::FinalMessageNotRendered`],
    /// and [`Error::ChatTemplate`] with what the template itself reports.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        options: &ChatOptions,
    ) -> Result<String> {
        match &self.templates {
            Some(templates) => templates.render(messages, options),
            None => Err(Error::NoChatTemplate),
        }
    }

    /// The ids of a conversation: [`apply_chat_template`](Self::apply_chat_template), then
    /// [`encode`](Self::encode), because the template writes the BOS token where it wants one.
    ///
    /// # Errors
    /// Those of both.
    pub fn encode_chat(&self, messages: &[ChatMessage], options: &ChatOptions) -> Result<Vec<i64>> {
        self.encode(&self.apply_chat_template(messages, options)?)
    }

    /// Writes the tokenizer's files as they were read.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        for (name, bytes) in &self.files {
            let path = dir.join(name);
            let folder = path.parent().unwrap_or(dir);
            std::fs::create_dir_all(folder).map_err(Error::io("creating", folder))?;
            write_atomic(&path, bytes)?;
        }
        Ok(())
    }
}

fn ids(encoding: &Encoding) -> Vec<i64> {
    encoding.get_ids().iter().map(|&id| i64::from(id)).collect()
}

impl Detokenize for Tokenizer {
    fn detokenize(&self, ids: &[i64]) -> rlhf_core::Result<String> {
        Ok(self.decode(ids, true)?)
    }
}
