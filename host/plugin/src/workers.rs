//! Threads that run jobs from one bounded queue, first come, first served. Knows no guest.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::standing::{self, Share};

/// A grammar's expressions may be nested thousands deep. Only what is used of a stack is memory.
pub(crate) const GRAMMAR_STACK_BYTES: usize = 64 << 20;
/// Enough for a guest's call and all around it.
pub(crate) const GUEST_STACK_BYTES: usize = 4 << 20;

/// Most threads that answer samplers and grammars.
pub(crate) const WORKERS_MAX: usize = 64;

/// Something a worker does.
pub(crate) type Job = Box<dyn FnOnce() + Send>;

/// The queue is full, or there are no threads.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct NoRoom;

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
    /// Threads there are.
    threads: usize,
    /// Those of them that wait for a job or have just been started.
    idle: usize,
    /// Those that wait for a job and stand back.
    idle_behind: usize,
    closed: bool,
}

/// What is quick.
pub(crate) const QUICK_MAX: Duration = Duration::from_millis(5);
/// With so many more quick jobs than one has another thread is worth waking up: that takes as long as a few of them.
const JOBS_EACH: usize = 8;
/// How often a thread that stands back and has nothing to do looks whether it still has to.
const BEHIND_MAX: Duration = Duration::from_secs(1);
/// For how long a helper that was held by a job helps no more.
const HELPLESS: Duration = Duration::from_secs(1);

struct Shared {
    // A std Mutex and Condvar: a job is pushed every few milliseconds, and a parked thread leaves its core to the
    // kernels. Spinning would save some microseconds of wake-up and cost the forward pass a core.
    queue: Mutex<Queue>,
    pushed: Condvar,
    // A std Mutex: looked at once per round of help.
    helpless_until: Mutex<Option<Instant>>,
    /// In a cell: what its guests may use before its threads stand back.
    share: Option<Arc<Share>>,
}

/// The threads, which are started when there is something for them to do. They end when this is dropped, each after its
/// current job; nobody waits for them, because the last owner may be one of them.
pub(crate) struct Workers {
    shared: Arc<Shared>,
    threads_max: usize,
    stack_bytes: usize,
    helped: bool,
}

impl Workers {
    /// At most `threads_max` threads over a queue of at most `jobs_max` waiting jobs. In a cell, where there is a `share`, they
    /// may [stand back](standing::stand_back): those that do serve as long as it is spent, then others take their place.
    pub(crate) fn new(
        threads_max: usize,
        jobs_max: usize,
        stack_bytes: usize,
        share: Option<Arc<Share>>,
    ) -> Self {
        let queue = Queue {
            jobs: VecDeque::new(),
            jobs_max,
            threads: 0,
            idle: 0,
            idle_behind: 0,
            closed: false,
        };
        let shared = Shared {
            queue: Mutex::new(queue),
            pushed: Condvar::new(),
            helpless_until: Mutex::default(),
            share,
        };
        Self {
            shared: Arc::new(shared),
            threads_max,
            stack_bytes,
            helped: false,
        }
    }

    /// Puts a job at the end of the queue.
    pub(crate) fn push(&self, nature: Nature, job: Job) -> Result<(), NoRoom> {
        let mut queue = self.shared.queue();
        if queue.jobs.len() >= queue.jobs_max {
            return Err(NoRoom);
        }
        queue.jobs.push_back((nature, job));
        // Whoever helps comes for quick jobs right away; a thread that wakes up too would only be in the way.
        if self.helped && nature == Nature::Quick {
            return Ok(());
        }
        if let Err(error) = self.man(&mut queue) {
            tracing::error!(%error, "start a thread for guests");
            queue.jobs.pop_back();
            return Err(NoRoom);
        }
        let (idle, behind) = (queue.idle, queue.idle_behind);
        drop(queue);
        match (idle, behind) {
            // Whoever is busy looks for more before it waits.
            (0, 0) => {}
            (_, 0) => self.shared.pushed.notify_one(),
            // Of two kinds of threads the one that wakes up might be the one that leaves it to the other.
            _ => self.shared.pushed.notify_all(),
        }
        Ok(())
    }

    /// Sees to it that there is a thread for each job that waits, as far as there may be, and one in any case.
    fn man(&self, queue: &mut Queue) -> std::io::Result<()> {
        let behind = if self.shared.is_spent() {
            queue.idle_behind
        } else {
            0
        };
        while queue.jobs.len() > queue.idle + behind && queue.threads < self.threads_max {
            let shared = Arc::clone(&self.shared);
            let thread = std::thread::Builder::new()
                .name("guest".to_owned())
                .stack_size(self.stack_bytes);
            match thread.spawn(move || shared.work()) {
                Ok(_) => {
                    queue.threads += 1;
                    queue.idle += 1;
                }
                Err(error) if queue.threads == 0 => return Err(error),
                Err(_) => break,
            }
        }
        Ok(())
    }

    /// The same threads, with somebody who [helps](Self::help) after each round of pushes.
    pub(crate) fn with_help(mut self) -> Self {
        self.helped = true;
        self
    }

    /// Does quick jobs on this thread until none waits; others are the threads'. Whoever helps has other things to do: after a
    /// job that was not quick after all it helps no more for a second.
    pub(crate) fn help(&self) {
        self.call_others();
        self.help_out();
        let mut queue = self.shared.queue();
        if queue.jobs.is_empty() {
            return;
        }
        if let Err(error) = self.man(&mut queue) {
            tracing::error!(%error, "start a thread for guests");
        }
        drop(queue);
        self.shared.pushed.notify_all();
    }

