//! Threads that work through one task together: whoever submits it and the pool's own. Knows nothing of programs.
//!
//! A task is one function that every worker runs with its own index. It is cut into phases, each with a
//! [`Ticket`] that hands out its units and counts those done. Workers wait for the units of a phase, not for
//! each other: one that the system has put to sleep, or that comes late, holds nobody up unless it has a piece in hand.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker waits for a phase before it sleeps: longer than pieces differ, shorter than a time slice.
const SPIN_PHASE: Duration = Duration::from_micros(100);
/// How long a thread looks for a new task before it sleeps: longer than the usual gap between two steps of a decode
/// loop. It gives its core away meanwhile to whoever else wants it.
const SPIN_IDLE: Duration = Duration::from_micros(200);

/// Another worker of the task has panicked: give up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Poisoned;

/// Work for all workers.
pub(crate) trait Job: Send + Sync {
    /// The part of worker `worker.index`; returns when the work of all is done, or early with an error of
    /// [`Worker::run`]. Outside pieces it was handed it may touch nothing that the job writes.
    fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned>;
}

/// Who runs a job.
#[derive(Clone, Copy)]
pub(crate) struct Worker<'a> {
    /// From 0, which is whoever waits for the task.
    pub(crate) index: usize,
    /// Workers there may be on this job.
    pub(crate) count: usize,
    meeting: &'a Meeting,
}

impl Worker<'_> {
    /// One phase: runs `part` on pieces of `0 .. units` until none are left, then waits until those of other workers
    /// are done too. What they wrote is then visible.
    #[inline]
    pub(crate) fn run(
        &self,
        ticket: &Ticket,
        units: usize,
        part: impl FnMut(Range<usize>),
    ) -> Result<(), Poisoned> {
        self.run_by(1, ticket, units, part)
    }

    /// As [`Self::run`], with pieces of a multiple of `multiple` units while there are as many.
    #[inline]
    pub(crate) fn run_by(
        &self,
        multiple: usize,
        ticket: &Ticket,
        units: usize,
        mut part: impl FnMut(Range<usize>),
    ) -> Result<(), Poisoned> {
        let mut finished = 0;
        while let Some(piece) = ticket.claim(self.index, units, multiple) {
            finished += piece.len();
            part(piece);
        }
        self.finish(ticket, finished, units);
        while let Some(piece) = ticket.steal(self.index, units, multiple) {
            let count = piece.len();
            part(piece);
            self.finish(ticket, count, units);
        }
        self.meeting
            .wait(|| ticket.done.0.load(Ordering::SeqCst) >= units)
    }

    /// Tells the others that so many units more are done.
    fn finish(&self, ticket: &Ticket, count: usize, units: usize) {
        // Sequentially consistent with the sleepers' count: either a sleeper sees the units done, or this thread sees
        // the sleeper.
        if count > 0 && ticket.done.0.fetch_add(count, Ordering::SeqCst) + count == units {
            self.meeting.wake_sleepers();
        }
    }
}

/// Hands out the units of one phase. Each worker has a share of its own, always the same one, so that what it reads and
/// writes stays in its core's cache and no other core is asked; whoever is through helps the others from the end of theirs.
#[derive(Debug)]
pub(crate) struct Ticket {
    shares: Box<[Share]>,
    done: Done,
}

/// Units of one worker's share that are taken: from its start (low half) and from its end (high half).
#[derive(Debug, Default)]
#[repr(align(64))]
struct Share(AtomicU64);

#[derive(Debug, Default)]
#[repr(align(64))]
struct Done(AtomicUsize);

impl Ticket {
    /// For a pool of so many workers.
    pub(crate) fn new(workers: usize) -> Self {
        Self {
            shares: (0..workers).map(|_| Share::default()).collect(),
            done: Done::default(),
        }
    }

    /// Before a task. Nobody may be in a task that uses it.
    pub(crate) fn reset(&self) {
        for share in &self.shares {
            share.0.store(0, Ordering::Relaxed);
        }
        self.done.0.store(0, Ordering::Relaxed);
    }

    /// The units of a worker's share of `0 .. total`.
    fn share(&self, worker: usize, total: usize) -> Range<usize> {
        let workers = self.shares.len();
        worker * total / workers..(worker + 1) * total / workers
    }

