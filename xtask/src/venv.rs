//! Python programs under `target/`, each set in a virtual environment of its own. Knows none of them.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Result, ensure};

use crate::{demo, workspace_root};

/// The `bin` folder of a virtual environment in this folder of `target/`, with these requirements; made once per set of
/// them.
pub(crate) fn bin(folder: &str, requirements: &[&str]) -> Result<PathBuf> {
    bin_with(folder, requirements, &[])
}

/// The same with others that are installed last and without what they require.
pub(crate) fn bin_with(folder: &str, requirements: &[&str], alone: &[&str]) -> Result<PathBuf> {
    let folder = workspace_root().join("target").join(folder);
    let bin = folder.join("bin");
    let stamp = folder.join("pins");
    let pins = [requirements, alone].concat().join("\n");
    if std::fs::read_to_string(&stamp).is_ok_and(|installed| installed == pins) {
        return Ok(bin);
    }
    let base = demo::python()?;
    let status = Command::new(&base)
        .args(["-m", "venv", "--clear"])
        .arg(&folder)
        .status()?;
    ensure!(
        status.success(),
        "{base} -m venv failed; on Debian: sudo apt-get install python3-venv"
    );
    for (options, requirements) in [(&[][..], requirements), (&["--no-deps"], alone)] {
        if requirements.is_empty() {
            continue;
        }
        let status = Command::new(bin.join("python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check"])
            .args(options)
            .args(requirements)
            .status()?;
        ensure!(status.success(), "pip could not install {requirements:?}");
    }
    std::fs::write(stamp, pins)?;
    Ok(bin)
}
