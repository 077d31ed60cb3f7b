//! Threads that run jobs from one bounded queue, first come, first served. Knows no guest.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A grammar's expressions may be nested thousands deep. Only what is used of a stack is memory.
pub(crate) const GRAMMAR_STACK_BYTES: usize = 64 << 20;
/// Enough for a guest's call and all around it.
pub(crate) const GUEST_STACK_BYTES: usize = 4 << 20;

/// Most threads that answer samplers and grammars.
pub(crate) const WORKERS_MAX: usize = 64;

/// Something a worker does.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// The queue is full.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct QueueFull;

/// Whether others than the threads may do a job.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Nature {
    /// It is one that was quick before.
    Quick,
    /// Nothing is known.
    #[default]
    Any,
}

struct Queue {
    jobs: VecDeque<(Nature, Job)>,
    jobs_max: usize,
    closed: bool,
}

/// What is quick.
pub(crate) const QUICK_MAX: Duration = Duration::from_millis(5);
/// For how long a helper that was held by a job helps no more.
const HELPLESS: Duration = Duration::from_secs(1);

struct Shared {
    // A std Mutex and Condvar: a job is pushed every few milliseconds, and a parked thread leaves its core to the
    // kernels. Spinning would save some microseconds of wake-up and cost the forward pass a core.
    queue: Mutex<Queue>,
    pushed: Condvar,
    // A std Mutex: looked at once per round of help.
    helpless_until: Mutex<Option<Instant>>,
}

/// The threads. They end when this is dropped, each after its current job; nobody waits for them, because the last
/// owner may be one of them.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    helped: bool,
}

impl Workers {
    /// Starts `threads` threads over a queue of at most `jobs_max` waiting jobs.
    pub(crate) fn start(threads: usize, jobs_max: usize, stack_bytes: usize) -> std::io::Result<Self> {
        let queue = Queue {
            jobs: VecDeque::new(),
            jobs_max,
            closed: false,
        };
        let shared = Arc::new(Shared {
            queue: Mutex::new(queue),
            pushed: Condvar::new(),
            helpless_until: Mutex::default(),
        });
        let workers = Self {
            shared,
            helped: false,
        };
        for number in 0..threads {
            let shared = Arc::clone(&workers.shared);
            // On failure the threads that already run end when `workers` is dropped.
            std::thread::Builder::new()
                .name(format!("guest-{number}"))
                .stack_size(stack_bytes)
                .spawn(move || shared.work())?;
        }
        Ok(workers)
    }

    /// Puts a job at the end of the queue.
    pub(crate) fn push(&self, nature: Nature, job: Job) -> Result<(), QueueFull> {
        let mut queue = self.shared.queue();
        if queue.jobs.len() >= queue.jobs_max {
            return Err(QueueFull);
        }
        queue.jobs.push_back((nature, job));
        drop(queue);
        // Whoever helps comes for quick jobs right away; a thread that wakes up too would only be in the way.
        if !(self.helped && nature == Nature::Quick) {
            self.shared.pushed.notify_one();
        }
        Ok(())
    }

    /// The same threads, with somebody who [helps](Self::help) after each round of pushes.
    pub(crate) fn with_help(mut self) -> Self {
        self.helped = true;
        self
    }

    /// Does quick jobs on this thread until none waits. Whoever helps has other things to do: after a job that was not quick
    /// after all it helps no more for a second.
    pub(crate) fn help(&self) {
        self.help_out();
        // What is left is the threads'.
        if !self.shared.queue().jobs.is_empty() {
            self.shared.pushed.notify_all();
        }
    }

    fn help_out(&self) {
        let mut helpless_until = self
            .shared
            .helpless_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if helpless_until.is_some_and(|until| Instant::now() < until) {
            return;
        }
        *helpless_until = None;
        loop {
            let mut queue = self.shared.queue();
            let quick = queue.jobs.iter().position(|(nature, _)| *nature == Nature::Quick);
            let Some((_, job)) = quick.and_then(|place| queue.jobs.remove(place)) else {
                return;
            };
            drop(queue);
            let begin = Instant::now();
            run(job);
            if begin.elapsed() > QUICK_MAX {
                *helpless_until = Some(Instant::now() + HELPLESS);
                return;
            }
        }
    }
}

fn run(job: Job) {
    if catch_unwind(AssertUnwindSafe(job)).is_err() {
        tracing::error!("bug of the host: a guest worker's job panicked");
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.shared.queue().closed = true;
        self.shared.pushed.notify_all();
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        // Nothing can panic between two changes of the queue.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        while let Some(job) = self.next() {
            run(job);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            if let Some((_, job)) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed {
                return None;
            }
            queue = self.pushed.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn a_full_queue_refuses_and_recovers() {
        let workers = Workers::start(1, 1, GUEST_STACK_BYTES).expect("threads");
        let (started, has_started) = mpsc::channel();
        let (release, released) = mpsc::channel::<()>();
        workers
            .push(
                Nature::Any,
                Box::new(move || {
                    started.send(()).expect("the test waits");
                    released.recv().expect("the test releases");
                }),
            )
            .expect("room");
        has_started.recv_timeout(SOON).expect("the worker runs");
        let (done, is_done) = mpsc::channel();
        workers
            .push(
                Nature::Any,
                Box::new(move || done.send(()).expect("the test waits")),
            )
            .expect("room for one");
        assert_eq!(workers.push(Nature::Any, Box::new(|| ())), Err(QueueFull));
        release.send(()).expect("the worker waits");
        is_done.recv_timeout(SOON).expect("the second job runs");
    }

    #[test]
    fn a_panicking_job_does_not_end_its_worker() {
        let workers = Workers::start(1, 4, GUEST_STACK_BYTES).expect("threads");
        workers
            .push(Nature::Any, Box::new(|| panic!("expected by this test")))
            .expect("room");
        let (done, is_done) = mpsc::channel();
        workers
            .push(
                Nature::Any,
                Box::new(move || done.send(()).expect("the test waits")),
            )
            .expect("room");
        is_done.recv_timeout(SOON).expect("the worker lives");
    }

    #[test]
    fn a_helper_does_what_waits_until_a_job_holds_it() {
        let workers = Workers::start(0, 8, GUEST_STACK_BYTES).expect("no threads");
        let (done, is_done) = mpsc::channel();
        let push = |number: u32, nature: Nature, takes: Duration| {
            let done = done.clone();
            let job = move || {
                std::thread::sleep(takes);
                done.send(number).expect("the test waits");
            };
            workers.push(nature, Box::new(job)).expect("room");
        };
        push(0, Nature::Any, Duration::ZERO);
        push(1, Nature::Quick, Duration::ZERO);
        push(2, Nature::Quick, QUICK_MAX * 2);
        push(3, Nature::Quick, Duration::ZERO);
        workers.help();
        workers.help();
        assert_eq!(is_done.try_iter().collect::<Vec<u32>>(), [1, 2]);
    }

    #[test]
    fn threads_end_with_their_owner() {
        let workers = Workers::start(2, 4, GUEST_STACK_BYTES).expect("threads");
        let shared = Arc::downgrade(&workers.shared);
        drop(workers);
        let deadline = Instant::now() + SOON;
        while shared.upgrade().is_some() {
            assert!(Instant::now() < deadline, "a worker still holds the queue");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
