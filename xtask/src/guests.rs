//! `cargo xtask guests`: builds the first-party guests to components under `target/guests`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use sha2::{Digest as _, Sha256};

use crate::toolchain::{TARGET, Toolchain};
use crate::{cargo, workspace_root};

/// Folders under `plugins/`, each a crate `galerne-guest-NAME`.
const GUESTS: [&str; 4] = ["llama", "chatml", "mirostat", "hostile"];

/// The component of a guest.
pub(crate) fn path(guest: &str) -> PathBuf {
    workspace_root()
        .join("target/guests")
        .join(format!("{guest}.wasm"))
}

/// Builds every guest whose sources, SDK, contract, dependencies or toolchain changed since its last build.
pub(crate) fn build_all() -> Result<()> {
    let stale: Vec<(&str, String)> = GUESTS
        .iter()
        .map(|guest| Ok((*guest, digest(guest)?)))
        .collect::<Result<Vec<_>>>()?
        .into_iter()
        .filter(|(guest, digest)| !is_fresh(guest, digest))
        .collect();
    if stale.is_empty() {
        return Ok(());
    }
    let toolchain = Toolchain::find()?;
    eprintln!("building guests with {}", toolchain.describe());
    std::fs::create_dir_all(workspace_root().join("target/guests"))?;
    for (guest, digest) in stale {
        let begin = Instant::now();
        let module = build_module(&toolchain, guest)?;
        let component =
            componentize(&module).with_context(|| format!("make a component of guest {guest}"))?;
        write_atomically(&path(guest), &component)?;
        write_atomically(&stamp(guest), digest.as_bytes())?;
        eprintln!(
            "  {guest}: {} KiB in {:.1} s",
            component.len().div_ceil(1_024),
            begin.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

fn stamp(guest: &str) -> PathBuf {
    path(guest).with_extension("stamp")
}

fn is_fresh(guest: &str, digest: &str) -> bool {
    path(guest).exists() && std::fs::read_to_string(stamp(guest)).is_ok_and(|stamp| stamp == digest)
}

/// Over everything a guest is made of, in a stable order. The compiler is left out: asking for it would
/// cost more than everything else here, and another compiler makes an equivalent guest.
fn digest(guest: &str) -> Result<String> {
    let root = workspace_root();
    let mut files = BTreeMap::new();
    for folder in [
        root.join("plugins").join(guest),
        root.join("sdk-guest"),
        root.join("wit"),
    ] {
        collect(&folder, &mut files)?;
    }
    for file in ["Cargo.lock", "Cargo.toml"] {
        files.insert(root.join(file), ());
    }
    let mut hash = Sha256::new();
    for file in files.keys() {
        let bytes = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        hash.update(file.strip_prefix(root)?.to_string_lossy().as_bytes());
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(&bytes);
    }
    Ok(hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

fn collect(folder: &Path, files: &mut BTreeMap<PathBuf, ()>) -> Result<()> {
    for entry in std::fs::read_dir(folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.insert(path, ());
        }
    }
    Ok(())
}

/// The manifests stay plain libraries, so that guests are also tested on the host; only here one becomes a module.
fn build_module(toolchain: &Toolchain, guest: &str) -> Result<Vec<u8>> {
    let package = format!("galerne-guest-{guest}");
    let folder = workspace_root().join("target/guest-build");
    let mut command = Command::new(cargo());
    command
        .args([
            "rustc",
            "--quiet",
            "--package",
            &package,
            "--lib",
            "--crate-type",
            "cdylib",
        ])
        .args(["--profile", "guest", "--target", TARGET, "--target-dir"])
        .arg(&folder)
        .current_dir(workspace_root());
    toolchain.apply(&mut command);
    let status = command.status()?;
    ensure!(status.success(), "guest {guest} does not build: {command:?}");
    let module = folder
        .join(TARGET)
        .join("guest")
        .join(format!("{}.wasm", package.replace('-', "_")));
    std::fs::read(&module).with_context(|| format!("read {}", module.display()))
}

fn componentize(module: &[u8]) -> Result<Vec<u8>> {
    wit_component::ComponentEncoder::default()
        .module(module)?
        .validate(true)
        .encode()
}

fn write_atomically(file: &Path, bytes: &[u8]) -> Result<()> {
    let side = file.with_extension("part");
    std::fs::write(&side, bytes)?;
    std::fs::rename(&side, file).with_context(|| format!("write {}", file.display()))
}