    /// Wakes threads for what is more than one should do.
    fn call_others(&self) {
        let queue = self.shared.queue();
        let others = (queue.jobs.len() / JOBS_EACH).saturating_sub(1).min(queue.idle);
        drop(queue);
        for _ in 0..others {
            self.shared.pushed.notify_one();
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
        let mut round = || {
            let mut begin = Instant::now();
            while let Some(job) = self.shared.next_quick() {
                run(job);
                let end = Instant::now();
                if end - begin > QUICK_MAX {
                    *helpless_until = Some(end + HELPLESS);
                    return;
                }
                begin = end;
            }
        };
        match &self.shared.share {
            Some(share) => share.pay_for(round),
            None => round(),
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

    fn is_spent(&self) -> bool {
        self.share.as_ref().is_some_and(|share| share.is_spent())
    }

    fn work(&self) {
        if self.share.is_some() {
            standing::may_stand_back();
        }
        self.queue().idle -= 1;
        while let Some(job) = self.next() {
            run(job);
        }
    }

    fn next_quick(&self) -> Option<Job> {
        let mut queue = self.queue();
        let quick = queue.jobs.iter().position(|(nature, _)| *nature == Nature::Quick);
        let (_, job) = quick.and_then(|place| queue.jobs.remove(place))?;
        Some(job)
    }

    fn next(&self) -> Option<Job> {
        let mut queue = self.queue();
        loop {
            let is_behind = standing::stands_back();
            // What others wait for is theirs.
            let is_theirs = is_behind && queue.jobs.len() <= queue.idle;
            if !is_theirs && let Some((_, job)) = queue.jobs.pop_front() {
                return Some(job);
            }
            if queue.closed || (is_behind && !self.is_spent()) {
                queue.threads -= 1;
                return None;
            }
            if is_behind {
                queue.idle_behind += 1;
                let woken = self.pushed.wait_timeout(queue, BEHIND_MAX);
                queue = woken.unwrap_or_else(PoisonError::into_inner).0;
                queue.idle_behind -= 1;
            } else {
                queue.idle += 1;
                queue = self.pushed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Barrier, mpsc};

    use super::*;

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn a_full_queue_refuses_and_recovers() {
        let workers = Workers::new(1, 1, GUEST_STACK_BYTES, None);
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
        assert_eq!(workers.push(Nature::Any, Box::new(|| ())), Err(NoRoom));
        release.send(()).expect("the worker waits");
        is_done.recv_timeout(SOON).expect("the second job runs");
    }

    #[test]
    fn a_panicking_job_does_not_end_its_worker() {
        let workers = Workers::new(1, 4, GUEST_STACK_BYTES, None);
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
        let workers = Workers::new(0, 8, GUEST_STACK_BYTES, None);
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
    fn whoever_helps_does_not_do_much_alone() {
        let workers = Workers::new(2, 64, GUEST_STACK_BYTES, None).with_help();
        let (awake, is_awake) = mpsc::channel();
        workers
            .push(
                Nature::Any,
                Box::new(move || awake.send(()).expect("the test waits")),
            )
            .expect("room");
        is_awake.recv_timeout(SOON).expect("a thread runs");
        while workers.shared.queue().idle == 0 {
            std::thread::yield_now();
        }
        let (last, last_ran) = mpsc::channel();
        let (met, has_met) = mpsc::channel();
        let push = |job: Job| workers.push(Nature::Quick, job).expect("room");
        // Holds whoever comes first until somebody else has done the last.
        push(Box::new(move || {
            met.send(last_ran.recv_timeout(SOON).is_ok())
                .expect("the test waits");
        }));
        for _ in 2..2 * JOBS_EACH {
            push(Box::new(|| ()));
        }
        push(Box::new(move || last.send(()).expect("the first waits")));
        workers.help();
        assert_eq!(has_met.recv_timeout(SOON * 2), Ok(true));
    }

    #[test]
    fn every_job_finds_a_thread_and_those_that_stand_back_are_replaced() {
        let share = Arc::new(Share::of_this_machine());
        let workers = Workers::new(3, 8, GUEST_STACK_BYTES, Some(Arc::clone(&share)));
        let (done, is_done) = mpsc::channel();
        // All three threads are needed at once, whatever is left of the round before.
        let round = |stand_back: usize| -> usize {
            let all = Arc::new(Barrier::new(3));
            for number in 0..3 {
                let (all, done) = (Arc::clone(&all), done.clone());
                let job = move || {
                    let stood_back = standing::stands_back();
                    if number < stand_back {
                        standing::stand_back();
                    }
                    all.wait();
                    done.send(stood_back).expect("the test waits");
                };
                workers.push(Nature::Any, Box::new(job)).expect("room");
            }
            let soon = || is_done.recv_timeout(SOON).expect("a thread for each");
            (0..3).filter(|_| soon()).count()
        };
        assert_eq!(round(2), 0);
        // Nothing is spent: they have gone, or go when they see that.
        for stand_back in [3, 0, 1, 2, 3, 3, 0] {
            round(stand_back);
        }
        share.took(Duration::from_secs(1));
        for stand_back in [3, 3, 1, 2, 0] {
            round(stand_back);
        }
        assert_eq!(round(3), 3, "all stand back and serve");
        assert!(workers.shared.queue().threads <= 3);
    }

    #[test]
    fn threads_end_with_their_owner() {
        let workers = Workers::new(2, 4, GUEST_STACK_BYTES, None);
        for _ in 0..2 {
            workers.push(Nature::Any, Box::new(|| ())).expect("room");
        }
        let shared = Arc::downgrade(&workers.shared);
        drop(workers);
        let deadline = Instant::now() + SOON;
        while shared.upgrade().is_some() {
            assert!(Instant::now() < deadline, "a worker still holds the queue");
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
