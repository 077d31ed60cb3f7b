//! `galerne compile-guest` and `galerne cell`: what the host starts to do in another process.

use std::time::Duration;

use anyhow::Result;
use clap::Args;

/// Arguments of `galerne compile-guest`.
#[derive(Debug, Args)]
pub(super) struct CompileGuestArgs {
    /// CPU time it may take, in seconds
    cpu_seconds: u64,
    /// Memory it may write, in bytes
    memory_bytes: u64,
    /// Make code that counts what it executes
    #[arg(long)]
    count_fuel: bool,
}

pub(super) fn compile_guest(args: &CompileGuestArgs) -> Result<()> {
    let cpu = Duration::from_secs(args.cpu_seconds);
    galerne_plugin::compile_guest(cpu, args.memory_bytes, args.count_fuel)?;
    Ok(())
}

/// Arguments of `galerne cell`.
#[derive(Debug, Args)]
pub(super) struct CellArgs {
    /// Memory it may write, in bytes
    memory_bytes: u64,
}

pub(super) fn cell(args: &CellArgs) -> Result<()> {
    galerne_plugin::cell(args.memory_bytes)?;
    Ok(())
}
