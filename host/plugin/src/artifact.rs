//! Compiled components kept in a folder that only this user can read or write, each under a MAC. Knows no runtime.
//!
//! Loading compiled code is running it. So a file is used only if its MAC, made with a key that never leaves the folder,
//! says that this host wrote it for this component and this engine; any other file is as good as none.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use hmac::{Hmac, Mac as _};
use rustix::rand::{GetRandomFlags, getrandom};
use sha2::{Digest as _, Sha256};

use crate::errors::PluginError;

/// The key's file within the folder.
const KEY_FILE: &str = "key";
/// A block of the hash: the longest key that is used as it is.
const KEY_BYTES: usize = 64;
const MAC_BYTES: usize = 32;
/// Bytes of all files together; past it the oldest go.
const FOLDER_BYTES_MAX: u64 = 4 << 30;

/// Compiled code that this host made, or that its MAC says it made. To have one is to be allowed to load it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Artifact(Vec<u8>);

impl Artifact {
    /// Only for bytes that came from this host's own compiler, or, in a cell, from its host.
    pub(crate) fn trusted(bytes: Vec<u8>) -> Self {
        Self(bytes)
    }

    /// The serialized component.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What a compiled component is for: the digest of the component and of all that changes its code.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ArtifactKey(String);

impl ArtifactKey {
    /// `component` is the digest of its bytes, `engine` the runtime's own hash of version and settings.
    pub(crate) fn new(component: &[u8; 32], engine: u64) -> Self {
        let digest = Sha256::new()
            .chain_update(component)
            .chain_update(engine.to_le_bytes())
            .finalize();
        Self(digest.iter().map(|byte| format!("{byte:02x}")).collect())
    }
}

/// The folder.
#[derive(Debug)]
pub(crate) struct ArtifactFolder {
    folder: PathBuf,
    key: [u8; KEY_BYTES],
}

impl ArtifactFolder {
    /// Opens the folder, and makes it and its key if they are not there.
    ///
    /// # Errors
    /// It cannot be read or made, or others may read or write it.
    pub(crate) fn open(folder: &Path) -> Result<Self, PluginError> {
        let failed = |source| PluginError::Artifacts {
            folder: folder.to_owned(),
            source,
        };
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)
            .map_err(failed)?;
        let metadata = folder.metadata().map_err(failed)?;
        if metadata.mode() & 0o077 != 0 || metadata.uid() != rustix::process::geteuid().as_raw() {
            return Err(PluginError::ArtifactsOpen {
                folder: folder.to_owned(),
                mode: metadata.mode() & 0o777,
            });
        }
        let key = key(folder).map_err(failed)?;
        Ok(Self {
            folder: folder.to_owned(),
            key,
        })
    }

    /// The artifact, if there is one that this host wrote.
    pub(crate) fn get(&self, key: &ArtifactKey) -> Option<Artifact> {
        let file = self.folder.join(&key.0);
        let mut bytes = std::fs::read(&file).ok()?;
        let mac: [u8; MAC_BYTES] = bytes.first_chunk().copied()?;
        if self.mac(key, &bytes[MAC_BYTES..]).verify_slice(&mac).is_err() {
            tracing::warn!(file = %file.display(), "a compiled guest is not this host's work; it is compiled again");
            return None;
        }
        bytes.drain(..MAC_BYTES);
        Some(Artifact(bytes))
    }

    /// Keeps the artifact. What goes wrong costs the next start a compilation and is only logged.
    pub(crate) fn put(&self, key: &ArtifactKey, artifact: &Artifact) {
        let mac = self.mac(key, artifact.bytes()).finalize().into_bytes();
        let write = || -> std::io::Result<()> {
            self.make_room(artifact.bytes().len() as u64)?;
            let side = self.folder.join(format!("{}.{}.tmp", key.0, std::process::id()));
            let mut file = new_file(&side)?;
            file.write_all(&mac)?;
            file.write_all(artifact.bytes())?;
            std::fs::rename(&side, self.folder.join(&key.0))
        };
        if let Err(error) = write() {
            tracing::warn!(%error, folder = %self.folder.display(), "a compiled guest could not be kept");
        }
    }

    /// The name is part of it: a file that takes another's place is not taken for it.
    fn mac(&self, key: &ArtifactKey, artifact: &[u8]) -> Hmac<Sha256> {
        let mac = Hmac::<Sha256>::new((&self.key).into());
        mac.chain_update(key.0.as_bytes()).chain_update(artifact)
    }

