//! Where a pipeline's thread, the engine's and the client's meet: something came, or the client is gone.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::super::super::error::ApiError;
use super::super::super::generation::Usage;

/// Why waiting ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Waited {
    /// Something came.
    Woken,
    /// Nobody waits for the answer any more.
    Over,
    /// Nothing came in time.
    TimedOut,
}

#[derive(Default)]
struct State {
    woken: bool,
    over: bool,
    usage: Usage,
    failure: Option<ApiError>,
}

/// One request's.
#[derive(Default)]
pub(super) struct Shared {
    // A std Mutex and Condvar: the pipeline's thread is none of the runtime's, and what is done under the lock is a few moves.
    state: Mutex<State>,
    changed: Condvar,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something came.
    pub(super) fn wake(&self) {
        self.state().woken = true;
        self.changed.notify_all();
    }

    /// Nobody waits for the answer any more.
    pub(super) fn end(&self) {
        self.state().over = true;
        self.changed.notify_all();
    }

    /// Whether nobody waits for the answer any more.
    pub(super) fn is_over(&self) -> bool {
        self.state().over
    }

    /// Waits until something came since the last time.
    pub(super) fn wait(&self, limit: Duration) -> Waited {
        let quiet = |state: &mut State| !state.woken && !state.over;
        let waited = self.changed.wait_timeout_while(self.state(), limit, quiet);
        let (mut state, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if state.over {
            Waited::Over
        } else if std::mem::take(&mut state.woken) {
            Waited::Woken
        } else {
            Waited::TimedOut
        }
    }

    /// Counts what a generation took.
    pub(super) fn spend(&self, usage: Usage) {
        let mut state = self.state();
        state.usage = state.usage + usage;
    }

    /// What all generations took so far.
    pub(super) fn usage(&self) -> Usage {
        self.state().usage
    }

    /// Keeps the reason why the host ends the request; the first stays.
    pub(super) fn fail(&self, error: ApiError) {
        self.state().failure.get_or_insert(error);
    }

    /// Why the host ended the request, if it did.
    pub(super) fn failure(&self) -> Option<ApiError> {
        self.state().failure.clone()
    }
}
