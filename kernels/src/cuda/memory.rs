//! Device memory: one planner says where everything of a program lies before a byte is taken, and owned allocations.
//! Knows no kernel.

use std::sync::Arc;

use super::driver::{DevicePtr, Driver, DriverError, HostPtr};
use crate::device::{DeviceError, MemoryUse};

/// Every region begins at a multiple of this: what tensor maps and 16-byte accesses ask for, with room to spare.
pub const ALIGNMENT_BYTES: usize = 256;

/// What a region is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// Weights and tables that do not change.
    Weights,
    /// The KV pool.
    Kv,
    /// Buffers of a step, workspaces, step tables, rooms of the sampler.
    Workspace,
}

impl Purpose {
    const fn name(self) -> &'static str {
        match self {
            Self::Weights => "weights",
            Self::Kv => "the KV pool",
            Self::Workspace => "buffers and workspaces",
        }
    }
}

/// Bytes `offset .. offset + bytes` of a program's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Region {
    /// From the beginning of the program's memory; a multiple of [`ALIGNMENT_BYTES`].
    pub offset: usize,
    /// Its size.
    pub bytes: usize,
}

/// Lays regions out one after the other, within a budget.
#[derive(Debug)]
pub struct Planner {
    budget_bytes: usize,
    next: usize,
    memory: MemoryUse,
}

impl Planner {
    /// For a program that may take so many bytes.
    #[must_use]
    pub fn new(budget_bytes: usize) -> Self {
        Self {
            budget_bytes,
            next: 0,
            memory: MemoryUse::default(),
        }
    }

    /// A region of so many bytes, which may be 0.
    ///
    /// # Errors
    /// It does not fit the budget; nothing was taken then.
    pub fn take(&mut self, purpose: Purpose, bytes: usize) -> Result<Region, DeviceError> {
        let refused = || DeviceError::Memory {
            what: purpose.name(),
            needed_bytes: bytes,
        };
        let padded = bytes
            .checked_next_multiple_of(ALIGNMENT_BYTES)
            .ok_or_else(refused)?;
        let end = self.next.checked_add(padded).ok_or_else(refused)?;
        if end > self.budget_bytes {
            return Err(refused());
        }
        let region = Region {
            offset: self.next,
            bytes,
        };
        self.next = end;
        *match purpose {
            Purpose::Weights => &mut self.memory.weight_bytes,
            Purpose::Kv => &mut self.memory.kv_bytes,
            Purpose::Workspace => &mut self.memory.workspace_bytes,
        } += padded;
        Ok(region)
    }

    /// Bytes of all regions together.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.next
    }

    /// The same by purpose.
    #[must_use]
    pub const fn memory(&self) -> MemoryUse {
        self.memory
    }
}

/// Device memory that is given back when dropped.
pub struct DeviceMemory {
    driver: Arc<dyn Driver>,
    at: DevicePtr,
    bytes: usize,
}

impl DeviceMemory {
    /// Takes memory of any content.
    ///
    /// # Errors
    /// There is not so much.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, DriverError> {
        Ok(Self {
            at: driver.allocate(bytes)?,
            driver: Arc::clone(driver),
            bytes,
        })
    }

    /// The address of a region in it.
    ///
    /// # Panics
    /// The region is not in it: a host bug.
    #[must_use]
    pub fn address(&self, region: Region) -> DevicePtr {
        assert!(region.offset + region.bytes <= self.bytes);
        self.at.offset(region.offset)
    }
}

impl Drop for DeviceMemory {
    fn drop(&mut self) {
        // What is enqueued may still use it; a lost device uses nothing.
        let _ = self.driver.finish();
        // SAFETY: `new` allocated it, and nothing runs any more.
        unsafe { self.driver.release(self.at) };
    }
}

/// Pinned host memory that is given back when dropped.
pub struct HostMemory {
    driver: Arc<dyn Driver>,
    at: HostPtr,
    bytes: usize,
}

impl HostMemory {
    /// Takes zeroed memory.
    ///
    /// # Errors
    /// There is not so much.
    pub fn new(driver: &Arc<dyn Driver>, bytes: usize) -> Result<Self, DriverError> {
        Ok(Self {
            at: driver.allocate_host(bytes)?,
            driver: Arc::clone(driver),
            bytes,
        })
    }

    /// Its address.
    #[must_use]
    pub const fn ptr(&self) -> HostPtr {
        self.at
    }

    /// Its bytes.
    ///
    /// # Safety
    /// No copy from or to it is enqueued.
    #[must_use]
    pub unsafe fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: allocated and zeroed with this size; exclusive by `&mut self` and the contract.
        unsafe { std::slice::from_raw_parts_mut(self.at.0, self.bytes) }
    }
}

impl Drop for HostMemory {
    fn drop(&mut self) {
        let _ = self.driver.finish();
        // SAFETY: `new` allocated it, and nothing runs any more.
        unsafe { self.driver.release_host(self.at) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn purpose() -> impl Strategy<Value = Purpose> {
        prop_oneof![
            Just(Purpose::Weights),
            Just(Purpose::Kv),
            Just(Purpose::Workspace)
        ]
    }

    proptest! {
        #[test]
        fn regions_are_aligned_apart_and_within_the_budget(
            budget in 0usize..100_000,
            asked in prop::collection::vec((purpose(), prop_oneof![0usize..20_000, Just(usize::MAX)]), 0..40),
        ) {
            let mut planner = Planner::new(budget);
            let mut regions: Vec<Region> = vec![];
            for (purpose, bytes) in asked {
                let before = planner.bytes();
                match planner.take(purpose, bytes) {
                    Ok(region) => {
                        prop_assert_eq!(region.bytes, bytes);
                        prop_assert!(region.offset.is_multiple_of(ALIGNMENT_BYTES));
                        prop_assert!(region.offset + region.bytes <= planner.bytes());
                        for other in &regions {
                            let apart = other.offset + other.bytes <= region.offset || region.offset + region.bytes <= other.offset;
                            prop_assert!(apart, "{:?} and {:?}", other, region);
                        }
                        regions.push(region);
                    }
                    Err(error) => {
                        let padded = bytes.checked_next_multiple_of(ALIGNMENT_BYTES);
                        let fits = padded.and_then(|b| b.checked_add(before)).is_some_and(|end| end <= budget);
                        prop_assert!(!fits, "refused what fits: {error}");
                        prop_assert_eq!(planner.bytes(), before);
                    }
                }
                prop_assert!(planner.bytes() <= budget);
            }
            let memory = planner.memory();
            prop_assert_eq!(memory.weight_bytes + memory.kv_bytes + memory.workspace_bytes, planner.bytes());
        }
    }
}
