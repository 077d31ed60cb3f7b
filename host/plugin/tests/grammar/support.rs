//! A vocabulary of all bytes and some words, and walks through a grammar by drawing tokens.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use galerne_core::grammar::{
    GrammarError, GrammarFactory, GrammarSession, GrammarSource, Next, TokenText, TokenTexts,
};
use galerne_core::guest::Waker;
use galerne_core::ids::TokenId;
use galerne_core::limits::GrammarLimits;
use galerne_plugin::{Grammars, PluginHost, PluginOptions};

/// Tokens of several bytes, some of them parts of a character or across a JSON text's parts.
const WORDS: &[&[u8]] = &[
    b"{\"",
    b"\":",
    b"\": ",
    b"\", \"",
    b"\"}",
    b"\"]",
    b", ",
    b"[[",
    b"}]",
    b"}}",
    b"true",
    b" false",
    b"null",
    b"12",
    b"0.",
    b"e+",
    b"\n  ",
    b"yes",
    b"no",
    b" way",
    b"ab",
    b"abc",
    b"na",
    b"name",
    b"\\u00",
    b"\\\"",
    "é".as_bytes(),
    "né".as_bytes(),
    "日本".as_bytes(),
    &[0xe6, 0x97],
    &[0xa5, b'"'],
    b"2026-",
    b"-0",
];
/// Ends an answer.
pub(crate) const END: TokenId = TokenId(256 + WORDS.len() as u32);
/// A control token that does not.
pub(crate) const CONTROL: TokenId = TokenId(END.0 + 1);

/// Entries of the vocabulary, the last without a meaning.
pub(crate) fn vocabulary() -> u32 {
    CONTROL.0 + 2
}

pub(crate) fn texts() -> TokenTexts {
    let bytes = (0..=u8::MAX).map(|byte| vec![byte]);
    let words = WORDS.iter().map(|word| word.to_vec());
    let mut tokens: Vec<TokenText> = bytes.chain(words).map(TokenText::Bytes).collect();
    tokens.push(TokenText::Control("<|end|>".to_owned()));
    tokens.push(TokenText::Control("<|other|>".to_owned()));
    tokens.push(TokenText::Bytes(Vec::new()));
    TokenTexts {
        tokens,
        ends: vec![END],
    }
}

/// One plugin host for all tests.
pub(crate) fn grammars() -> &'static Grammars {
    static GRAMMARS: OnceLock<Grammars> = OnceLock::new();
    GRAMMARS.get_or_init(|| grammars_within(GrammarLimits::default()))
}

pub(crate) fn grammars_within(grammar_limits: GrammarLimits) -> Grammars {
    let options = PluginOptions {
        grammar_limits,
        instances_max: 64,
        ..PluginOptions::default()
    };
    let host = PluginHost::new(options).expect("a plugin host");
    host.grammars(&texts()).expect("a sound vocabulary")
}

pub(crate) fn no_waker() -> Waker {
    Arc::new(|| ())
}

pub(crate) fn token_of(bytes: &[u8]) -> TokenId {
    let texts = texts();
    let is = |text: &TokenText| *text == TokenText::Bytes(bytes.to_vec());
    let at = texts
        .tokens
        .iter()
        .position(is)
        .expect("a token of the vocabulary");
    TokenId(u32::try_from(at).expect("few tokens"))
}

pub(crate) fn bytes_of(tokens: &[TokenId]) -> Vec<u8> {
    let word = |token: &TokenId| match token.index() {
        byte @ 0..256 => vec![u8::try_from(byte).expect("a byte")],
        word => WORDS[word - 256].to_vec(),
    };
    tokens.iter().flat_map(word).collect()
}

pub(crate) fn spell(tokens: &[TokenId]) -> String {
    String::from_utf8(bytes_of(tokens)).expect("a grammar's text is UTF-8")
}

/// How a walk ended.
pub(crate) enum Answer {
    Complete(String),
    /// It was not over after as many tokens as were allowed.
    Cut,
    Failed(GrammarError),
}

/// One answer's way through a grammar.
pub(crate) struct Walk {
    session: Box<dyn GrammarSession>,
    woken: Receiver<()>,
    tokens: Vec<TokenId>,
    /// Of `tokens`, those the grammar knows.
    told: usize,
}

impl Walk {
    pub(crate) fn new(grammars: &Grammars, source: &GrammarSource) -> Self {
        let (wake, woken) = channel();
        let waker: Waker = Arc::new(move || {
            let _ = wake.send(()); // nobody waits once the walk is over
        });
        Self {
            session: grammars.session(source, waker).expect("a grammar"),
            woken,
            tokens: Vec::new(),
            told: 0,
        }
    }

    /// What may follow these tokens.
    pub(crate) fn next(&mut self, tokens: &[TokenId]) -> Result<Next, GrammarError> {
        self.session.request_next(tokens.to_vec());
        self.woken
            .recv_timeout(Duration::from_secs(20))
            .expect("an answer");
        match self.session.take_next() {
            galerne_core::guest::Answer::Ready(next) => next,
            galerne_core::guest::Answer::Pending => panic!("woken without an answer"),
        }
    }

    /// Draws one token evenly among those allowed; `false` at the end.
    pub(crate) fn draw(&mut self, random: &mut impl FnMut(usize) -> usize) -> Result<bool, GrammarError> {
        let new = self.tokens[self.told..].to_vec();
        self.told = self.tokens.len();
        let Next::Tokens(mask) = self.next(&new)? else {
            return Ok(false);
        };
        let allowed: Vec<u32> = (0..vocabulary()).filter(|t| mask.allows(TokenId(*t))).collect();
        let token = TokenId(allowed[random(allowed.len())]);
        if token == END {
            return Ok(false);
        }
        self.tokens.push(token);
        Ok(true)
    }

    pub(crate) fn finish(mut self, random: &mut impl FnMut(usize) -> usize, tokens_max: usize) -> Answer {
        for _ in 0..tokens_max {
            match self.draw(random) {
                Ok(true) => {}
                Ok(false) => return Answer::Complete(spell(&self.tokens)),
                Err(error) => return Answer::Failed(error),
            }
        }
        Answer::Cut
    }
}
