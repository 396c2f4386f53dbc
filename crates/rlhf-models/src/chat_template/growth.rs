//! Templates that may not grow what they hold without bounds.
//!
//! A template is a program that comes with a downloaded model, and `{% set x = x ~ x %}` forty times
//! over asks for a terabyte. minijinja bounds the steps of a program but not the size of its values,
//! so every expression that makes a larger value than it was given is put into a call of a function
//! that measures the result: `a ~ b` becomes `__grown(__part(a) ~ __part(b))`.

use minijinja::{Error, ErrorKind};

use super::tokens::{Kind, Token, tokens};

/// Raw text longer than this is charged for when it is written, since a variable may capture it.
const LONG_TEXT: usize = 256;
/// Most branches of all conditions, of which each is nested in the one before.
const BRANCH_LIMIT: usize = 500;
/// How deep expressions may be nested.
const DEPTH_LIMIT: usize = 60;
/// Operators of one chain between measurements: as many nested calls fewer.
const CHAIN: usize = 8;
/// Calls of what [`limits`](super::limits) measures with.
const GROWN: (&str, &str) = ("__grown(", ")");
const PART: (&str, &str) = ("__part(", ")");
const PLAIN: (&str, &str) = ("__plain(", ")");
/// Functions whose calls minijinja treats in a way of its own.
const SPECIAL: [&str; 3] = ["super", "loop", "caller"];

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
                out.push_str(&rewritten(inner, &found.tokens, opening == "{{")?);
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

/// The inside of a tag.
fn rewritten(inner: &str, tokens: &[Token], expression: bool) -> Result<String, Error> {
    let mut parser = Parser {
        source: inner,
        tokens,
        at: 0,
        depth: 0,
        insertions: Vec::new(),
    };
    let read = match expression {
        true => parser.expression(),
        false => parser.statement(),
    };
    if read.is_none() || parser.at < tokens.len() {
        return Err(unread(inner));
    }
    let mut insertions = parser.insertions;
    insertions.sort_unstable_by_key(|insertion| (insertion.place, insertion.order));
    let (mut out, mut done) = (String::new(), 0);
    for Insertion { place, text, .. } in insertions {
        out.push_str(&inner[done..place]);
        out.push_str(text);
        done = place;
    }
    out.push_str(&inner[done..]);
    Ok(out)
}

/// Reads expressions by Jinja's grammar, as far as it must know where they begin and end. `None`:
/// not an expression.
struct Parser<'a> {
    source: &'a str,
    tokens: &'a [Token],
    at: usize,
    depth: usize,
    insertions: Vec<Insertion>,
}

struct Insertion {
    place: usize,
    /// Of those at one place: what is put in later is outside of what was put in earlier.
    order: isize,
    text: &'static str,
}

