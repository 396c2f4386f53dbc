//! Conversations to text, by the Jinja template that comes with a model, as transformers renders
//! them.

mod growth;
mod limits;
mod message;
mod python;
mod tokens;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::SystemTime;

use minijinja::value::{Kwargs, Value};
use minijinja::{Environment, ErrorKind, State};
use serde::Serialize;
use serde_json::Map;

use crate::{Error, Result};
use limits::{Bounded, OUTPUT_LIMIT, SOURCE_LIMIT, fuel};
pub use message::ChatMessage;

/// How a rendered conversation ends.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum ChatEnd {
    /// As the last message ends: what a model is trained on.
    #[default]
    Closed,
    /// With the opening of the assistant's next turn (`add_generation_prompt`).
    GenerationPrompt,
    /// Within the last message, so that a model goes on with it (`continue_final_message`).
    OpenFinalMessage,
}

/// What a chat template is given besides the messages.
///
/// ```
/// use rlhf_models::{ChatEnd, ChatOptions};
/// use serde_json::json;
///
/// let options = ChatOptions {
///     end: ChatEnd::GenerationPrompt,
///     variables: [("enable_thinking".to_string(), json!(false))].into_iter().collect(),
///     ..ChatOptions::default()
/// };
/// ```
#[derive(Debug, Clone, Default)]
pub struct ChatOptions {
    /// How the text ends.
    pub end: ChatEnd,
    /// JSON schemas of functions that the model may call. Empty: the template sees `none`.
    pub tools: Vec<serde_json::Value>,
    /// Documents for answers that quote them. Empty: the template sees `none`.
    pub documents: Vec<serde_json::Value>,
    /// Which of several named templates; without a name, `tool_use` where there are tools and
    /// such a template, else `default`.
    pub template: Option<String>,
    /// More variables that the template may read, such as `enable_thinking`. They win over the
    /// tokenizer's own (`bos_token`, …).
    pub variables: Map<String, serde_json::Value>,
    /// What `strftime_now` takes for the present, shown in the local time zone. Without it, the
    /// clock: a template that writes the date then gives other text tomorrow.
    pub now: Option<SystemTime>,
}

impl ChatOptions {
    /// Options that differ from the default in how the text ends.
    pub fn ending(end: ChatEnd) -> Self {
        Self {
            end,
            ..Self::default()
        }
    }
}

/// Templates that have been parsed once.
#[derive(Clone)]
pub(crate) struct ChatTemplates {
    environment: Environment<'static>,
    names: Vec<String>,
    /// Special tokens by their names in `tokenizer_config.json`.
    special: Map<String, serde_json::Value>,
}

impl ChatTemplates {
    /// Parses templates, each with its name.
    pub(crate) fn new(
        sources: Vec<(String, String)>,
        special: Map<String, serde_json::Value>,
    ) -> Result<Self> {
        let mut environment = environment();
        let mut names = Vec::with_capacity(sources.len());
        for (name, source) in sources {
            if source.len() > SOURCE_LIMIT {
                return Err(Error::TemplateTooLong {
                    name,
                    bytes: source.len(),
                    limit: SOURCE_LIMIT,
                });
            }
            names.push(name.clone());
            let source = without_generation_tags(&source);
            growth::measured(&source)
                .and_then(|measured| environment.add_template_owned(name, measured))
                .map_err(|source| Error::ChatTemplate { source })?;
        }
        Ok(Self {
            environment,
            names,
            special,
        })
    }

    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    pub(crate) fn render(&self, messages: &[ChatMessage], options: &ChatOptions) -> Result<String> {
        let name = self.choose(options)?;
        let mut messages: Vec<ChatMessage> = messages
            .iter()
            .map(ChatMessage::with_reasoning_aliases)
            .collect();
        let open = options.end == ChatEnd::OpenFinalMessage;
        let said = match messages.last_mut() {
            Some(last) if open => Some(last.mark(END_MARK).ok_or(Error::FinalMessageNotRendered)?),
            _ if open => return Err(Error::FinalMessageNotRendered),
            _ => None,
        };
        let text = self
            .render_named(name, &messages, options)
            .map_err(|source| Error::ChatTemplate { source })?;
        match said {
            Some(said) => cut_at_mark(text, &said),
            None => Ok(text),
        }
    }

    /// transformers' rule for folders with several templates.
    fn choose<'a>(&'a self, options: &'a ChatOptions) -> Result<&'a str> {
        let known = |name: &str| self.names.iter().any(|n| n == name);
        let name = match &options.template {
            Some(name) => name.as_str(),
            None if !options.tools.is_empty() && known("tool_use") => "tool_use",
            None => "default",
        };
        if known(name) {
            return Ok(name);
        }
        Err(Error::NoSuchTemplate {
            name: name.into(),
            known: self.names.clone(),
        })
    }

