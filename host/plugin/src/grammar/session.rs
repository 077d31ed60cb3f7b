//! A grammar's answers for one sequence, found on the worker threads. Knows nothing of how a grammar works.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_core::grammar::{GrammarError, GrammarSession, Next};
use galerne_core::guest::{Answer, Waker};
use galerne_core::ids::TokenId;

use super::host_error;
use super::place::{Place, let_go};
use crate::host::HostShared;
use crate::workers::Nature;

/// Where the engine's thread and a worker meet.
struct Slot {
    /// A question waits or is being answered.
    open: bool,
    /// The answer to the last question, until it is taken.
    answer: Option<Result<Next, GrammarError>>,
    /// The session is gone: its open question needs no answer.
    closed: bool,
}

struct Shared {
    waker: Waker,
    // A std Mutex: held for moves only, never while the grammar works.
    slot: Mutex<Slot>,
}

pub(super) struct Session {
    host: Arc<HostShared>,
    place: Arc<Place>,
    shared: Arc<Shared>,
}

impl Session {
    /// `first` is what may follow now, if that is known.
    pub(super) fn new(host: Arc<HostShared>, place: Arc<Place>, first: Option<Next>, waker: Waker) -> Self {
        let slot = Mutex::new(Slot {
            open: false,
            answer: first.map(Ok),
            closed: false,
        });
        Self {
            host,
            place,
            shared: Arc::new(Shared { waker, slot }),
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
        if slot.open {
            // Without tokens it is the first question once more: whoever made the session asked it ahead of time.
            if !accepted.is_empty() {
                // Its answer stands; the engine sees its own mistake in the log.
                tracing::error!("bug of the host: a grammar was asked a second question while one is open");
            }
            return;
        }
        slot.open = true;
        slot.answer = None;
        drop(slot);
        self.place.push(&accepted);
        let (shared, place) = (Arc::clone(&self.shared), Arc::clone(&self.place));
        let job = Box::new(move || shared.work(place));
        if self.host.workers.push(Nature::Any, job).is_err() {
            let mut slot = self.shared.slot();
            slot.open = false;
            slot.answer = Some(Err(host_error(
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
        self.shared.slot().closed = true;
        let_go(&self.host, &self.place);
    }
}

impl Shared {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        // A panic while the lock is held leaves a whole slot: every change is a single assignment.
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// On a worker thread: answers the open question and wakes the engine.
    fn work(&self, place: Arc<Place>) {
        if self.slot().closed {
            return;
        }
        let answer = place.next();
        // Before anybody hears of the answer: the session's place is then its own again.
        drop(place);
        let mut slot = self.slot();
        slot.open = false;
        slot.answer = Some(answer);
        drop(slot);
        (self.waker)();
    }
}
