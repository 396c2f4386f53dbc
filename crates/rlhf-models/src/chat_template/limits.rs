//! What a template may use up. It comes with a downloaded model and is a program.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use minijinja::value::{Rest, Value, ValueKind};
use minijinja::{Environment, Error, ErrorKind, State, filters};

use super::{ChatMessage, ChatOptions};

/// Longest template, in bytes. The longest in use have some 20,000.
pub(super) const SOURCE_LIMIT: usize = 1 << 20;
/// Longest text that a template may write, in bytes.
pub(super) const OUTPUT_LIMIT: usize = 64 << 20;
/// How deep macros and loops may call themselves.
pub(super) const RECURSION_LIMIT: usize = 100;

/// Number of instructions that a template may run: enough for any that reads each message a few
/// times (one in use takes 50 to 300 for a message), and over within a second.
pub(super) fn fuel(messages: &[ChatMessage], options: &ChatOptions) -> u64 {
    let items = messages.len() + options.tools.len() + options.documents.len();
    200_000 + 5_000 * items as u64
}

pub(super) fn too_long() -> Error {
    Error::new(
        ErrorKind::InvalidOperation,
        format!("the template writes more than {OUTPUT_LIMIT} bytes"),
    )
}

/// Text that may not grow past [`OUTPUT_LIMIT`].
#[derive(Default)]
pub(super) struct Bounded(Vec<u8>);

