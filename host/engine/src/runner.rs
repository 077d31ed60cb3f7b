//! The engine's thread: carries steps from the state machine to the device and back, and is the only place
//! here that sleeps. Knows nothing of scheduling.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use galerne_kernels::device::{DeviceError, LoadedProgram, SampleOutcome};

use crate::ahead::NextStep;
use crate::engine::{Engine, Step};
use crate::handle::{EngineOptions, Shared, WATCH};
use crate::request::SequenceError;

/// How long a step that could start waits for guests that propose: many times what a quick guest takes, few of what a step
/// takes.
const PROPOSAL_GRACE: Duration = Duration::from_micros(200);

/// What the thread owns.
pub(crate) struct Runner {
    pub(crate) engine: Engine,
    pub(crate) program: Box<dyn LoadedProgram>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) options: EngineOptions,
    /// Of [`Engine::left_queue`], how many the handles know of.
    pub(crate) published_left: u64,
}

/// Tells the handles that the thread has ended, also when it ends in a panic.
struct End(Arc<Shared>);

impl Drop for End {
    fn drop(&mut self) {
        self.0.end();
    }
}

impl Runner {
    /// Runs until the engine is closed and idle, or the device has failed.
    pub(crate) fn run(mut self) {
        let _end = End(Arc::clone(&self.shared));
        loop {
            let closed = self.take_mail();
            let is_under_way = self.engine.is_under_way();
            let step = (!is_under_way).then(|| self.engine.schedule(Instant::now()));
            // What was admitted or ended makes room in the queue as soon as it is known, not after the step.
            self.publish();
            if let Some(None) = step {
                let _ = self.check(); // kept in the statistics
                if self.engine.is_idle() && closed {
                    return;
                }
                self.shared.sleep(None);
                continue;
            }
            if let Err(error) = self.step(step.flatten().as_ref()) {
                tracing::error!(%error, "the device failed; the engine stops");
                self.shared.close();
                self.engine
                    .fail_all(Instant::now(), &SequenceError::Device(error));
                self.publish();
                return;
            }
            if self.options.check_integrity {
                let _ = self.check(); // kept in the statistics
            }
        }
    }

    /// Applies what other threads asked. Whether the engine is closed.
    fn take_mail(&mut self) -> bool {
        let mail = self.shared.take();
        for submission in mail.submitted {
            self.engine
                .insert(submission.at, submission.id, submission.request, submission.sink);
        }
        for id in mail.cancelled {
            self.engine.cancel(Instant::now(), id);
        }
        for answer in mail.checks {
            // Counts are published first, so that whoever gets the answer sees the numbers that belong to it.
            self.publish();
            // A caller that went away needs no answer.
            let _ = answer.send(self.check());
        }
        mail.closed
    }

    /// Runs one step, which the device may have begun already. The error is one after which the device cannot be used.
    fn step(&mut self, step: Option<&Step>) -> Result<(), DeviceError> {
        if let Some(step) = step
            && !self.submit(step)?
        {
            return Ok(());
        }
        self.engine.ask_guests();
        self.settle_plans()?;
        let outcomes = self.sample()?;
        if let Err(error) = self.engine.complete(Instant::now(), outcomes) {
            tracing::error!(%error, "bug: the device's answer cannot be used");
        }
        let grace = self.options.guest_grace;
        self.with_grace(grace, Engine::settle_choices);
        self.with_grace(grace.min(PROPOSAL_GRACE), Engine::settle_ahead);
        Ok(())
    }

    /// Draws the step's tokens and, where the device gains by it, submits the next step before they are known.
    fn sample(&mut self) -> Result<Vec<SampleOutcome>, DeviceError> {
        // Who has just come would wait for a step that does without it.
        let may_run_ahead = self.program.runs_ahead() && !self.shared.has_submissions();
        let next = may_run_ahead.then(|| self.engine.schedule_next()).flatten();
        let requests = self.engine.sample_requests();
        match next {
            Some(NextStep { step, drawn }) => {
                if !step.zero.is_empty() {
                    self.program.zero_blocks(&step.zero)?;
                }
                self.program.sample_and_submit(&requests, &step.batch, &drawn)
            }
            None if requests.is_empty() => self.program.wait().map(|()| Vec::new()),
            None => self.program.sample(&requests),
        }
    }

    /// Starts a step. Whether it was started.
    fn submit(&mut self, step: &Step) -> Result<bool, DeviceError> {
        if !step.zero.is_empty() {
            self.program.zero_blocks(&step.zero)?;
        }
        match self.program.submit(&step.batch) {
            Ok(()) => Ok(true),
            Err(error @ DeviceError::Failed { .. }) => Err(error),
            Err(error) => {
                // Nothing was started: a host bug of this step only.
                tracing::error!(%error, "bug: the device refused a step");
                self.engine.fail_step(Instant::now(), &error);
                Ok(false)
            }
        }
    }

    /// Takes the step's plans. If all come while the device computes, sampling follows the step at once; for the others the
    /// step's end is waited for, and the grace.
    fn settle_plans(&mut self) -> Result<(), DeviceError> {
        loop {
            self.shared.forget_wake();
            if self.engine.settle_plans(Instant::now()) == 0 {
                return Ok(());
            }
            if !self.program.is_running()? {
                break;
            }
            self.shared.watch(WATCH, || self.engine.hear());
        }
        self.program.wait()?;
        self.with_grace(self.options.guest_grace, Engine::settle_plans);
        Ok(())
    }

    /// Takes guests' answers until none is missing or the grace is over.
    fn with_grace(&mut self, grace: Duration, settle: fn(&mut Engine, Instant) -> usize) {
        let mut now = Instant::now();
        let end = now + grace;
        loop {
            // Before looking, so that an answer that comes while we look still ends the sleep.
            self.shared.forget_wake();
            if settle(&mut self.engine, now) == 0 {
                return;
            }
            self.shared.watch(WATCH.min(grace), || self.engine.hear());
            now = Instant::now();
            if now >= end || !self.shared.sleep(Some(end - now)) {
                return;
            }
            now = Instant::now();
        }
    }

    fn check(&mut self) -> Result<(), crate::stats::IntegrityError> {
        let result = self.engine.check_integrity();
        if let Err(error) = &result {
            tracing::error!(%error, "bug: engine integrity");
            self.engine.note_integrity(error.clone());
        }
        result
    }

    fn publish(&mut self) {
        let left = self.engine.left_queue - self.published_left;
        self.published_left = self.engine.left_queue;
        self.shared.leave_queue(left, self.engine.retry_after_ms());
        *self.shared.stats.lock().unwrap_or_else(PoisonError::into_inner) = self.engine.stats();
    }
}
