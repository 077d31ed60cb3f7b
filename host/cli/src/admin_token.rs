//! The token that opens a host's admin routes: made once, kept in the data folder for its owner only.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use anyhow::{Context, Result, ensure};

const FILE: &str = "admin.token";
/// 256 bits: not to be guessed.
const RANDOM_BYTES: usize = 32;

/// The token of this data folder; made if there is none yet.
///
/// # Errors
/// The file cannot be read or written, or is empty.
pub fn load_or_create(data: &Path) -> Result<String> {
    let file = data.join(FILE);
    let made = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(&file);
    match made {
        Ok(mut made) => {
            let token = random()?;
            writeln!(made, "{token}").with_context(|| format!("write {}", file.display()))?;
            Ok(token)
        }
        Err(error) if error.kind() == ErrorKind::AlreadyExists => load(data),
        Err(error) => Err(error).with_context(|| format!("make {}", file.display())),
    }
}

/// The token of this data folder.
///
/// # Errors
/// There is none, or it cannot be read.
pub fn load(data: &Path) -> Result<String> {
    let file = data.join(FILE);
    let text = std::fs::read_to_string(&file).with_context(|| {
        format!(
            "read the admin token {}; a host that was started with `galerne serve` on this data folder makes it, \
             for another host pass --admin-token",
            file.display()
        )
    })?;
    let token = text.trim().to_owned();
    ensure!(
        !token.is_empty(),
        "the admin token {} is empty; remove the file and start the host again",
        file.display()
    );
    Ok(token)
}

fn random() -> Result<String> {
    let mut bytes = [0; RANDOM_BYTES];
    File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("read random bytes for the admin token")?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn the_token_stays_and_is_its_owners_only() {
        let data = tempfile::tempdir().expect("folder");
        assert!(load(data.path()).is_err(), "none yet");
        let token = load_or_create(data.path()).expect("made");
        assert_eq!(token.len(), 64);
        assert_eq!(load_or_create(data.path()).expect("read"), token);
        let mode = data
            .path()
            .join(FILE)
            .metadata()
            .expect("there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
    }
}
