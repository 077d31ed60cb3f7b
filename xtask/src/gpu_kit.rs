//! `cargo xtask gpu-kit`: one folder that checks and measures Galerne on a machine with an NVIDIA driver and nothing else of ours.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{cargo, demo, guests, kernels, workspace_root};

/// What can be carried to such a machine, with room for what comes back.
const BYTES_MAX: u64 = 60_000_000;
/// What runs the sections, from `benches/gpu`.
const SCRIPTS: [&str; 3] = ["run.py", "torch_kernels.py", "torch_decode.py"];
/// A third of the size; both machines have Python, and not all have a program for it.
const PACK: &str = "import lzma, shutil, sys\n\
    with open(sys.argv[1], 'rb') as whole, lzma.open(sys.argv[2], 'wb', preset=9) as packed:\n\
    \x20   shutil.copyfileobj(whole, packed)";

pub(crate) fn run() -> Result<()> {
    guests::build_all()?;
    if let Err(missing) = kernels::build_and_check()? {
        return Err(missing.context("a kit without kernels is none"));
    }
    let root = workspace_root();
    let mut build = Command::new(cargo());
    build
        .args(["build", "--release", "-p", "galerne"])
        .current_dir(root);
    successful(&mut build)?;
    let kit = root.join("target/gpu-kit");
    // What an older kit had must not be carried along.
    let _ = std::fs::remove_dir_all(&kit);
    std::fs::create_dir_all(&kit)?;
    let stripped = root.join("target/release/galerne.stripped");
    successful(
        Command::new("strip")
            .arg("-o")
            .arg(&stripped)
            .arg(root.join("target/release/galerne")),
    )?;
    successful(
        Command::new(demo::python()?)
            .args(["-c", PACK])
            .arg(&stripped)
            .arg(kit.join("galerne.xz")),
    )?;
    for script in SCRIPTS {
        std::fs::copy(root.join("benches/gpu").join(script), kit.join(script))?;
    }
    let bytes = size(&kit)?;
    ensure!(
        bytes <= BYTES_MAX,
        "the kit: expected at most {BYTES_MAX} bytes, got {bytes}"
    );
    eprintln!(
        "{} ({:.1} MB); on the machine with the GPU: python3 run.py",
        kit.display(),
        bytes as f64 / 1e6
    );
    Ok(())
}

fn successful(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("run {command:?}"))?;
    ensure!(status.success(), "{command:?} failed");
    Ok(())
}

/// Of the files in a folder.
fn size(folder: &Path) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(folder)? {
        bytes += entry?.metadata()?.len();
    }
    Ok(bytes)
}
