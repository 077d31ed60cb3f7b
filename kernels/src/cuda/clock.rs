//! The GPU's own clock: moments in the stream, and how long the GPU waits from one decode step to the next. Knows no kernel.
//!
//! Compiled only: no GPU has run it.

use std::sync::{Mutex, PoisonError};

use cudarc::driver::result::event;
use cudarc::driver::sys;

use super::driver::DriverError;
use super::native::check;

/// A moment, once the stream has come to it.
pub(super) struct Moment(sys::CUevent);

// SAFETY: an event may be used by any thread that has made its context current.
unsafe impl Send for Moment {}
// SAFETY: as above; the driver's API locks by itself.
unsafe impl Sync for Moment {}

impl Moment {
    /// None yet. The context is current.
    pub(super) fn new() -> Result<Self, DriverError> {
        check(
            "cuEventCreate",
            event::create(sys::CUevent_flags::CU_EVENT_DEFAULT),
        )
        .map(Self)
    }

    /// When everything enqueued so far is done.
    ///
    /// # Safety
    /// The context is current and the stream lives.
    pub(super) unsafe fn note(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the event lives; the rest is the caller's contract.
        check("cuEventRecord", unsafe { event::record(self.0, stream) })
    }

    /// The same, of each run of the graph that is being captured.
    ///
    /// # Safety
    /// As [`Moment::note`]; and the event outlives the graph.
    unsafe fn note_in_graph(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // Otherwise it would only order the graph's nodes.
        let external = sys::CUevent_record_flags::CU_EVENT_RECORD_EXTERNAL as u32;
        // SAFETY: as above.
        let noted = unsafe { sys::cuEventRecordWithFlags(self.0, stream, external) };
        check("cuEventRecordWithFlags", noted.result())
    }

    /// Waits until it has come.
    pub(super) fn wait(&self) -> Result<(), DriverError> {
        // SAFETY: the event lives.
        check("cuEventSynchronize", unsafe { event::synchronize(self.0) })
    }

    /// Whether it has come.
    fn has_come(&self) -> Result<bool, DriverError> {
        // SAFETY: the event lives.
        match unsafe { sys::cuEventQuery(self.0) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            done => check("cuEventQuery", done.result()).map(|()| true),
        }
    }

    /// Seconds from an earlier moment to this one; both have come.
    pub(super) fn since(&self, earlier: &Self) -> Result<f64, DriverError> {
        // SAFETY: both events live and belong to one stream.
        let milliseconds = check("cuEventElapsedTime", unsafe { event::elapsed(earlier.0, self.0) })?;
        Ok(f64::from(milliseconds) / 1e3)
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // SAFETY: made in `new`; the driver keeps what it still needs of it.
        let _ = unsafe { event::destroy(self.0) };
    }
}

/// From the end of what was launched last (a step's sampling) to the beginning of the next step's graph.
pub(super) struct Gaps {
    /// Of the launches before this graph, and of those before the next one.
    ends: [Moment; 2],
    begin: Moment,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Which of the ends is the next graph's.
    end: usize,
    /// Whether it was noted.
    has_end: bool,
    /// Whether what is launched until the next graph belongs to that one's step.
    keeps_end: bool,
    /// Whether a graph has begun since an end.
    has_gap: bool,
    seconds: Vec<f64>,
}

impl Gaps {
    /// None yet. The context is current.
    pub(super) fn new() -> Result<Self, DriverError> {
        Ok(Self {
            ends: [Moment::new()?, Moment::new()?],
            begin: Moment::new()?,
            state: Mutex::default(),
        })
    }

    /// Something was launched that is no graph.
    ///
    /// # Safety
    /// The context is current and the stream lives.
    pub(super) unsafe fn launched(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        let mut state = self.state();
        if state.keeps_end {
            return Ok(());
        }
        // SAFETY: the caller's contract.
        unsafe { self.ends[state.end].note(stream) }?;
        state.has_end = true;
        Ok(())
    }

    /// A step's sampling was launched, and the next step will be before it is done.
    pub(super) fn sampled(&self) {
        self.state().keeps_end = true;
    }

    /// A graph is about to be launched. The one before it has long begun, as a rule, if a step's tokens were waited for.
    pub(super) fn begins(&self) -> Result<(), DriverError> {
        if self.begin.has_come()? {
            return self.finished();
        }
        self.state().has_gap = false;
        Ok(())
    }

    /// A graph is being captured, and nothing of it yet.
    ///
    /// # Safety
    /// As [`Gaps::launched`]; and this outlives the graph.
    pub(super) unsafe fn capture(&self, stream: sys::CUstream) -> Result<(), DriverError> {
        // SAFETY: the caller's contract.
        unsafe { self.begin.note_in_graph(stream) }
    }

    /// A graph was launched.
    pub(super) fn begun(&self) {
        let mut state = self.state();
        state.has_gap = state.has_end;
        (state.has_end, state.keeps_end) = (false, false);
        state.end = 1 - state.end;
    }

    /// Everything enqueued is done.
    pub(super) fn finished(&self) -> Result<(), DriverError> {
        let mut state = self.state();
        if state.has_gap {
            state.has_gap = false;
            let seconds = self.begin.since(&self.ends[1 - state.end])?;
            state.seconds.push(seconds);
        }
        Ok(())
    }

    /// All since this was asked last, in seconds.
    pub(super) fn take(&self) -> Vec<f64> {
        std::mem::take(&mut self.state().seconds)
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
