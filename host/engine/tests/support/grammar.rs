//! A grammar for tests: what it allows depends on everything that came before, when it answers on its delays; strict
//! about the protocol.

use galerne_core::grammar::{GrammarError, GrammarSession, Next, TokenMask};
use galerne_core::guest::Answer;
use galerne_core::ids::TokenId;

use super::device::VOCABULARY;

/// Nothing follows after so many tokens.
pub const LENGTH: usize = 9;

/// Answers after being looked at some times, by a small pattern that repeats.
pub struct FakeGrammar {
    delays: [u8; 3],
    accepted: Vec<TokenId>,
    questions: usize,
    looks_left: Option<u8>,
    /// It fails instead of saying what follows so many tokens.
    pub fails_at: Option<usize>,
}

impl FakeGrammar {
    pub fn new(delays: [u8; 3]) -> Self {
        Self::after(Vec::new(), delays)
    }

    /// One that has taken these tokens already.
    pub fn after(accepted: Vec<TokenId>, delays: [u8; 3]) -> Self {
        Self {
            delays,
            accepted,
            questions: 0,
            looks_left: None,
            fails_at: None,
        }
    }
}

/// What may follow these tokens: about half of the vocabulary, now and then one token.
pub fn follows(tokens: &[TokenId]) -> Next {
    if tokens.len() >= LENGTH {
        return Next::End;
    }
    let hash = tokens.iter().fold(7, |hash: u32, token| {
        hash.wrapping_mul(0x9e37_79b1).wrapping_add(token.0 + 1)
    });
    let one = hash >> 8 & 3 == 0;
    let word = if one {
        1 << ((hash >> 16) % VOCABULARY)
    } else {
        hash | 1 << 5
    };
    Next::Tokens(TokenMask::new(vec![word], VOCABULARY))
}

impl GrammarSession for FakeGrammar {
    fn request_next(&mut self, accepted: Vec<TokenId>) {
        assert!(self.looks_left.is_none(), "two questions are open");
        assert_eq!(
            accepted.is_empty(),
            self.questions == 0,
            "each question follows a token"
        );
        self.accepted.extend(accepted);
        self.looks_left = Some(self.delays[self.questions % 3]);
        self.questions += 1;
    }

    fn take_next(&mut self) -> Answer<Next, GrammarError> {
        let left = self.looks_left.expect("an answer is only taken after a question");
        if left > 0 {
            self.looks_left = Some(left - 1);
            return Answer::Pending;
        }
        self.looks_left = None;
        if self.fails_at == Some(self.accepted.len()) {
            let reason = "as planned".to_owned();
            return Answer::Ready(Err(GrammarError::Stuck { reason }));
        }
        Answer::Ready(Ok(follows(&self.accepted)))
    }
}
