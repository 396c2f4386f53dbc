//! Templates that may not grow what they hold without bounds.
//!
//! A template is a program that comes with a downloaded model, and `{% set x = x ~ x %}` forty times
//! over asks for a terabyte. minijinja bounds the steps of a program but not the size of its values,
//! so every expression that makes a larger value than it was given is put into a call of a function
//! that measures the result: `a ~ b` becomes `__grown(__part(a) ~ __part(b))`.

use minijinja::{Error, ErrorKind};

use super::tokens::tokens;
use parser::rewritten;

mod parser;

/// Raw text longer than this is charged for when it is written, since a variable may capture it.
const LONG_TEXT: usize = 256;
/// Most branches of all conditions, of which each is nested in the one before.
const BRANCH_LIMIT: usize = 500;

/// The template with its measurements.
///
/// # Errors
/// A tag that is not read here, with its text.
pub(super) fn measured(source: &str) -> Result<String, Error> {
    let mut out = String::with_capacity(source.len() * 2);
    let (mut rest, mut branches) = (source, 0);
    loop {
        let opens = |pair: &[u8]| pair[0] == b'{' && b"{%#".contains(&pair[1]);
        let Some(at) = rest.as_bytes().windows(2).position(opens) else {
            write_text(&mut out, rest);
            return Ok(out);
        };
        let (text, tag) = rest.split_at(at);
        write_text(&mut out, text);
        let length = match &tag[..2] {
            "{#" => tag.find("#}").map_or(tag.len(), |end| end + 2),
            "{%" if is_raw(tag) => raw_block(tag)?,
            opening => {
                let found = tokens(&tag[2..]).ok_or_else(|| unread(tag))?;
                let inner = &tag[2..2 + found.length];
                let keyword = found.tokens.first();
                branches += usize::from(keyword.is_some_and(|t| &inner[t.start..t.end] == "elif"));
                if branches > BRANCH_LIMIT {
                    return Err(unread(tag));
                }
                out.push_str(opening);
                let expression = opening == "{{";
                let inside = rewritten(inner, &found.tokens, expression);
                out.push_str(&inside.ok_or_else(|| unread(inner))?);
                let length = 2 + found.length;
                out.push_str(&tag[length..length + 2]);
                rest = &tag[length + 2..];
                continue;
            }
        };
        out.push_str(&tag[..length]);
        rest = &tag[length..];
    }
}

fn write_text(out: &mut String, text: &str) {
    let inner = text.trim_start();
    if text.len() > LONG_TEXT && !inner.is_empty() {
        // Within the text, where no tag takes whitespace away.
        let (space, inner) = text.split_at(text.len() - inner.len());
        out.push_str(space);
        out.push_str(&format!("{{{{ __text({}) }}}}", text.len()));
        out.push_str(inner);
    } else {
        out.push_str(text);
    }
}

fn is_raw(tag: &str) -> bool {
    let word = tag[2..].trim_start_matches(['-', '+']).trim_start();
    word.strip_prefix("raw")
        .is_some_and(|after| !after.starts_with(|c: char| c.is_alphanumeric() || c == '_'))
}

/// The length of a raw block, whose text is what it is.
fn raw_block(tag: &str) -> Result<usize, Error> {
    let end = tag.find("endraw").ok_or_else(|| unread(tag))?;
    let close = tag[end..].find("%}").ok_or_else(|| unread(tag))?;
    match end + close + 2 {
        length if length <= 16 * LONG_TEXT => Ok(length),
        _ => Err(unread(tag)),
    }
}

fn unread(tag: &str) -> Error {
    let text: String = tag.chars().take(80).collect();
    Error::new(
        ErrorKind::SyntaxError,
        format!("a tag that chat templates may not have: {text}"),
    )
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn what_grows_is_measured() {
        for (source, expected) in [
            ("{{ x }}", "{{ x }}"),
            ("{{ a ~ b }}", "{{ __grown(__part(a) ~ __part(b)) }}"),
            (
                "{% set x = a + b - 1 %}",
                "{% set x = __grown(a + b - 1) %}",
            ),
            ("{%- if a.b(c)[1:] %}", "{%- if __grown(a.b(c))[1:] %}"),
            ("{{ a|join(', ') }}", "{{ __grown(__plain(a)|join(', ')) }}"),
            ("{% set x = a, b %}", "{% set x = __grown((a, b)) %}"),
            ("{{ loop(x) }}", "{{ loop(x) }}"),
            ("{% do f(x) %}", "{% do f(x) %}"),
            (
                "{{ '}} ~' }}{# {{ a ~ b }} #}",
                "{{ '}} ~' }}{# {{ a ~ b }} #}",
            ),
            (
                "{% raw %}{{ a ~ b }}{% endraw %}",
                "{% raw %}{{ a ~ b }}{% endraw %}",
            ),
            (
                "{% for x in [a, b] if x is not none %}",
                "{% for x in __grown([a, b]) if x is not none %}",
            ),
        ] {
            assert_eq!(measured(source).unwrap(), expected);
        }
    }

    #[test]
    fn what_is_no_expression_is_refused() {
        for source in ["{{ a ~ }}", "{% if ) %}", "{{ a b }}", "{{ a"] {
            assert!(measured(source).is_err(), "{source}");
        }
        let deep = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
        assert!(measured(&deep).is_err());
    }
}
