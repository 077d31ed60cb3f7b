//! `galerne plugin`: check, push, list and show.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use galerne_core::guest::{GuestLoader as _, GuestSource};
use galerne_plugin::{PluginHost, PluginOptions};
use galerne_sdk_build::{GuestCrate, Toolchain};
use serde_json::Value;

use super::connect::{AdminArgs, AdminRequest};
use crate::config::DataArgs;
use crate::scaffold::{self, Template};

/// Subcommands of `galerne plugin`.
#[derive(Debug, Subcommand)]
pub(super) enum PluginCommand {
    /// Make a folder with a new plugin, ready to be built
    New(NewArgs),
    /// Compile a plugin's crate to a component
    Build(BuildArgs),
    /// Say what a component is, or what is wrong with it and what to do; needs no running host
    Check {
        /// The component
        #[arg(value_name = "FILE.wasm")]
        file: PathBuf,
    },
    /// Run a plugin's own cases, tests.toml, against a real host with a tiny model
    Test(super::plugin_test::TestArgs),
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

/// Options of `galerne plugin new`.
#[derive(Debug, Args)]
pub(super) struct NewArgs {
    /// Name of the plugin and its folder
    name: String,
    /// What it is
    #[arg(long, value_enum)]
    world: Template,
}

/// Options of `galerne plugin build`.
#[derive(Debug, Args)]
pub(super) struct BuildArgs {
    /// The plugin's folder
    #[arg(default_value = ".")]
    folder: PathBuf,
    /// Where the component goes [default: NAME.wasm in the plugin's folder]
    #[arg(short, long, value_name = "FILE.wasm")]
    output: Option<PathBuf>,
    /// Where the compiler keeps what it makes [default: target in the plugin's folder]
    #[arg(long, value_name = "DIR")]
    target_dir: Option<PathBuf>,
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
        PluginCommand::New(args) => new(&args),
        PluginCommand::Build(args) => build(&args),
        PluginCommand::Check { file } => check(&file),
        PluginCommand::Test(args) => super::plugin_test::run(&args),
        PluginCommand::Push(args) => push(data, args),
        PluginCommand::List(admin) => list(data, &admin),
        PluginCommand::Show { name, admin } => show(data, &name, &admin),
    }
}

fn new(args: &NewArgs) -> Result<()> {
    let name = &args.name;
    scaffold::create(Path::new(name), name, args.world)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "made {name}/; its code is in {name}/src/lib.rs. Next:")?;
    writeln!(out, "  cd {name}\n  cargo test\n  galerne plugin build")?;
    match args.world {
        Template::Model => writeln!(
            out,
            "  galerne model import SOURCE --name NAME --architecture {name}.wasm"
        )?,
        Template::Chat => writeln!(
            out,
            "  galerne model import SOURCE --name NAME --chat {name}.wasm"
        )?,
        Template::Filter | Template::Sampler | Template::Tool | Template::Pipeline => writeln!(
            out,
            "  galerne plugin push {name}.wasm      # while `galerne serve` runs\n  galerne deploy\n  \
             galerne chat -m my-{name}"
        )?,
    }
    Ok(())
}

fn build(args: &BuildArgs) -> Result<()> {
    let folder = args
        .folder
        .canonicalize()
        .with_context(|| format!("find the plugin's folder {}", args.folder.display()))?;
    let name = crate_name(&folder)?;
    let say = |line: &str| eprintln!("galerne: {line}");
    let toolchain = match Toolchain::present() {
        Some(toolchain) => toolchain,
        None => Toolchain::install(&say)?,
    };
    let begin = Instant::now();
    say(&format!("building {name} with {}", toolchain.describe()));
    let target_dir = args.target_dir.clone().unwrap_or_else(|| folder.join("target"));
    let component = galerne_sdk_build::build(
        &toolchain,
        &GuestCrate {
            folder: &folder,
            package: &name,
            profile: "release",
            target_dir: &std::path::absolute(&target_dir)?,
        },
    )?;
    let file = args
        .output
        .clone()
        .unwrap_or_else(|| folder.join(format!("{name}.wasm")));
    std::fs::write(&file, &component).with_context(|| format!("write {}", file.display()))?;
    say(&format!("built in {:.1} s", begin.elapsed().as_secs_f64()));
    check(&file)
}

/// The name in a crate's manifest.
pub(super) fn crate_name(folder: &Path) -> Result<String> {
    let file = folder.join("Cargo.toml");
    let text = std::fs::read_to_string(&file).with_context(|| {
        format!(
            "read {}; give the folder of a plugin, or make one with `galerne plugin new`",
            file.display()
        )
    })?;
    let manifest: toml::Table = text.parse().with_context(|| format!("read {}", file.display()))?;
    let name = manifest.get("package").and_then(|package| package.get("name"));
    let name = name.and_then(toml::Value::as_str);
    name.map(str::to_owned)
        .with_context(|| format!("{}: expected [package] with a name, got none", file.display()))
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
    // What a world itself imports needs no grant.
    let of_world = |import: &&String| !import.starts_with("galerne:pipeline/");
    let capabilities: Vec<&str> = facts
        .imports
        .iter()
        .filter(of_world)
        .map(String::as_str)
        .collect();
    match &capabilities[..] {
        [] => println!("  capabilities  none"),
        some => println!("  capabilities  {}", some.join(", ")),
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
