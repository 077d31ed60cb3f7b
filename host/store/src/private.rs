//! Folders that only this user may look into.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::Path;

/// Creates a folder and those above it, as far as they are missing.
pub(crate) fn create_private_folder(folder: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(folder)
}
