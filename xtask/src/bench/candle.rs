//! candle's side of the comparisons: the small program in `benches/candle`, its own package, built on first use.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use super::groups::{DECODE, SHORT_CONTEXT, rate};
use super::llama::{self, BenchFigures};
use super::ours::{self, EngineRun};
use super::report::Report;
use super::stats::Sample;
use super::{Context, MODEL, process};
use crate::{cargo, workspace_root};

const PREFILL: u32 = 512;

pub(super) fn run(context: &Context, report: &mut Report) -> Result<()> {
    let candle = build(context)?;
    let engine = EngineRun {
        threads: context.threads,
        prefill: vec![PREFILL],
        decode: DECODE,
        context: SHORT_CONTEXT,
        batch: 1,
        ..EngineRun::default()
    };
    let (mut ours, mut peer) = (
        [Sample::default(), Sample::default()],
        [Sample::default(), Sample::default()],
    );
    for run in 0..context.runs {
        eprintln!("candle: alternation {} of {}", run + 1, context.runs);
        let figures = ours::engine(context, MODEL, &engine)?;
        ours[0].push(figures.prefill(PREFILL)?);
        ours[1].push(figures.decode(&engine)?);
        let figures = bench(context, &candle)?;
        peer[0].push(figures.prefill(PREFILL)?);
        peer[1].push(figures.decode(DECODE)?);
    }
    report.add(
        rate(format!("prefill {PREFILL}"), "candle", 1.0),
        &ours[0],
        &peer[0],
    );
    report.add(
        rate(format!("decode {DECODE}"), "candle", 1.0),
        &ours[1],
        &peer[1],
    );
    Ok(())
}

/// Cargo itself knows whether what is there is whole and new.
fn build(context: &Context) -> Result<PathBuf> {
    eprintln!("building candle for this machine (the first time takes some minutes)");
    let target = context.peers.join("candle");
    let status = Command::new(cargo())
        .args(["build", "--quiet", "--release", "--locked", "--manifest-path"])
        .arg(workspace_root().join("benches/candle/Cargo.toml"))
        .arg("--target-dir")
        .arg(&target)
        .env("RUSTFLAGS", "-C target-cpu=native")
        .status()
        .context("start cargo for candle")?;
    ensure!(status.success(), "could not build benches/candle");
    Ok(target.join("release/candle-bench"))
}

fn bench(context: &Context, candle: &PathBuf) -> Result<BenchFigures> {
    let mut command = Command::new(candle);
    command
        .arg(&context.gguf)
        .args([DECODE.to_string(), PREFILL.to_string()]);
    // candle has a pool of its own beside rayon's; both heed this.
    command.env("RAYON_NUM_THREADS", context.threads.to_string());
    llama::figures(&process::finish(&mut command)?)
}
