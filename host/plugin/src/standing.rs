//! How threads that run tenants' guests give way to the model's. Knows no guest.
//!
//! The forward pass has a thread on every core, and a tenant's code must not make it late. A cell may use a little time like
//! anybody; beyond it ([`Share`]) its threads stand back: they run when no other thread of the host wants their core
//! (`SCHED_IDLE`). Lower niceness would not do: there a running guest keeps its core to the end of its time slice, which is
//! as long as a decode step (one loop beside a stream on two cores: ITL p99 +45% at niceness 0, +20% at 19, within the noise so).

use std::cell::Cell;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};

/// What a cell may use at once.
const AT_ONCE: Duration = Duration::from_millis(20);
/// What it may use all the time: one part of so many of the machine's.
const PARTS: u32 = 100;

/// CPU time that a cell uses, as a leaky bucket.
#[derive(Debug)]
pub(crate) struct Share {
    cores: u32,
    // A std Mutex: held to add.
    used: Mutex<(Duration, Instant)>,
}

impl Share {
    /// Of this machine.
    pub(crate) fn of_this_machine() -> Self {
        Self::new(std::thread::available_parallelism().map_or(1, usize::from))
    }

    fn new(cores: usize) -> Self {
        Self {
            cores: u32::try_from(cores).unwrap_or(u32::MAX),
            used: Mutex::new((Duration::ZERO, Instant::now())),
        }
    }

    /// Whether the cell has used more than it may, so that it has to stand back.
    pub(crate) fn is_spent(&self) -> bool {
        self.now().0 > AT_ONCE
    }

    /// Runs what the cell's share pays for; stands back before it if nothing is left. What is within it is paid for with it: asking
    /// for a thread's time takes about a tenth of what a quick call does, so a round of them asks once.
    pub(crate) fn pay_for<T>(&self, run: impl FnOnce() -> T) -> T {
        if PAYS.get() {
            return run();
        }
        if self.is_spent() {
            stand_back();
        }
        let paying = Paying::begin();
        let before = thread_time();
        let result = run();
        self.took(thread_time().saturating_sub(before));
        drop(paying);
        result
    }

    /// The cell has used so much more.
    pub(crate) fn took(&self, time: Duration) {
        // However much it was, what is over is forgiven soon after the last.
        let mut used = self.now();
        used.0 = (used.0 + time).min(2 * AT_ONCE);
    }

    fn now(&self) -> MutexGuard<'_, (Duration, Instant)> {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let may = now.duration_since(used.1).saturating_mul(self.cores) / PARTS;
        *used = (used.0.saturating_sub(may), now);
        used
    }
}

/// A thread's place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Place {
    /// Where every thread is; it stays there.
    Fixed,
    /// There too, until it has to stand back.
    Front,
    /// Behind all others, for good: coming back would take a privilege.
    Back,
}

thread_local! {
    static PLACE: Cell<Place> = const { Cell::new(Place::Fixed) };
    /// Whether the cell's share pays for what this thread does.
    static PAYS: Cell<bool> = const { Cell::new(false) };
}

/// While this lives, the cell's share pays for what the thread does. Ends in a panic too.
struct Paying;

impl Paying {
    fn begin() -> Self {
        PAYS.set(true);
        Self
    }
}

impl Drop for Paying {
    fn drop(&mut self) {
        PAYS.set(false);
    }
}

/// Lets [`stand_back`] move this thread.
pub(crate) fn may_stand_back() {
    PLACE.set(Place::Front);
}

/// Whether this thread stands back.
pub(crate) fn stands_back() -> bool {
    PLACE.get() == Place::Back
}

/// From now on this thread runs when no other wants its core, if it is one that may be moved.
pub(crate) fn stand_back() {
    if PLACE.get() == Place::Front {
        // A system that does not allow it is asked once per thread.
        PLACE.set(if run_idle() { Place::Back } else { Place::Fixed });
    }
}

/// CPU time of this thread.
fn thread_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

#[expect(
    unsafe_code,
    reason = "no safe wrapper sets the scheduling policy of the calling thread"
)]
fn run_idle() -> bool {
    let param = libc::sched_param { sched_priority: 0 };
    // SAFETY: 0 is the calling thread, and `param` is only read, during the call. By number: musl has a function of that name
    // that does nothing.
    let result = unsafe {
        libc::syscall(
            libc::SYS_sched_setscheduler,
            0 as libc::c_long,
            libc::c_long::from(libc::SCHED_IDLE),
            &raw const param,
        )
    };
    result == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_share_is_spent_by_much_and_comes_back_with_time() {
        let share = Share::new(1);
        share.took(AT_ONCE / 2);
        assert!(!share.is_spent());
        share.took(Duration::from_secs(100));
        assert!(share.is_spent());
        // As if that had been a minute ago.
        share.used.lock().expect("whole").1 -= Duration::from_mins(1);
        assert!(!share.is_spent());
    }

    #[test]
    fn what_is_within_a_round_is_paid_for_once() {
        let busy = |time: Duration| {
            let begin = thread_time();
            while thread_time() - begin < time {}
        };
        let part = AT_ONCE / 5;
        let share = Share::new(1);
        share.pay_for(|| {
            share.pay_for(|| busy(part));
            assert_eq!(share.now().0, Duration::ZERO, "the round pays");
            busy(part);
        });
        // No less the part of the machine that the cell may use all the time.
        let (used, _) = *share.now();
        assert!((part / 4..4 * part).contains(&used), "{used:?}");
        let broken = std::panic::catch_unwind(|| share.pay_for(|| panic!("expected by this test")));
        assert!(broken.is_err() && !PAYS.get());
    }

    #[test]
    fn a_thread_stands_back_if_it_may() {
        let stood = |may: bool| {
            let thread = std::thread::spawn(move || {
                if may {
                    may_stand_back();
                }
                stand_back();
                let policy = std::fs::read_to_string("/proc/thread-self/sched").unwrap_or_default();
                (
                    stands_back(),
                    policy
                        .lines()
                        .any(|line| line.starts_with("policy") && line.ends_with(" 5")),
                )
            });
            thread.join().expect("no panic")
        };
        assert_eq!(stood(false), (false, false));
        let (stands, is_idle) = stood(true);
        assert!(stands, "any thread may stand back");
        assert!(is_idle || !std::fs::exists("/proc/thread-self/sched").unwrap_or(false));
    }
}
