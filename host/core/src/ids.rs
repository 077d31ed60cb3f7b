//! Newtypes for every id and index that crosses a module.

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $repr:ty) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub $repr);

        impl $name {
            /// The id as an index into a table.
            #[must_use]
            pub fn index(self) -> usize {
                self.0 as usize
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(/// A token of a model's vocabulary.
    TokenId, u32);
id!(/// A node of a [`crate::graph::Graph`]: its position in SSA order.
    NodeId, u32);
id!(/// An attention layer of a model, numbered from 0 without gaps.
    LayerId, u32);
id!(/// One stream of tokens in the engine.
    SequenceId, u64);
id!(/// One block of the KV cache.
    BlockId, u32);

/// A tenant's stable number. Part of every cache key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct TenantId(pub u64);

/// A secret per tenant that salts prefix keys, so that no tenant can probe another's cache.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct TenantSalt(pub [u8; 16]);

impl std::fmt::Debug for TenantSalt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("TenantSalt(..)")
    }
}