    fn render_named(
        &self,
        name: &str,
        messages: &[ChatMessage],
        options: &ChatOptions,
    ) -> Result<String, minijinja::Error> {
        let mut variables = self.special.clone();
        let some = |list: &[serde_json::Value]| match list {
            [] => serde_json::Value::Null,
            list => list.to_vec().into(),
        };
        variables.insert("tools".into(), some(&options.tools));
        variables.insert("documents".into(), some(&options.documents));
        let prompt = options.end == ChatEnd::GenerationPrompt;
        variables.insert("add_generation_prompt".into(), prompt.into());
        variables.extend(options.variables.clone());

        // An environment of its own: fuel, clock and the count of bytes belong to one rendering.
        let mut environment = self.environment.clone();
        environment.set_fuel(Some(fuel(messages, options)));
        let context = Context {
            messages,
            variables: &variables,
        };
        let input = serde_json::to_vec(&context).map_or(0, |json| json.len());
        let items = messages.len() + options.tools.len() + options.documents.len();
        limits::Budget::new(input, items).install(&mut environment);
        let now = options.now;
        environment.add_function("strftime_now", move |format: String| {
            python::strftime(now.unwrap_or_else(SystemTime::now), &format)
        });
        let written = AtomicUsize::new(0);
        environment.set_formatter(move |out, _, value| {
            let text = python::str(value)?;
            // What a template captures in a variable does not pass the writer below, so that
            // it is counted here.
            let before = written.fetch_add(text.len(), Ordering::Relaxed);
            if before + text.len() > OUTPUT_LIMIT {
                return Err(limits::too_long());
            }
            out.write_str(&text).map_err(minijinja::Error::from)
        });
        let mut out = Bounded::default();
        environment
            .get_template(name)?
            .render_captured_to(context, &mut out)?;
        out.into_string()
    }
}

/// What a template sees.
#[derive(Serialize)]
struct Context<'a> {
    messages: &'a [ChatMessage],
    #[serde(flatten)]
    variables: &'a Map<String, serde_json::Value>,
}

/// Jinja as transformers sets it up.
fn environment() -> Environment<'static> {
    let mut environment = Environment::new();
    environment.set_trim_blocks(true);
    environment.set_lstrip_blocks(true);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_recursion_limit(limits::RECURSION_LIMIT);
    environment.set_unknown_method_callback(limits::method);
    limits::guard_filters(&mut environment);
    environment.add_function("raise_exception", |message: String| {
        Err::<String, _>(minijinja::Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_filter("tojson", |value: &Value, options: Kwargs| {
        python::to_json(value, &options)
    });
    environment.add_filter("string", |_: &State, value: &Value| {
        python::str(value).map(Value::from)
    });
    environment
}

/// `{% generation %}` marks what an assistant wrote; it changes nothing in the text. minijinja
/// has no such tag, so that it becomes a block that is always on, whitespace marks kept.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let (before, tag) = rest.split_at(at);
        out.push_str(before);
        let inner = &tag[2..];
        let mark = inner.len() - inner.trim_start_matches(['-', '+']).len();
        let body = inner[mark..].trim_start();
        let word = |w: &str| {
            let after = body.strip_prefix(w)?;
            let trimmed = after.trim_start();
            let closes = ["%}", "-%}", "+%}"].iter().any(|c| trimmed.starts_with(c));
            closes.then_some(after)
        };
        let replaced = word("generation")
            .map(|after| (" if true", after))
            .or_else(|| word("endgeneration").map(|after| (" endif", after)));
        out.push_str("{%");
        match replaced {
            Some((with, after)) => {
                out.push_str(&inner[..mark]);
                out.push_str(with);
                rest = after;
            }
            None => rest = inner,
        }
    }
    out.push_str(rest);
    out
}

/// Stands at the end of a message that is to stay open. Its space tells whether the template
/// trims what is said.
const END_MARK: &str = "THIS-IS-WHERE-THE-FINAL-MESSAGE-ENDS ";

/// The text up to the mark at the end of what the last message says, as transformers cuts it.
fn cut_at_mark(mut text: String, said: &str) -> Result<String> {
    let Some(at) = text.rfind(END_MARK.trim_end()) else {
        return Err(Error::FinalMessageNotRendered);
    };
    if !text.contains(said.trim()) {
        return Err(Error::FinalMessageNotRendered);
    }
    let trimmed = !text[at..].starts_with(END_MARK);
    text.truncate(at);
    if trimmed {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}
