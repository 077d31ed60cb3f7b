//! `cargo xtask bench plugins`: what guests and grammars cost, each figure against its target.
//!
//! A group is a function that takes [`Bench`] and gives figures; a new one is a variant of [`Group`] and an arm in
//! [`measure`].

use std::fmt::Write as _;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use clap::ValueEnum;
use serde_json::{Value, json};

use super::report::{markdown, number};
use super::{machine, plugins_service, process, warn_unless_quiet};
use crate::demo::{self, MODEL};
use crate::{cargo, guests, target_dir, workspace_root};

#[derive(clap::Args)]
pub(crate) struct PluginsArgs {
    /// How thorough: each stands for 8 pairs of short decodes where two ways are compared
    #[arg(long, default_value = "5")]
    runs: NonZeroU32,
    /// Answers to random schemas to check
    #[arg(long, default_value = "1000")]
    schemas: NonZeroU32,
    /// Only these groups
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Group>,
    /// Also write one JSON object per line of the table to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// What new instances and the plans of a step take, in process and in a cell
    Instance,
    /// A sampling guest on each of 16 sequences against native sampling
    Sampler,
    /// Decoding under a JSON schema against plain sampling
    Schema,
    /// Answers to random schemas, checked by an independent validator
    Valid,
    /// A neighbour's stream beside evil guests
    Neighbour,
    /// A stream while its deployment is switched again and again
    Switch,
    /// From a component's upload to its first answer
    Upload,
}

/// What every group needs.
pub(super) struct Bench<'a> {
    pub(super) galerne: PathBuf,
    /// Data folder with the demo model.
    pub(super) data: PathBuf,
    gguf: PathBuf,
    args: &'a PluginsArgs,
}

/// One measured figure. Less is better in all of them.
#[derive(Debug, PartialEq)]
pub(super) struct Figure {
    pub(super) name: String,
    pub(super) unit: &'static str,
    pub(super) measured: f64,
    /// The most it may be.
    pub(super) target: f64,
    /// Spread, or what else was seen.
    pub(super) note: String,
}

impl Figure {
    fn status(&self) -> &'static str {
        if self.measured <= self.target {
            "ok"
        } else {
            "short"
        }
    }

    fn row(&self) -> [String; 6] {
        [
            self.name.clone(),
            self.unit.to_owned(),
            number(self.measured),
            format!("<= {}", self.target),
            self.status().to_owned(),
            self.note.clone(),
        ]
    }

    fn json(&self) -> Value {
        json!({
            "name": self.name,
            "unit": self.unit,
            "measured": self.measured,
            "target": self.target,
            "status": self.status(),
            "note": self.note,
        })
    }
}

pub(super) fn run(args: &PluginsArgs) -> Result<()> {
    guests::build_all()?;
    let bench = Bench {
        galerne: demo::build_binary(demo::Profile::Release)?,
        data: target_dir().join("bench-plugins"),
        gguf: demo::fetch_model()?,
        args,
    };
    demo::import(&bench.galerne, &bench.data, &bench.gguf, MODEL)?;
    warn_unless_quiet(machine::load_average());
    let mut figures = Vec::new();
    for group in Group::value_variants() {
        if args.only.is_empty() || args.only.contains(group) {
            for figure in measure(*group, &bench)? {
                eprintln!("{}", figure.row().join("  "));
                figures.push(figure);
            }
        }
    }
    let mut rows = vec![["name", "unit", "measured", "target", "", "note"].map(str::to_owned)];
    rows.extend(figures.iter().map(Figure::row));
    println!("\n{}", markdown(&rows));
    if let Some(file) = &args.json {
        let mut lines = String::new();
        for figure in &figures {
            writeln!(lines, "{}", figure.json())?;
        }
        std::fs::write(file, lines)?;
    }
    Ok(())
}

fn measure(group: Group, bench: &Bench<'_>) -> Result<Vec<Figure>> {
    match group {
        Group::Instance => instances(bench),
        Group::Sampler => {
            let arguments = ["--sampler", "mirostat", "--compare-batch", "16"];
            let ratio = bench.compare(&arguments)?;
            Ok(vec![cost("a sampling guest on each of 16 sequences", ratio, 2.0)])
        }
        Group::Schema => Ok(vec![
            cost("a JSON schema, 1 sequence", bench.compare(&["--schema"])?, 5.0),
            cost(
                "a JSON schema on each of 16 sequences",
                bench.compare(&["--schema", "--compare-batch", "16"])?,
                5.0,
            ),
        ]),
        Group::Valid => valid(bench),
        Group::Neighbour => plugins_service::neighbour(bench),
        Group::Switch => plugins_service::switch(bench),
        Group::Upload => plugins_service::upload(bench),
    }
}

