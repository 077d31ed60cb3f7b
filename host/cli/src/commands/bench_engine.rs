//! `galerne bench engine`: prefill, decode and batched decode of a packaged model through the real engine.

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use galerne_core::grammar::GrammarSource;
use galerne_plugin::PluginHost;
use galerne_store::store::Store;
use serde::Serialize;

use super::bench::only_model;
use super::bench_runs::{Runs, Way};
use crate::config::{DataArgs, DeviceArgs};
use crate::{guests, load};

/// Options of `galerne bench engine`.
#[derive(Debug, Args)]
pub(super) struct EngineBenchArgs {
    /// Model to measure [default: the data folder's only one]
    #[arg(short, long)]
    model: Option<String>,
    /// Prompt lengths to prefill, in tokens; none if nothing follows
    #[arg(long, value_delimiter = ',', num_args = 0.., default_values_t = [128, 512, 2_048])]
    prefill: Vec<u32>,
    /// Output tokens of the decode runs
    #[arg(long, default_value = "128")]
    decode: u32,
    /// Prompt tokens each sequence of the decode runs has before its output
    #[arg(long, default_value = "16")]
    context: u32,
    /// Numbers of sequences decoded together; none if nothing follows
    #[arg(long, value_delimiter = ',', num_args = 0.., default_values_t = [1, 2, 4, 8, 16, 32])]
    batch: Vec<u32>,
    /// Runs of each measurement; the median is printed with the extremes
    #[arg(long, default_value = "5")]
    runs: u32,
    /// Also decode with this sampling guest, alternating with plain sampling, and print the ratio
    #[arg(long, value_name = "NAME")]
    sampler: Option<String>,
    /// Also decode under this JSON schema, alternating with plain sampling, and print the ratio; without FILE an array of
    /// objects
    #[arg(long, value_name = "FILE")]
    schema: Option<Option<PathBuf>>,
    /// Sequences that decode together where two ways of choosing tokens are compared
    #[arg(long, default_value = "1", value_name = "SEQUENCES")]
    compare_batch: u32,
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Names, numbers and text as services ask for them, and always another one: it does not end before `--decode` tokens.
const SCHEMA: &str = r#"{"type": "array", "minItems": 10000, "items": {"type": "object", "additionalProperties": false,
    "required": ["name", "kind", "price", "tags", "note"], "properties": {"name": {"type": "string", "maxLength": 40},
    "kind": {"enum": ["book", "film", "place"]}, "price": {"type": "number", "minimum": 0},
    "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4}, "note": {"type": ["string", "null"]}}}}"#;

/// What one measurement gave.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum Figure {
    Rate {
        name: String,
        median_tokens_per_s: f64,
        min_tokens_per_s: f64,
        max_tokens_per_s: f64,
    },
    /// Of the rates of pairs, so that a drifting machine moves both.
    Ratio {
        name: String,
        median_ratio: f64,
        lower_quarter: f64,
        upper_quarter: f64,
    },
}

impl Figure {
    fn rate(name: String, rates: Vec<f64>) -> Result<Self> {
        let rates = sorted(&name, rates)?;
        Ok(Self::Rate {
            name,
            median_tokens_per_s: rates[rates.len() / 2],
            min_tokens_per_s: rates[0],
            max_tokens_per_s: rates[rates.len() - 1],
        })
    }

    fn ratio(name: String, ratios: Vec<f64>) -> Result<Self> {
        let ratios = sorted(&name, ratios)?;
        Ok(Self::Ratio {
            name,
            median_ratio: ratios[ratios.len() / 2],
            lower_quarter: ratios[ratios.len() / 4],
            upper_quarter: ratios[ratios.len() * 3 / 4],
        })
    }
}

impl fmt::Display for Figure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rate {
                name,
                median_tokens_per_s: median,
                min_tokens_per_s: min,
                max_tokens_per_s: max,
            } => write!(f, "{name:<28} {median:>8.1} tokens/s  ({min:.1} to {max:.1})"),
            Self::Ratio {
                name,
                median_ratio: median,
                lower_quarter: low,
                upper_quarter: high,
            } => write!(
                f,
                "{name:<28} {median:>8.3}            (quarters at {low:.3} and {high:.3})"
            ),
        }
    }
}

/// Values in order, at least one.
fn sorted(name: &str, mut values: Vec<f64>) -> Result<Vec<f64>> {
    ensure!(!values.is_empty(), "{name}: no runs; give --runs at least 1");
    values.sort_by(f64::total_cmp);
    Ok(values)
}

