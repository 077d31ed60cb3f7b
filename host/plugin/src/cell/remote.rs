//! In a cell: a guest's questions, sent to the host, which answers them. Decides nothing.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::time::Duration;

use galerne_core::capability::{Ask, CapabilityError, CapabilitySession, Reply};

use super::outbox::{Outbox, WhenFull};
use super::protocol::{AskId, Question, Said, SessionId};

type Answered = mpsc::SyncSender<Result<Reply, CapabilityError>>;

/// The way to the host.
pub(super) struct Remote {
    out: Arc<Outbox>,
    next: AtomicU64,
    // A std Mutex: held for look-ups.
    waiting: Mutex<HashMap<AskId, Answered>>,
}

impl Remote {
    pub(super) fn new(out: Arc<Outbox>) -> Self {
        Self {
            out,
            next: AtomicU64::new(0),
            waiting: Mutex::default(),
        }
    }

    /// Asks in the name of a session that the host has numbered.
    pub(super) fn session(self: &Arc<Self>, session: SessionId) -> Box<dyn CapabilitySession> {
        Box::new(Session {
            remote: Arc::clone(self),
            session,
        })
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<AskId, Answered>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The host's answer.
    pub(super) fn answered(&self, id: AskId, result: Result<Reply, CapabilityError>) {
        let answered = self.waiting().remove(&id);
        if let Some(answered) = answered {
            // There is room for the one answer, and whoever asked waits for it.
            let _ = answered.send(result);
        }
    }
}

struct Session {
    remote: Arc<Remote>,
    session: SessionId,
}

impl CapabilitySession for Session {
    fn ask(&mut self, ask: Ask, time_left: Duration) -> Result<Reply, CapabilityError> {
        let remote = &self.remote;
        let id = remote.next.fetch_add(1, Ordering::Relaxed);
        let (answered, answer) = mpsc::sync_channel(1);
        remote.waiting().insert(id, answered);
        let question = Question {
            id,
            session: self.session,
            ask,
            time_left,
        };
        let gone = || CapabilityError::Failed("the host is gone".to_owned());
        remote
            .out
            .push_now(&Said::Ask(question), WhenFull::Wait)
            .map_err(|_| gone())?;
        // The host keeps the time and answers in any case; without a host this process ends.
        answer.recv().unwrap_or_else(|_| Err(gone()))
    }
}
