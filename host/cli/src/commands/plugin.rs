//! `galerne plugin`: check, push, list and show.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use galerne_core::guest::{GuestLoader as _, GuestSource};
use galerne_plugin::{PluginHost, PluginOptions};
use serde_json::Value;

use super::connect::{AdminArgs, AdminRequest};
use crate::config::DataArgs;

/// Subcommands of `galerne plugin`.
#[derive(Debug, Subcommand)]
pub(super) enum PluginCommand {
    /// Say what a component is, or what is wrong with it and what to do; needs no running host
    Check {
        /// The component
        #[arg(value_name = "FILE.wasm")]
        file: PathBuf,
    },
    /// Give a component to a running host as a version of a plugin
    Push(PushArgs),
    /// List the plugins of a running host
    List(AdminArgs),
    /// Show all versions of a plugin
    Show {
        /// Its name
        name: String,
        #[command(flatten)]
        admin: AdminArgs,
    },
}

/// Options of `galerne plugin push`.
#[derive(Debug, Args)]
pub(super) struct PushArgs {
    /// The component
    #[arg(value_name = "FILE.wasm")]
    file: PathBuf,
    /// Name of the plugin [default: the file's, with "-" for "_"]
    #[arg(long)]
    name: Option<String>,
    /// Version, MAJOR.MINOR.PATCH; one that exists never changes
    #[arg(long, default_value = "0.1.0", id = "plugin-version", value_name = "VERSION")]
    plugin_version: String,
    #[command(flatten)]
    admin: AdminArgs,
}

pub(super) fn run(data: &DataArgs, command: PluginCommand) -> Result<()> {
    match command {
        PluginCommand::Check { file } => check(&file),
        PluginCommand::Push(args) => push(data, args),
        PluginCommand::List(admin) => list(data, &admin),
        PluginCommand::Show { name, admin } => show(data, &name, &admin),
    }
}

fn check(file: &Path) -> Result<()> {
    let component = read(file)?;
    let host = PluginHost::new(PluginOptions::default())?;
    let begin = Instant::now();
    let facts = host.inspect(GuestSource {
        tenant: "default",
        name: &plugin_name(file),
        component: &component,
    })?;
    let worlds: Vec<String> = facts.worlds.iter().map(ToString::to_string).collect();
    println!("{}: fits", file.display());
    println!("  worlds        {}", worlds.join(", "));
    if facts.imports.is_empty() {
        println!("  capabilities  none");
    } else {
        println!("  capabilities  {}", facts.imports.join(", "));
    }
    println!("  size          {} KiB", component.len().div_ceil(1_024));
    println!("  compiled in   {} ms", begin.elapsed().as_millis());
    Ok(())
}

fn push(data: &DataArgs, args: PushArgs) -> Result<()> {
    let component = read(&args.file)?;
    let name = args.name.unwrap_or_else(|| plugin_name(&args.file));
    let request = AdminRequest {
        query: vec![("name", name), ("version", args.plugin_version)],
        ..AdminRequest::post("plugins", component)
    };
    let record = args.admin.ask(data, request)?;
    println!("pushed {} ({})", line(&record), text(&record["digest"]));
    Ok(())
}

fn list(data: &DataArgs, admin: &AdminArgs) -> Result<()> {
    let answer = admin.ask(data, AdminRequest::get("plugins"))?;
    let mut out = std::io::stdout().lock();
    for record in answer["data"].as_array().into_iter().flatten() {
        writeln!(out, "{}", line(record))?;
    }
    for name in answer["builtin"].as_array().into_iter().flatten() {
        writeln!(out, "{} (comes with the host)", text(name))?;
    }
    Ok(())
}

fn show(data: &DataArgs, name: &str, admin: &AdminArgs) -> Result<()> {
    let answer = admin.ask(data, AdminRequest::get(format!("plugins/{name}")))?;
    println!("{}", serde_json::to_string_pretty(&answer["data"])?);
    Ok(())
}

/// Name, version and worlds of a plugin's record.
fn line(record: &Value) -> String {
    let worlds = record["worlds"].as_array().into_iter().flatten().map(text);
    let worlds: Vec<&str> = worlds.collect();
    format!(
        "{} {} [{}]",
        text(&record["name"]),
        text(&record["version"]),
        worlds.join(", ")
    )
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

fn read(file: &Path) -> Result<Vec<u8>> {
    std::fs::read(file).with_context(|| format!("read the component {}", file.display()))
}

/// The name of a plugin whose file this is; Cargo writes `_` for `-`.
fn plugin_name(file: &Path) -> String {
    let stem = file.file_stem().unwrap_or(file.as_os_str());
    stem.to_string_lossy().replace('_', "-")
}
