//! Tokenizers of the Hugging Face hub.

use std::path::Path;

use rlhf_core::Detokenize;

use crate::chat_template::{ChatMessage, ChatTemplate};
use crate::checkpoint::write_atomic;
use crate::config::{Fields, OneOrMany};
use crate::{Error, ModelConfig, Result};

/// Files that belong to a tokenizer; the first must be there.
const FILES: &[&str] = &[
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
];

/// Text to token ids and back.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    bos: Option<i64>,
    eos: Option<i64>,
    pad: Option<i64>,
    stop: Vec<i64>,
    vocab_size: usize,
    template: Option<ChatTemplate>,
    /// As read, to be written beside a trained model.
    files: Vec<(&'static str, Vec<u8>)>,
}

impl Tokenizer {
    /// Reads `tokenizer.json` of a folder, and where there are: `tokenizer_config.json` (special
    /// tokens, chat template), `chat_template.jinja`, `generation_config.json` (stop tokens).
    ///
    /// Truncation and padding that the file asks for are switched off: batches are ragged here.
    ///
    /// # Errors
    /// A file that is absent or damaged, a chat template with a syntax error.
    pub fn from_dir(dir: impl AsRef<Path>) -> Result<Self> {
        let dir = dir.as_ref();
        let mut files = Vec::new();
        for (i, &name) in FILES.iter().enumerate() {
            let path = dir.join(name);
            if i == 0 || path.exists() {
                let bytes = std::fs::read(&path).map_err(Error::io("reading", &path))?;
                files.push((name, bytes));
            }
        }
        let path = dir.join(FILES[0]);
        let wrap = |source| Error::Tokenizer {
            path: path.clone(),
            source,
        };
        let mut inner = tokenizers::Tokenizer::from_bytes(&files[0].1).map_err(wrap)?;
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
            template: None,
            files,
        };
        tokenizer.read_settings(dir)?;
        Ok(tokenizer)
    }

    /// Special tokens by name, from the first file that knows them; old folders have them in
    /// `special_tokens_map.json`, or as ids in the model's config only.
    fn read_settings(&mut self, dir: &Path) -> Result<()> {
        let read = |name: &str| -> Result<Option<Fields>> {
            let path = dir.join(name);
            path.exists().then(|| Fields::read(&path)).transpose()
        };
        let settings = read("tokenizer_config.json")?;
        let map = read("special_tokens_map.json")?;
        let model = read("config.json")?;
        let id = |token: &str| -> Result<Option<i64>> {
            for fields in [&settings, &map].into_iter().flatten() {
                let text = fields.get::<SpecialToken>(token)?.map(SpecialToken::text);
                if let Some(id) = text.and_then(|text| self.inner.token_to_id(&text)) {
                    return Ok(Some(id.into()));
                }
            }
            let ids = match &model {
                Some(model) => model.get::<OneOrMany>(&format!("{token}_id"))?,
                None => None,
            };
            let ids = ids.map_or_else(Vec::new, Vec::from);
            Ok(ids.into_iter().find(|&id| self.text_of(id).is_some()))
        };
        [self.bos, self.eos, self.pad] = [id("bos_token")?, id("eos_token")?, id("pad_token")?];
        self.stop.extend(self.eos);
        if let Some(generation) = read("generation_config.json")? {
            let ids: Option<OneOrMany> = generation.get("eos_token_id")?;
            for id in ids.map_or_else(Vec::new, Vec::from) {
                if !self.stop.contains(&id) {
                    self.stop.push(id);
                }
            }
        }
        let path = dir.join("chat_template.jinja");
        let template = match &settings {
            _ if path.exists() => {
                Some(std::fs::read_to_string(&path).map_err(Error::io("reading", &path))?)
            }
            Some(settings) => settings
                .get::<Templates>("chat_template")?
                .and_then(Templates::default_one),
            None => None,
        };
        if let Some(source) = template {
            let special = [self.bos, self.eos, self.pad].map(|id| self.text_of(id?));
            self.template = Some(ChatTemplate::new(source, special)?);
        }
        Ok(())
    }

    fn text_of(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(id.try_into().ok()?)
    }

    /// The ids of a text, with no special tokens added. Special tokens that the text spells out
    /// (`<|endoftext|>`) become their ids.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        self.encode_adding(text, false)
    }

    /// The ids of a text with the special tokens that the tokenizer adds around one, such as a
    /// BOS token.
    ///
    /// # Errors
    /// The tokenizer's own.
    pub fn encode_with_special_tokens(&self, text: &str) -> Result<Vec<i64>> {
        self.encode_adding(text, true)
    }

    fn encode_adding(&self, text: &str, special: bool) -> Result<Vec<i64>> {
        let encoding = self
            .inner
            .encode_fast(text, special)
            .map_err(|source| Error::Encode { source })?;
        Ok(encoding.get_ids().iter().map(|&id| i64::from(id)).collect())
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
        self.template.is_some()
    }

    /// A conversation as the text that the model was trained on. `add_generation_prompt` opens
    /// the assistant's next turn.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`], and what the template itself reports.
    pub fn apply_chat_template(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String> {
        match &self.template {
            Some(template) => template.render(messages, add_generation_prompt),
            None => Err(Error::NoChatTemplate),
        }
    }

    /// Writes the tokenizer's files as they were read.
    ///
    /// # Errors
    /// A folder or file that cannot be written.
    pub fn save(&self, dir: impl AsRef<Path>) -> Result<()> {
        let dir = dir.as_ref();
        std::fs::create_dir_all(dir).map_err(Error::io("creating", dir))?;
        self.files
            .iter()
            .try_for_each(|(name, bytes)| write_atomic(&dir.join(name), bytes))
    }
}

impl Detokenize for Tokenizer {
    fn detokenize(&self, ids: &[i64]) -> rlhf_core::Result<String> {
        Ok(self.decode(ids, true)?)
    }
}

/// A special token is a string, or an object with its properties.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum SpecialToken {
    Text(String),
    Token { content: String },
}

impl SpecialToken {
    fn text(self) -> String {
        match self {
            Self::Text(text) | Self::Token { content: text } => text,
        }
    }
}

/// A chat template is a string, or a list of named ones.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(serde::Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn default_one(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(all) => all
                .into_iter()
                .find(|t| t.name == "default")
                .map(|t| t.template),
        }
    }
}
