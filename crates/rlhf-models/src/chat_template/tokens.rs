//! The tokens of a Jinja tag.

/// Most tokens of a tag. A chain of operators, filters or attributes is nested as deep as it is long for
/// those who read it after this.
const TOKEN_LIMIT: usize = 1000;

/// What a token is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    Name,
    Number,
    String,
    /// An operator or a bracket.
    Symbol,
}

/// Bytes `start..end` of a tag's inside.
#[derive(Debug, Clone, Copy)]
pub(super) struct Token {
    pub(super) kind: Kind,
    pub(super) start: usize,
    pub(super) end: usize,
}

/// The tokens of a tag, and the length of its inside with the signs that trim whitespace.
pub(super) struct Tokens {
    pub(super) tokens: Vec<Token>,
    pub(super) length: usize,
}

/// Reads what follows `{{` or `{%`, up to the end of the tag; `None` where it has none, or too many
/// tokens.
pub(super) fn tokens(text: &str) -> Option<Tokens> {
    let bytes = text.as_bytes();
    let mut tokens = Vec::new();
    let mut at = usize::from(text.starts_with(['-', '+']));
    let mut brackets = 0i32;
    loop {
        let rest = &text[at..];
        let first = rest.chars().next()?;
        if first.is_whitespace() {
            at += first.len_utf8();
            continue;
        }
        if brackets == 0 {
            let sign = usize::from(rest.starts_with(['-', '+']));
            if rest[sign..].starts_with("%}") || rest[sign..].starts_with("}}") {
                let length = at + sign;
                return Some(Tokens { tokens, length });
            }
        }
        let (kind, length) = match first {
            '"' | '\'' => (Kind::String, quoted(rest)?),
            c if c.is_ascii_digit() => (Kind::Number, number(rest, &tokens, bytes)),
            c if c.is_alphabetic() || c == '_' => {
                let word = |c: char| c.is_alphanumeric() || c == '_';
                (
                    Kind::Name,
                    rest.find(|c: char| !word(c)).unwrap_or(rest.len()),
                )
            }
            c => {
                brackets += match c {
                    '(' | '[' | '{' => 1,
                    ')' | ']' | '}' => -1,
                    _ => 0,
                };
                let two = ["**", "//", "==", "!=", "<=", ">="];
                let double = two.iter().any(|symbol| rest.starts_with(symbol));
                (Kind::Symbol, if double { 2 } else { c.len_utf8() })
            }
        };
        if tokens.len() == TOKEN_LIMIT {
            return None;
        }
        tokens.push(Token {
            kind,
            start: at,
            end: at + length,
        });
        at += length;
    }
}

/// The length of a string with its quotes.
fn quoted(text: &str) -> Option<usize> {
    let quote = text.as_bytes()[0];
    let mut escaped = false;
    for (at, &byte) in text.as_bytes().iter().enumerate().skip(1) {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            byte if byte == quote => return Some(at + 1),
            _ => {}
        }
    }
    None
}

/// The length of a number. After a dot it is an index, which has no fraction.
fn number(text: &str, before: &[Token], bytes: &[u8]) -> usize {
    let digits = |text: &str| {
        let other = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        text.find(other).unwrap_or(text.len())
    };
    let whole = digits(text);
    let index = before
        .last()
        .is_some_and(|token| bytes[token.start] == b'.');
    match text[whole..].strip_prefix('.') {
        Some(fraction) if !index && fraction.starts_with(|c: char| c.is_ascii_digit()) => {
            whole + 1 + digits(fraction)
        }
        _ => whole,
    }
}
