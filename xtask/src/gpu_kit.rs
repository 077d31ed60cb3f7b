//! `cargo xtask gpu-kit`: one folder that checks and measures Galerne on a machine with an NVIDIA driver and nothing else of ours.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{cargo, demo, guests, kernels, workspace_root};

/// What can be carried to such a machine, with room for what comes back.
const BYTES_MAX: u64 = 60_000_000;
/// What runs the sections, from `benches/gpu`.
const SCRIPTS: [&str; 3] = ["run.py", "torch_kernels.py", "torch_decode.py"];
/// The tests that compare each kernel with f64, on a GPU where there is one.
const TESTS: [&str; 8] = [
    "cuda_attention",
    "cuda_copy",
    "cuda_elementwise",
    "cuda_linear",
    "cuda_mixture",
    "cuda_norm",
    "cuda_rope",
    "cuda_sample",
];
/// A third of the size; both machines have Python, and not all have a program for it.
const PACK: &str = "import os, sys, tarfile\n\
    with tarfile.open(sys.argv[1], 'w:xz', preset=9) as packed:\n\
    \x20   for path in sys.argv[2:]: packed.add(path, os.path.basename(path))";

pub(crate) fn run() -> Result<()> {
    guests::build_all()?;
    if let Err(missing) = kernels::build_and_check()? {
        return Err(missing.context("a kit without kernels is none"));
    }
    let root = workspace_root();
    let galerne = demo::build_binary(demo::Profile::Release)?;
    let kit = root.join("target/gpu-kit");
    // What an older kit had must not be carried along.
    let _ = std::fs::remove_dir_all(&kit);
    std::fs::create_dir_all(&kit)?;
    let stripped = root.join("target/release/stripped");
    std::fs::create_dir_all(&stripped)?;
    let mut pack = Command::new(demo::python()?);
    pack.args(["-c", PACK])
        .arg(kit.join("programs.tar.xz"))
        .arg(root.join("target/cuda-kernels/kernels.bin"));
    let binary = ("galerne".to_owned(), galerne);
    for (name, program) in tests()?.into_iter().chain([binary]) {
        let out = stripped.join(name);
        successful(Command::new("strip").arg("-o").arg(&out).arg(program))?;
        pack.arg(out);
    }
    successful(&mut pack)?;
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

/// Builds the tests; names and executables.
fn tests() -> Result<Vec<(String, PathBuf)>> {
    let mut build = Command::new(cargo());
    build
        .args([
            "test",
            "--release",
            "-p",
            "galerne-kernels",
            "--no-run",
            "--message-format=json",
        ])
        .args(TESTS.iter().flat_map(|test| ["--test", test]))
        .current_dir(workspace_root())
        .stderr(Stdio::inherit());
    let output = build.output().with_context(|| format!("run {build:?}"))?;
    ensure!(output.status.success(), "{build:?} failed");
    let built = |message: Value| {
        let name = message["target"]["name"].as_str()?;
        let executable = message["executable"].as_str()?;
        Some((name.to_owned(), PathBuf::from(executable)))
    };
    let messages = serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>();
    let tests: Vec<_> = messages.filter_map(|message| built(message.ok()?)).collect();
    let names: Vec<&str> = tests.iter().map(|(name, _)| name.as_str()).collect();
    ensure!(
        tests.len() == TESTS.len(),
        "tests of kernels: expected {TESTS:?}, got {names:?}"
    );
    Ok(tests)
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