impl Bounded {
    pub(super) fn into_string(self) -> Result<String, Error> {
        String::from_utf8(self.0).map_err(|error| {
            Error::new(ErrorKind::BadSerialization, "the text is not UTF-8").with_source(error)
        })
    }
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > OUTPUT_LIMIT {
            return Err(io::Error::other(too_long()));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that an element of a list counts for.
const ELEMENT: usize = 32;

/// What the values of one rendering may take.
pub(super) struct Budget {
    /// Bytes of one value.
    value: usize,
    /// Bytes that all measured values may have yet, those included that are gone.
    left: AtomicUsize,
}

impl Budget {
    /// For a template that sees `input` bytes in `items` messages and the like. No value need be much
    /// larger than the whole conversation, nor be made anew more than a few times for each message.
    pub(super) fn new(input: usize, items: usize) -> Self {
        let value = SOURCE_LIMIT + 4 * input;
        let left = AtomicUsize::new(value.saturating_mul(64 + items));
        Self { value, left }
    }

    /// Gives an environment the functions that [`measured`](super::growth::measured) calls.
    pub(super) fn install(self, environment: &mut Environment) {
        let budget = Arc::new(self);
        let grown = Arc::clone(&budget);
        environment.add_function("__grown", move |value: Value| {
            if !is_namespace(&value) {
                grown.measure(&value, 0, &mut 0)?;
            }
            Ok::<_, Error>(value)
        });
        let part = Arc::clone(&budget);
        environment.add_function("__part", move |value: Value| {
            part.measure(&value, 0, &mut 0)?;
            Ok::<_, Error>(value)
        });
        environment.add_function("__plain", |value: Value| match is_namespace(&value) {
            true => Err(refused("a namespace is given to a filter")),
            false => Ok(value),
        });
        environment.add_function("__text", move |bytes: usize| {
            budget.charge(bytes)?;
            Ok::<_, Error>("")
        });
    }

    fn charge(&self, bytes: usize) -> Result<(), Error> {
        let take = |left: usize| left.checked_sub(bytes);
        match self
            .left
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, take)
        {
            Ok(_) => Ok(()),
            Err(_) => Err(refused("the template makes too many large values")),
        }
    }

    /// Adds what a value takes to `total`. What lists share is counted wherever it is met, since
    /// that is what writing it takes.
    fn measure(&self, value: &Value, depth: usize, total: &mut usize) -> Result<(), Error> {
        if depth > RECURSION_LIMIT {
            return Err(refused("a value is nested too deep"));
        }
        let text = value.as_str().map_or(0, str::len);
        *total += ELEMENT + text;
        if *total > self.value {
            let limit = self.value;
            return Err(refused(format!("a value of more than {limit} bytes")));
        }
        // The text of elements was charged when it was made.
        self.charge(ELEMENT + if depth == 0 { text } else { 0 })?;
        match value.kind() {
            ValueKind::Map if is_namespace(value) => {
                // It can change after it was measured.
                return Err(refused("a namespace within another value"));
            }
            ValueKind::Map => {
                for key in value.try_iter()? {
                    self.measure(&key, depth + 1, total)?;
                    self.measure(&value.get_item(&key)?, depth + 1, total)?;
                }
            }
            ValueKind::Seq | ValueKind::Iterable => {
                for item in value.try_iter()? {
                    self.measure(&item, depth + 1, total)?;
                }
            }
            _ => {}
        }
        Ok(())
    }
}

fn is_namespace(value: &Value) -> bool {
    let object = value.as_object();
    object.is_some_and(|object| object.type_name().ends_with("Namespace"))
}

fn refused(what: impl Into<std::borrow::Cow<'static, str>>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what)
}

/// Puts filters that can make much of little behind a look at what they are given.
pub(super) fn guard_filters(environment: &mut Environment) {
    let guarded: [(&'static str, Value); 6] = [
        ("join", Value::from_function(filters::join)),
        ("replace", Value::from_function(filters::replace)),
        ("indent", Value::from_function(filters::indent)),
        ("batch", Value::from_function(filters::batch)),
        ("slice", Value::from_function(filters::slice)),
        ("format", Value::from_function(filters::format)),
    ];
    for (name, filter) in guarded {
        environment.add_filter(name, move |state: &State, arguments: Rest<Value>| {
            check_product(name, &arguments)?;
            filter.call(state, &arguments)
        });
    }
}

/// A method of Python's values, after the same look.
pub(super) fn method(
    state: &State,
    value: &Value,
    name: &str,
    arguments: &[Value],
) -> Result<Value, Error> {
    let mut all: Vec<Value> = std::iter::once(value).chain(arguments).cloned().collect();
    if name == "join" && all.len() > 1 {
        // The separator has the method, the filter's input are the items.
        all.swap(0, 1);
    }
    check_product(name, &all)?;
    minijinja_contrib::pycompat::unknown_method_callback(state, value, name, arguments)
}

/// Fails where a result would be larger than any text may be.
fn check_product(name: &str, arguments: &[Value]) -> Result<(), Error> {
    let text = |place: usize| arguments.get(place).and_then(Value::as_str).unwrap_or("");
    let input = text(0);
    let bytes = match name {
        "join" => {
            let items = arguments.first().and_then(Value::len).unwrap_or(0);
            items.saturating_mul(text(1).len())
        }
        "replace" => {
            let places = match text(1) {
                "" => input.len() + 1,
                from => input.matches(from).count(),
            };
            places.saturating_mul(text(2).len())
        }
        "indent" => (input.lines().count() + 1).saturating_mul(largest(arguments)),
        "batch" | "slice" => largest(arguments).saturating_mul(ELEMENT),
        // A width or a precision is a run of digits.
        "format" => {
            let runs = input.split(|c: char| !c.is_ascii_digit());
            let widest = runs.filter(|digits| !digits.is_empty());
            let widest = widest
                .map(|digits| digits.parse().unwrap_or(usize::MAX))
                .max();
            let widest = widest.unwrap_or(0);
            input.matches(['%', '{']).count().saturating_mul(widest)
        }
        _ => 0,
    };
    match bytes <= OUTPUT_LIMIT {
        true => Ok(()),
        false => Err(too_long()),
    }
}

/// The largest integer among arguments, named ones included.
fn largest(arguments: &[Value]) -> usize {
    let named = arguments.iter().filter(|value| value.is_kwargs());
    let named = named.flat_map(|map| {
        let keys = map.try_iter().into_iter().flatten();
        keys.filter_map(|key| map.get_item(&key).ok())
            .collect::<Vec<_>>()
    });
    let all = arguments.iter().skip(1).cloned().chain(named);
    all.filter_map(|value| value.as_usize()).max().unwrap_or(0)
}
