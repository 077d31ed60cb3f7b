//! A tenant's key-value store in one SQLite file. Knows no guest and no other tenant.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use galerne_core::capability::{CapabilityError, KvStore};
use galerne_core::limits::Allowance;
use rusqlite::{Connection, OptionalExtension as _, TransactionBehavior};

use crate::private::create_private_folder;

/// How long a call waits for another process that writes.
const BUSY_MAX: Duration = Duration::from_secs(2);

/// The totals are kept beside the values, in the same transaction: counting all keys at each call would be slow.
const SCHEMA: &str = "
    PRAGMA journal_mode = WAL;
    PRAGMA synchronous = NORMAL;
    CREATE TABLE IF NOT EXISTS entries (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
    CREATE TABLE IF NOT EXISTS totals (id INTEGER PRIMARY KEY CHECK (id = 0), keys INTEGER NOT NULL, bytes INTEGER NOT NULL);
    INSERT OR IGNORE INTO totals VALUES (0, 0, 0);
";

/// Why a store cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum KvOpenError {
    /// Its folder.
    #[error("create the folder {}: {source}", folder.display())]
    Folder {
        /// Where.
        folder: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The file is none of ours, damaged, or cannot be written.
    #[error("open the key-value store {}: {source}; is it a SQLite file that this user may write?", file.display())]
    Database {
        /// Where.
        file: PathBuf,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
}

/// A store on disk. Calls block for a write to the disk's cache; a call that returned survives the end of the process.
pub struct KvDatabase {
    // A std Mutex: SQLite writes one at a time anyway, and each call is short.
    connection: Mutex<Connection>,
}

impl std::fmt::Debug for KvDatabase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvDatabase").finish_non_exhaustive()
    }
}

impl KvDatabase {
    /// Opens the file, usually `DATA/tenants/TENANT/kv.sqlite`, or creates it with its folder, readable by this user only.
    ///
    /// # Errors
    /// See [`KvOpenError`].
    pub fn open(file: &Path) -> Result<Self, KvOpenError> {
        if let Some(folder) = file.parent() {
            create_private_folder(folder).map_err(|source| KvOpenError::Folder {
                folder: folder.to_owned(),
                source,
            })?;
        }
        let open = || {
            let connection = Connection::open(file)?;
            connection.busy_timeout(BUSY_MAX)?;
            connection.execute_batch(SCHEMA)?;
            Ok(connection)
        };
        let connection = open().map_err(|source| KvOpenError::Database {
            file: file.to_owned(),
            source,
        })?;
        Ok(Self {
            connection: Mutex::new(connection),
        })
    }

    fn connection(&self) -> MutexGuard<'_, Connection> {
        // A transaction that a panic left open was rolled back when it was dropped.
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What SQLite says is for the operator; a guest is told no path.
#[expect(clippy::needless_pass_by_value, reason = "for map_err")]
fn failed(error: rusqlite::Error) -> CapabilityError {
    tracing::error!(%error, "a tenant's key-value store failed");
    CapabilityError::Failed("kv: the storage failed; the host's log says why".to_owned())
}

/// Bytes as SQLite counts: its integers have a sign, and limits are far below their end.
fn counted(bytes: usize) -> i64 {
    i64::try_from(bytes).unwrap_or(i64::MAX)
}

impl KvStore for KvDatabase {
    fn get(&self, key: &str) -> Result<Option<Vec<u8>>, CapabilityError> {
        let connection = self.connection();
        let mut query = connection
            .prepare("SELECT value FROM entries WHERE key = ?1")
            .map_err(failed)?;
        query
            .query_row([key], |row| row.get(0))
            .optional()
            .map_err(failed)
    }

    fn set(&self, key: &str, value: &[u8], allowance: &Allowance) -> Result<(), CapabilityError> {
        allowance.check_kv_sizes(key, value)?;
        let mut connection = self.connection();
        // Immediate, so that what is checked is still so when it is written.
        let change = connection
            .transaction_with_behavior(TransactionBehavior::Immediate)
            .map_err(failed)?;
        let (old_keys, old_bytes) = entry(&change, key).map_err(failed)?;
        let totals = change.query_row("SELECT keys, bytes FROM totals", [], |row| {
            Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?))
        });
        let (keys, bytes) = totals.map_err(failed)?;
        let (other_keys, other_bytes) = (keys - old_keys, bytes - old_bytes);
        let unsigned = |count: i64| u64::try_from(count).unwrap_or(0);
        allowance.check_kv_room(unsigned(other_keys), unsigned(other_bytes), key, value)?;
        let write = || {
            change.execute("INSERT OR REPLACE INTO entries VALUES (?1, ?2)", (key, value))?;
            let bytes = other_bytes + counted(key.len() + value.len());
            change.execute("UPDATE totals SET keys = ?1, bytes = ?2", (other_keys + 1, bytes))
        };
        write().map_err(failed)?;
        change.commit().map_err(failed)
    }

    fn delete(&self, key: &str) -> Result<(), CapabilityError> {
        let mut connection = self.connection();
        let mut delete = || {
            let change = connection.transaction_with_behavior(TransactionBehavior::Immediate)?;
            let (keys, bytes) = entry(&change, key)?;
            change.execute("DELETE FROM entries WHERE key = ?1", [key])?;
            change.execute(
                "UPDATE totals SET keys = keys - ?1, bytes = bytes - ?2",
                (keys, bytes),
            )?;
            change.commit()
        };
        delete().map_err(failed)
    }

    fn list(&self, prefix: &str, after: &str, listed_max: usize) -> Result<Vec<String>, CapabilityError> {
        let connection = self.connection();
        let list = || {
            let mut query = connection.prepare(
                "SELECT key FROM entries WHERE key >= ?1 AND (?2 = '' OR key > ?2) ORDER BY key LIMIT ?3",
            )?;
            let keys = query.query_map((prefix, after, counted(listed_max)), |row| {
                row.get::<_, String>(0)
            })?;
            keys.collect::<Result<Vec<_>, _>>()
        };
        let mut keys = list().map_err(failed)?;
        // In order, so that the first without the prefix ends them.
        keys.truncate(keys.partition_point(|key| key.starts_with(prefix)));
        Ok(keys)
    }
}

