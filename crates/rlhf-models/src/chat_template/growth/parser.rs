//! Where in a tag's inside something may grow.

use crate::chat_template::tokens::{Kind, Token};

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

/// The inside of a tag, an expression or a statement, with its measurements; `None` for what is
/// neither.
pub(super) fn rewritten(inner: &str, tokens: &[Token], expression: bool) -> Option<String> {
    let mut parser = Parser {
        source: inner,
        tokens,
        at: 0,
        depth: 0,
        insertions: Vec::new(),
    };
    match expression {
        true => parser.expression()?,
        false => parser.statement()?,
    }
    if parser.at < tokens.len() {
        return None;
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
    Some(out)
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