    /// The next units of a worker's own share, or `None` if all are taken.
    fn claim(&self, worker: usize, total: usize, multiple: usize) -> Option<Range<usize>> {
        let share = self.share(worker, total);
        let alone = self.shares.len() == 1;
        let (front, _, piece) = self.take(worker, share.len(), 0, |left| {
            // Large pieces first: few claims, and enough left for others to help with.
            if alone { left } else { half(left, multiple) }
        })?;
        Some(share.start + front..share.start + front + piece)
    }

    /// Units that another worker has not begun, or `None` if there are none.
    fn steal(&self, thief: usize, total: usize, multiple: usize) -> Option<Range<usize>> {
        let workers = self.shares.len();
        (1..workers).find_map(|step| {
            let worker = (thief + step) % workers;
            let share = self.share(worker, total);
            let (_, back, piece) = self.take(worker, share.len(), 32, |left| half(left, multiple))?;
            Some(share.end - back - piece..share.end - back)
        })
    }

    /// Takes `piece(left)` units from one end of a share; what was taken from its start and end before, and the piece.
    fn take(
        &self,
        worker: usize,
        len: usize,
        shift: u32,
        piece: impl Fn(usize) -> usize,
    ) -> Option<(usize, usize, usize)> {
        let share = &self.shares[worker].0;
        let mut seen = share.load(Ordering::Relaxed);
        loop {
            let (front, back) = (seen as u32 as usize, (seen >> 32) as usize);
            let left = len.checked_sub(front + back).filter(|&left| left > 0)?;
            let piece = piece(left);
            let taken = seen + ((piece as u64) << shift);
            match share.compare_exchange_weak(seen, taken, Ordering::Relaxed, Ordering::Relaxed) {
                Ok(_) => return Some((front, back, piece)),
                Err(now) => seen = now,
            }
        }
    }
}

/// Half of the units left, and as many more as make a multiple.
fn half(left: usize, multiple: usize) -> usize {
    left.div_ceil(2).next_multiple_of(multiple).min(left)
}

/// Where the workers of one task wait for the end of a phase.
#[derive(Debug, Default)]
struct Meeting {
    poisoned: AtomicBool,
    sleepers: AtomicUsize,
    gate: Mutex<()>,
    wake: Condvar,
}

