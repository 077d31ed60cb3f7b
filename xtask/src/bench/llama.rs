//! llama.cpp's side of the comparisons: llama-bench and llama-batched-bench, and their figures.

use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::build::Llama;
use super::process::{self, Finished};

/// One run of llama-bench, flash attention on (the faster setting on every CPU tried).
#[derive(Clone, Default)]
pub(super) struct BenchRun {
    pub(super) threads: usize,
    pub(super) prefill: Vec<u32>,
    /// Output tokens of the decode run, or 0 for none.
    pub(super) decode: u32,
}

/// What it gave.
pub(super) struct BenchFigures {
    rates: Vec<Rate>,
    /// Bytes of the model's tensors, where the program tells.
    pub(super) model_bytes: Option<f64>,
    pub(super) peak_bytes: f64,
}

struct Rate {
    prompt: u64,
    output: u64,
    tokens_per_s: f64,
}

impl BenchFigures {
    pub(super) fn prefill(&self, tokens: u32) -> Result<f64> {
        self.rate(u64::from(tokens), 0)
    }

    pub(super) fn decode(&self, tokens: u32) -> Result<f64> {
        self.rate(0, u64::from(tokens))
    }

    fn rate(&self, prompt: u64, output: u64) -> Result<f64> {
        let found = self
            .rates
            .iter()
            .find(|rate| (rate.prompt, rate.output) == (prompt, output));
        found
            .map(|rate| rate.tokens_per_s)
            .with_context(|| format!("llama-bench gave no figure for prompt {prompt}, output {output}"))
    }
}

/// Settings of llama-batched-bench worth trying: which is fastest differs from machine to machine.
pub(super) const BATCHED_SETTINGS: [(&str, &[&str]); 3] = [
    ("llama.cpp, flash attention off", &["-fa", "off"]),
    ("llama.cpp, flash attention on", &["-fa", "on"]),
    (
        "llama.cpp, int8 KV",
        &["-fa", "on", "-ctk", "q8_0", "-ctv", "q8_0"],
    ),
];

pub(super) fn bench(llama: &Llama, gguf: &Path, run: &BenchRun) -> Result<BenchFigures> {
    let mut command = Command::new(llama.tool("llama-bench"));
    command
        .args(["-fa", "1", "-r", "1", "-o", "jsonl", "-m"])
        .arg(gguf);
    command.args(["-t", &run.threads.to_string(), "-n", &run.decode.to_string()]);
    let prefill: Vec<String> = run.prefill.iter().map(ToString::to_string).collect();
    let prefill = if prefill.is_empty() {
        "0".to_owned()
    } else {
        prefill.join(",")
    };
    figures(&process::finish(command.args(["-p", &prefill]))?)
}

/// The figures in the output of llama-bench, or of a program that prints the same form.
pub(super) fn figures(finished: &Finished) -> Result<BenchFigures> {
    let (rates, model_bytes) = parse_bench(&finished.stdout)?;
    Ok(BenchFigures {
        rates,
        model_bytes,
        peak_bytes: finished.peak_bytes,
    })
}

fn parse_bench(jsonl: &str) -> Result<(Vec<Rate>, Option<f64>)> {
    let (mut rates, mut model_bytes) = (Vec::new(), None);
    for line in jsonl.lines().filter(|line| line.starts_with('{')) {
        let test: Value = serde_json::from_str(line).context("read what llama-bench printed")?;
        let count = |name: &str| {
            test[name]
                .as_u64()
                .with_context(|| format!("llama-bench: no {name}"))
        };
        rates.push(Rate {
            prompt: count("n_prompt")?,
            output: count("n_gen")?,
            tokens_per_s: test["avg_ts"].as_f64().context("llama-bench: no avg_ts")?,
        });
        model_bytes = test["model_size"].as_f64();
    }
    Ok((rates, model_bytes))
}

/// Output tokens per second of `sequences` that decode `output` tokens each after a prompt of `context` tokens.
///
/// The prompt is computed once and its KV copied to every sequence (`-pps`): decode is what is timed.
pub(super) fn batched(
    llama: &Llama,
    gguf: &Path,
    threads: usize,
    shape: BatchedShape,
    setting: &[&str],
) -> Result<f64> {
    let BatchedShape {
        sequences,
        context,
        output,
    } = shape;
    let mut command = Command::new(llama.tool("llama-batched-bench"));
    command.args([
        "--output-format",
        "jsonl",
        "-pps",
        "-b",
        "2048",
        "-ub",
        "512",
        "-m",
    ]);
    command.arg(gguf).args(["-t", &threads.to_string()]);
    command.args(["-c", &(sequences * (context + output + 64)).to_string()]);
    command.args(["-npp", &context.to_string(), "-ntg", &output.to_string()]);
    command.args(["-npl", &sequences.to_string()]).args(setting);
    parse_batched(&process::finish(&mut command)?.stdout)
}

/// Sizes of a batched decode.
#[derive(Clone, Copy)]
pub(super) struct BatchedShape {
    pub(super) sequences: u32,
    pub(super) context: u32,
    pub(super) output: u32,
}

fn parse_batched(jsonl: &str) -> Result<f64> {
    let line = jsonl.lines().find(|line| line.starts_with('{'));
    let line = line.context("llama-batched-bench printed no result")?;
    let result: Value = serde_json::from_str(line).context("read what llama-batched-bench printed")?;
    result["speed_tg"]
        .as_f64()
        .context("llama-batched-bench: no speed_tg")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn llama_bench_lines_are_read() {
        let jsonl = concat!(
            r#"{"model_size": 96512896, "n_prompt": 512, "n_gen": 0, "avg_ns": 1, "avg_ts": 328.9}"#,
            "\n",
            r#"{"model_size": 96512896, "n_prompt": 0, "n_gen": 128, "avg_ns": 1, "avg_ts": 133.8}"#,
            "\n"
        );
        let (rates, model_bytes) = parse_bench(jsonl).expect("parse");
        let figures = BenchFigures {
            rates,
            model_bytes,
            peak_bytes: 0.0,
        };
        assert_eq!(figures.prefill(512).expect("there"), 328.9);
        assert_eq!(figures.decode(128).expect("there"), 133.8);
        assert_eq!(figures.model_bytes, Some(96_512_896.0));
        assert!(figures.decode(64).is_err());
        assert!(parse_bench("{\"n_prompt\": 1}").is_err());
    }

    #[test]
    fn llama_batched_bench_lines_are_read() {
        let jsonl =
            "\n{\"pp\": 256, \"tg\": 64, \"pl\": 16, \"t_tg\": 4.785962, \"speed_tg\": 213.959076}\n\n";
        assert_eq!(parse_batched(jsonl).expect("parse"), 213.959_076);
        assert!(parse_batched("llama_decode() failed").is_err());
    }
}
