//! `cargo xtask guests`: builds the first-party guests to components under `target/guests`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use galerne_sdk_build::{GuestCrate, Toolchain};
use sha2::{Digest as _, Sha256};

use crate::workspace_root;

/// Folders under `plugins/`, each a crate `galerne-guest-NAME`, with the interfaces it exports and those it imports, in
/// the order of their names.
const GUESTS: [(&str, &[&str], &[&str]); 16] = [
    ("llama", &[MODEL], &[]),
    ("chatml", &["galerne:chat/format@0.1.0"], &[]),
    ("mirostat", &[SAMPLING], &[]),
    ("watermark", &[SAMPLING], &[]),
    ("ngram-speculate", &[SAMPLING], &[]),
    ("choices", &[SAMPLING], &[GRAMMAR]),
    ("pii-redact", &[FILTER], &[]),
    ("calculator", &[TOOL], &[]),
    ("http-get", &[TOOL], &[HTTP]),
    ("best-of-n", &[PIPELINE], &[INFERENCE]),
    ("self-consistency", &[PIPELINE], &[INFERENCE]),
    ("agent", &[PIPELINE], &[INFERENCE]),
    ("hostile", &[FILTER, MODEL, TOOL], &[]),
    ("hostile-pipeline", &[PIPELINE], &[INFERENCE]),
    ("hostile-sampler", &[SAMPLING], &[GRAMMAR]),
    ("overreach", &[TOOL], &[HTTP, KV, LOG, SECRETS]),
];
const FILTER: &str = "galerne:filter/filtering@0.1.0";
const MODEL: &str = "galerne:model/architecture@0.1.0";
const PIPELINE: &str = "galerne:pipeline/pipelines@0.1.0";
const SAMPLING: &str = "galerne:sampling/sampling@0.2.0";
const TOOL: &str = "galerne:tool/tools@0.1.0";
const GRAMMAR: &str = "galerne:grammar/grammars@0.1.0";
const HTTP: &str = "galerne:http/client@0.1.0";
const INFERENCE: &str = "galerne:pipeline/inference@0.1.0";
const KV: &str = "galerne:kv/store@0.1.0";
const LOG: &str = "galerne:log/logging@0.1.0";
const SECRETS: &str = "galerne:secrets/vault@0.1.0";

/// The component of a guest.
pub(crate) fn path(guest: &str) -> PathBuf {
    workspace_root()
        .join("target/guests")
        .join(format!("{guest}.wasm"))
}

/// Builds every guest whose sources, SDK, contract, dependencies or compiler changed since its last build.
pub(crate) fn build_all() -> Result<()> {
    let toolchain = Toolchain::present();
    let compiler = toolchain.as_ref().map(Toolchain::version);
    let mut stale = Vec::new();
    for (guest, exports, imports) in GUESTS {
        let root = workspace_root();
        let digest = digest(
            &[
                &root.join("plugins").join(guest),
                &root.join("sdk-guest"),
                &root.join("wit"),
            ],
            &["Cargo.lock", "Cargo.toml"],
        )?;
        if !is_fresh(guest, &digest, compiler) {
            stale.push((guest, exports, imports, digest));
        }
    }
    if stale.is_empty() {
        return Ok(());
    }
    let toolchain = match toolchain {
        Some(present) => present,
        None => Toolchain::install(&|line| eprintln!("{line}"))?,
    };
    eprintln!("building guests with {}", toolchain.describe());
    std::fs::create_dir_all(workspace_root().join("target/guests"))?;
    for (guest, exports, imports, digest) in stale {
        let begin = Instant::now();
        let component = galerne_sdk_build::build(
            &toolchain,
            &GuestCrate {
                folder: workspace_root(),
                package: &format!("galerne-guest-{guest}"),
                profile: "guest",
                target_dir: &workspace_root().join("target/guest-build"),
            },
        )
        .with_context(|| format!("build guest {guest}"))?;
        check_world(&component, exports, imports).with_context(|| format!("guest {guest}"))?;
        write_atomically(&path(guest), &component)?;
        let stamp_text = format!("{digest}\n{}\n", toolchain.version());
        write_atomically(&stamp(guest), stamp_text.as_bytes())?;
        eprintln!(
            "  {guest}: {} KiB in {:.1} s",
            component.len().div_ceil(1_024),
            begin.elapsed().as_secs_f64()
        );
    }
    Ok(())
}

/// What a component was made of: the digest of its sources, and the compiler, each on a line.
fn stamp(guest: &str) -> PathBuf {
    path(guest).with_extension("stamp")
}

/// Where no compiler is at hand, what another one made of the same sources will do.
fn is_fresh(guest: &str, digest: &str, compiler: Option<&str>) -> bool {
    let Ok(stamp) = std::fs::read_to_string(stamp(guest)) else {
        return false;
    };
    let mut lines = stamp.lines();
    path(guest).exists()
        && lines.next() == Some(digest)
        && compiler.is_none_or(|compiler| lines.next() == Some(compiler))
}

/// Over every file a guest is made of, those in folders and those in the workspace's root, in a stable order.
pub(crate) fn digest(folders: &[&Path], root_files: &[&str]) -> Result<String> {
    let root = workspace_root();
    let mut files = BTreeMap::new();
    for folder in folders {
        collect(folder, &mut files)?;
    }
    for file in root_files {
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
        if path.ends_with("__pycache__") {
            // Written by who reads the sources.
        } else if path.is_dir() {
            collect(&path, files)?;
        } else {
            files.insert(path, ());
        }
    }
    Ok(())
}

/// A guest exports and imports what is listed for it. The host checks too, but this error comes before anything is
/// shipped, and points at the guest's manifest: each feature of the SDK adds a world or a capability.
fn check_world(component: &[u8], exports: &[&str], imports: &[&str]) -> Result<()> {
    let got = galerne_sdk_build::interfaces(component)?;
    ensure!(
        got.exports == exports && got.imports == imports,
        "expected the exports {exports:?} and imports {imports:?}, got {:?} and {:?}; does the guest take just the SDK \
         features of its worlds and capabilities?",
        got.exports,
        got.imports
    );
    Ok(())
}

/// Leaves a file that is already the same as it is, so that what embeds it is not rebuilt.
pub(crate) fn write_atomically(file: &Path, bytes: &[u8]) -> Result<()> {
    if std::fs::read(file).is_ok_and(|present| present == bytes) {
        return Ok(());
    }
    // Two runs at once must not share the side file.
    let side = file.with_extension(format!("part-{}", std::process::id()));
    std::fs::write(&side, bytes).with_context(|| format!("write {}", side.display()))?;
    std::fs::rename(&side, file).with_context(|| format!("write {}", file.display()))
}
