//! Conversations to text, by the Jinja template that comes with a model.

use minijinja::{Environment, ErrorKind, context};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// One turn of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChatMessage {
    /// Who speaks: `system`, `user` or `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl ChatMessage {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Self {
            role: role.into(),
            content: content.into(),
        }
    }
}

/// A template that has been parsed once.
#[derive(Clone)]
pub(crate) struct ChatTemplate {
    environment: Environment<'static>,
    special: [Option<String>; 3],
}

impl ChatTemplate {
    /// Parses a template; `special` are the BOS, EOS and padding tokens that it may name.
    pub(crate) fn new(source: String, special: [Option<String>; 3]) -> Result<Self> {
        let mut environment = Environment::new();
        // As transformers sets up Jinja.
        environment.set_trim_blocks(true);
        environment.set_lstrip_blocks(true);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |message: String| {
            Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
        });
        environment
            .add_template_owned("chat", source)
            .map_err(|source| Error::ChatTemplate { source })?;
        Ok(Self {
            environment,
            special,
        })
    }

    pub(crate) fn render(
        &self,
        messages: &[ChatMessage],
        add_generation_prompt: bool,
    ) -> Result<String> {
        let [bos_token, eos_token, pad_token] = &self.special;
        self.environment
            .get_template("chat")
            .and_then(|template| {
                template.render(context! {
                    messages,
                    add_generation_prompt,
                    bos_token,
                    eos_token,
                    pad_token,
                })
            })
            .map_err(|source| Error::ChatTemplate { source })
    }
}
