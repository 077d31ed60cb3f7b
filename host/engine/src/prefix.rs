//! Which KV block holds the keys and values of which tokens. Knows nothing of holds or free lists.
//!
//! A block's key is a hash of its tokens chained to the key of the block before it; the first link is the
//! tenant and its salt. So equal keys mean equal prefixes of one tenant, and tenants never meet.

use std::collections::HashMap;

use galerne_core::ids::{BlockId, TenantId, TenantSalt, TokenId};
use sha2::{Digest, Sha256};

use crate::stats::IntegrityError;

/// SHA-256 of a prefix, the first 128 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PrefixKey([u8; 16]);

impl PrefixKey {
    /// The key of the empty prefix of a tenant.
    #[must_use]
    pub fn root(tenant: TenantId, salt: TenantSalt) -> Self {
        let mut hash = Sha256::new();
        hash.update(b"galerne prefix root");
        hash.update(tenant.0.to_le_bytes());
        hash.update(salt.0);
        Self::truncated(hash)
    }

    /// The key of this prefix followed by one block of tokens.
    #[must_use]
    pub fn child(self, tokens: &[TokenId]) -> Self {
        let mut hash = Sha256::new();
        hash.update(self.0);
        for token in tokens {
            hash.update(token.0.to_le_bytes());
        }
        Self::truncated(hash)
    }

    fn truncated(hash: Sha256) -> Self {
        let digest = hash.finalize();
        let mut key = [0; 16];
        key.copy_from_slice(&digest[..16]);
        Self(key)
    }
}

/// A one-to-one map of keys and blocks.
#[derive(Debug, Default)]
pub struct PrefixIndex {
    blocks: HashMap<PrefixKey, BlockId>,
    keys: HashMap<BlockId, PrefixKey>,
}

impl PrefixIndex {
    /// The block that holds the last block of this prefix.
    #[must_use]
    pub fn get(&self, key: PrefixKey) -> Option<BlockId> {
        self.blocks.get(&key).copied()
    }

    /// Whether the index knows the block.
    #[must_use]
    pub fn contains(&self, block: BlockId) -> bool {
        self.keys.contains_key(&block)
    }

    /// Enters a block. Of two blocks with equal content the first stays, so that no key ever changes its block.
    pub fn insert(&mut self, key: PrefixKey, block: BlockId) {
        if self.contains(block) || self.blocks.contains_key(&key) {
            return;
        }
        self.blocks.insert(key, block);
        self.keys.insert(block, key);
    }

    /// Forgets a block, if it is known. Longer prefixes stay: they are found again once this one is back.
    pub fn remove(&mut self, block: BlockId) {
        if let Some(key) = self.keys.remove(&block) {
            self.blocks.remove(&key);
        }
    }

    /// Blocks known.
    pub fn blocks(&self) -> impl Iterator<Item = BlockId> {
        self.keys.keys().copied()
    }

    /// Checks that keys and blocks correspond one to one.
    ///
    /// # Errors
    /// The first pair that does not.
    pub fn check(&self) -> Result<(), IntegrityError> {
        IntegrityError::check(
            "entries of the prefix index",
            &self.keys.len(),
            &self.blocks.len(),
        )?;
        for (block, key) in &self.keys {
            IntegrityError::check("block of a prefix key", &Some(*block), &self.get(*key))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(tenant: u64, salt: u8, blocks: &[&[u32]]) -> PrefixKey {
        let root = PrefixKey::root(TenantId(tenant), TenantSalt([salt; 16]));
        blocks.iter().fold(root, |key, block| {
            key.child(&block.iter().copied().map(TokenId).collect::<Vec<_>>())
        })
    }

    #[test]
    fn equal_tokens_of_different_tenants_never_meet() {
        let base = key(1, 7, &[&[1, 2], &[3, 4]]);
        assert_eq!(base, key(1, 7, &[&[1, 2], &[3, 4]]));
        assert_ne!(base, key(2, 7, &[&[1, 2], &[3, 4]]));
        assert_ne!(base, key(1, 8, &[&[1, 2], &[3, 4]]));
        assert_ne!(base, key(1, 7, &[&[3, 4]]));
        assert_ne!(base, key(1, 7, &[&[3, 4], &[1, 2]]));
    }

    #[test]
    fn the_first_of_two_equal_blocks_stays() {
        let mut index = PrefixIndex::default();
        let key = key(1, 1, &[&[5]]);
        index.insert(key, BlockId(3));
        index.insert(key, BlockId(4));
        assert_eq!(index.get(key), Some(BlockId(3)));
        assert!(!index.contains(BlockId(4)));
        index.remove(BlockId(3));
        assert_eq!(index.get(key), None);
        index.check().expect("sound");
    }
}
