//! The engine as other threads see it: submit, cancel, look, shut down. Knows nothing of scheduling.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use galerne_core::guest::Waker;
use galerne_core::ids::SequenceId;
use galerne_core::limits::EngineLimits;
use galerne_kernels::device::LoadedProgram;

use crate::admission::Admission;
use crate::engine::Engine;
use crate::request::{Event, EventSink, Request, SequenceError, SubmitError};
use crate::runner::Runner;
use crate::stats::{EngineStats, IntegrityError};

/// How long the engine's thread watches for a guest's answer before it sleeps: several times what a quick guest takes.
pub const WATCH: Duration = Duration::from_micros(100);

/// How an engine runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Queues, steps and the KV pool; the program must have been loaded with the same pool and step sizes.
    pub limits: EngineLimits,
    /// Mixed into every draw: equal seeds and requests replay a run.
    pub seed: u64,
    /// Whether the self-check runs after every step; it always runs when the engine falls idle.
    pub check_integrity: bool,
    /// How long a step waits for late guests before their sequences sit it out.
    pub guest_grace: Duration,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self {
            limits: EngineLimits::default(),
            seed: 0,
            check_integrity: false,
            guest_grace: Duration::from_millis(2),
        }
    }
}

/// Starts an engine on its own thread, which runs until [`EngineHandle::shutdown`] or until the last handle
/// is dropped, and then finishes the sequences it has.
///
/// # Panics
/// If the operating system cannot start a thread, or a limit of steps or pool is 0.
#[must_use]
pub fn start(
    program: Box<dyn LoadedProgram>,
    vocabulary: u32,
    context_tokens_max: u32,
    options: EngineOptions,
) -> EngineHandle {
    let admission = Admission {
        limits: options.limits,
        vocabulary,
        context_tokens_max,
    };
    let engine = Engine::new(admission, options.seed);
    let shared = Arc::new(Shared::new(engine.stats()));
    let runner = Runner {
        engine,
        program,
        shared: Arc::clone(&shared),
        options,
        published_left: 0,
    };
    std::thread::Builder::new()
        .name("galerne-engine".to_owned())
        .spawn(move || runner.run())
        .expect("the operating system starts the engine's thread");
    EngineHandle {
        shared: Arc::new(Owner { shared }),
        admission,
    }
}

/// A clonable handle to a running engine.
#[derive(Clone)]
pub struct EngineHandle {
    shared: Arc<Owner>,
    admission: Admission,
}

impl std::fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EngineHandle")
            .field("alive", &self.is_alive())
            .finish_non_exhaustive()
    }
}

impl EngineHandle {
    /// Checks and queues a request. The decision is made here, on the caller's thread, without blocking.
    ///
    /// # Errors
    /// The request can never be served, too many wait, or the engine is shutting down. No event is sent then.
    pub fn submit(&self, request: Request, sink: Box<dyn EventSink>) -> Result<SequenceId, SubmitError> {
        let shared = &self.shared.shared;
        self.admission.check(&request)?;
        let mut mailbox = shared.mailbox();
        if mailbox.closed {
            return Err(SubmitError::ShuttingDown);
        }
        // The mailbox lock makes count and queue one decision; the runner only ever lowers the count.
        let waiting = shared.queued.load(Ordering::Acquire);
        if waiting >= self.admission.limits.queue_max {
            let retry_after_ms = shared.retry_after_ms.load(Ordering::Relaxed);
            return Err(SubmitError::QueueFull {
                waiting,
                retry_after_ms,
            });
        }
        shared.queued.fetch_add(1, Ordering::AcqRel);
        let id = SequenceId(shared.next_id.fetch_add(1, Ordering::Relaxed));
        mailbox.submitted.push(Submission {
            id,
            request,
            sink,
            at: Instant::now(),
        });
        mailbox.woken = true;
        drop(mailbox);
        shared.signal.notify_all();
        Ok(id)
    }

