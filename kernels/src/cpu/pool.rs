//! Persistent worker threads that run one task after another, all workers on each. Knows nothing of programs.
//!
//! A task is one function that every worker runs with its own index; workers share the work by [`Ticket`]s and
//! meet at a [`Barrier`] between dependent parts. That costs under a microsecond per part where a queue of
//! small jobs would cost several.

use std::collections::VecDeque;
use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker looks for work or waits at a barrier before it sleeps: longer than the usual gap between
/// two steps of a decode loop, short enough not to be seen in an idle process.
const SPIN: Duration = Duration::from_micros(60);

/// Another worker of the task has panicked: give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Poisoned;

/// Work for all workers.
pub(crate) trait Job: Send + Sync {
    /// The part of worker `worker.index`. Returns early when the barrier says so.
    fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned>;
}

/// Who runs a job.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Worker<'a> {
    /// From 0.
    pub(crate) index: usize,
    /// Workers on this job.
    pub(crate) count: usize,
    barrier: &'a Barrier,
}

impl Worker<'_> {
    /// Waits until all workers are here; what they wrote before is then visible.
    pub(crate) fn meet(&self) -> Result<(), Poisoned> {
        self.barrier.wait()
    }
}

/// Hands out a range of units piecewise: large pieces first, so that claims are few and the ends are even.
#[derive(Debug, Default)]
#[repr(align(64))]
pub(crate) struct Ticket(AtomicUsize);

impl Ticket {
    /// Before a task. Nobody may be claiming.
    pub(crate) fn reset(&self) {
        self.0.store(0, Ordering::Relaxed);
    }

    /// The next units of `0 .. total`, or `None` if all are taken.
    pub(crate) fn claim(&self, total: usize, workers: usize) -> Option<Range<usize>> {
        let mut taken = self.0.load(Ordering::Relaxed);
        loop {
            let left = total.checked_sub(taken).filter(|&left| left > 0)?;
            let piece = (left / (2 * workers)).max(1);
            match self
                .0
                .compare_exchange_weak(taken, taken + piece, Ordering::Relaxed, Ordering::Relaxed)
            {
                Ok(_) => return Some(taken..taken + piece),
                Err(now) => taken = now,
            }
        }
    }
}

/// Where the workers of one task meet.
#[derive(Debug)]
struct Barrier {
    count: usize,
    arrived: AtomicUsize,
    generation: AtomicUsize,
    poisoned: AtomicBool,
    sleepers: AtomicUsize,
    gate: Mutex<()>,
    wake: Condvar,
}

impl Barrier {
    fn new(count: usize) -> Self {
        Self {
            count,
            arrived: AtomicUsize::new(0),
            generation: AtomicUsize::new(0),
            poisoned: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            gate: Mutex::new(()),
            wake: Condvar::new(),
        }
    }

    fn wait(&self) -> Result<(), Poisoned> {
        let generation = self.generation.load(Ordering::Acquire);
        if self.arrived.fetch_add(1, Ordering::AcqRel) + 1 == self.count {
            self.arrived.store(0, Ordering::Relaxed);
            // Sequentially consistent with the sleepers' count: either a sleeper sees the new generation, or
            // this thread sees the sleeper.
            self.generation
                .store(generation.wrapping_add(1), Ordering::SeqCst);
            self.wake_sleepers();
        } else {
            let open = || self.generation.load(Ordering::SeqCst) != generation || self.is_poisoned();
            if !spin_until(open) {
                self.sleepers.fetch_add(1, Ordering::SeqCst);
                let mut guard = lock(&self.gate);
                while !open() {
                    guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
                }
                self.sleepers.fetch_sub(1, Ordering::SeqCst);
            }
        }
        if self.is_poisoned() { Err(Poisoned) } else { Ok(()) }
    }

    fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::SeqCst)
    }

    fn poison(&self) {
        self.poisoned.store(true, Ordering::SeqCst);
        self.wake_sleepers();
    }

    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            drop(lock(&self.gate));
            self.wake.notify_all();
        }
    }
}

/// A job on its way through the pool. Wait for it with [`Task::wait`].
pub(crate) struct Task {
    job: Box<dyn Job>,
    barrier: Barrier,
    running: AtomicUsize,
    panic: Mutex<Option<String>>,
    finished: Mutex<bool>,
    done: Condvar,
}

impl Task {
    /// Sleeps until every worker is through. An error is the message of a panic.
    pub(crate) fn wait(&self) -> Result<(), String> {
        let mut finished = lock(&self.finished);
        while !*finished {
            finished = self.done.wait(finished).unwrap_or_else(PoisonError::into_inner);
        }
        lock(&self.panic).clone().map_or(Ok(()), Err)
    }

    fn run_part(&self, index: usize) {
        let worker = Worker {
            index,
            count: self.barrier.count,
            barrier: &self.barrier,
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.job.run(&worker))) {
            let text = payload
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "a worker panicked".to_owned());
            lock(&self.panic).get_or_insert(text);
            self.barrier.poison();
        }
    }

    fn finish(&self) {
        *lock(&self.finished) = true;
        self.done.notify_all();
    }
}

#[derive(Default)]
struct Queue {
    current: Option<Arc<Task>>,
    waiting: VecDeque<Arc<Task>>,
    stopping: bool,
}

