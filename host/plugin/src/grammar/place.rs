//! A grammar at a place in its text: what it has taken and what may follow. Knows no thread and nothing of how a grammar was
//! written.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_core::grammar::{GrammarError, GrammarSession, GrammarStatus, HeldGrammar, Next, TokenMask};
use galerne_core::guest::Waker;
use galerne_core::ids::TokenId;
use llguidance::Matcher;
use llguidance::api::StopReason;

use super::session::Session;
use super::{on_stack, reason};
use crate::host::HostShared;
use crate::workers::{GRAMMAR_STACK_BYTES, Nature};

/// A grammar's state, asked by a sequence and by the guest that holds it.
pub(super) struct Place {
    vocabulary: u32,
    // A std Mutex: held while the grammar works, never by the engine's thread.
    state: Mutex<State>,
    // A std Mutex: held for moves only.
    drawn: Mutex<Vec<u32>>,
}

struct State {
    matcher: Matcher,
    /// Tokens it has taken.
    taken: usize,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // The library turns its panics into errors; what is moved here is moved whole.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Place {
    pub(super) fn new(matcher: Matcher, vocabulary: u32) -> Self {
        Self {
            vocabulary,
            state: Mutex::new(State { matcher, taken: 0 }),
            drawn: Mutex::default(),
        }
    }

    /// Tells it of tokens, which it takes before anything else is asked of it. Never blocks.
    pub(super) fn push(&self, tokens: &[TokenId]) {
        lock(&self.drawn).extend(tokens.iter().map(|token| token.0));
    }

    /// What may follow. Blocks while the grammar works.
    pub(super) fn next(&self) -> Result<Next, GrammarError> {
        let vocabulary = self.vocabulary;
        self.with(|State { matcher, .. }| {
            if has_ended(matcher)? {
                return Ok(Next::End);
            }
            let mask = matcher.compute_mask();
            let mask = mask.map_err(|error| failed(matcher, &error.to_string()))?;
            Ok(Next::Tokens(TokenMask::new(mask.as_slice().to_vec(), vocabulary)))
        })
    }

    /// Its state, once it has taken what was drawn.
    fn with<T>(&self, ask: impl FnOnce(&mut State) -> Result<T, GrammarError>) -> Result<T, GrammarError> {
        let mut state = lock(&self.state);
        let drawn = std::mem::take(&mut *lock(&self.drawn));
        if !drawn.is_empty() {
            let taken = state.matcher.consume_tokens(&drawn);
            taken.map_err(|error| failed(&state.matcher, &error.to_string()))?;
            state.taken += drawn.len();
        }
        ask(&mut state)
    }
}

/// Whether nothing more can follow. An error if that is not because the text is complete.
fn has_ended(matcher: &Matcher) -> Result<bool, GrammarError> {
    if matcher.is_stopped() && !matcher.stop_reason().is_ok() {
        return Err(failed(matcher, &matcher.stop_reason().to_string()));
    }
    Ok(matcher.is_stopped())
}

fn failed(matcher: &Matcher, error: &str) -> GrammarError {
    let reason = reason(error);
    match matcher.stop_reason() {
        StopReason::LexerTooComplex | StopReason::ParserTooComplex => GrammarError::TooComplex { reason },
        _ => GrammarError::Stuck { reason },
    }
}

/// Before a share of a place is dropped. A grammar may hold megabytes in small pieces, and sessions end on the engine's thread:
/// the last share goes to another. A full queue drops it here.
pub(super) fn let_go(host: &HostShared, place: &Arc<Place>) {
    if Arc::strong_count(place) == 1 {
        let place = Arc::clone(place);
        let _ = host.workers.push(Nature::Any, Box::new(move || drop(place)));
    }
}

/// A grammar in a guest's hands.
pub(super) struct Held {
    pub(super) host: Arc<HostShared>,
    pub(super) place: Arc<Place>,
}

impl Held {
    /// Asks on a stack that is deep enough, since the caller's may be any.
    fn ask<T: Send>(
        &self,
        ask: impl FnOnce(&mut State) -> Result<T, GrammarError> + Send,
    ) -> Result<T, GrammarError> {
        on_stack(GRAMMAR_STACK_BYTES, || self.place.with(ask))
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let_go(&self.host, &self.place);
    }
}

impl HeldGrammar for Held {
    fn fork(&self) -> Result<Arc<dyn HeldGrammar>, GrammarError> {
        // The states of the lexer are shared, and with them the bound on how many there are.
        let copy = self.ask(|state| {
            Ok(State {
                matcher: state.matcher.clone(),
                taken: state.taken,
            })
        })?;
        Ok(Arc::new(Self {
            host: Arc::clone(&self.host),
            place: Arc::new(Place {
                vocabulary: self.place.vocabulary,
                state: Mutex::new(copy),
                drawn: Mutex::default(),
            }),
        }))
    }

    fn accept(&self, tokens: &[TokenId]) -> Result<usize, GrammarError> {
        // What is no token may not follow.
        let tokens: Vec<u32> = tokens
            .iter()
            .map(|token| token.0)
            .take_while(|token| *token < self.place.vocabulary)
            .collect();
        self.ask(|State { matcher, taken }| {
            let accepted = matcher.try_consume_tokens(&tokens);
            let accepted = accepted.map_err(|error| failed(matcher, &error.to_string()))?;
            *taken += accepted;
            Ok(accepted)
        })
    }

    fn rollback(&self, tokens: usize) -> Result<bool, GrammarError> {
        self.ask(|State { matcher, taken }| {
            let Some(left) = taken.checked_sub(tokens) else {
                return Ok(false);
            };
            let forgot = matcher.rollback(tokens);
            forgot.map_err(|error| failed(matcher, &error.to_string()))?;
            *taken = left;
            Ok(true)
        })
    }

    fn status(&self) -> Result<GrammarStatus, GrammarError> {
        self.ask(|State { matcher, .. }| {
            if has_ended(matcher)? {
                return Ok(GrammarStatus::Ended);
            }
            let accepting = matcher.is_accepting();
            let accepting = accepting.map_err(|error| failed(matcher, &error.to_string()))?;
            Ok(if accepting {
                GrammarStatus::Complete
            } else {
                GrammarStatus::Open
            })
        })
    }

    fn drawn(&self, tokens: &[TokenId]) {
        self.place.push(tokens);
    }

    fn session(&self, waker: Waker) -> Box<dyn GrammarSession> {
        Box::new(Session::new(
            Arc::clone(&self.host),
            Arc::clone(&self.place),
            None,
            waker,
        ))
    }
}
