//! A tiny language: arithmetic on single digits, and the programs that it has for a task.

use std::collections::BTreeMap;

/// Runs an expression of digits, `+`, `-`, `*` and parentheses, with the usual precedence. `None`
/// unless all of it is one.
pub fn run(program: &str) -> Option<i64> {
    let mut parser = Parser {
        rest: program.as_bytes(),
    };
    let value = parser.sum()?;
    parser.rest.is_empty().then_some(value)
}

struct Parser<'a> {
    rest: &'a [u8],
}

impl Parser<'_> {
    fn take(&mut self, wanted: u8) -> bool {
        let found = self.rest.first() == Some(&wanted);
        if found {
            self.rest = &self.rest[1..];
        }
        found
    }

    fn sum(&mut self) -> Option<i64> {
        let mut value = self.product()?;
        loop {
            if self.take(b'+') {
                value = value.checked_add(self.product()?)?;
            } else if self.take(b'-') {
                value = value.checked_sub(self.product()?)?;
            } else {
                return Some(value);
            }
        }
    }

    fn product(&mut self) -> Option<i64> {
        let mut value = self.factor()?;
        while self.take(b'*') {
            value = value.checked_mul(self.factor()?)?;
        }
        Some(value)
    }

    fn factor(&mut self) -> Option<i64> {
        if self.take(b'(') {
            let value = self.sum()?;
            return self.take(b')').then_some(value);
        }
        let digit = *self.rest.first()?;
        self.rest = &self.rest[1..];
        digit.is_ascii_digit().then(|| i64::from(digit - b'0'))
    }
}

/// Digits, and the number that an expression which uses each of them once is to come to.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Task {
    pub digits: Vec<u8>,
    pub target: i64,
}

impl Task {
    /// `2,5,7=19:` without the commas.
    pub fn prompt(&self) -> String {
        let digits: String = self.digits.iter().map(|d| char::from(b'0' + d)).collect();
        format!("{digits}={}:", self.target)
    }

    /// The task that a prompt poses.
    pub fn parse(prompt: &str) -> Option<Self> {
        let (digits, target) = prompt.strip_suffix(':')?.split_once('=')?;
        Some(Self {
            digits: digits.bytes().map(|b| b.wrapping_sub(b'0')).collect(),
            target: target.parse().ok()?,
        })
    }

    /// Whether the program uses the digits, each once, and nothing but them.
    pub fn fits(&self, program: &str) -> bool {
        let mut used: Vec<u8> = program
            .bytes()
            .filter(u8::is_ascii_digit)
            .map(|b| b - b'0')
            .collect();
        used.sort_unstable();
        used == self.digits
    }

    /// Whether the program, when run, solves the task.
    pub fn solved_by(&self, program: &str) -> bool {
        self.fits(program) && run(program) == Some(self.target)
    }
}

/// Every task over three digits from 1 to 9 with a target from 0 to 99, with its programs.
pub fn all_tasks() -> BTreeMap<Task, Vec<String>> {
    let mut tasks: BTreeMap<Task, Vec<String>> = BTreeMap::new();
    for a in 1..=9u8 {
        for b in a..=9 {
            for c in b..=9 {
                let digits = vec![a, b, c];
                let mut programs = programs([a, b, c]);
                programs.sort_unstable();
                programs.dedup();
                for program in programs {
                    let target = run(&program).unwrap_or(-1);
                    if (0..100).contains(&target) {
                        let task = Task {
                            digits: digits.clone(),
                            target,
                        };
                        tasks.entry(task).or_default().push(program);
                    }
                }
            }
        }
    }
    tasks
}

fn programs([a, b, c]: [u8; 3]) -> Vec<String> {
    let orders = [
        [a, b, c],
        [a, c, b],
        [b, a, c],
        [b, c, a],
        [c, a, b],
        [c, b, a],
    ];
    let mut all = Vec::new();
    for [x, y, z] in orders {
        for first in ['+', '-', '*'] {
            for second in ['+', '-', '*'] {
                all.push(format!("{x}{first}{y}{second}{z}"));
                all.push(format!("({x}{first}{y}){second}{z}"));
                all.push(format!("{x}{first}({y}{second}{z})"));
            }
        }
    }
    all
}

/// The characters of prompts and programs as tokens; 0 ends a program.
pub struct Characters;

const ALPHABET: &str = "\n0123456789+-*()=:";

impl Characters {
    /// Number of tokens.
    pub fn len() -> usize {
        ALPHABET.len()
    }

    /// Of characters of the alphabet; others are left out.
    pub fn encode(text: &str) -> Vec<i64> {
        text.chars()
            .filter_map(|c| ALPHABET.find(c))
            .map(|i| i as i64)
            .collect()
    }

    /// Without the token that ends a program.
    pub fn decode(ids: &[i64]) -> String {
        ids.iter()
            .filter(|id| **id > 0)
            .filter_map(|id| ALPHABET.chars().nth(*id as usize))
            .collect()
    }
}
