//! From the text of an expression to its value, in one pass: each rule of the grammar is a function.
//!
//! ```text
//! sum     = product { ("+" | "-") product }
//! product = sign { ("*" | "/" | "%") sign }
//! sign    = { "+" | "-" } power
//! power   = atom [ "^" sign ]                     so that -2^2 is -4, 2^-1 is 0.5 and 2^3^2 is 2^9
//! atom    = number | constant | function "(" sum { "," sum } ")" | "(" sum ")"
//! ```

use crate::functions;
use crate::number::Number;

/// Bytes of an expression: more than any a model writes.
const EXPRESSION_BYTES_MAX: usize = 10_000;
/// Parentheses, powers and signs within each other: each takes some stack.
const DEPTH_MAX: usize = 200;

/// The value of an expression; errors say at which character.
pub(crate) fn evaluate(expression: &str) -> Result<Number, String> {
    if expression.len() > EXPRESSION_BYTES_MAX {
        let got = expression.len();
        return Err(format!(
            "expression: expected at most {EXPRESSION_BYTES_MAX} bytes, got {got}"
        ));
    }
    let mut parser = Parser {
        characters: expression.chars().map(plain).collect(),
        at: 0,
        depth: 0,
    };
    let value = parser.sum()?;
    match parser.peek() {
        None => Ok(value),
        Some(other) => Err(parser.wrong(&format!("an operator or the end, got \"{other}\""))),
    }
}

/// The typographer's operators as the keyboard's.
fn plain(character: char) -> char {
    match character {
        '×' | '·' | '⋅' => '*',
        '÷' => '/',
        '−' | '–' => '-',
        other => other,
    }
}

struct Parser {
    characters: Vec<char>,
    at: usize,
    depth: usize,
}

impl Parser {
    /// The next character that is no space.
    fn peek(&mut self) -> Option<char> {
        while self
            .characters
            .get(self.at)
            .is_some_and(|next| next.is_whitespace())
        {
            self.at += 1;
        }
        self.characters.get(self.at).copied()
    }

    /// Takes the next character if it is this one.
    fn take(&mut self, wanted: char) -> bool {
        let found = self.peek() == Some(wanted);
        self.at += usize::from(found);
        found
    }

    /// Takes characters as long as they fit.
    fn take_while(&mut self, fits: impl Fn(char) -> bool) -> String {
        let rest = &self.characters[self.at..];
        let word: String = rest.iter().copied().take_while(|next| fits(*next)).collect();
        self.at += word.chars().count();
        word
    }

    fn wrong(&self, expected: &str) -> String {
        format!("expression, character {}: expected {expected}", self.at + 1)
    }

    fn sum(&mut self) -> Result<Number, String> {
        let mut value = self.product()?;
        loop {
            value = if self.take('+') {
                value.add(self.product()?)?
            } else if self.take('-') {
                value.subtract(self.product()?)?
            } else {
                return Ok(value);
            };
        }
    }

    fn product(&mut self) -> Result<Number, String> {
        let mut value = self.sign()?;
        loop {
            value = if self.take('*') {
                value.multiply(self.sign()?)?
            } else if self.take('/') {
                value.divide(self.sign()?)?
            } else if self.take('%') {
                value.remainder(self.sign()?)?
            } else {
                return Ok(value);
            };
        }
    }

    /// Every recursion passes here, so that here its depth is bounded.
    fn sign(&mut self) -> Result<Number, String> {
        self.depth += 1;
        if self.depth > DEPTH_MAX {
            return Err(self.wrong(&format!("at most {DEPTH_MAX} levels")));
        }
        let value = if self.take('-') {
            self.sign()?.negate()
        } else if self.take('+') {
            self.sign()?
        } else {
            self.power()?
        };
        self.depth -= 1;
        Ok(value)
    }

    fn power(&mut self) -> Result<Number, String> {
        let base = self.atom()?;
        if self.take('^') {
            return base.power(self.sign()?);
        }
        // As Python writes it.
        if self.peek() == Some('*') && self.characters.get(self.at + 1) == Some(&'*') {
            self.at += 2;
            return base.power(self.sign()?);
        }
        Ok(base)
    }

    fn atom(&mut self) -> Result<Number, String> {
        match self.peek() {
            Some('(') => {
                self.at += 1;
                let value = self.sum()?;
                self.close()?;
                Ok(value)
            }
            Some(next) if next.is_ascii_digit() || next == '.' => self.number(),
            Some(next) if next.is_alphabetic() => self.name(),
            Some(other) => Err(self.wrong(&format!("a number, a name or \"(\", got \"{other}\""))),
            None => Err(self.wrong("a number, a name or \"(\", got the end")),
        }
    }

    fn close(&mut self) -> Result<(), String> {
        if self.take(')') {
            return Ok(());
        }
        let got = self
            .peek()
            .map_or("the end".to_owned(), |next| format!("\"{next}\""));
        Err(self.wrong(&format!("\")\", got {got}")))
    }

    fn number(&mut self) -> Result<Number, String> {
        let begin = self.at;
        let mut text = self.digits();
        if let Ok(integer) = text.parse()
            && !matches!(self.characters.get(self.at), Some('.' | 'e' | 'E'))
        {
            return Ok(Number::Integer(integer));
        }
        if self.characters.get(self.at) == Some(&'.') {
            self.at += 1;
            text = format!("{text}.{}", self.digits());
        }
        text.push_str(&self.exponent());
        match text.parse() {
            Ok(value) => Number::real(value),
            Err(_) => {
                self.at = begin;
                Err(self.wrong(&format!("a number, got \"{text}\"")))
            }
        }
    }

    /// Digits, with `_` between them as programmers write.
    fn digits(&mut self) -> String {
        self.take_while(|next| next.is_ascii_digit() || next == '_')
            .replace('_', "")
    }

    /// `e` and digits; nothing if what follows `e` is no number, because `e` is also a constant.
    fn exponent(&mut self) -> String {
        let begin = self.at;
        if !matches!(self.characters.get(self.at), Some('e' | 'E')) {
            return String::new();
        }
        self.at += 1;
        let minus = self.characters.get(self.at) == Some(&'-');
        let signed = minus || self.characters.get(self.at) == Some(&'+');
        self.at += usize::from(signed);
        let digits = self.digits();
        if digits.is_empty() {
            self.at = begin;
            return String::new();
        }
        format!("e{}{digits}", if minus { "-" } else { "" })
    }

    fn name(&mut self) -> Result<Number, String> {
        let begin = self.at;
        let name = self
            .take_while(|next| next.is_alphanumeric() || next == '_')
            .to_lowercase();
        if !self.take('(') {
            return functions::constant(&name).ok_or_else(|| {
                self.at = begin;
                self.wrong(&format!("pi, tau, e or a function with \"(\", got \"{name}\""))
            });
        }
        let mut arguments = vec![self.sum()?];
        while self.take(',') {
            arguments.push(self.sum()?);
        }
        self.close()?;
        functions::call(&name, &arguments)
    }
}
