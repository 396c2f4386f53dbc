//! Values as Python writes them: `str`, `repr`, `json.dumps`, `strftime`.

use std::borrow::Cow;
use std::fmt::Write;
use std::time::SystemTime;

use chrono::{DateTime, Local};
use minijinja::value::{Kwargs, Value, ValueKind};
use minijinja::{Error, ErrorKind};

use super::limits::{OUTPUT_LIMIT, too_long};

/// How deep a value may be nested.
const DEPTH_LIMIT: usize = 128;

/// `str(value)`.
pub(super) fn str(value: &Value) -> Result<Cow<'_, str>, Error> {
    if let Some(text) = value.as_str() {
        return Ok(Cow::Borrowed(text));
    }
    let mut out = String::new();
    write_repr(&mut out, value, 0)?;
    Ok(Cow::Owned(out))
}

/// `repr(value)`; what is undefined is written as nothing, as Jinja does.
fn write_repr(out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
    check_size(out, depth)?;
    match value.kind() {
        ValueKind::Undefined => {}
        ValueKind::None => out.push_str("None"),
        ValueKind::Bool => out.push_str(if value.is_true() { "True" } else { "False" }),
        ValueKind::Number => write_number(out, value)?,
        ValueKind::String => write_quoted(out, value.as_str().unwrap_or("")),
        ValueKind::Map => {
            out.push('{');
            for (i, key) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &key, depth + 1)?;
                out.push_str(": ");
                write_repr(out, &value.get_item(&key)?, depth + 1)?;
            }
            out.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            out.push('[');
            for (i, item) in value.try_iter()?.enumerate() {
                out.push_str(if i > 0 { ", " } else { "" });
                write_repr(out, &item, depth + 1)?;
            }
            out.push(']');
        }
        _ => write!(out, "{value}").map_err(Error::from)?,
    }
    Ok(())
}

/// Fails for what is nested too deep, or has written too much already: lists that hold one list
/// twice, and so on, are small and write without end.
fn check_size(out: &str, depth: usize) -> Result<(), Error> {
    if out.len() > OUTPUT_LIMIT {
        return Err(too_long());
    }
    match depth < DEPTH_LIMIT {
        true => Ok(()),
        false => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("a value is nested more than {DEPTH_LIMIT} deep"),
        )),
    }
}

/// Integers as they are; floats as the shortest digits that read back the same, with an exponent
/// outside of 1e-4 to 1e16.
fn write_number(out: &mut String, value: &Value) -> Result<(), Error> {
    if value.is_integer() {
        return write!(out, "{value}").map_err(Error::from);
    }
    let x = f64::try_from(value.clone())?;
    if x.is_nan() {
        out.push_str("nan");
    } else if x.is_infinite() {
        out.push_str(if x > 0.0 { "inf" } else { "-inf" });
    } else if x != 0.0 && !(1e-4..1e16).contains(&x.abs()) {
        let text = format!("{x:e}");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
        let exponent: i32 = exponent.parse().unwrap_or(0);
        let sign = if exponent < 0 { '-' } else { '+' };
        write!(out, "{digits}e{sign}{:02}", exponent.abs()).map_err(Error::from)?;
    } else {
        write!(out, "{x:?}").map_err(Error::from)?;
    }
    Ok(())
}

fn write_quoted(out: &mut String, text: &str) {
    let quote = match text.contains('\'') && !text.contains('"') {
        true => '"',
        false => '\'',
    };
    out.push(quote);
    for c in text.chars() {
        match c {
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            '\\' => out.push_str("\\\\"),
            c if c == quote => out.extend(['\\', c]),
            c if c.is_control() => out.push_str(&format!("\\x{:02x}", u32::from(c))),
            c => out.push(c),
        }
    }
    out.push(quote);
}

