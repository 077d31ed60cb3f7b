//! The command line: one file per command.

mod bench;
mod bench_engine;
mod bench_guests;
mod bench_logits;
mod bench_runs;
mod bench_serve;
mod chat;
mod connect;
mod deploy;
mod doctor;
mod doctor_measure;
mod gpu_check;
mod logs;
mod model;
mod plugin;
mod plugin_test;
mod secret;
mod serve;
mod test_host;
mod watermark;
mod worker;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::config::DataArgs;

/// Serves open-weight language models whose behaviour is programmed by sandboxed WebAssembly guests.
#[derive(Debug, Parser)]
#[command(
    name = "galerne",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
#[command(
    after_help = "A first tour:\n  galerne model import model.gguf --name mymodel\n  galerne serve\n  galerne chat \"Hello\""
)]
pub struct Cli {
    #[command(flatten)]
    data: DataArgs,
    /// Log filter, as in RUST_LOG: error, warn, info, debug, or per crate
    #[arg(
        long,
        value_name = "FILTER",
        env = "GALERNE_LOG",
        default_value = "warn",
        global = true
    )]
    log: String,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve the models of the data folder over HTTP/3, HTTP/2 and HTTP/1.1
    Serve(serve::ServeArgs),
    /// Talk to a host over HTTP/3: one answer for PROMPT, or a conversation without it
    Chat(chat::ChatArgs),
    /// Import, list and show models
    #[command(subcommand)]
    Model(model::ModelCommand),
    /// Check components, give them to a host, list and show them
    #[command(subcommand)]
    Plugin(plugin::PluginCommand),
    /// Keep secrets that a tenant's guests may read where a deployment grants them
    #[command(subcommand)]
    Secret(secret::SecretCommand),
    /// Publish a deployment: a model with guests, under a name of its own
    Deploy(deploy::DeployArgs),
    /// List a host's deployments, or show one
    Deployments(deploy::DeploymentsArgs),
    /// Show what a deployment's guests wrote to their log
    Logs(logs::LogsArgs),
    /// Give a deployment's canary all requests
    Promote(deploy::SwitchArgs),
    /// End a deployment's canary, or go back to the version before
    Rollback(deploy::SwitchArgs),
    /// Look for the mark that the sampler watermark leaves in text
    Watermark(watermark::WatermarkArgs),
    /// Say what this machine offers and what is in the way
    Doctor(doctor::DoctorArgs),
    /// Measure
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Check and measure the GPU of this machine; started by the kit that `cargo xtask gpu-kit` makes
    #[command(hide = true)]
    GpuCheck(gpu_check::GpuCheckArgs),
    /// Compile one component from standard input to standard output, confined; started by the host
    #[command(hide = true)]
    CompileGuest(worker::CompileGuestArgs),
    /// Run a tenant's guests, confined, for the host on standard input; started by the host
    #[command(hide = true)]
    Cell(worker::CellArgs),
}

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    /// What went wrong and what to do, for the person at the terminal.
    pub fn run(self) -> Result<()> {
        let filter = tracing_subscriber::EnvFilter::try_new(&self.log)?;
        tracing_subscriber::fmt()
            .with_env_filter(filter)
            .with_writer(std::io::stderr)
            .init();
        match self.command {
            Command::Serve(args) => serve::run(&self.data, &args),
            Command::Chat(args) => chat::run(&self.data, &args),
            Command::Model(command) => model::run(&self.data, command),
            Command::Plugin(command) => plugin::run(&self.data, command),
            Command::Secret(command) => secret::run(&self.data, command),
            Command::Deploy(args) => deploy::deploy(&self.data, &args),
            Command::Deployments(args) => deploy::deployments(&self.data, &args),
            Command::Logs(args) => logs::run(&self.data, &args),
            Command::Promote(args) => deploy::promote(&self.data, &args),
            Command::Rollback(args) => deploy::rollback(&self.data, &args),
            Command::Watermark(args) => watermark::run(&self.data, &args),
            Command::Doctor(args) => doctor::run(&self.data, &args),
            Command::Bench(command) => bench::run(&self.data, command),
            Command::GpuCheck(args) => gpu_check::run(&self.data, &args),
            Command::CompileGuest(args) => worker::compile_guest(&args),
            Command::Cell(args) => worker::cell(&args),
        }
    }
}