    /// Ends a sequence at the next step, wherever it is. Unknown and ended sequences are ignored.
    pub fn cancel(&self, id: SequenceId) {
        let shared = &self.shared.shared;
        if id.0 >= shared.next_id.load(Ordering::Relaxed) {
            return;
        }
        let mut mailbox = shared.mailbox();
        if mailbox.gone {
            return;
        }
        mailbox.cancelled.insert(id);
        mailbox.woken = true;
        drop(mailbox);
        shared.signal.notify_all();
    }

    /// The numbers after the last step.
    #[must_use]
    pub fn stats(&self) -> EngineStats {
        self.shared
            .shared
            .stats
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    /// Wakes the engine when a guest's answer is there; for `SamplerFactory::session`.
    #[must_use]
    pub fn waker(&self) -> Waker {
        // Weak: a session that outlives every handle must not keep the engine's state alive.
        let shared = Arc::downgrade(&self.shared.shared);
        Arc::new(move || {
            if let Some(shared) = shared.upgrade() {
                shared.wake();
            }
        })
    }

    /// Takes no more requests, finishes those it has, then ends the engine's thread. Returns at once.
    pub fn shutdown(&self) {
        self.shared.shared.close();
    }

    /// Runs the self-check on the engine's thread, between two steps, after everything submitted and
    /// cancelled before this call has taken effect. Blocks for at most a step.
    ///
    /// # Errors
    /// A broken invariant, or an engine that has ended in failure with one.
    pub fn check_integrity(&self) -> Result<(), IntegrityError> {
        let (answer, receiver) = sync_channel(1);
        let shared = &self.shared.shared;
        let mut mailbox = shared.mailbox();
        if mailbox.gone {
            drop(mailbox);
            return self.stats().integrity.map_or(Ok(()), Err);
        }
        mailbox.checks.push(answer);
        mailbox.woken = true;
        drop(mailbox);
        shared.signal.notify_all();
        receiver
            .recv()
            .unwrap_or_else(|_| self.stats().integrity.map_or(Ok(()), Err))
    }

    /// The limits it runs under.
    #[must_use]
    pub fn limits(&self) -> EngineLimits {
        self.admission.limits
    }

    /// Largest number of prompt and output tokens of one sequence, the smaller of the model's context and the pool.
    #[must_use]
    pub fn context_tokens_max(&self) -> u32 {
        self.admission.sequence_tokens_max()
    }

    /// Entries of the vocabulary.
    #[must_use]
    pub fn vocabulary(&self) -> u32 {
        self.admission.vocabulary
    }

    /// Sequences that were accepted and have not yet been admitted to the batch.
    #[must_use]
    pub fn queued(&self) -> usize {
        self.shared.shared.queued.load(Ordering::Acquire)
    }

    /// Whether the engine takes requests.
    #[must_use]
    pub fn is_accepting(&self) -> bool {
        !self.shared.shared.mailbox().closed
    }

    /// Whether the engine's thread still runs; false after a device failure or a finished shutdown.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        self.shared.shared.alive.load(Ordering::Acquire)
    }
}

/// Closes the engine when the last handle goes.
struct Owner {
    shared: Arc<Shared>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.shared.close();
    }
}

/// A request on its way to the engine's thread.
pub(crate) struct Submission {
    pub(crate) id: SequenceId,
    pub(crate) request: Request,
    pub(crate) sink: Box<dyn EventSink>,
    pub(crate) at: Instant,
}

/// What other threads have asked since the runner last looked. `submitted` is bounded by `queue_max`,
/// `cancelled` holds each id once.
#[derive(Default)]
pub(crate) struct Mailbox {
    pub(crate) submitted: Vec<Submission>,
    pub(crate) cancelled: BTreeSet<SequenceId>,
    pub(crate) checks: Vec<SyncSender<Result<(), IntegrityError>>>,
    /// No more requests are taken.
    pub(crate) closed: bool,
    /// The runner has ended: nobody will look any more.
    gone: bool,
    /// Something happened since the runner last looked.
    woken: bool,
}