    /// Removes the oldest files until `size_bytes` more fit.
    fn make_room(&self, size_bytes: u64) -> std::io::Result<()> {
        let mut files: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
        for entry in std::fs::read_dir(&self.folder)? {
            let entry = entry?;
            if entry.file_name() != KEY_FILE {
                let metadata = entry.metadata()?;
                files.push((metadata.modified()?, metadata.len(), entry.path()));
            }
        }
        files.sort_unstable();
        let mut total_bytes: u64 = files.iter().map(|(_, size_bytes, _)| size_bytes).sum();
        for (_, file_bytes, path) in files {
            if total_bytes.saturating_add(size_bytes) <= FOLDER_BYTES_MAX {
                break;
            }
            std::fs::remove_file(path)?;
            total_bytes -= file_bytes;
        }
        Ok(())
    }
}

/// A file that was not there and that only this user may read.
fn new_file(path: &Path) -> std::io::Result<File> {
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
}

/// The folder's key; makes one if there is none.
fn key(folder: &Path) -> std::io::Result<[u8; KEY_BYTES]> {
    let path = folder.join(KEY_FILE);
    if !path.exists() {
        let mut key = [0; KEY_BYTES];
        getrandom(&mut key, GetRandomFlags::empty())?;
        let side = folder.join(format!("{KEY_FILE}.{}.tmp", std::process::id()));
        new_file(&side)?.write_all(&key)?;
        // A link, because it does not replace the key of a host that started at the same moment.
        let linked = std::fs::hard_link(&side, &path);
        std::fs::remove_file(&side)?;
        if !path.exists() {
            linked?;
        }
    }
    let mut key = [0; KEY_BYTES];
    File::open(&path)?.read_exact(&mut key)?;
    Ok(key)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn open(folder: &tempfile::TempDir) -> ArtifactFolder {
        ArtifactFolder::open(&folder.path().join("compiled")).expect("opens")
    }

    fn artifact() -> Artifact {
        Artifact::trusted(b"code".to_vec())
    }

    #[test]
    fn what_is_kept_is_found_again_by_the_same_component_and_engine_only() {
        let folder = tempfile::tempdir().expect("a folder");
        let key = ArtifactKey::new(&[1; 32], 7);
        open(&folder).put(&key, &artifact());
        let again = open(&folder);
        assert_eq!(again.get(&key), Some(artifact()));
        assert_eq!(again.get(&ArtifactKey::new(&[1; 32], 8)), None);
        assert_eq!(again.get(&ArtifactKey::new(&[2; 32], 7)), None);
    }

    #[test]
    fn a_changed_file_or_one_under_anothers_name_is_ignored() {
        let folder = tempfile::tempdir().expect("a folder");
        let (key, other) = (ArtifactKey::new(&[1; 32], 7), ArtifactKey::new(&[2; 32], 7));
        let cache = open(&folder);
        cache.put(&key, &artifact());
        let file = cache.folder.join(&key.0);
        std::fs::copy(&file, cache.folder.join(&other.0)).expect("copies");
        assert_eq!(cache.get(&other), None);
        for at in [0, MAC_BYTES, MAC_BYTES + 3] {
            let mut bytes = std::fs::read(&file).expect("reads");
            bytes[at] ^= 1;
            std::fs::write(&file, &bytes).expect("writes");
            assert_eq!(cache.get(&key), None, "byte {at} was changed");
            bytes[at] ^= 1;
            std::fs::write(&file, &bytes).expect("writes");
        }
        assert_eq!(cache.get(&key), Some(artifact()));
        std::fs::write(&file, b"short").expect("writes");
        assert_eq!(cache.get(&key), None);
    }

    #[test]
    fn another_hosts_files_are_ignored() {
        let (ours, theirs) = (
            tempfile::tempdir().expect("a folder"),
            tempfile::tempdir().expect("a folder"),
        );
        let key = ArtifactKey::new(&[1; 32], 7);
        let (ours, theirs) = (open(&ours), open(&theirs));
        theirs.put(&key, &artifact());
        std::fs::copy(theirs.folder.join(&key.0), ours.folder.join(&key.0)).expect("copies");
        assert_eq!(ours.get(&key), None);
    }

    #[test]
    fn only_this_user_can_read_the_folder_and_the_key() {
        let folder = tempfile::tempdir().expect("a folder");
        let cache = open(&folder);
        let mode = |path: &Path| path.metadata().expect("is there").permissions().mode() & 0o777;
        assert_eq!(mode(&cache.folder), 0o700);
        assert_eq!(mode(&cache.folder.join(KEY_FILE)), 0o600);
        let opened = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(&cache.folder, opened).expect("changes");
        let error = ArtifactFolder::open(&cache.folder).expect_err("others can read it");
        assert!(error.to_string().contains("chmod 700"), "{error}");
    }
}