pub(super) fn run(data: &DataArgs, args: &EngineBenchArgs) -> Result<()> {
    ensure!(args.runs > 0, "--runs: expected at least 1");
    ensure!(args.decode > 1, "--decode: expected at least 2 tokens");
    ensure!(args.context > 0, "--context: expected at least 1 token");
    ensure!(
        args.compare_batch > 0,
        "--compare-batch: expected at least 1 sequence"
    );
    let store = Store::new(&data.folder()?);
    let name = match &args.model {
        Some(name) => name.clone(),
        None => only_model(&store)?,
    };
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let device = load::device(&args.device)?.device;
    let model = load::start(&store.open(&name)?, &plugins, &*device, &args.device)?;
    let info = device.info();
    if !args.json {
        println!(
            "{name} on {} ({}, {} threads), precision {:?}",
            info.name, info.isa, info.threads, args.device.precision
        );
    }
    let runs = Runs {
        engine: &model.engine,
        grammars: Some(&*model.grammars),
        context: args.context,
    };
    let mut bench = Bench {
        runs,
        args,
        figures: Vec::new(),
    };
    bench.all(&plugins)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&bench.figures)?);
    }
    model.engine.shutdown();
    Ok(())
}

/// Pairs of short decodes that each of `--runs` stands for where two ways of choosing tokens are compared: a few percent
/// cannot be told from one pair.
const PAIRS_PER_RUN: u32 = 8;

struct Bench<'a> {
    runs: Runs<'a>,
    args: &'a EngineBenchArgs,
    figures: Vec<Figure>,
}

impl Bench<'_> {
    fn all(&mut self, plugins: &PluginHost) -> Result<()> {
        let args = self.args;
        // The first run pays for page faults and frequency changes; it does not count.
        self.runs.decode(1, 16, Way::Plain)?;
        for &tokens in &args.prefill {
            self.runs.prefill(tokens)?;
            let rates = self.repeat(|runs| runs.prefill(tokens))?;
            self.push(Figure::rate(format!("prefill {tokens}"), rates)?);
        }
        for &sequences in &args.batch {
            let rates = self.repeat(|runs| runs.decode(sequences, args.decode, Way::Plain))?;
            self.push(Figure::rate(
                format!("decode {} x {sequences}", args.decode),
                rates,
            )?);
        }
        if let Some(name) = &args.sampler {
            let samplers = guests::samplers(plugins, &[])?;
            let factory = samplers.get(name);
            let factory = factory.with_context(|| format!("no sampling guest \"{name}\" in this build"))?;
            self.compare(&format!("guest {name}"), Way::Guest(&**factory))?;
        }
        if let Some(file) = &args.schema {
            let source = GrammarSource::JsonSchema(schema(file.as_deref())?);
            self.compare("schema", Way::Grammar(&source))?;
        }
        Ok(())
    }

    fn repeat(&self, mut run: impl FnMut(&Runs<'_>) -> Result<f64>) -> Result<Vec<f64>> {
        (0..self.args.runs).map(|_| run(&self.runs)).collect()
    }

    /// Keeps a figure and shows it, since a whole run takes long.
    fn push(&mut self, figure: Figure) {
        if !self.args.json {
            println!("{figure}");
        }
        self.figures.push(figure);
    }

    /// Alternates plain sampling and another way, each first in turn.
    fn compare(&mut self, name: &str, way: Way<'_>) -> Result<()> {
        let (mut plain, mut other, mut ratios) = (Vec::new(), Vec::new(), Vec::new());
        for pair in 0..self.args.runs * PAIRS_PER_RUN {
            let mut both = [(Way::Plain, 0.0), (way, 0.0)];
            both.rotate_left(pair as usize % 2);
            for (way, rate) in &mut both {
                *rate = self
                    .runs
                    .decode(self.args.compare_batch, self.args.decode, *way)?;
            }
            both.rotate_left(pair as usize % 2);
            let [(_, without), (_, with)] = both;
            plain.push(without);
            other.push(with);
            ratios.push(with / without);
        }
        self.push(Figure::rate("decode, plain sampling".to_owned(), plain)?);
        self.push(Figure::rate(format!("decode, {name}"), other)?);
        self.push(Figure::ratio(format!("ratio {name} / plain"), ratios)?);
        Ok(())
    }
}

fn schema(file: Option<&Path>) -> Result<serde_json::Value> {
    let Some(file) = file else {
        return Ok(serde_json::from_str(SCHEMA)?);
    };
    let text = std::fs::read_to_string(file).with_context(|| format!("read schema {}", file.display()))?;
    serde_json::from_str(&text).with_context(|| format!("schema {}", file.display()))
}
