//! Our side of the comparisons: `galerne bench engine` and its figures.

use std::collections::BTreeMap;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Context, process};

/// One run of `galerne bench engine`.
#[derive(Clone, Default)]
pub(super) struct EngineRun {
    pub(super) threads: usize,
    pub(super) prefill: Vec<u32>,
    pub(super) decode: u32,
    pub(super) context: u32,
    /// Sequences decoded together, or 0 for no decode.
    pub(super) batch: u32,
    /// Size of the KV memory; the program's default without.
    pub(super) kv_mib: Option<u32>,
}

/// What it gave.
pub(super) struct EngineFigures {
    tokens_per_s: BTreeMap<String, f64>,
    pub(super) peak_bytes: f64,
}

impl EngineFigures {
    pub(super) fn prefill(&self, tokens: u32) -> Result<f64> {
        self.named(&format!("prefill {tokens}"))
    }

    pub(super) fn decode(&self, run: &EngineRun) -> Result<f64> {
        self.named(&format!("decode {} x {}", run.decode, run.batch))
    }

    fn named(&self, name: &str) -> Result<f64> {
        let figure = self.tokens_per_s.get(name).copied();
        figure.with_context(|| format!("galerne bench engine gave no figure \"{name}\""))
    }
}

pub(super) fn engine(context: &Context, model: &str, run: &EngineRun) -> Result<EngineFigures> {
    let mut command = Command::new(&context.galerne);
    command.args(["bench", "engine", "--json", "--runs", "1", "-m", model, "--data"]);
    command.arg(&context.data);
    command.arg(format!("--threads={}", run.threads));
    if let Some(mib) = run.kv_mib {
        command.arg(format!("--kv-memory={mib}"));
    }
    command.arg("--prefill");
    if !run.prefill.is_empty() {
        let lengths: Vec<String> = run.prefill.iter().map(ToString::to_string).collect();
        command.arg(lengths.join(","));
    }
    command.arg("--batch");
    if run.batch > 0 {
        command.arg(run.batch.to_string());
        command.arg(format!("--decode={}", run.decode));
        command.arg(format!("--context={}", run.context));
    }
    let finished = process::finish(&mut command)?;
    Ok(EngineFigures {
        tokens_per_s: parse(&finished.stdout)?,
        peak_bytes: finished.peak_bytes,
    })
}

/// How fast this many threads (1 or all) read a buffer of about the model's size, in bytes per second.
pub(super) fn read_bytes_per_s(context: &Context, threads: usize) -> Result<f64> {
    let mut doctor = Command::new(&context.galerne);
    doctor
        .args(["doctor", "--measure", "--json", "--data"])
        .arg(&context.data);
    parse_read(&process::finish(&mut doctor)?.stdout, threads)
}

fn parse_read(json: &str, threads: usize) -> Result<f64> {
    let measured: Value =
        serde_json::from_str(json).context("read what galerne doctor --measure --json printed")?;
    let reads = measured["read"].as_array().context("no read bandwidths")?;
    let of_threads = reads.iter().filter(|read| read["threads"] == threads);
    // The smallest buffer is the one of the model's size.
    let read = of_threads.min_by_key(|read| read["buffer_bytes"].as_u64());
    let gb_per_s = read.and_then(|read| read["gb_per_s"].as_f64());
    let gb_per_s = gb_per_s.with_context(|| {
        format!("galerne doctor --measure gave no read bandwidth of {threads} threads; leave --threads out")
    })?;
    Ok(gb_per_s * 1e9)
}

fn parse(json: &str) -> Result<BTreeMap<String, f64>> {
    let figures: Vec<Value> =
        serde_json::from_str(json).context("read what galerne bench engine --json printed")?;
    figures
        .iter()
        .map(|figure| {
            let name = figure["name"].as_str().context("a figure without a name")?;
            let rate = figure["median_tokens_per_s"].as_f64();
            Ok((name.to_owned(), rate.context("a figure without a median")?))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_are_found_by_what_was_asked() {
        let json = r#"[
            {"name":"prefill 512","median_tokens_per_s":3000.5,"min_tokens_per_s":1.0,"max_tokens_per_s":2.0},
            {"name":"decode 128 x 16","median_tokens_per_s":1400.0,"min_tokens_per_s":1.0,"max_tokens_per_s":2.0}
        ]"#;
        let figures = EngineFigures {
            tokens_per_s: parse(json).expect("parse"),
            peak_bytes: 0.0,
        };
        let run = EngineRun {
            decode: 128,
            batch: 16,
            ..EngineRun::default()
        };
        assert_eq!(figures.prefill(512).expect("there"), 3_000.5);
        assert_eq!(figures.decode(&run).expect("there"), 1_400.0);
        assert!(figures.prefill(128).is_err());
    }

    #[test]
    fn the_bound_is_of_the_buffer_of_the_models_size() {
        let json = r#"{"isa":"avx512-vnni","threads":2,"read":[
            {"buffer_bytes":100663296,"threads":1,"streams":4,"gb_per_s":20.0},
            {"buffer_bytes":100663296,"threads":2,"streams":4,"gb_per_s":38.5},
            {"buffer_bytes":268435456,"threads":2,"streams":4,"gb_per_s":30.0}
        ],"arithmetic":[]}"#;
        assert_eq!(parse_read(json, 2).expect("there"), 38.5e9);
        assert!(parse_read(json, 3).is_err());
    }
}
