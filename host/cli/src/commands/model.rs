//! `galerne model`: import, list, show.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use anyhow::Result;
use clap::{Args, Subcommand};
use galerne_plugin::PluginHost;
use galerne_store::import::{self, ImportRequest, Progress};
use galerne_store::store::Store;
use indicatif::{ProgressBar, ProgressStyle};

use crate::config::DataArgs;
use crate::guests::{self, Chooser};

/// Subcommands of `galerne model`.
#[derive(Debug, Subcommand)]
pub(super) enum ModelCommand {
    /// Make a package of a GGUF file or a Hugging Face folder
    Import(ImportArgs),
    /// List the models of the data folder
    List,
    /// Show one model's manifest
    Show {
        /// Its name
        name: String,
    },
}

/// Options of `galerne model import`.
#[derive(Debug, Args)]
pub(super) struct ImportArgs {
    /// A .gguf file, or a folder with config.json, tokenizer.json and safetensors
    source: PathBuf,
    /// Name under which it is served
    #[arg(long)]
    name: String,
    /// Version of the package
    #[arg(long, default_value = "0.1.0", id = "package-version", value_name = "VERSION")]
    package_version: String,
    /// SPDX licence expression, if the source does not say
    #[arg(long, value_name = "SPDX")]
    license: Option<String>,
    /// Your own architecture guest [default: the one that knows the model type]
    #[arg(long, value_name = "FILE.wasm")]
    architecture: Option<PathBuf>,
    /// Your own chat guest [default: the one that recognises the chat template]
    #[arg(long, value_name = "FILE.wasm")]
    chat: Option<PathBuf>,
    /// Replace a model of this name
    #[arg(long)]
    replace: bool,
}

static CANCELLED: AtomicBool = AtomicBool::new(false);

pub(super) fn run(data: &DataArgs, command: ModelCommand) -> Result<()> {
    let folder = data.folder()?;
    match command {
        ModelCommand::Import(args) => import(data, &folder, args),
        ModelCommand::List => list(&folder),
        ModelCommand::Show { name } => show(&folder, &name),
    }
}

fn import(data: &DataArgs, folder: &Path, args: ImportArgs) -> Result<()> {
    let store = Store::new(folder);
    let plugins = PluginHost::new(guests::plugin_options(data)?)?;
    let chooser = Chooser {
        host: &plugins,
        architecture: args.architecture,
        chat: args.chat,
    };
    cancel_on_ctrl_c()?;
    let request = ImportRequest {
        source: &args.source,
        name: &args.name,
        models_dir: store.models_dir(),
        version: Some(&args.package_version),
        license: args.license.as_deref(),
        replace: args.replace,
        now: SystemTime::now(),
    };
    let package = import::import(&request, &chooser, &Bar::default(), &CANCELLED)?;
    println!(
        "imported \"{}\" into {}",
        package.manifest().name,
        package.dir().display()
    );
    Ok(())
}

/// The first Ctrl-C stops the import cleanly (nothing half-made stays behind); the next one kills.
fn cancel_on_ctrl_c() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    std::thread::spawn(move || {
        runtime.block_on(async {
            if tokio::signal::ctrl_c().await.is_ok() {
                CANCELLED.store(true, Ordering::Relaxed);
            }
            if tokio::signal::ctrl_c().await.is_ok() {
                std::process::exit(130);
            }
        });
    });
    Ok(())
}

/// A progress bar per stage; silent when the terminal is none.
#[derive(Default)]
struct Bar(Mutex<Option<ProgressBar>>);

impl Progress for Bar {
    fn stage(&self, name: &str, total_bytes: u64) {
        let bar = ProgressBar::new(total_bytes);
        if let Ok(style) =
            ProgressStyle::with_template("{msg:<22} {bar:40} {bytes}/{total_bytes} {bytes_per_sec} {eta}")
        {
            bar.set_style(style);
        }
        bar.set_message(name.to_owned());
        if let Ok(mut current) = self.0.lock()
            && let Some(last) = current.replace(bar)
        {
            last.finish();
        }
    }

    fn advance(&self, bytes: u64) {
        if let Ok(current) = self.0.lock()
            && let Some(bar) = current.as_ref()
        {
            bar.inc(bytes);
        }
    }
}

fn list(folder: &Path) -> Result<()> {
    let models = Store::new(folder).list()?;
    if models.is_empty() {
        println!(
            "no models in {}; import one with `galerne model import SOURCE --name NAME`",
            folder.display()
        );
        return Ok(());
    }
    let width = models
        .iter()
        .map(|model| model.name.len())
        .max()
        .unwrap_or(0)
        .max(4);
    println!(
        "{:<width$}  {:<10}  {:<10}  {:>10}  LICENCE",
        "NAME", "VERSION", "TYPE", "SIZE"
    );
    for model in models {
        let size = indicatif::HumanBytes(model.size_bytes).to_string();
        match model.manifest {
            Ok(manifest) => println!(
                "{:<width$}  {:<10}  {:<10}  {size:>10}  {}",
                model.name,
                manifest.version,
                manifest.model_type,
                manifest.license.as_deref().unwrap_or("unknown"),
            ),
            Err(error) => println!("{:<width$}  unusable: {error}", model.name),
        }
    }
    Ok(())
}

fn show(folder: &Path, name: &str) -> Result<()> {
    let package = Store::new(folder).open(name)?;
    println!("# {}", package.dir().display());
    print!("{}", std::fs::read_to_string(package.dir().join("galerne.toml"))?);
    Ok(())
}