impl<'a> Parser<'a> {
    fn text(&self, at: usize) -> &'a str {
        let token = self.tokens.get(at);
        token.map_or("", |token| &self.source[token.start..token.end])
    }

    fn is(&self, text: &str) -> bool {
        let string = self.tokens.get(self.at).map(|token| token.kind) == Some(Kind::String);
        !string && self.text(self.at) == text
    }

    fn takes(&mut self, text: &str) -> bool {
        let is = self.is(text);
        self.at += usize::from(is);
        is
    }

    fn needs(&mut self, text: &str) -> Option<()> {
        self.takes(text).then_some(())
    }

    fn name(&mut self) -> Option<&'a str> {
        let token = self.tokens.get(self.at)?;
        (token.kind == Kind::Name).then(|| {
            self.at += 1;
            self.text(self.at - 1)
        })
    }

    /// Puts what was read since the token `first` into a call, or into brackets.
    fn wrap(&mut self, first: usize, (open, close): (&'static str, &'static str)) {
        let (start, end) = (self.tokens[first].start, self.tokens[self.at - 1].end);
        let count = self.insertions.len() as isize;
        let mut insert = |place, order, text| {
            self.insertions.push(Insertion { place, order, text });
        };
        insert(start, -count, open);
        insert(end, count, close);
    }

    fn statement(&mut self) -> Option<()> {
        match self.name()? {
            "if" | "elif" => self.expression(),
            "set" => self.set(),
            "for" => {
                while !self.takes("in") {
                    self.tokens.get(self.at)?;
                    self.at += 1;
                }
                // Without a conditional: what follows `if` chooses the items.
                self.logical()?;
                while self.takes(",") {
                    self.logical()?;
                }
                if self.takes("if") {
                    self.expression()?;
                }
                self.takes("recursive");
                Some(())
            }
            "macro" => {
                self.name()?;
                self.needs("(")?;
                self.assignments(")")?;
                self.needs(")")
            }
            "with" => self.assignments(""),
            "do" => self.call(),
            "call" => {
                if self.takes("(") {
                    self.assignments(")")?;
                    self.needs(")")?;
                }
                self.call()
            }
            // Nothing that grows, or nothing that a variable keeps.
            _ => {
                self.at = self.tokens.len();
                Some(())
            }
        }
    }

    /// A call that must stay one.
    fn call(&mut self) -> Option<()> {
        let first = self.at;
        self.expression()?;
        let (start, end) = (self.tokens[first].start, self.tokens[self.at - 1].end);
        if let [.., open, close] = self.insertions.as_slice()
            && (open.place, close.place) == (start, end)
        {
            self.insertions.truncate(self.insertions.len() - 2);
        }
        Some(())
    }

    /// `a = 1, b, c = 2`, as macros and `with` have them.
    fn assignments(&mut self, end: &str) -> Option<()> {
        while self.at < self.tokens.len() && (end.is_empty() || !self.is(end)) {
            match self.takes("=") {
                true => self.expression()?,
                false => self.at += 1,
            }
        }
        Some(())
    }

    fn set(&mut self) -> Option<()> {
        while !self.takes("=") {
            if self.at == self.tokens.len() || self.is("|") {
                // The block form, whose text is counted as it is written.
                self.at = self.tokens.len();
                return Some(());
            }
            self.at += 1;
        }
        let first = self.at;
        self.expression()?;
        let single = self.at;
        while self.takes(",") {
            if self.at < self.tokens.len() {
                self.expression()?;
            }
        }
        if self.at > single {
            self.wrap(first, ("__grown((", "))"));
        }
        Some(())
    }

    fn expression(&mut self) -> Option<()> {
        self.depth += 1;
        if self.depth > DEPTH_LIMIT {
            return None;
        }
        self.logical()?;
        while self.takes("if") {
            self.logical()?;
            if self.takes("else") {
                self.expression()?;
            }
        }
        self.depth -= 1;
        Some(())
    }

    /// Comparisons and what joins them: their results are small.
    fn logical(&mut self) -> Option<()> {
        loop {
            while self.takes("not") {}
            self.sum()?;
            let negated = self.takes("not");
            let more = ["and", "or", "in", "==", "!=", "<", "<=", ">", ">="];
            let found = more.iter().any(|operator| self.takes(operator));
            if !found {
                return (!negated).then_some(());
            }
        }
    }

    fn sum(&mut self) -> Option<()> {
        self.chain(&["+", "-"], &["+"], Self::joined)
    }

    fn joined(&mut self) -> Option<()> {
        let first = self.at;
        self.product()?;
        if !self.is("~") {
            return Some(());
        }
        self.wrap(first, PART);
        let mut operators = 0;
        while self.takes("~") {
            let right = self.at;
            self.product()?;
            self.wrap(right, PART);
            operators += 1;
            if operators % CHAIN == 0 || !self.is("~") {
                self.wrap(first, GROWN);
            }
        }
        Some(())
    }

    fn product(&mut self) -> Option<()> {
        self.chain(&["*", "/", "//", "%"], &["*"], |parser| {
            parser.chain(&["**"], &[], Self::unary)
        })
    }

    /// Operands with operators between them, of which some make larger values.
    fn chain(
        &mut self,
        operators: &[&str],
        growing: &[&str],
        operand: impl Fn(&mut Self) -> Option<()>,
    ) -> Option<()> {
        let (first, mut grown) = (self.at, 0);
        operand(self)?;
        while let Some(operator) = operators.iter().find(|operator| self.is(operator)) {
            self.at += 1;
            operand(self)?;
            grown += usize::from(growing.contains(operator));
            let last = !operators.iter().any(|operator| self.is(operator));
            if grown > 0 && (grown == CHAIN || last) {
                self.wrap(first, GROWN);
                grown = 0;
            }
        }
        Some(())
    }

    fn unary(&mut self) -> Option<()> {
        let first = self.at;
        self.signed()?;
        loop {
            if self.is("|") {
                self.wrap(first, PLAIN);
                self.at += 1;
                self.dotted()?;
                if self.is("(") {
                    self.arguments()?;
                }
                self.wrap(first, GROWN);
            } else if self.takes("is") {
                self.takes("not");
                self.dotted()?;
                let word = ["and", "or", "else", "is", "if", "in", "not"];
                let starts = |kind| matches!(kind, Kind::Name | Kind::Number | Kind::String);
                let next = self.tokens.get(self.at).map(|token| token.kind);
                if self.is("(") {
                    self.arguments()?;
                } else if ["-", "[", "{"].iter().any(|c| self.is(c))
                    || (next.is_some_and(starts) && !word.iter().any(|w| self.is(w)))
                {
                    self.signed()?;
                }
            } else {
                return Some(());
            }
        }
    }

    fn dotted(&mut self) -> Option<()> {
        self.name()?;
        while self.takes(".") {
            self.name()?;
        }
        Some(())
    }

    /// A value with attributes, items and calls.
    fn signed(&mut self) -> Option<()> {
        while self.takes("-") {}
        let first = self.at;
        let mut plain = self.primary()?;
        loop {
            if self.takes(".") {
                self.tokens.get(self.at)?;
                self.at += 1;
                plain = None;
            } else if self.takes("[") {
                while !self.takes("]") {
                    if !self.takes(":") {
                        self.expression()?;
                    }
                }
                plain = None;
            } else if self.is("(") {
                self.arguments()?;
                if !plain.is_some_and(|name| SPECIAL.contains(&name)) {
                    self.wrap(first, GROWN);
                }
                plain = None;
            } else {
                return Some(());
            }
        }
    }

    /// The name, if it is one.
    fn primary(&mut self) -> Option<Option<&'a str>> {
        let first = self.at;
        let token = self.tokens.get(first)?;
        if token.kind != Kind::Symbol {
            self.at += 1;
            return Some((token.kind == Kind::Name).then(|| self.text(first)));
        }
        let close = match self.text(first) {
            "(" => ")",
            "[" => "]",
            "{" => "}",
            _ => return None,
        };
        self.at += 1;
        let mut several = close != ")";
        while !self.is(close) {
            self.expression()?;
            if close == "}" {
                self.needs(":")?;
                self.expression()?;
            }
            if self.takes(",") {
                several = true;
            } else if !self.is(close) {
                return None;
            }
        }
        self.at += 1;
        if several && self.at > first + 2 {
            self.wrap(first, GROWN);
        }
        Some(None)
    }

    fn arguments(&mut self) -> Option<()> {
        self.needs("(")?;
        while !self.takes(")") {
            while self.takes("*") || self.takes("**") {}
            if self.text(self.at + 1) == "=" && self.name().is_some() {
                self.at += 1;
            }
            self.expression()?;
            if !self.takes(",") && !self.is(")") {
                return None;
            }
        }
        Some(())
    }
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
