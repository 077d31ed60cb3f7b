//! The build tool: guests, CUDA kernels, the demo, and the tests. Run as `cargo xtask COMMAND`.
#![expect(clippy::print_stdout, reason = "a build tool talks to a terminal")]

mod bench;
mod demo;
mod deny;
mod gpu_kit;
mod guests;
mod kernels;
mod languages;
mod test;
mod venv;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

/// Builds, shows and tests Galerne.
#[derive(Parser)]
#[command(name = "cargo xtask", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// The main job end to end: build, fetch a small real model, serve it, stream an answer over HTTP/3
    Demo(demo::DemoArgs),
    /// Everything CI checks
    Test(test::TestArgs),
    /// Measure against other engines
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Build the first-party guests to components under target/guests
    Guests,
    /// Build the example guests in Python and JavaScript, and install what that needs under target/languages
    Languages,
    /// Compile the CUDA kernels into the archive that the binary embeds
    Kernels(kernels::KernelsArgs),
    /// Make target/gpu-kit, which checks and measures Galerne on a machine with a GPU
    GpuKit,
    /// Check licences, advisories and sources of dependencies with cargo-deny
    Deny,
}

fn main() -> ExitCode {
    match run(&Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: &Command) -> Result<()> {
    match command {
        Command::Demo(args) => demo::run(args),
        Command::Test(args) => test::run(args),
        Command::Bench(command) => bench::run(command),
        Command::Guests => guests::build_all(),
        Command::Languages => languages::run(),
        Command::GpuKit => gpu_kit::run(),
        Command::Kernels(args) => kernels::run(args),
        Command::Deny => deny::run(),
    }
}

/// The workspace's root folder.
fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .parent()
        .unwrap_or_else(|| Path::new("."))
}

/// The cargo that runs this tool.
fn cargo() -> String {
    std::env::var("CARGO").unwrap_or_else(|_| "cargo".to_owned())
}

/// Where cargo puts what it builds.
fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| workspace_root().join("target"), PathBuf::from)
}
