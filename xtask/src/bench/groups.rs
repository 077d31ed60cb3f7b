//! The groups of comparisons of one engine run with another: decode, prefill, batched decode, formats, memory.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use super::llama::{self, BATCHED_SETTINGS, BatchedShape, BenchRun};
use super::ours::{self, EngineRun};
use super::report::{Better, Compared, Report};
use super::stats::Sample;
use super::{Context, MODEL, build};
use crate::demo;

pub(super) const DECODE: u32 = 128;
/// Prompt tokens before a decode run: enough to begin with.
pub(super) const SHORT_CONTEXT: u32 = 1;

pub(super) fn rate<'a>(name: impl Into<String>, peer_name: &'a str, target: f64) -> Compared<'a> {
    Compared {
        name: name.into(),
        unit: "tokens/s",
        peer_name,
        better: Better::Higher,
        target,
    }
}

pub(super) fn decode(context: &Context, report: &mut Report) -> Result<()> {
    decode_with(context, report, context.threads, 1.7)?;
    if context.threads > 1 {
        decode_with(context, report, 1, 1.5)?;
    }
    Ok(())
}

fn decode_with(context: &Context, report: &mut Report, threads: usize, target: f64) -> Result<()> {
    let (mut ours, mut peer, mut bound) = (Sample::default(), Sample::default(), Sample::default());
    let engine = EngineRun {
        threads,
        decode: DECODE,
        context: SHORT_CONTEXT,
        batch: 1,
        ..EngineRun::default()
    };
    let bench = BenchRun {
        threads,
        decode: DECODE,
        ..BenchRun::default()
    };
    for run in 0..context.runs {
        eprintln!(
            "decode, {threads} threads: alternation {} of {}",
            run + 1,
            context.runs
        );
        ours.push(ours::engine(context, MODEL, &engine)?.decode(&engine)?);
        let figures = llama::bench(&context.llama, &context.gguf, &bench)?;
        peer.push(figures.decode(DECODE)?);
        let model_bytes = figures.model_bytes.context("llama-bench: no model_size")?;
        bound.push(ours::read_bytes_per_s(context, threads)? / model_bytes);
    }
    let name = format!("decode {DECODE}, {threads} threads");
    report.add(rate(&name, "llama.cpp", target), &ours, &peer);
    // Of one thread, no more than to be seen: its target is the ratio above.
    let target = if threads == context.threads { 0.75 } else { 0.0 };
    let name = format!("{name}, of the memory bound");
    report.add(rate(name, "all weights read once a token", target), &ours, &bound);
    Ok(())
}

pub(super) fn prefill(context: &Context, report: &mut Report) -> Result<()> {
    let lengths = [128, 512, 2_048];
    let targets = [1.0, 4.5, 4.5];
    compare_prefill(context, report, MODEL, &context.gguf, "", &lengths, &targets)
}

fn compare_prefill(
    context: &Context,
    report: &mut Report,
    model: &str,
    gguf: &Path,
    label: &str,
    lengths: &[u32],
    targets: &[f64],
) -> Result<()> {
    for (&length, &target) in lengths.iter().zip(targets) {
        let (mut ours, mut peer) = (Sample::default(), Sample::default());
        let engine = EngineRun {
            threads: context.threads,
            prefill: vec![length],
            ..EngineRun::default()
        };
        let bench = BenchRun {
            threads: context.threads,
            prefill: vec![length],
            ..BenchRun::default()
        };
        for run in 0..context.runs {
            eprintln!(
                "prefill {length}{label}: alternation {} of {}",
                run + 1,
                context.runs
            );
            ours.push(ours::engine(context, model, &engine)?.prefill(length)?);
            peer.push(llama::bench(&context.llama, gguf, &bench)?.prefill(length)?);
        }
        report.add(
            rate(format!("prefill {length}{label}"), "llama.cpp", target),
            &ours,
            &peer,
        );
    }
    Ok(())
}

