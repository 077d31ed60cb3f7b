//! `cargo xtask deny`: licences, advisories and sources of dependencies. Needs cargo-deny, which it does not install.

use std::process::{Command, Stdio};

use anyhow::{Result, ensure};

use crate::{cargo, workspace_root};

pub(crate) fn run() -> Result<()> {
    let installed = Command::new(cargo())
        .args(["deny", "--version"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    ensure!(
        installed,
        "cargo-deny is not installed; run `cargo install cargo-deny --locked`"
    );
    let status = Command::new(cargo())
        .args(["deny", "check"])
        .current_dir(workspace_root())
        .status()?;
    ensure!(status.success(), "cargo deny check failed");
    Ok(())
}
