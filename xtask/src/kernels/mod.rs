//! `cargo xtask kernels`: compiles `kernels/cuda/*.cu` for every architecture into the archive that the binary embeds, and
//! checks what the compiler made of them.

mod archive;
mod compile;
mod gate;
mod listing;
mod toolchain;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use anyhow::{Context, Error, Result, ensure};

use crate::{guests, workspace_root};
use compile::{Compiled, Job};
use toolchain::Toolchain;

/// Compilers at work at once; one takes up to a gigabyte.
const COMPILERS: usize = 2;

#[derive(clap::Args)]
pub(crate) struct KernelsArgs {
    /// Check registers, spills and instructions against kernels/cuda/gate.toml.
    #[arg(long)]
    check: bool,
    /// Only files whose names contain this, without writing the archive; prints what the compiler made of each kernel.
    #[arg(long)]
    only: Option<String>,
}

pub(crate) fn run(args: &KernelsArgs) -> Result<()> {
    let compiled = match &args.only {
        Some(part) => {
            let jobs = Job::all()?
                .into_iter()
                .filter(|job| job.name().contains(part.as_str()));
            let compiled = compile_all(jobs.collect())??;
            print!("{}", listing::table(&compiled));
            compiled
        }
        None => build()??,
    };
    if args.check {
        gate::check(&compiled, args.only.is_none())?;
    }
    Ok(())
}

/// Compiles what changed, writes the archive and the report, and checks. The inner error is why there is no toolchain here:
/// builds then have no CUDA kernels.
///
/// # Errors
/// A kernel does not compile or does not pass the gate.
pub(crate) fn build_and_check() -> Result<Result<(), Error>> {
    match build()? {
        Ok(compiled) => gate::check(&compiled, true).map(Ok),
        Err(missing) => Ok(Err(missing)),
    }
}

fn build() -> Result<Result<Vec<Compiled>, Error>> {
    let compiled = match compile_all(Job::all()?)? {
        Ok(compiled) => compiled,
        Err(missing) => return Ok(Err(missing)),
    };
    let folder = workspace_root().join("target/cuda-kernels");
    std::fs::create_dir_all(&folder)?;
    let archive = archive::pack(&compiled);
    // The sources go last: a build takes the archive only if they are those it finds.
    guests::write_atomically(&folder.join("kernels.bin"), &archive)?;
    guests::write_atomically(
        &folder.join("report.json"),
        &serde_json::to_vec_pretty(&compiled)?,
    )?;
    guests::write_atomically(&folder.join("sources"), &sources()?.concat())?;
    eprintln!(
        "CUDA kernels: {} modules in {} KiB",
        compiled.len(),
        archive.len().div_ceil(1_024)
    );
    Ok(Ok(compiled))
}

/// In the order of the jobs. Nothing is installed where nothing has changed.
fn compile_all(jobs: Vec<Job>) -> Result<Result<Vec<Compiled>, Error>> {
    let mut done = BTreeMap::new();
    let mut stale = Vec::new();
    for (index, job) in jobs.into_iter().enumerate() {
        match job.cached() {
            Some(compiled) => {
                done.insert(index, compiled);
            }
            None => stale.push((index, job)),
        }
    }
    if stale.is_empty() {
        return Ok(Ok(done.into_values().collect()));
    }
    let toolchain = match Toolchain::install() {
        Ok(toolchain) => toolchain,
        Err(missing) => return Ok(Err(missing.context("no CUDA toolchain"))),
    };
    eprintln!(
        "compiling {} CUDA modules with {}",
        stale.len(),
        toolchain::COMPILER
    );
    let (queue, results) = (Mutex::new(stale.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..COMPILERS {
            scope.spawn(|| {
                // Not `while let`: its condition would hold the queue's lock while the job runs.
                loop {
                    let next = queue.lock().ok().and_then(|mut queue| queue.next());
                    let Some((index, job)) = next else { return };
                    let compiled = job.run(&toolchain);
                    results
                        .lock()
                        .expect("no compiler thread panics")
                        .push((index, compiled));
                }
            });
        }
    });
    let mut failed = Vec::new();
    for (index, compiled) in results.into_inner().expect("no compiler thread panics") {
        match compiled {
            Ok(compiled) => drop(done.insert(index, compiled)),
            Err(error) => failed.push(format!("{error:#}")),
        }
    }
    ensure!(failed.is_empty(), "{}", failed.join("\n"));
    Ok(Ok(done.into_values().collect()))
}

/// Where kernels lie.
fn kernels_dir() -> PathBuf {
    workspace_root().join("kernels/cuda")
}

/// Every file that a kernel can be made of, in the order of their names.
fn source_files() -> Result<Vec<PathBuf>> {
    let folder = kernels_dir();
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&folder).with_context(|| format!("list {}", folder.display()))? {
        let path = entry?.path();
        if path
            .extension()
            .is_some_and(|ending| ending == "cu" || ending == "cuh")
        {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}

/// Name and text of each source; `host/cli/build.rs` compares the same.
fn sources() -> Result<Vec<Vec<u8>>> {
    source_files()?.iter().map(|file| source(file)).collect()
}

fn source(file: &Path) -> Result<Vec<u8>> {
    let name = file.file_name().unwrap_or_default();
    let mut bytes = format!("{}\n", name.to_string_lossy()).into_bytes();
    bytes.extend(std::fs::read(file).with_context(|| format!("read {}", file.display()))?);
    Ok(bytes)
}