/// What the handles and the runner share. A std mutex and condvar: critical sections are a few moves,
/// and the runner is a thread of its own, not a task.
pub(crate) struct Shared {
    mailbox: Mutex<Mailbox>,
    signal: Condvar,
    pub(crate) stats: Mutex<EngineStats>,
    queued: AtomicUsize,
    retry_after_ms: AtomicU64,
    next_id: AtomicU64,
    alive: AtomicBool,
}

impl Shared {
    fn new(stats: EngineStats) -> Self {
        Self {
            mailbox: Mutex::default(),
            signal: Condvar::new(),
            stats: Mutex::new(stats),
            queued: AtomicUsize::new(0),
            retry_after_ms: AtomicU64::new(1_000),
            next_id: AtomicU64::new(0),
            alive: AtomicBool::new(true),
        }
    }

    fn mailbox(&self) -> MutexGuard<'_, Mailbox> {
        // A panic elsewhere cannot leave the mailbox half changed: every critical section is a few pushes.
        self.mailbox.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self) {
        self.mailbox().woken = true;
        self.signal.notify_all();
    }

    pub(crate) fn close(&self) {
        let mut mailbox = self.mailbox();
        mailbox.closed = true;
        mailbox.woken = true;
        drop(mailbox);
        self.signal.notify_all();
    }

    /// What was asked since the last call; `closed` stays set.
    pub(crate) fn take(&self) -> Mailbox {
        let mut mailbox = self.mailbox();
        mailbox.woken = false;
        let closed = mailbox.closed;
        std::mem::replace(
            &mut *mailbox,
            Mailbox {
                closed,
                ..Mailbox::default()
            },
        )
    }

    /// Sleeps until somebody wakes the runner; at most `limit` if given. Says whether somebody did.
    pub(crate) fn sleep(&self, limit: Option<Duration>) -> bool {
        let mailbox = self.mailbox();
        let mailbox = match limit {
            None => self
                .signal
                .wait_while(mailbox, |m| !m.woken)
                .unwrap_or_else(PoisonError::into_inner),
            Some(limit) => {
                self.signal
                    .wait_timeout_while(mailbox, limit, |m| !m.woken)
                    .unwrap_or_else(PoisonError::into_inner)
                    .0
            }
        };
        mailbox.woken
    }

    /// Looks for a wake for a while without sleeping, lets `hear` do what may bring one, and leaves its core to whoever wants it
    /// meanwhile: a guest answers in less time than it takes to wake this thread.
    pub(crate) fn watch(&self, limit: Duration, mut hear: impl FnMut()) {
        let start = Instant::now();
        while !self.mailbox().woken && start.elapsed() < limit {
            hear();
            std::thread::yield_now();
        }
    }

    /// Whether requests have come since the last [`Shared::take`].
    pub(crate) fn has_submissions(&self) -> bool {
        !self.mailbox().submitted.is_empty()
    }

    /// Lets later calls of [`Shared::sleep`] sleep although the mailbox is not yet emptied: the runner is in
    /// the middle of a step and waits for guests only. [`Shared::take`] still finds everything.
    pub(crate) fn forget_wake(&self) {
        self.mailbox().woken = false;
    }

    /// Lowers the count of sequences that were never admitted.
    pub(crate) fn leave_queue(&self, left: u64, retry_after_ms: u64) {
        self.queued
            .fetch_sub(usize::try_from(left).unwrap_or(usize::MAX), Ordering::AcqRel);
        self.retry_after_ms.store(retry_after_ms, Ordering::Relaxed);
    }

    /// Marks the engine's end and fails what is still in the mailbox.
    pub(crate) fn end(&self) {
        let mut mailbox = self.mailbox();
        mailbox.closed = true;
        mailbox.gone = true;
        let left = std::mem::take(&mut mailbox.submitted);
        // Dropped senders answer the waiting checks.
        mailbox.checks.clear();
        mailbox.cancelled.clear();
        drop(mailbox);
        for submission in left {
            submission.sink.send(Event::Failed(SequenceError::EngineStopped));
        }
        self.queued.store(0, Ordering::Release);
        self.alive.store(false, Ordering::Release);
    }
}