impl Bench<'_> {
    /// Alternations of what is measured in pairs.
    pub(super) fn runs(&self) -> u32 {
        self.args.runs.get()
    }

    /// The figures that a command of our binary prints as JSON.
    fn figures(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let mut command = Command::new(&self.galerne);
        command.arg("bench").args(arguments).args(["--json", "--data"]);
        let printed = process::finish(command.arg(&self.data))?.stdout;
        serde_json::from_str(&printed)
            .with_context(|| format!("read what galerne bench {arguments:?} printed"))
    }

    /// The ratio of two ways to choose tokens, of pairs of short decodes.
    fn compare(&self, arguments: &[&str]) -> Result<Ratio> {
        let runs = self.args.runs.to_string();
        let mut all = vec!["engine", "-m", MODEL, "--prefill", "--batch", "--runs", &runs];
        all.extend(arguments);
        Ratio::find(&self.figures(&all)?)
    }
}

/// How fast one way decodes as a part of another's speed.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Ratio {
    median: f64,
    lower_quarter: f64,
    upper_quarter: f64,
}

impl Ratio {
    fn find(figures: &[Value]) -> Result<Self> {
        let figure = figures.iter().find(|figure| figure["median_ratio"].is_number());
        let figure = figure.context("galerne bench engine gave no ratio")?;
        let part = |name: &str| {
            figure[name]
                .as_f64()
                .with_context(|| format!("a ratio without {name}"))
        };
        Ok(Self {
            median: part("median_ratio")?,
            lower_quarter: part("lower_quarter")?,
            upper_quarter: part("upper_quarter")?,
        })
    }
}

/// What the slower way costs, in percent of decode speed.
fn cost(name: &str, ratio: Ratio, target: f64) -> Figure {
    let percent = |ratio: f64| 100.0 * (1.0 - ratio);
    Figure {
        name: name.to_owned(),
        unit: "% of decode speed",
        measured: percent(ratio.median),
        target,
        note: format!(
            "quarters at {:.1} and {:.1}",
            percent(ratio.upper_quarter),
            percent(ratio.lower_quarter)
        ),
    }
}

fn instances(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let figures = bench.figures(&["guests"])?;
    ensure!(!figures.is_empty(), "galerne bench guests gave no figures");
    figures
        .iter()
        .map(|figure| {
            let time = |field: &str| {
                figure[field]
                    .as_f64()
                    .with_context(|| format!("a figure without {field}"))
            };
            let name = figure["name"].as_str().context("a figure without a name")?;
            // Shown by the command, and no target of this table.
            if name.ends_with("in process") {
                return Ok(None);
            }
            let target = match (name.contains("session of"), name.contains("plans")) {
                (true, _) => 300.0,
                (false, true) => 60.0,
                (false, false) => 50.0,
            };
            Ok(Some(Figure {
                name: format!("{name}, p50"),
                unit: "us",
                measured: time("p50_us")?,
                target,
                note: format!("p99 {:.1}", time("p99_us")?),
            }))
        })
        .filter_map(Result::transpose)
        .collect()
}

/// Runs the test of random schemas for longer. It fails at the first answer that is not valid.
fn valid(bench: &Bench<'_>) -> Result<Vec<Figure>> {
    let mut test = Command::new(cargo());
    test.args([
        "test",
        "--package",
        "galerne",
        "--test",
        "schemas",
        "--",
        "--nocapture",
    ])
    .current_dir(workspace_root())
    .env("GALERNE_TEST_GGUF", &bench.gguf)
    .env("GALERNE_TEST_SCHEMAS", bench.args.schemas.to_string());
    let printed = process::finish(&mut test)?.stdout;
    let figures = printed.lines().find_map(|line| line.split_once("figures "));
    let (_, figures) = figures.context("the test of random schemas gave no figures")?;
    let figures: Value = serde_json::from_str(figures)?;
    let count = |name: &str| {
        figures[name]
            .as_u64()
            .with_context(|| format!("no count of {name}"))
    };
    let (valid, cut, refused) = (count("valid")?, count("cut")?, count("refused")?);
    Ok(vec![Figure {
        name: format!("invalid of {valid} answers to random schemas"),
        unit: "answers",
        measured: 0.0,
        target: 0.0,
        note: format!("besides, {cut} longer than their limit and {refused} schemas refused"),
    }])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ratio_becomes_a_cost_and_a_verdict() {
        let figures = [
            json!({"name": "decode, schema", "median_tokens_per_s": 200.0}),
            json!({"name": "ratio", "median_ratio": 0.96, "lower_quarter": 0.9, "upper_quarter": 1.0}),
        ];
        let ratio = Ratio::find(&figures).expect("a ratio");
        let figure = cost("a schema", ratio, 5.0);
        assert!((figure.measured - 4.0).abs() < 1e-9, "{figure:?}");
        assert_eq!(
            (figure.status(), &*figure.note),
            ("ok", "quarters at 0.0 and 10.0")
        );
        assert_eq!(cost("a schema", ratio, 2.0).status(), "short");
        assert!(Ratio::find(&figures[..1]).is_err());
    }
}