/// transformers' `tojson`: `json.dumps` with `ensure_ascii=False`, and no HTML escapes.
pub(super) fn to_json(value: &Value, options: &Kwargs) -> Result<String, Error> {
    let indent: Option<usize> = options.get("indent")?;
    let separators: Option<(String, String)> = match options.get::<Option<Value>>("separators")? {
        Some(pair) if !pair.is_none() => Some((
            str(&pair.get_item_by_index(0)?)?.into_owned(),
            str(&pair.get_item_by_index(1)?)?.into_owned(),
        )),
        _ => None,
    };
    let (item, key) = separators.unwrap_or_else(|| match indent {
        Some(_) => (",".into(), ": ".into()),
        None => (", ".into(), ": ".into()),
    });
    let dumps = Dumps {
        indent: indent.map(|n| n.min(64)),
        item,
        key,
        ascii: options
            .get::<Option<bool>>("ensure_ascii")?
            .unwrap_or(false),
        sort: options.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
    };
    options.assert_all_used()?;
    let mut out = String::new();
    dumps.write(&mut out, value, 0)?;
    Ok(out)
}

/// The arguments of `json.dumps`.
struct Dumps {
    indent: Option<usize>,
    item: String,
    key: String,
    ascii: bool,
    sort: bool,
}

impl Dumps {
    fn write(&self, out: &mut String, value: &Value, depth: usize) -> Result<(), Error> {
        check_size(out, depth)?;
        match value.kind() {
            ValueKind::None => out.push_str("null"),
            ValueKind::Bool => out.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => {
                let at = out.len();
                write_number(out, value)?;
                let name = match &out[at..] {
                    "nan" => "NaN",
                    "inf" => "Infinity",
                    "-inf" => "-Infinity",
                    _ => return Ok(()),
                };
                out.truncate(at);
                out.push_str(name);
            }
            ValueKind::String => self.write_text(out, value.as_str().unwrap_or("")),
            ValueKind::Map => {
                let mut keys: Vec<Value> = value.try_iter()?.collect();
                if self.sort {
                    keys.sort();
                }
                self.write_items(out, ('{', '}'), keys, depth, |out, key| {
                    self.write_text(out, &str(&key)?);
                    out.push_str(&self.key);
                    self.write(out, &value.get_item(&key)?, depth + 1)
                })?;
            }
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.collect();
                self.write_items(out, ('[', ']'), items, depth, |out, item| {
                    self.write(out, &item, depth + 1)
                })?;
            }
            kind => {
                let message = format!("a value of kind {kind} has no JSON");
                return Err(Error::new(ErrorKind::BadSerialization, message));
            }
        }
        Ok(())
    }

    fn write_items(
        &self,
        out: &mut String,
        (open, close): (char, char),
        items: Vec<Value>,
        depth: usize,
        mut write: impl FnMut(&mut String, Value) -> Result<(), Error>,
    ) -> Result<(), Error> {
        out.push(open);
        let any = !items.is_empty();
        for (i, item) in items.into_iter().enumerate() {
            out.push_str(if i > 0 { &self.item } else { "" });
            self.new_line(out, depth + 1);
            write(out, item)?;
        }
        if any {
            self.new_line(out, depth);
        }
        out.push(close);
        Ok(())
    }

    fn new_line(&self, out: &mut String, depth: usize) {
        if let Some(indent) = self.indent {
            out.push('\n');
            out.extend(std::iter::repeat_n(' ', indent * depth));
        }
    }

    fn write_text(&self, out: &mut String, text: &str) {
        out.push('"');
        for c in text.chars() {
            match c {
                '"' => out.push_str("\\\""),
                '\\' => out.push_str("\\\\"),
                '\n' => out.push_str("\\n"),
                '\r' => out.push_str("\\r"),
                '\t' => out.push_str("\\t"),
                '\u{8}' => out.push_str("\\b"),
                '\u{c}' => out.push_str("\\f"),
                c if c < ' ' || (self.ascii && c > '~') => {
                    for unit in c.encode_utf16(&mut [0; 2]) {
                        out.push_str(&format!("\\u{unit:04x}"));
                    }
                }
                c => out.push(c),
            }
        }
        out.push('"');
    }
}

/// `datetime.strftime`, in the local time zone.
pub(super) fn strftime(now: SystemTime, format: &str) -> Result<String, Error> {
    let now = DateTime::<Local>::from(now);
    let mut out = String::new();
    write!(out, "{}", now.format(format)).map_err(|_| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now: {format:?} is not a format of dates"),
        )
    })?;
    Ok(out)
}
