//! Draws the tokens of a step's sequences on all workers, a row each. Knows nothing of how a token is drawn.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use super::isa::Isa;
use super::memory::Rect;
use super::pool::{Job, Poisoned, Pool, Ticket, Worker};
use super::sampler::Sampler;
use crate::device::{SampleOutcome, SampleRequest};

/// The samplers of a program's workers; each keeps its room between calls and takes none before its first.
pub(crate) struct Samplers {
    /// Locked by their own worker only.
    samplers: Arc<[Mutex<Sampler>]>,
}

/// Requests on their way through the pool.
struct SampleJob {
    samplers: Arc<[Mutex<Sampler>]>,
    ticket: Ticket,
    output: Rect,
    requests: *const SampleRequest<'static>,
    outcomes: Arc<[OnceLock<SampleOutcome>]>,
}

// SAFETY: `requests` and `output` are only read, and only inside pieces, which end before the caller that lends them goes on.
unsafe impl Send for SampleJob {}
// SAFETY: as above.
unsafe impl Sync for SampleJob {}

impl Job for SampleJob {
    fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned> {
        worker.run(&self.ticket, self.outcomes.len(), |rows| {
            let mut sampler = lock(&self.samplers[worker.index]);
            for at in rows {
                // SAFETY: there is a request for each outcome, lent until all pieces are done; its row was checked, and no step
                // writes it.
                let outcome = unsafe {
                    let request = &*self.requests.add(at);
                    sampler.sample(self.output.row(request.row), request)
                };
                // Each piece is handed out once.
                let _ = self.outcomes[at].set(outcome);
            }
        })
    }
}

impl Samplers {
    /// For `workers` workers.
    pub(crate) fn new(isa: Isa, workers: usize) -> Self {
        Self {
            samplers: (0..workers).map(|_| Mutex::new(Sampler::new(isa))).collect(),
        }
    }

    /// Serves the requests, which have been checked against `output`. An error is the message of a panic.
    ///
    /// # Safety
    /// Nobody writes `output` meanwhile.
    pub(crate) unsafe fn sample(
        &self,
        pool: &Pool,
        output: Rect,
        requests: &[SampleRequest<'_>],
    ) -> Result<Vec<SampleOutcome>, String> {
        // To wake the others takes about as long as a row.
        if requests.len() <= 1 || self.samplers.len() == 1 {
            let mut sampler = lock(&self.samplers[0]);
            // SAFETY: by contract.
            let outcome =
                |request: &SampleRequest<'_>| unsafe { sampler.sample(output.row(request.row), request) };
            return Ok(requests.iter().map(outcome).collect());
        }
        let outcomes: Arc<[OnceLock<SampleOutcome>]> = requests.iter().map(|_| OnceLock::new()).collect();
        let task = pool.submit(Box::new(SampleJob {
            samplers: Arc::clone(&self.samplers),
            ticket: Ticket::new(self.samplers.len()),
            output,
            requests: requests.as_ptr().cast(),
            outcomes: Arc::clone(&outcomes),
        }));
        let done = pool.wait(&task);
        // After a panic others may still be in their pieces.
        task.wait_empty();
        done?;
        Ok(outcomes.iter().filter_map(OnceLock::get).cloned().collect())
    }
}

fn lock(sampler: &Mutex<Sampler>) -> std::sync::MutexGuard<'_, Sampler> {
    // A panic has ended the program; its sampler's room is written anew for each row.
    sampler.lock().unwrap_or_else(PoisonError::into_inner)
}
