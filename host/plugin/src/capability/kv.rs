//! A tenant's key-value store in memory: for tests of guests, and hosts that keep nothing.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Mutex, MutexGuard, PoisonError};

use galerne_core::capability::{CapabilityError, KvStore};
use galerne_core::limits::Allowance;

/// Forgotten with the process.
#[derive(Debug, Default)]
pub struct MemoryKv {
    values: Mutex<BTreeMap<String, Vec<u8>>>,
}

impl MemoryKv {
    fn values(&self) -> MutexGuard<'_, BTreeMap<String, Vec<u8>>> {
        self.values.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl KvStore for MemoryKv {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, CapabilityError> {
        Ok(self.values().get(key).cloned())
    }

    fn set(&self, key: &str, value: &[u8], allowance: &Allowance) -> Result<(), CapabilityError> {
        allowance.check_kv_sizes(key, value)?;
        let mut values = self.values();
        let others = values.iter().filter(|(known, _)| *known != key);
        let (keys, bytes) = others.fold((0, 0), |(keys, bytes), (key, value)| {
            (keys + 1, bytes + (key.len() + value.len()) as u64)
        });
        allowance.check_kv_room(keys, bytes, key, value)?;
        values.insert(key.to_owned(), value.to_vec());
        Ok(())
    }

    fn delete(&self, key: &str) -> Result<(), CapabilityError> {
        self.values().remove(key);
        Ok(())
    }

    fn list(&self, prefix: &str, after: &str, listed_max: usize) -> Result<Vec<String>, CapabilityError> {
        let values = self.values();
        let begin = prefix.max(after);
        let keys = values
            .range::<str, _>((Bound::Included(begin), Bound::Unbounded))
            .map(|(key, _)| key)
            .filter(|key| after.is_empty() || key.as_str() > after);
        // In order, so that the first without the prefix ends them.
        let keys = keys.take_while(|key| key.starts_with(prefix));
        Ok(keys.take(listed_max).cloned().collect())
    }
}
