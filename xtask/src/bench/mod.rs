//! `cargo xtask bench`: Galerne and other engines in turn, on the same model file with the same threads; and what the
//! plugin platform costs.

mod build;
mod candle;
mod groups;
mod llama;
mod machine;
mod ours;
mod plugins;
mod plugins_service;
mod process;
mod report;
mod serve;
mod server;
mod stats;
mod truth;
mod vllm;

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::Result;
use clap::{Subcommand, ValueEnum};

use crate::demo::{self, MODEL};
use crate::{guests, target_dir};
use build::Llama;
use report::Report;

#[derive(Subcommand)]
pub(crate) enum BenchCommand {
    /// Measure against llama.cpp (built from source the first time) and others, in turn, on the demo model
    Peers(PeersArgs),
    /// Measure what guests and grammars cost, against the targets
    Plugins(plugins::PluginsArgs),
}

#[derive(clap::Args)]
pub(crate) struct PeersArgs {
    /// Alternations of each measurement
    #[arg(long, default_value = "5")]
    runs: NonZeroUsize,
    /// Only these groups
    #[arg(long, value_enum, value_delimiter = ',')]
    only: Vec<Group>,
    /// Also against vLLM for CPU (the group vllm), which takes 6 GB under target/peers
    #[arg(long)]
    vllm: bool,
    /// Threads of both sides [default: all cores]
    #[arg(long)]
    threads: Option<NonZeroUsize>,
    /// Also write one JSON object per line of the table to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the results go [default: benches/results/cpu-DATE.md]
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Group {
    /// One sequence, all threads and one, and the fraction of the memory bound
    Decode,
    /// Prompts of 128, 512 and 2,048 tokens
    Prefill,
    /// 16 sequences with 256 tokens of context each
    Batched,
    /// Q8_0 and bf16 versions of the model
    Formats,
    /// 32 streaming clients over plain HTTP
    Serve,
    /// Peak memory
    Memory,
    /// Distance to the f32 logits
    Truth,
    /// Decode and prefill against candle
    Candle,
    /// Servers and prefill against vLLM in bf16; only if named, or with --vllm
    Vllm,
}

impl PeersArgs {
    fn wants(&self, group: Group) -> bool {
        let by_default = self.only.is_empty() && group != Group::Vllm;
        by_default || self.only.contains(&group) || (self.vllm && group == Group::Vllm)
    }
}

/// What every group needs.
struct Context {
    galerne: PathBuf,
    /// Where the peers are built.
    peers: PathBuf,
    /// Data folder with the models that are measured.
    data: PathBuf,
    gguf: PathBuf,
    llama: Llama,
    runs: usize,
    threads: usize,
    /// What else the machine did.
    load_before: Option<f64>,
}

/// A load average above this is worth a warning.
const LOAD_QUIET: f64 = 0.5;

pub(crate) fn run(command: &BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Peers(args) => peers(args),
        BenchCommand::Plugins(args) => plugins::run(args),
    }
}

/// Says so if the machine is doing something else.
fn warn_unless_quiet(load: Option<f64>) {
    if let Some(load) = load.filter(|load| *load > LOAD_QUIET) {
        eprintln!("the machine is not quiet (load average {load}): the figures will say little");
    }
}

fn peers(args: &PeersArgs) -> Result<()> {
    let peers = target_dir().join("peers");
    std::fs::create_dir_all(&peers)?;
    guests::build_all()?;
    let context = Context {
        galerne: demo::build_binary(demo::Profile::Release)?,
        data: peers.join("data"),
        llama: build::llama(&peers)?,
        peers,
        gguf: demo::fetch_model()?,
        runs: args.runs.get(),
        threads: args.threads.map_or_else(machine::cores, NonZeroUsize::get),
        load_before: machine::load_average(),
    };
    warn_unless_quiet(context.load_before);
    demo::import(&context.galerne, &context.data, &context.gguf, MODEL)?;
    let mut report = Report::default();
    for group in Group::value_variants() {
        if args.wants(*group) {
            measure(*group, &context, &mut report)?;
        }
    }
    println!("\n{}", report.table());
    if let Some(file) = &args.json {
        std::fs::write(file, report.json_lines())?;
    }
    let out = args.out.clone().map_or_else(machine::results_file, Ok)?;
    if let Some(folder) = out.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(&out, machine::document(&context, &report)?)?;
    println!("written to {}", out.display());
    Ok(())
}

fn measure(group: Group, context: &Context, report: &mut Report) -> Result<()> {
    match group {
        Group::Decode => groups::decode(context, report),
        Group::Prefill => groups::prefill(context, report),
        Group::Batched => groups::batched(context, report),
        Group::Formats => groups::formats(context, report),
        Group::Serve => serve::run(context, report),
        Group::Memory => groups::memory(context, report),
        Group::Truth => truth::run(context, report),
        Group::Candle => candle::run(context, report),
        Group::Vllm => vllm::run(context, report),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        args: PeersArgs,
    }

    #[test]
    fn vllm_is_measured_only_when_asked_for() {
        let wants = |args: &[&str]| {
            let args = Cli::try_parse_from([&["peers"], args].concat())
                .expect("parse")
                .args;
            [Group::Serve, Group::Truth, Group::Vllm].map(|group| args.wants(group))
        };
        assert_eq!(wants(&[]), [true, true, false]);
        assert_eq!(wants(&["--vllm"]), [true, true, true]);
        assert_eq!(wants(&["--only", "truth"]), [false, true, false]);
        assert_eq!(wants(&["--only", "serve", "--vllm"]), [true, false, true]);
        assert_eq!(wants(&["--only", "vllm"]), [false, false, true]);
    }
}
