//! Distance of both sides to the f32 logits: every position of the golden prompts and their reference answers.

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::Value;

use super::report::{Better, Compared, Report};
use super::stats::Sample;
use super::{Context, MODEL, process};
use crate::workspace_root;

const GOLDEN: &str = "tests/golden/smollm2-135m-instruct.json";

/// How far a side's logits are from the reference's.
struct Distance {
    /// Mean of KL(reference || side), in nats.
    mean_kl: f64,
    /// Fraction of positions whose likeliest token is the reference's.
    top1: f64,
}

pub(super) fn run(context: &Context, report: &mut Report) -> Result<()> {
    eprintln!("truth: the golden prompts through f32, ours and llama.cpp");
    let folder = context.peers.join("truth");
    std::fs::create_dir_all(&folder)?;
    let tokens = folder.join("tokens.txt");
    let positions = write_tokens(&tokens)?;
    let [reference, auto, peer] = ["f32", "auto", "llama"].map(|name| folder.join(format!("{name}.logits")));
    for (precision, out) in [("f32", &reference), ("auto", &auto)] {
        process::finish(
            Command::new(&context.galerne)
                .args(["bench", "logits", "-m", MODEL, "--precision", precision, "--data"])
                .arg(&context.data)
                .args(["--threads", &context.threads.to_string(), "--tokens"])
                .arg(&tokens)
                .arg("--out")
                .arg(out),
        )?;
    }
    process::finish(
        Command::new(context.llama.tool("logits"))
            .arg(&context.gguf)
            .arg(context.threads.to_string())
            .arg(&tokens)
            .arg(&peer),
    )?;
    let ours = distance(&reference, &auto, positions)?;
    let theirs = distance(&reference, &peer, positions)?;
    std::fs::remove_dir_all(folder)?;
    let compared = |name: &str, unit, better| Compared {
        name: format!("{name}, {positions} positions"),
        unit,
        peer_name: "llama.cpp",
        better,
        target: 1.0,
    };
    let one = |value| Sample(vec![value]);
    let kl = compared("mean KL to f32", "nats", Better::Lower);
    report.add(kl, &one(ours.mean_kl), &one(theirs.mean_kl));
    let top1 = compared("top-1 agreement with f32", "%", Better::Higher);
    report.add(top1, &one(ours.top1 * 100.0), &one(theirs.top1 * 100.0));
    Ok(())
}

/// A line per golden prompt with its reference answer; how many tokens there are.
fn write_tokens(path: &Path) -> Result<usize> {
    let golden = workspace_root().join(GOLDEN);
    let text = std::fs::read_to_string(&golden).with_context(|| format!("read {}", golden.display()))?;
    let golden: Value = serde_json::from_str(&text)?;
    let prompts = golden["prompts"].as_array().context("a list of golden prompts")?;
    let mut lines = String::new();
    let mut positions = 0;
    for prompt in prompts {
        let part = |name: &str| {
            prompt[name]
                .as_array()
                .with_context(|| format!("a golden prompt without {name}"))
        };
        let ids: Vec<String> = part("prompt_ids")?
            .iter()
            .chain(part("greedy_ids")?)
            .map(ToString::to_string)
            .collect();
        positions += ids.len();
        lines.push_str(&ids.join(" "));
        lines.push('\n');
    }
    std::fs::write(path, lines)?;
    Ok(positions)
}

/// Compares two files of logits, row by row: they are too large to hold at once.
fn distance(reference: &Path, other: &Path, positions: usize) -> Result<Distance> {
    let bytes = std::fs::metadata(reference)?.len();
    ensure!(
        std::fs::metadata(other)?.len() == bytes && bytes > 0,
        "{} and {} differ in size; are they of the same model?",
        reference.display(),
        other.display()
    );
    let row_bytes = usize::try_from(bytes)? / positions;
    let (mut a, mut b) = (
        BufReader::new(File::open(reference)?),
        BufReader::new(File::open(other)?),
    );
    let (mut sum, mut same) = (0.0, 0_u32);
    for _ in 0..positions {
        let (a, b) = (row(&mut a, row_bytes)?, row(&mut b, row_bytes)?);
        sum += kl(&a, &b);
        same += u32::from(argmax(&a) == argmax(&b));
    }
    Ok(Distance {
        mean_kl: sum / positions as f64,
        top1: f64::from(same) / positions as f64,
    })
}

fn row(file: &mut impl Read, bytes: usize) -> Result<Vec<f64>> {
    let mut row = vec![0; bytes];
    file.read_exact(&mut row)?;
    let (values, _) = row.as_chunks::<4>();
    Ok(values
        .iter()
        .map(|value| f64::from(f32::from_le_bytes(*value)))
        .collect())
}

/// KL(reference || other) of two rows of logits, in nats.
fn kl(reference: &[f64], other: &[f64]) -> f64 {
    let (a, b) = (log_sum_exp(reference), log_sum_exp(other));
    let terms = reference.iter().zip(other).map(|(p, q)| {
        let log_p = p - a;
        log_p.exp() * (log_p - (q - b))
    });
    terms.sum()
}

fn log_sum_exp(row: &[f64]) -> f64 {
    let max = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    max + row.iter().map(|logit| (logit - max).exp()).sum::<f64>().ln()
}

fn argmax(row: &[f64]) -> Option<usize> {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kl_of_two_coins() {
        // A fair coin against one that shows heads three times in four: ln 2 - (ln 3) / 2.
        let fair = [7.0, 7.0];
        let loaded = [3.0_f64.ln(), 0.0];
        assert!((kl(&fair, &loaded) - (2.0_f64.ln() - 3.0_f64.ln() / 2.0).abs()).abs() < 1e-12);
        assert!(kl(&loaded, &loaded).abs() < 1e-12);
        assert_eq!(argmax(&loaded), Some(0));
    }

    #[test]
    fn rows_are_little_endian_f32() {
        let mut bytes: &[u8] = &[0, 0, 128, 63, 0, 0, 0, 192, 0, 0, 0, 0];
        assert_eq!(row(&mut bytes, 8).expect("two values"), [1.0, -2.0]);
        assert!(row(&mut bytes, 8).is_err(), "only one value is left");
    }
}