impl Meeting {
    #[inline]
    fn wait(&self, done: impl Fn() -> bool) -> Result<(), Poisoned> {
        let open = || done() || self.is_poisoned();
        if !open() && !spin_until(SPIN_PHASE, std::hint::spin_loop, open) {
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            let mut guard = lock(&self.gate);
            while !open() {
                guard = self.wake.wait(guard).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
        if self.is_poisoned() { Err(Poisoned) } else { Ok(()) }
    }

    fn is_poisoned(&self) -> bool {
        self.poisoned.load(Ordering::Relaxed)
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

/// A job on its way through the pool. [`Pool::wait`] takes part in it and ends it.
pub(crate) struct Task {
    /// From 1.
    id: u64,
    job: Box<dyn Job>,
    count: usize,
    meeting: Meeting,
    panic: Mutex<Option<String>>,
    /// Threads of the pool that are in the job. Rises only under the lock of the pool's list.
    inside: AtomicUsize,
}

impl Task {
    fn run_part(&self, index: usize) {
        let worker = Worker {
            index,
            count: self.count,
            meeting: &self.meeting,
        };
        if let Err(payload) = catch_unwind(AssertUnwindSafe(|| self.job.run(&worker))) {
            let text = payload
                .downcast_ref::<String>()
                .cloned()
                .or_else(|| payload.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                .unwrap_or_else(|| "a worker panicked".to_owned());
            lock(&self.panic).get_or_insert(text);
            self.meeting.poison();
        }
    }

    /// Waits until no thread of the pool is in the job any more: for what the job names to be used anew. Call after
    /// [`Pool::wait`], when at most a straggler is on its way out.
    pub(crate) fn wait_empty(&self) {
        let empty = || self.inside.load(Ordering::Acquire) == 0;
        while !spin_until(SPIN_PHASE, std::thread::yield_now, empty) {
            std::thread::sleep(SPIN_PHASE);
        }
    }
}

#[derive(Default)]
struct Tasks {
    /// Oldest first; as many as programs are computing.
    open: Vec<Arc<Task>>,
    stopping: bool,
}

struct Shared {
    tasks: Mutex<Tasks>,
    work: Condvar,
    /// Changes with each new task and when the pool stops.
    epoch: AtomicU64,
}

/// The threads. Dropping the pool joins them.
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    submitted: AtomicU64,
}

impl Pool {
    /// For `workers` workers: whoever waits for a task is one of them, so one thread fewer is started.
    pub(crate) fn new(workers: NonZeroUsize) -> std::io::Result<Self> {
        let shared = Arc::new(Shared {
            tasks: Mutex::new(Tasks::default()),
            work: Condvar::new(),
            epoch: AtomicU64::new(0),
        });
        let mut pool = Self {
            shared,
            threads: Vec::with_capacity(workers.get() - 1),
            submitted: AtomicU64::new(0),
        };
        for index in 1..workers.get() {
            let shared = Arc::clone(&pool.shared);
            let thread = std::thread::Builder::new()
                .name(format!("galerne-cpu-{index}"))
                .spawn(move || work(&shared, index))?;
            pool.threads.push(thread);
        }
        Ok(pool)
    }

    /// Number of workers.
    pub(crate) fn workers(&self) -> usize {
        self.threads.len() + 1
    }

    /// Lets the pool's threads begin a job and returns at once. Whoever submits it must [`Pool::wait`] for it.
    pub(crate) fn submit(&self, job: Box<dyn Job>) -> Arc<Task> {
        let task = Arc::new(Task {
            id: self.submitted.fetch_add(1, Ordering::Relaxed) + 1,
            job,
            count: self.workers(),
            meeting: Meeting::default(),
            panic: Mutex::new(None),
            inside: AtomicUsize::new(0),
        });
        self.shared.change(|tasks| tasks.open.push(Arc::clone(&task)));
        task
    }

    /// Works on a task as worker 0 until it is done. An error is the message of a panic.
    pub(crate) fn wait(&self, task: &Arc<Task>) -> Result<(), String> {
        task.run_part(0);
        lock(&self.shared.tasks)
            .open
            .retain(|open| !Arc::ptr_eq(open, task));
        lock(&task.panic).clone().map_or(Ok(()), Err)
    }
}

impl Shared {
    /// Changes the list and tells idle threads.
    fn change(&self, change: impl FnOnce(&mut Tasks)) {
        let mut tasks = lock(&self.tasks);
        change(&mut tasks);
        // Under the lock, so that no thread goes to sleep between looking at the list and the news.
        self.epoch.fetch_add(1, Ordering::SeqCst);
        drop(tasks);
        self.work.notify_all();
    }

    /// Enters the newest task other than `left`, where the thread comes from; `None` when the pool stops.
    fn next_task(&self, left: u64) -> Option<Arc<Task>> {
        let mut tired = false;
        loop {
            let mut tasks = lock(&self.tasks);
            if tasks.stopping {
                return None;
            }
            if let Some(task) = tasks.open.iter().rfind(|task| task.id != left) {
                task.inside.fetch_add(1, Ordering::Relaxed);
                return Some(Arc::clone(task));
            }
            let seen = self.epoch.load(Ordering::SeqCst);
            if tired {
                tasks = self.work.wait(tasks).unwrap_or_else(PoisonError::into_inner);
                drop(tasks);
                tired = false;
            } else {
                drop(tasks);
                let news = || self.epoch.load(Ordering::SeqCst) != seen;
                tired = !spin_until(SPIN_IDLE, std::thread::yield_now, news);
            }
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.change(|tasks| tasks.stopping = true);
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
fn spin_until(limit: Duration, pause: impl Fn(), ready: impl Fn() -> bool) -> bool {
    let mut start = None;
    loop {
        for _ in 0..64 {
            if ready() {
                return true;
            }
            std::hint::spin_loop();
        }
        pause();
        if start.get_or_insert_with(Instant::now).elapsed() > limit {
            return false;
        }
    }
}

fn work(shared: &Shared, index: usize) {
    let mut left = 0;
    while let Some(task) = shared.next_task(left) {
        task.run_part(index);
        left = task.id;
        task.inside.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Count {
        parts: Arc<AtomicUsize>,
        tickets: [Ticket; 2],
        units: usize,
    }

    impl Job for Count {
        fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned> {
            worker.run(&self.tickets[0], self.units, |piece| {
                self.parts.fetch_add(piece.len(), Ordering::Relaxed);
            })?;
            assert_eq!(self.parts.load(Ordering::Relaxed) % self.units, 0);
            worker.run(&self.tickets[1], self.units, |_| {})
        }
    }

    struct Dies {
        ticket: Ticket,
    }

    impl Job for Dies {
        fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned> {
            worker.run(&self.ticket, 100, |piece| {
                assert!(!piece.contains(&20), "as planned");
            })
        }
    }

    #[test]
    fn claims_and_thefts_cover_every_share_once() {
        let cases = [
            (1, 7, 1),
            (2, 1, 1),
            (3, 100, 1),
            (4, 3, 1),
            (5, 64, 1),
            (2, 36, 4),
            (3, 7, 4),
        ];
        for (workers, total, multiple) in cases {
            let ticket = Ticket::new(workers);
            let mut taken = vec![0; total];
            let mut take = |piece: Option<Range<usize>>| {
                piece
                    .map(|piece| piece.for_each(|unit| taken[unit] += 1))
                    .is_some()
            };
            let claim = |worker| ticket.claim(worker, total, multiple);
            let steal = |worker| ticket.steal(worker, total, multiple);
            // The first worker comes alone and does what the others leave; then the others come too late.
            while take(claim(0)) {}
            take(claim(workers - 1));
            while take(steal(0)) {}
            for worker in 0..workers {
                assert!(!take(claim(worker)) && !take(steal(worker)));
            }
            assert_eq!(taken, vec![1; total], "{workers} workers");
        }
    }

    #[test]
    fn pieces_are_multiples_while_there_are_as_many() {
        let ticket = Ticket::new(2);
        let pieces: Vec<_> = std::iter::from_fn(|| ticket.claim(1, 37, 4)).collect();
        assert_eq!(pieces, [18..30, 30..34, 34..37]);
    }

    #[test]
    fn every_unit_is_handed_out_once_however_many_workers() {
        for workers in 1..5 {
            let pool = Pool::new(NonZeroUsize::new(workers).unwrap()).unwrap();
            let parts = Arc::new(AtomicUsize::new(0));
            for _ in 0..200 {
                let task = pool.submit(Box::new(Count {
                    parts: Arc::clone(&parts),
                    tickets: [Ticket::new(workers), Ticket::new(workers)],
                    units: 37,
                }));
                pool.wait(&task).unwrap();
                task.wait_empty();
            }
            assert_eq!(parts.load(Ordering::Relaxed), 200 * 37);
        }
    }

    #[test]
    fn tasks_of_several_programs_do_not_wait_for_each_other() {
        let pool = Pool::new(NonZeroUsize::new(3).unwrap()).unwrap();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    let parts = Arc::new(AtomicUsize::new(0));
                    for _ in 0..100 {
                        let task = pool.submit(Box::new(Count {
                            parts: Arc::clone(&parts),
                            tickets: [Ticket::new(3), Ticket::new(3)],
                            units: 11,
                        }));
                        pool.wait(&task).unwrap();
                    }
                    assert_eq!(parts.load(Ordering::Relaxed), 1_100);
                });
            }
        });
    }

    #[test]
    fn a_panic_in_one_worker_is_an_error_and_the_pool_lives_on() {
        let pool = Pool::new(NonZeroUsize::new(3).unwrap()).unwrap();
        let task = pool.submit(Box::new(Dies {
            ticket: Ticket::new(3),
        }));
        let error = pool.wait(&task).unwrap_err();
        assert!(error.contains("as planned"), "{error}");
        let parts = Arc::new(AtomicUsize::new(0));
        let task = pool.submit(Box::new(Count {
            parts: Arc::clone(&parts),
            tickets: [Ticket::new(3), Ticket::new(3)],
            units: 5,
        }));
        pool.wait(&task).unwrap();
        assert_eq!(parts.load(Ordering::Relaxed), 5);
    }
}
