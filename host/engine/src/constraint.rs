//! What the next token of one sequence may be: its grammar's open question or answer. Never waits.
//! Knows nothing of how a token is drawn.

use galerne_core::grammar::{GrammarError, GrammarSession, Next, TokenMask};
use galerne_core::guest::Answer;
use galerne_core::ids::TokenId;

/// What is known of the next token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// All there is to know now.
    Known,
    /// The grammar is not done.
    Pending,
    /// There is none: the output is complete.
    End,
}

/// The grammar of one sequence.
pub(crate) struct Constraint {
    session: Box<dyn GrammarSession>,
    state: State,
    /// Output tokens since the grammar was last asked.
    accepted: Vec<TokenId>,
}

enum State {
    /// To be asked before the next token.
    Idle,
    Asked,
    Mask(TokenMask),
}

impl Constraint {
    pub(crate) fn new(session: Box<dyn GrammarSession>) -> Self {
        Self {
            session,
            state: State::Idle,
            accepted: Vec::new(),
        }
    }

    /// Asks what may come next, unless that is known or asked.
    pub(crate) fn ask(&mut self) {
        if matches!(self.state, State::Idle) {
            self.session.request_next(std::mem::take(&mut self.accepted));
            self.state = State::Asked;
        }
    }

    /// Whether an answer is missing.
    pub(crate) fn awaits(&self) -> bool {
        matches!(self.state, State::Asked)
    }

    /// Takes the answer if it has come.
    ///
    /// # Errors
    /// The grammar cannot go on.
    pub(crate) fn poll(&mut self) -> Result<Allowed, GrammarError> {
        if !self.awaits() {
            return Ok(Allowed::Known);
        }
        match self.session.take_next() {
            Answer::Pending => Ok(Allowed::Pending),
            Answer::Ready(next) => match next? {
                Next::End => Ok(Allowed::End),
                Next::Tokens(mask) if mask.is_empty() => Err(GrammarError::Host {
                    reason: "bug: a mask that allows nothing".to_owned(),
                }),
                Next::Tokens(mask) => {
                    self.state = State::Mask(mask);
                    Ok(Allowed::Known)
                }
            },
        }
    }

    /// The tokens that may come next, if they are known.
    pub(crate) fn mask(&self) -> Option<&TokenMask> {
        match &self.state {
            State::Mask(mask) => Some(mask),
            State::Idle | State::Asked => None,
        }
    }

    /// Takes note of an output token.
    pub(crate) fn accept(&mut self, token: TokenId) {
        self.accepted.push(token);
        self.state = State::Idle;
    }
}
