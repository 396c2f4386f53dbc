//! One turn of a conversation.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// One turn of a conversation: who speaks (`role`), what is said (`content`), and whatever else
/// the chat template reads (`tool_calls`, `name`, `reasoning_content`, …), as it was written.
///
/// ```
/// use rlhf_models::ChatMessage;
/// use serde_json::json;
///
/// let question = ChatMessage::new("user", "What is the weather in Paris?");
/// let call = ChatMessage::new("assistant", "").with(
///     "tool_calls",
///     json!([{"type": "function", "function": {"name": "weather", "arguments": {"in": "Paris"}}}]),
/// );
/// assert_eq!((question.role(), call.text()), ("user", Some("")));
/// ```
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Map<String, Value>", into = "Map<String, Value>")]
pub struct ChatMessage {
    fields: Map<String, Value>,
}

impl ChatMessage {
    /// A turn.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        let (role, content): (String, String) = (role.into(), content.into());
        let mut fields = Map::new();
        fields.insert("role".into(), role.into());
        fields.insert("content".into(), content.into());
        Self { fields }
    }

    /// With one more field, or another value in one.
    #[must_use]
    pub fn with(mut self, field: impl Into<String>, value: impl Into<Value>) -> Self {
        self.fields.insert(field.into(), value.into());
        self
    }

    /// Who speaks: `system`, `user`, `assistant`, `tool`.
    pub fn role(&self) -> &str {
        self.field_str("role").unwrap_or("")
    }

    /// What is said: the content, or the last text among its parts. `None` for a message without
    /// text, such as one that only calls a tool.
    pub fn text(&self) -> Option<&str> {
        match self.fields.get("content")? {
            Value::String(text) => Some(text),
            Value::Array(parts) => parts
                .iter()
                .rev()
                .find_map(|part| part.get("text")?.as_str()),
            _ => None,
        }
    }

    /// A field, as it was written.
    pub fn get(&self, field: &str) -> Option<&Value> {
        self.fields.get(field)
    }

    /// With its reasoning under the names that templates read, whichever it came under, as
    /// transformers does it.
    pub(super) fn with_reasoning_aliases(&self) -> Self {
        let mut message = self.clone();
        let reasoning = ["reasoning_content", "thinking", "reasoning"]
            .iter()
            .find_map(|name| self.get(name).filter(|value| !value.is_null()));
        if let Some(reasoning) = reasoning {
            let fields = &mut message.fields;
            fields
                .entry("thinking")
                .or_insert_with(|| reasoning.clone());
            fields.insert("reasoning_content".into(), reasoning.clone());
        }
        message
    }

    /// Appends a mark to [`text`](Self::text) and returns the text without it.
    pub(super) fn mark(&mut self, mark: &str) -> Option<String> {
        let text = match self.fields.get_mut("content")? {
            Value::String(text) => text,
            Value::Array(parts) => {
                parts
                    .iter_mut()
                    .rev()
                    .find_map(|part| match part.get_mut("text")? {
                        Value::String(text) => Some(text),
                        _ => None,
                    })?
            }
            _ => return None,
        };
        let said = text.clone();
        text.push_str(mark);
        Some(said)
    }

    fn field_str(&self, field: &str) -> Option<&str> {
        self.fields.get(field)?.as_str()
    }
}

impl TryFrom<Map<String, Value>> for ChatMessage {
    type Error = String;

    fn try_from(mut fields: Map<String, Value>) -> Result<Self, String> {
        // The names of another habit (`from`, `value`), as TRL takes them.
        for (old, new) in [("from", "role"), ("value", "content")] {
            if !fields.contains_key(new)
                && let Some(value) = fields.shift_remove(old)
            {
                fields.insert(new.into(), value);
            }
        }
        match fields.get("role") {
            Some(Value::String(_)) => Ok(Self { fields }),
            Some(other) => Err(format!("a message's `role` is {other}, not a string")),
            None => Err("a message without `role`".into()),
        }
    }
}

impl From<ChatMessage> for Map<String, Value> {
    fn from(message: ChatMessage) -> Self {
        message.fields
    }
}
