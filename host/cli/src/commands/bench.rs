//! `galerne bench`: what there is to measure.

use anyhow::{Result, bail};
use clap::Subcommand;
use galerne_store::store::Store;

use super::{bench_engine, bench_guests, bench_logits, bench_serve};
use crate::config::DataArgs;

/// Subcommands of `galerne bench`.
#[derive(Debug, Subcommand)]
pub(super) enum BenchCommand {
    /// Prefill, decode and batched decode of one model, without the network
    Engine(bench_engine::EngineBenchArgs),
    /// New instances of the guests in this binary
    Guests(bench_guests::GuestsBenchArgs),
    /// Streaming clients against a running server, ours or another, over plain HTTP
    Serve(bench_serve::ServeBenchArgs),
    /// Write the logits of given tokens, to compare them with another engine's
    Logits(bench_logits::LogitsArgs),
}

pub(super) fn run(data: &DataArgs, command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Engine(args) => bench_engine::run(data, &args),
        BenchCommand::Guests(args) => bench_guests::run(data, &args),
        BenchCommand::Serve(args) => bench_serve::run(&args),
        BenchCommand::Logits(args) => bench_logits::run(data, &args),
    }
}

pub(super) fn only_model(store: &Store) -> Result<String> {
    let mut models = store.list()?;
    match (models.pop(), models.is_empty()) {
        (Some(model), true) => Ok(model.name),
        (None, _) => bail!("no models; import one with `galerne model import SOURCE --name NAME`"),
        (Some(_), false) => bail!("several models; choose one with -m NAME"),
    }
}
