//! Storage of KV blocks: who holds which, which are free and in what order they are reused.
//! Knows nothing of tokens or of what the prefix index makes of a block's content.

use std::collections::{BTreeMap, VecDeque};

use galerne_core::ids::{BlockId, TenantId};

use crate::stats::IntegrityError;

/// A block taken from the free list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    /// The block, held once.
    pub block: BlockId,
    /// It still had cached content: the prefix index must forget it.
    pub was_cached: bool,
    /// It last belonged to another tenant: the device must zero it.
    pub needs_zero: bool,
}

/// Where a block is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// Held by so many sequences, at least 1.
    Held(u32),
    /// Free without useful content.
    Empty,
    /// Free, but the prefix index knows its content; the stamp is its place in the reuse order.
    Cached(u64),
}

/// Reference-counted blocks. Empty ones are reused first, the last one freed before those no sequence ever had: a pool that is
/// never full takes no more memory than its fullest moment did. Then cached ones, least recently freed first.
#[derive(Debug)]
pub struct BlockPool {
    states: Vec<State>,
    owners: Vec<Option<TenantId>>,
    empty: VecDeque<BlockId>,
    cached: BTreeMap<u64, BlockId>,
    clock: u64,
}

impl BlockPool {
    /// A pool of `blocks` empty blocks.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        let ids = (0..u32::try_from(blocks).unwrap_or(u32::MAX)).map(BlockId);
        let empty: VecDeque<_> = ids.collect();
        Self {
            states: vec![State::Empty; empty.len()],
            owners: vec![None; empty.len()],
            empty,
            cached: BTreeMap::new(),
            clock: 0,
        }
    }

    /// Blocks in the pool.
    #[must_use]
    pub fn total(&self) -> usize {
        self.states.len()
    }

    /// Blocks nobody holds, cached ones included.
    #[must_use]
    pub fn free(&self) -> usize {
        self.empty.len() + self.cached.len()
    }

    /// Blocks nobody holds whose content the prefix index knows.
    #[must_use]
    pub fn cached(&self) -> usize {
        self.cached.len()
    }

    /// Whether nobody holds the block.
    #[must_use]
    pub fn is_free(&self, block: BlockId) -> bool {
        !matches!(self.states[block.index()], State::Held(_))
    }

    /// Takes a free block for `tenant`, or `None` if all are held.
    pub fn take(&mut self, tenant: TenantId) -> Option<Taken> {
        let (block, was_cached) = match self.empty.pop_front() {
            Some(block) => (block, false),
            None => (self.cached.pop_first()?.1, true),
        };
        self.states[block.index()] = State::Held(1);
        let before = self.owners[block.index()].replace(tenant);
        Some(Taken {
            block,
            was_cached,
            needs_zero: before.is_some_and(|owner| owner != tenant),
        })
    }

    /// Holds a block once more; one that is free and cached leaves the free list.
    ///
    /// # Panics
    /// If the block is empty: only content the prefix index knows can be shared.
    pub fn hold(&mut self, block: BlockId) {
        let state = &mut self.states[block.index()];
        match *state {
            State::Held(count) => *state = State::Held(count + 1),
            State::Cached(stamp) => {
                self.cached.remove(&stamp);
                *state = State::Held(1);
            }
            State::Empty => panic!("block {block} is shared while empty"),
        }
    }

    /// Gives up one hold. The last one frees the block: to the cached ones if `keep`, else to the empty ones.
    ///
    /// # Panics
    /// If nobody holds the block.
    pub fn release(&mut self, block: BlockId, keep: bool) {
        let state = &mut self.states[block.index()];
        match *state {
            State::Held(1) if keep => {
                self.clock += 1;
                *state = State::Cached(self.clock);
                self.cached.insert(self.clock, block);
            }
            State::Held(1) => {
                *state = State::Empty;
                self.empty.push_front(block);
            }
            State::Held(count) => *state = State::Held(count - 1),
            State::Empty | State::Cached(_) => panic!("block {block} is released while free"),
        }
    }

    /// Compares the pool with the holds its users know of, and itself.
    ///
    /// # Errors
    /// The first difference.
    pub fn check(&self, holds: &[u32]) -> Result<(), IntegrityError> {
        IntegrityError::check("length of the hold table", &self.total(), &holds.len())?;
        let mut free = 0;
        for (index, (state, held)) in self.states.iter().zip(holds).enumerate() {
            let counted = match state {
                State::Held(count) => *count,
                State::Empty | State::Cached(_) => 0,
            };
            IntegrityError::check("holds of a block", &(index, *held), &(index, counted))?;
            free += usize::from(counted == 0);
        }
        IntegrityError::check("free blocks", &free, &self.free())?;
        for block in &self.empty {
            IntegrityError::check(
                "state of an empty block",
                &State::Empty,
                &self.states[block.index()],
            )?;
        }
        for (stamp, block) in &self.cached {
            let state = &self.states[block.index()];
            IntegrityError::check("state of a cached block", &State::Cached(*stamp), state)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: TenantId = TenantId(1);
    const B: TenantId = TenantId(2);

    #[test]
    fn empty_blocks_go_first_then_the_least_recently_freed() {
        let mut pool = BlockPool::new(3);
        let blocks: Vec<_> = (0..3).filter_map(|_| pool.take(A)).map(|t| t.block).collect();
        assert_eq!(pool.take(A), None);
        pool.release(blocks[1], true);
        pool.release(blocks[0], true);
        pool.release(blocks[2], false);
        let order: Vec<_> = (0..3).filter_map(|_| pool.take(A)).collect();
        assert_eq!(
            order.iter().map(|t| t.block).collect::<Vec<_>>(),
            [blocks[2], blocks[1], blocks[0]]
        );
        assert_eq!(
            order.iter().map(|t| t.was_cached).collect::<Vec<_>>(),
            [false, true, true]
        );
    }

    #[test]
    fn a_shared_block_is_freed_by_its_last_holder() {
        let mut pool = BlockPool::new(1);
        let block = pool.take(A).expect("a free block").block;
        pool.hold(block);
        pool.release(block, true);
        assert_eq!(pool.free(), 0);
        pool.release(block, true);
        assert_eq!((pool.free(), pool.cached()), (1, 1));
        pool.hold(block);
        assert_eq!((pool.free(), pool.cached()), (0, 0));
        pool.check(&[1]).expect("sound");
        pool.check(&[2]).expect_err("one hold is unaccounted for");
    }

    #[test]
    fn a_block_is_zeroed_only_between_tenants() {
        let mut pool = BlockPool::new(1);
        let zeroed = |pool: &mut BlockPool, tenant| {
            let taken = pool.take(tenant).expect("a free block");
            pool.release(taken.block, false);
            taken.needs_zero
        };
        assert!(!zeroed(&mut pool, A));
        assert!(!zeroed(&mut pool, A));
        assert!(zeroed(&mut pool, B));
        assert!(zeroed(&mut pool, A));
    }
}