/// How many keys and bytes an entry is: none, or one.
fn entry(connection: &Connection, key: &str) -> rusqlite::Result<(i64, i64)> {
    let value_bytes = connection
        .query_row("SELECT length(value) FROM entries WHERE key = ?1", [key], |row| {
            row.get::<_, i64>(0)
        })
        .optional()?;
    Ok(value_bytes.map_or((0, 0), |bytes| (1, bytes + counted(key.len()))))
}

#[cfg(test)]
mod tests {
    use galerne_core::limits::HostLimits;

    use super::*;

    fn open(folder: &Path) -> KvDatabase {
        KvDatabase::open(&folder.join("acme/kv.sqlite")).expect("it opens")
    }

    #[test]
    fn values_outlive_the_store() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path());
        assert_eq!(store.get("a"), Ok(None));
        store.set("a", b"1", &Allowance::default()).expect("room");
        store.set("a", &[0, 255], &Allowance::default()).expect("room");
        drop(store);
        let store = open(folder.path());
        assert_eq!(store.get("a"), Ok(Some(vec![0, 255])));
        store.delete("a").expect("it is there");
        store.delete("a").expect("or not");
        assert_eq!(store.get("a"), Ok(None));
    }

    #[test]
    fn keys_come_in_order_and_in_pages() {
        let folder = tempfile::tempdir().expect("a folder");
        let store = open(folder.path());
        for key in ["b", "a:2", "a:1", "a:é", "a;", "A:0", "a%"] {
            store.set(key, b"", &Allowance::default()).expect("room");
        }
        assert_eq!(
            store.list("a:", "", 2),
            Ok(vec!["a:1".to_owned(), "a:2".to_owned()])
        );
        assert_eq!(store.list("a:", "a:2", 2), Ok(vec!["a:é".to_owned()]));
        assert_eq!(store.list("a:", "a:é", 2), Ok(vec![]));
        assert_eq!(store.list("a:", "b", 2), Ok(vec![]));
        assert_eq!(store.list("", "a;", 2), Ok(vec!["b".to_owned()]));
        assert_eq!(store.list("%", "", 2), Ok(vec![]), "no pattern but a prefix");
    }

    #[test]
    fn quotas_hold_across_changes_and_restarts() {
        let folder = tempfile::tempdir().expect("a folder");
        let mut limits = HostLimits::default();
        for (name, value) in [
            ("kv_keys_max", 2),
            ("kv_bytes_max", 20),
            ("kv_value_bytes_max", 15),
        ] {
            assert!(limits.set(name, value));
        }
        let room = Allowance::of_host(limits);
        let full = |store: &KvDatabase, key: &str, bytes: usize| {
            matches!(
                store.set(key, &vec![0; bytes], &room),
                Err(CapabilityError::Limit(_))
            )
        };
        let store = open(folder.path());
        assert!(full(&store, "a", 16));
        store.set("a", &[0; 10], &room).expect("room");
        assert!(full(&store, "b", 9), "11 and 10 bytes");
        store.set("b", &[0; 8], &room).expect("just room");
        assert!(full(&store, "c", 0), "a third key");
        drop(store);
        let store = open(folder.path());
        store.set("a", &[0; 10], &room).expect("in its own place");
        assert!(full(&store, "a", 11));
        assert_eq!(
            store.get("a").expect("reads").map(|value| value.len()),
            Some(10),
            "a refusal changes nothing"
        );
        store.delete("b").expect("it is there");
        store.delete("b").expect("counted once");
        assert!(!full(&store, "c", 8) && full(&store, "d", 0));
    }

    #[test]
    fn another_file_is_not_opened() {
        let folder = tempfile::tempdir().expect("a folder");
        let file = folder.path().join("kv.sqlite");
        std::fs::write(
            &file,
            "not a database, but long enough to have a header of one hundred bytes".repeat(9),
        )
        .expect("writes");
        let error = KvDatabase::open(&file).expect_err("no database");
        assert!(error.to_string().contains("kv.sqlite"), "{error}");
    }
}
