//! Counts guests' failures by their kind, their time and their memory, and their fuel by name. Knows no guest.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use galerne_core::guest::{GuestError, GuestStats};

/// Since the host started.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    deadlines: AtomicU64,
    limits: AtomicU64,
    traps: AtomicU64,
    bad_answers: AtomicU64,
    lost: AtomicU64,
    busy_us: AtomicU64,
    memory_peak_bytes: AtomicU64,
    // A std Mutex: held for an addition, and only where fuel is counted.
    fuel: Mutex<BTreeMap<Arc<str>, u64>>,
}

impl Counters {
    /// Counts a call's own time, and the memory its instance had at its end.
    pub(crate) fn called(&self, own: Duration, memory_bytes: usize) {
        let own_us = u64::try_from(own.as_micros()).unwrap_or(u64::MAX);
        self.busy_us.fetch_add(own_us, Ordering::Relaxed);
        self.memory_peak_bytes
            .fetch_max(memory_bytes as u64, Ordering::Relaxed);
    }

    /// Counts the fuel of a call.
    pub(crate) fn spent(&self, guest: &Arc<str>, fuel: u64) {
        let mut spent = self.fuel.lock().unwrap_or_else(PoisonError::into_inner);
        *spent.entry(Arc::clone(guest)).or_default() += fuel;
    }

    /// All fuel so far, by guest.
    pub(crate) fn fuel(&self) -> Vec<(String, u64)> {
        let spent = self.fuel.lock().unwrap_or_else(PoisonError::into_inner);
        spent
            .iter()
            .map(|(guest, fuel)| (guest.to_string(), *fuel))
            .collect()
    }

    /// Counts an error that ends a guest's request. A refusal is an answer like any other, and what is never loaded fails
    /// nobody's request.
    pub(crate) fn note(&self, error: &GuestError) {
        let counter = match error {
            GuestError::Deadline { .. } => &self.deadlines,
            GuestError::Limit { .. } => &self.limits,
            GuestError::Trap { .. } => &self.traps,
            GuestError::Plan { .. } | GuestError::Answer { .. } => &self.bad_answers,
            GuestError::Process { .. } => &self.lost,
            GuestError::Refused { .. } | GuestError::Link { .. } => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    /// What was counted; of cells nothing is known here.
    pub(crate) fn stats(&self) -> GuestStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        GuestStats {
            deadlines: read(&self.deadlines),
            limits: read(&self.limits),
            traps: read(&self.traps),
            bad_answers: read(&self.bad_answers),
            lost: read(&self.lost),
            busy_us: read(&self.busy_us),
            memory_peak_bytes: read(&self.memory_peak_bytes),
            ..GuestStats::default()
        }
    }
}
