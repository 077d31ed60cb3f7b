//! A grammar's state for one sequence, whose questions are answered on the worker threads. Knows nothing of how a
//! grammar was written.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_core::grammar::{GrammarError, GrammarSession, Next, TokenMask};
use galerne_core::guest::{Answer, Waker};
use galerne_core::ids::TokenId;
use llguidance::Matcher;
use llguidance::api::StopReason;

use super::{host_error, reason};
use crate::host::HostShared;
use crate::workers::Nature;

/// Where the engine's thread and a worker meet.
struct Slot {
    /// The state, while no question is being answered.
    matcher: Option<Matcher>,
    /// The answer to the last question, until it is taken.
    answer: Option<Result<Next, GrammarError>>,
    /// The session is gone: its open question needs no answer.
    closed: bool,
}

struct Shared {
    host: Arc<HostShared>,
    vocabulary: u32,
    waker: Waker,
    // A std Mutex: held for moves only, never while the grammar works.
    slot: Mutex<Slot>,
}

pub(super) struct Session {
    shared: Arc<Shared>,
}

impl Session {
    /// `first` is what may follow before any token.
    pub(super) fn new(
        host: Arc<HostShared>,
        matcher: Matcher,
        first: Next,
        vocabulary: u32,
        waker: Waker,
    ) -> Self {
        let slot = Mutex::new(Slot {
            matcher: Some(matcher),
            answer: Some(Ok(first)),
            closed: false,
        });
        Self {
            shared: Arc::new(Shared {
                host,
                vocabulary,
                waker,
                slot,
            }),
        }
    }
}

impl GrammarSession for Session {
    fn request_next(&mut self, accepted: Vec<TokenId>) {
        let mut slot = self.shared.slot();
        if accepted.is_empty() && slot.answer.is_some() {
            // The first question was answered before it was asked.
            drop(slot);
            (self.shared.waker)();
            return;
        }
        slot.answer = None;
        let Some(matcher) = slot.matcher.take() else {
            // The first question's answer stands; the engine sees its own mistake in the log.
            tracing::error!("bug of the host: a grammar was asked a second question while one is open");
            return;
        };
        drop(slot);
        let shared = Arc::clone(&self.shared);
        let job = Box::new(move || shared.work(matcher, &accepted));
        if self.shared.host.workers.push(Nature::Any, job).is_err() {
            // The state is lost with the job, and the sequence ends with this answer.
            self.shared.slot().answer = Some(Err(host_error(
                "the queue of questions to guests and grammars is full; try again later",
            )));
        }
    }

    fn take_next(&mut self) -> Answer<Next, GrammarError> {
        match self.shared.slot().answer.take() {
            Some(answer) => Answer::Ready(answer),
            None => Answer::Pending,
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        let mut slot = self.shared.slot();
        slot.closed = true;
        let Some(matcher) = slot.matcher.take() else {
            return;
        };
        drop(slot);
        // A grammar may hold megabytes in small pieces, and this is the engine's thread. A full queue drops the job here.
        let _ = self
            .shared
            .host
            .workers
            .push(Nature::Any, Box::new(move || drop(matcher)));
    }
}

impl Shared {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        // A panic while the lock is held leaves a whole slot: every change is a single assignment.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On a worker thread: answers the open question and wakes the engine.
    fn work(&self, mut matcher: Matcher, accepted: &[TokenId]) {
        if self.slot().closed {
            return;
        }
        let answer = next(&mut matcher, accepted, self.vocabulary);
        let mut slot = self.slot();
        if slot.closed {
            drop(slot);
            drop(matcher);
            return;
        }
        slot.matcher = Some(matcher);
        slot.answer = Some(answer);
        drop(slot);
        (self.waker)();
    }
}

/// Consumes the tokens and finds what may follow. The library turns its panics into errors.
pub(super) fn next(
    matcher: &mut Matcher,
    accepted: &[TokenId],
    vocabulary: u32,
) -> Result<Next, GrammarError> {
    let tokens: Vec<u32> = accepted.iter().map(|token| token.0).collect();
    if let Err(error) = matcher.consume_tokens(&tokens) {
        return Err(failed(matcher.stop_reason(), &error.to_string()));
    }
    if matcher.is_stopped() {
        return match matcher.stop_reason() {
            StopReason::NoExtension | StopReason::NoExtensionBias | StopReason::EndOfSentence => {
                Ok(Next::End)
            }
            stopped => Err(failed(stopped, &stopped.to_string())),
        };
    }
    match matcher.compute_mask() {
        Ok(mask) => Ok(Next::Tokens(TokenMask::new(mask.as_slice().to_vec(), vocabulary))),
        Err(error) => Err(failed(matcher.stop_reason(), &error.to_string())),
    }
}

fn failed(stopped: StopReason, error: &str) -> GrammarError {
    let reason = reason(error);
    match stopped {
        StopReason::LexerTooComplex | StopReason::ParserTooComplex => GrammarError::TooComplex { reason },
        _ => GrammarError::Stuck { reason },
    }
}