pub(super) fn batched(context: &Context, report: &mut Report) -> Result<()> {
    let shape = BatchedShape {
        sequences: 16,
        context: 256,
        output: 64,
    };
    // Only what is decoded while all sequences decode counts, so ours is longer than the peer's to count as much.
    let engine = EngineRun {
        threads: context.threads,
        decode: shape.output + 32,
        context: shape.context,
        batch: shape.sequences,
        ..EngineRun::default()
    };
    let mut ours = Sample::default();
    let mut peers = BATCHED_SETTINGS.map(|_| Sample::default());
    for run in 0..context.runs {
        eprintln!("batched decode: alternation {} of {}", run + 1, context.runs);
        ours.push(ours::engine(context, MODEL, &engine)?.decode(&engine)?);
        for ((_, setting), peer) in BATCHED_SETTINGS.iter().zip(&mut peers) {
            peer.push(llama::batched(
                &context.llama,
                &context.gguf,
                context.threads,
                shape,
                setting,
            )?);
        }
    }
    let best = peers
        .iter()
        .zip(BATCHED_SETTINGS)
        .max_by(|a, b| a.0.summary().median.total_cmp(&b.0.summary().median))
        .context("no setting of llama-batched-bench")?;
    let name = format!(
        "decode of {} sequences, context {}",
        shape.sequences, shape.context
    );
    report.add(rate(name, best.1.0, 3.0), &ours, best.0);
    Ok(())
}

pub(super) fn formats(context: &Context, report: &mut Report) -> Result<()> {
    for quant in ["Q8_0", "BF16"] {
        let (gguf, model) = in_format(context, quant)?;
        let label = format!(", {quant}");
        compare_prefill(context, report, &model, &gguf, &label, &[512], &[1.0])?;
        let (mut ours, mut peer) = (Sample::default(), Sample::default());
        let engine = EngineRun {
            threads: context.threads,
            decode: DECODE,
            context: SHORT_CONTEXT,
            batch: 1,
            ..EngineRun::default()
        };
        let bench = BenchRun {
            threads: context.threads,
            decode: DECODE,
            ..BenchRun::default()
        };
        for run in 0..context.runs {
            eprintln!("decode{label}: alternation {} of {}", run + 1, context.runs);
            ours.push(ours::engine(context, &model, &engine)?.decode(&engine)?);
            peer.push(llama::bench(&context.llama, &gguf, &bench)?.decode(DECODE)?);
        }
        report.add(
            rate(format!("decode {DECODE}{label}"), "llama.cpp", 1.0),
            &ours,
            &peer,
        );
    }
    Ok(())
}

/// The model in another format: its GGUF file, and its name in the data folder.
pub(super) fn in_format(context: &Context, quant: &str) -> Result<(PathBuf, String)> {
    let folder = context.peers.join("formats");
    let gguf = build::quantized(&context.llama, &context.gguf, quant, &folder)?;
    let model = format!("{MODEL}-{}", quant.to_lowercase());
    demo::import(&context.galerne, &context.data, &gguf, &model)?;
    Ok((gguf, model))
}

/// Both sides with room for the 640 tokens and no more than a few times that.
pub(super) fn memory(context: &Context, report: &mut Report) -> Result<()> {
    let (mut ours, mut peer) = (Sample::default(), Sample::default());
    let engine = EngineRun {
        threads: context.threads,
        prefill: vec![512],
        decode: DECODE,
        context: SHORT_CONTEXT,
        batch: 1,
        kv_mib: Some(32),
    };
    let bench = BenchRun {
        threads: context.threads,
        prefill: vec![512],
        decode: DECODE,
    };
    for run in 0..context.runs {
        eprintln!("memory: alternation {} of {}", run + 1, context.runs);
        ours.push(ours::engine(context, MODEL, &engine)?.peak_bytes / 1e6);
        peer.push(llama::bench(&context.llama, &context.gguf, &bench)?.peak_bytes / 1e6);
    }
    let compared = Compared {
        name: format!("peak memory, prefill 512 and decode {DECODE}"),
        unit: "MB",
        peer_name: "llama.cpp",
        better: Better::Lower,
        target: 1.0,
    };
    report.add(compared, &ours, &peer);
    Ok(())
}