struct Shared {
    queue: Mutex<Queue>,
    work: Condvar,
    /// Changes with each new current task and when the pool stops.
    epoch: AtomicU64,
}

/// The threads. Dropping the pool lets submitted tasks finish and joins the threads.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl Pool {
    /// Starts the threads.
    pub(crate) fn new(threads: NonZeroUsize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            queue: Mutex::new(Queue::default()),
            work: Condvar::new(),
            epoch: AtomicU64::new(0),
        });
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(threads.get()),
        };
        for index in 0..threads.get() {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("galerne-cpu-{index}"))
                .spawn(move || work(&shared, index))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Number of workers.
    pub(crate) fn threads(&self) -> usize {
        self.threads.len()
    }

    /// Queues a job and returns at once. The queue holds at most one task per loaded program.
    pub(crate) fn submit(&self, job: Box<dyn Job>) -> Arc<Task> {
        let task = Arc::new(Task {
            job,
            barrier: Barrier::new(self.threads.len()),
            running: AtomicUsize::new(self.threads.len()),
            panic: Mutex::new(None),
            finished: Mutex::new(false),
            done: Condvar::new(),
        });
        let mut queue = lock(&self.shared.queue);
        if queue.current.is_some() {
            queue.waiting.push_back(Arc::clone(&task));
        } else {
            queue.current = Some(Arc::clone(&task));
            self.shared.announce();
        }
        task
    }
}

impl Shared {
    /// Call with the queue locked, so that no worker goes to sleep in between.
    fn announce(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        self.work.notify_all();
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        lock(&self.shared.queue).stopping = true;
        self.shared.work.notify_all();
        for thread in self.threads.drain(..) {
            // A worker catches panics of its jobs; one in the pool itself has nobody left to report to.
            let _ = thread.join();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// True as soon as `ready`, false if that took too long.
fn spin_until(ready: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..128 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.get_or_insert_with(Instant::now).elapsed() > SPIN {
            return false;
        }
    }
}

fn work(shared: &Shared, index: usize) {
    let mut seen = 0;
    while let Some((epoch, task)) = next_task(shared, seen) {
        seen = epoch;
        task.run_part(index);
        if task.running.fetch_sub(1, Ordering::AcqRel) == 1 {
            let mut queue = lock(&shared.queue);
            queue.current = queue.waiting.pop_front();
            if queue.current.is_some() {
                shared.announce();
            }
            let stopping = queue.stopping;
            drop(queue);
            if stopping {
                shared.work.notify_all();
            }
            task.finish();
        }
    }
}

/// The task after epoch `seen`, or `None` when the pool stops.
fn next_task(shared: &Shared, seen: u64) -> Option<(u64, Arc<Task>)> {
    spin_until(|| shared.epoch.load(Ordering::SeqCst) != seen);
    let mut queue = lock(&shared.queue);
    loop {
        let epoch = shared.epoch.load(Ordering::SeqCst);
        match &queue.current {
            // A worker leaves a task only when its own part is done, and the next is announced only when all
            // parts are: so no epoch is skipped.
            Some(task) if epoch != seen => return Some((epoch, Arc::clone(task))),
            None if queue.stopping => return None,
            _ => queue = shared.work.wait(queue).unwrap_or_else(PoisonError::into_inner),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count {
        parts: Arc<AtomicUsize>,
        ticket: Ticket,
        units: usize,
    }

    impl Job for Count {
        fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned> {
            while let Some(range) = self.ticket.claim(self.units, worker.count) {
                self.parts.fetch_add(range.len(), Ordering::Relaxed);
            }
            worker.meet()?;
            assert_eq!(self.parts.load(Ordering::Relaxed) % self.units, 0);
            worker.meet()
        }
    }

    struct Dies;

    impl Job for Dies {
        fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned> {
            assert!(worker.index != 1, "as planned");
            worker.meet()
        }
    }

    #[test]
    fn every_unit_is_handed_out_once_however_many_workers() {
        for threads in 1..5 {
            let pool = Pool::new(NonZeroUsize::new(threads).unwrap()).unwrap();
            let parts = Arc::new(AtomicUsize::new(0));
            let tasks: Vec<_> = (0..50)
                .map(|_| {
                    let job = Count {
                        parts: Arc::clone(&parts),
                        ticket: Ticket::default(),
                        units: 37,
                    };
                    pool.submit(Box::new(job))
                })
                .collect();
            for task in tasks {
                task.wait().unwrap();
            }
            assert_eq!(parts.load(Ordering::Relaxed), 50 * 37);
        }
    }

    #[test]
    fn a_panic_in_one_worker_is_an_error_and_the_pool_lives_on() {
        let pool = Pool::new(NonZeroUsize::new(3).unwrap()).unwrap();
        let error = pool.submit(Box::new(Dies)).wait().unwrap_err();
        assert!(error.contains("as planned"), "{error}");
        let parts = Arc::new(AtomicUsize::new(0));
        let job = Count {
            parts: Arc::clone(&parts),
            ticket: Ticket::default(),
            units: 5,
        };
        pool.submit(Box::new(job)).wait().unwrap();
        assert_eq!(parts.load(Ordering::Relaxed), 5);
    }
}
