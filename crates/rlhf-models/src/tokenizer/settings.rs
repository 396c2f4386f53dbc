//! What stands beside `tokenizer.json`: special tokens, where they go, chat templates.

use std::path::Path;

use serde_json::{Map, Value};

use tokenizers::AddedToken;
use tokenizers::processors::template::TemplateProcessing;

use super::Tokenizer;
use super::files::{TEMPLATE, TEMPLATE_FOLDER};
use crate::chat_template::ChatTemplates;
use crate::config::{Fields, OneOrMany};
use crate::{Error, Result};

/// The special tokens that transformers knows by name, and templates may use.
const SPECIAL: [&str; 7] = [
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
];

impl Tokenizer {
    /// Special tokens by name, from the first file that knows them; old folders have them in
    /// `special_tokens_map.json`, or as ids in the model's config only.
    pub(super) fn read_settings(&mut self, dir: &Path) -> Result<()> {
        let read = |name: &str| -> Result<Option<Fields>> {
            let path = dir.join(name);
            path.exists().then(|| Fields::read(&path)).transpose()
        };
        let settings = read("tokenizer_config.json")?;
        let map = read("special_tokens_map.json")?;
        let model = read("config.json")?;
        let text = |token: &str| -> Result<Option<String>> {
            for fields in [&settings, &map].into_iter().flatten() {
                let text = fields.get::<SpecialToken>(token)?.map(SpecialToken::text);
                if let Some(text) = text.filter(|text| self.inner.token_to_id(text).is_some()) {
                    return Ok(Some(text));
                }
            }
            let ids = match &model {
                Some(model) => model.get::<OneOrMany>(&format!("{token}_id"))?,
                None => None,
            };
            let ids = ids.map_or_else(Vec::new, Vec::from);
            Ok(ids.into_iter().find_map(|id| self.id_to_token(id)))
        };
        let mut special = Map::new();
        for token in SPECIAL {
            if let Some(text) = text(token)? {
                special.insert(token.into(), text.into());
            }
        }
        // Such a token is never split, even where `tokenizer.json` does not say so.
        let tokens = special.values().filter_map(|text| text.as_str());
        let tokens: Vec<_> = tokens.map(|text| AddedToken::from(text, true)).collect();
        self.inner.add_special_tokens(&tokens);
        let id = |token: &str| self.token_to_id(special.get(token)?.as_str()?);
        [self.bos, self.eos, self.pad] = [id("bos_token"), id("eos_token"), id("pad_token")];
        self.stop.extend(self.eos);
        if let Some(settings) = &settings {
            self.place_bos_and_eos(settings, dir)?;
        }
        if let Some(generation) = read("generation_config.json")? {
            let ids: Option<OneOrMany> = generation.get("eos_token_id")?;
            for id in ids.map_or_else(Vec::new, Vec::from) {
                if !self.stop.contains(&id) {
                    self.stop.push(id);
                }
            }
        }
        let sources = self.template_sources(dir, settings.as_ref())?;
        if !sources.is_empty() {
            self.templates = Some(ChatTemplates::new(sources, special)?);
        }
        Ok(())
    }

    /// `add_bos_token` and `add_eos_token`, where `tokenizer_config.json` has one of them, replace
    /// what `tokenizer.json` puts around a text, as in transformers 5.
    fn place_bos_and_eos(&mut self, settings: &Fields, dir: &Path) -> Result<()> {
        let [bos, eos] = ["add_bos_token", "add_eos_token"].map(|name| settings.get::<bool>(name));
        let (bos, eos) = (bos?, eos?);
        if bos.is_none() && eos.is_none() {
            return Ok(());
        }
        let token = |wanted: Option<bool>, id: Option<i64>| match wanted {
            Some(true) => self
                .id_to_token(id?)
                .zip(id.and_then(|id| id.try_into().ok())),
            _ => None,
        };
        let (bos, eos) = (token(bos, self.bos), token(eos, self.eos));
        let pieces = |text: &str, kind: usize| {
            let around = |token: &Option<(String, u32)>| {
                token.as_ref().map(|(token, _)| format!("{token}:{kind}"))
            };
            [around(&bos), Some(format!("{text}:{kind}")), around(&eos)]
                .into_iter()
                .flatten()
                .collect::<Vec<String>>()
        };
        let wrap = |error: String| Error::Tokenizer {
            path: dir.join("tokenizer_config.json"),
            source: error.into(),
        };
        let processor = TemplateProcessing::builder()
            .try_single(pieces("$A", 0))
            .map_err(wrap)?
            .try_pair([pieces("$A", 0), pieces("$B", 1)].concat())
            .map_err(wrap)?
            .special_tokens(bos.iter().chain(&eos).cloned().collect::<Vec<_>>())
            .build()
            .map_err(|error| wrap(error.to_string()))?;
        self.inner.with_post_processor(Some(processor));
        Ok(())
    }

    /// Chat templates by name. Files win over `tokenizer_config.json`, as in transformers.
    fn template_sources(
        &self,
        dir: &Path,
        settings: Option<&Fields>,
    ) -> Result<Vec<(String, String)>> {
        let mut sources = Vec::new();
        for (file, bytes) in &self.files {
            let name = match file.strip_prefix(TEMPLATE_FOLDER) {
                Some(rest) => rest.trim_start_matches('/').trim_end_matches(".jinja"),
                None if file == TEMPLATE => "default",
                None => continue,
            };
            let source = String::from_utf8(bytes.clone()).map_err(|error| {
                let source = std::io::Error::new(std::io::ErrorKind::InvalidData, error);
                Error::io("reading", dir.join(file))(source)
            })?;
            sources.push((name.to_string(), source));
        }
        if sources.is_empty()
            && let Some(settings) = settings
            && let Some(templates) = settings.get::<Templates>("chat_template")?
        {
            sources = templates.by_name();
        }
        Ok(sources)
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

/// Chat templates are a string, a list of named ones, or an object of them.
#[derive(serde::Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
    ByName(Map<String, Value>),
}

#[derive(serde::Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

impl Templates {
    fn by_name(self) -> Vec<(String, String)> {
        match self {
            Self::One(template) => vec![("default".into(), template)],
            Self::Named(all) => all.into_iter().map(|t| (t.name, t.template)).collect(),
            Self::ByName(all) => all
                .into_iter()
                .filter_map(|(name, template)| Some((name, template.as_str()?.to_string())))
                .collect(),
        }
    }
}
