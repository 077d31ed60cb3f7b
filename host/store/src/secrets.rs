//! A tenant's secrets: a folder with a file per secret. Never says anything of a value.

use std::io::{ErrorKind, Read as _};
use std::os::unix::fs::{MetadataExt as _, OpenOptionsExt as _};
use std::path::PathBuf;

use galerne_core::capability::{CapabilityError, SecretName, SecretSource};
use galerne_core::limits::CapabilityLimits;

/// Rights of group and others.
const RIGHTS_OF_OTHERS: u32 = 0o077;

/// Secrets as files, usually in `DATA/tenants/TENANT/secrets/`. Read at each call: a changed file counts at once.
#[derive(Debug, Clone)]
pub struct SecretFolder {
    folder: PathBuf,
    bytes_max: usize,
}

impl SecretFolder {
    /// The folder need not exist; then there are no secrets.
    #[must_use]
    pub fn new(folder: PathBuf, limits: &CapabilityLimits) -> Self {
        Self {
            folder,
            bytes_max: limits.secret_bytes_max,
        }
    }

    fn read(&self, name: &SecretName) -> Result<String, String> {
        let file = self.folder.join(name.as_str());
        // No link, and no pipe that would make the guest's thread wait.
        let file = std::fs::OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_NONBLOCK)
            .open(file)
            .map_err(|error| match error.kind() {
                ErrorKind::NotFound => "the tenant has none of that name".to_owned(),
                _ => format!("its file cannot be opened: {}", error.kind()),
            })?;
        let facts = file.metadata().map_err(|error| error.kind().to_string())?;
        if !facts.is_file() {
            return Err("expected a plain file".to_owned());
        }
        if facts.mode() & RIGHTS_OF_OTHERS != 0 {
            let mode = facts.mode() & 0o777;
            return Err(format!(
                "expected a file that only its owner may read (mode 0600), got mode 0{mode:o}"
            ));
        }
        let mut value = Vec::new();
        file.take(self.bytes_max as u64 + 1)
            .read_to_end(&mut value)
            .map_err(|error| format!("its file cannot be read: {}", error.kind()))?;
        if value.len() > self.bytes_max {
            return Err(format!("expected at most {} bytes, it has more", self.bytes_max));
        }
        let mut value = String::from_utf8(value).map_err(|_| "expected UTF-8 text".to_owned())?;
        // Editors end files with one; no secret does.
        if value.ends_with('\n') {
            value.pop();
        }
        if value.ends_with('\r') {
            value.pop();
        }
        Ok(value)
    }
}

impl SecretSource for SecretFolder {
    fn secret(&self, name: &SecretName) -> Result<String, CapabilityError> {
        let told = |reason| CapabilityError::Failed(format!("secret {}: {reason}", name.as_str()));
        self.read(name).map_err(told)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn secrets() -> (tempfile::TempDir, SecretFolder) {
        let folder = tempfile::tempdir().expect("a folder");
        let limits = CapabilityLimits {
            secret_bytes_max: 20,
            ..CapabilityLimits::default()
        };
        let secrets = SecretFolder::new(folder.path().to_owned(), &limits);
        (folder, secrets)
    }

    fn write(folder: &tempfile::TempDir, name: &str, mode: u32, value: &[u8]) {
        let file = folder.path().join(name);
        std::fs::write(&file, value).expect("writes");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).expect("its own file");
    }

    fn get(secrets: &SecretFolder, name: &str) -> Result<String, String> {
        let name = SecretName::new(name).expect("a name");
        secrets.secret(&name).map_err(|error| error.to_string())
    }

    #[test]
    fn a_secret_is_its_file_without_the_last_line_break() {
        let (folder, secrets) = secrets();
        write(&folder, "A", 0o600, b"hunter2\n");
        assert_eq!(get(&secrets, "A"), Ok("hunter2".to_owned()));
        write(&folder, "A", 0o400, b"two\nlines");
        assert_eq!(get(&secrets, "A"), Ok("two\nlines".to_owned()));
    }

    #[test]
    fn what_is_wrong_is_said_without_the_value() {
        let (folder, secrets) = secrets();
        write(&folder, "OPEN", 0o644, b"hunter2");
        write(&folder, "LONG", 0o600, b"hunter2 hunter2 hunter2");
        write(&folder, "BYTES", 0o600, b"hunter2\xff");
        std::fs::create_dir(folder.path().join("FOLDER")).expect("creates");
        std::os::unix::fs::symlink(folder.path().join("OPEN"), folder.path().join("LINK")).expect("links");
        for (name, words) in [
            ("OPEN", "mode 0600"),
            ("LONG", "at most 20 bytes"),
            ("BYTES", "UTF-8"),
            ("FOLDER", "a plain file"),
            ("LINK", "cannot be opened"),
            ("NONE", "none of that name"),
        ] {
            let error = get(&secrets, name).expect_err(name);
            assert!(error.contains(words) && error.contains(name), "{name}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
