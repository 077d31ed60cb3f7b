//! A store's state: what it may hold (memory, tables, instances), and its way to the host. Knows no guest and no call.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use galerne_core::limits::GuestLimits;
use galerne_core::pipeline::{GenerationId, Outcome};
use wasmtime::ResourceLimiter;

use crate::capability::asking::Asking;

/// Core instances of one component. A Rust guest whose resources have destructors is a main instance and two
/// small ones that tie the knot. An interpreter is linked of shared libraries, each an instance: QuickJS has 13, CPython 38
/// and one more for each native library that a guest brings.
pub(crate) const CORE_INSTANCES_MAX: u32 = 64;
/// Linear memories of one component. QuickJS has one and two empty ones.
pub(crate) const MEMORIES_MAX: u32 = 4;
/// Tables of one component.
pub(crate) const TABLES_MAX: u32 = 8;

/// A growth that was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Denied {
    /// Linear memory.
    Memory {
        /// Bytes all memories would have had together.
        wanted_bytes: usize,
        /// Bytes they may have.
        limit_bytes: usize,
    },
    /// A table.
    Table {
        /// Elements the table would have had.
        wanted: usize,
        /// Elements it may have.
        limit: usize,
    },
}

impl Denied {
    /// The limit's name.
    pub(crate) fn name(&self) -> &'static str {
        match self {
            Self::Memory { .. } => "memory_bytes_max",
            Self::Table { .. } => "table_elements_max",
        }
    }
}

impl fmt::Display for Denied {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Memory {
                wanted_bytes,
                limit_bytes,
            } => {
                write!(f, "memory of at most {limit_bytes} bytes, wanted {wanted_bytes}")
            }
            Self::Table { wanted, limit } => write!(f, "tables of at most {limit} elements, wanted {wanted}"),
        }
    }
}

/// The state of a store: its limits and what it uses of them.
#[derive(Debug)]
pub(crate) struct StoreState {
    memory_bytes_max: usize,
    table_elements_max: usize,
    memory_bytes: usize,
    pending_bytes: usize,
    denied: Option<Denied>,
    asking: Asking,
    /// Of the call under way, what is left of its time after the part before.
    pub(crate) later_ticks: u64,
    /// How long the guest's last call took, without what it waited for the host.
    pub(crate) last_call: Duration,
    /// What a pipeline's generations came to, until they are dropped.
    pub(crate) outcomes: BTreeMap<GenerationId, Outcome>,
}

impl StoreState {
    /// Nothing used yet.
    pub(crate) fn new(limits: &GuestLimits) -> Self {
        Self {
            memory_bytes_max: limits.memory_bytes_max,
            table_elements_max: limits.table_elements_max,
            memory_bytes: 0,
            pending_bytes: 0,
            denied: None,
            asking: Asking::default(),
            later_ticks: 0,
            last_call: Duration::ZERO,
            outcomes: BTreeMap::new(),
        }
    }

    /// Its way to the host.
    pub(crate) fn asking(&mut self) -> &mut Asking {
        &mut self.asking
    }

    /// All linear memories together.
    pub(crate) fn memory_bytes(&self) -> usize {
        self.memory_bytes
    }

    /// The last refused growth since this was last asked.
    pub(crate) fn take_denied(&mut self) -> Option<Denied> {
        self.denied.take()
    }
}

impl ResourceLimiter for StoreState {
    fn memory_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        let growth = desired.saturating_sub(current);
        let wanted_bytes = self.memory_bytes.saturating_add(growth);
        if wanted_bytes > self.memory_bytes_max {
            self.denied = Some(Denied::Memory {
                wanted_bytes,
                limit_bytes: self.memory_bytes_max,
            });
            return Ok(false);
        }
        self.memory_bytes = wanted_bytes;
        self.pending_bytes = growth;
        Ok(true)
    }

    fn memory_grow_failed(&mut self, error: wasmtime::Error) -> wasmtime::Result<()> {
        // Counted when it was allowed, but it did not happen.
        self.memory_bytes -= std::mem::take(&mut self.pending_bytes);
        tracing::debug!(%error, "a guest's memory could not grow");
        Ok(())
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        if desired > self.table_elements_max {
            self.denied = Some(Denied::Table {
                wanted: desired,
                limit: self.table_elements_max,
            });
            return Ok(false);
        }
        Ok(true)
    }

    fn instances(&self) -> usize {
        CORE_INSTANCES_MAX as usize
    }

    fn tables(&self) -> usize {
        TABLES_MAX as usize
    }

    fn memories(&self) -> usize {
        MEMORIES_MAX as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state(memory_bytes_max: usize) -> StoreState {
        StoreState::new(&GuestLimits {
            memory_bytes_max,
            ..GuestLimits::default()
        })
    }

    #[test]
    fn memories_are_counted_together() {
        let mut state = state(100);
        assert!(state.memory_growing(0, 60, None).expect("allowed"));
        assert!(!state.memory_growing(0, 60, None).expect("denied, not failed"));
        assert_eq!(
            state.take_denied(),
            Some(Denied::Memory {
                wanted_bytes: 120,
                limit_bytes: 100
            })
        );
        assert_eq!(state.take_denied(), None);
        assert!(state.memory_growing(60, 100, None).expect("allowed"));
    }

    #[test]
    fn a_growth_that_failed_is_not_counted() {
        let mut state = state(100);
        assert!(state.memory_growing(0, 100, None).expect("allowed"));
        state
            .memory_grow_failed(wasmtime::Error::msg("no memory"))
            .expect("no trap");
        assert!(state.memory_growing(0, 100, None).expect("allowed again"));
    }
}
