//! `galerne serve`: loads models, listens, drains on SIGTERM or Ctrl-C.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use galerne_core::limits::HostLimits;
use galerne_plugin::{AddressRange, Isolation, PluginHost, PluginOptions};
use galerne_server::api::{self, ApiLimits, ApiState, ServedModel};
use galerne_server::deployments::Deployments;
use galerne_server::limits::{Congestion, TransportLimits};
use galerne_server::serve::{self, ServeOptions};
use galerne_server::tls::{DevCertificate, TlsFiles};
use galerne_store::registry::Registry;
use galerne_store::store::Store;

use crate::capabilities::Services;
use crate::config::{DataArgs, DeviceArgs};
use crate::{admin_token, guests, load};

/// Options of `galerne serve`.
#[derive(Debug, Args)]
#[command(after_help = "Ctrl-C or SIGTERM lets running answers finish; a second one stops at once.")]
pub(super) struct ServeArgs {
    /// Address of HTTP/3 (UDP) and HTTP/2 and HTTP/1.1 with TLS (TCP, same port)
    #[arg(long, value_name = "ADDR:PORT", default_value = "127.0.0.1:8443")]
    listen: SocketAddr,
    /// Address of plain HTTP, loopback only; "off" for none
    #[arg(long, value_name = "ADDR:PORT|off", default_value = "127.0.0.1:8000")]
    http: String,
    /// Serve only this model; may be given several times [default: all of the data folder]
    #[arg(short, long = "model", value_name = "NAME")]
    models: Vec<String>,
    /// TLS certificate chain in PEM, with --key [default: a self-signed development certificate]
    #[arg(long, value_name = "FILE", requires = "key")]
    cert: Option<PathBuf>,
    /// Private key of --cert, in PEM
    #[arg(long, value_name = "FILE", requires = "cert")]
    key: Option<PathBuf>,
    /// Offer a sampling guest of your own under NAME; may be given several times
    #[arg(long = "sampler", value_name = "NAME=FILE.wasm")]
    samplers: Vec<String>,
    /// Where guests run that are not Galerne's own
    #[arg(long, value_enum, default_value = "process")]
    isolation: IsolationArg,
    /// Count what guests execute, and call them for each token: for `galerne plugin test`; they are slower for it
    #[arg(long, hide = true)]
    count_fuel: bool,
    /// Let guests call granted hosts at private addresses of this range; may be given several times
    #[arg(long = "guest-reach", value_name = "ADDRESS/BITS")]
    reach: Vec<AddressRange>,
    /// Set a limit of guests, as NAME=NUMBER, for example http_calls_max=32 or tool_ms_max=5000; may be given several times
    #[arg(long = "limit", value_name = "NAME=NUMBER")]
    limits: Vec<String>,
    /// Congestion control of QUIC
    #[arg(long, value_enum, default_value = "bbr")]
    congestion: CongestionArg,
    /// Longest wait for running answers when stopping, in seconds
    #[arg(long, value_name = "S", default_value = "30")]
    drain_seconds: u64,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum IsolationArg {
    /// In processes without files, network and privileges, one per tenant
    Process,
    /// In the host's process
    InProcess,
}

impl From<IsolationArg> for Isolation {
    fn from(value: IsolationArg) -> Self {
        match value {
            IsolationArg::Process => Self::Process,
            IsolationArg::InProcess => Self::InProcess,
        }
    }
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum CongestionArg {
    /// Holds up under loss
    Bbr,
    /// The standard; collapses at a few per cent of loss
    Cubic,
}

pub(super) fn run(data: &DataArgs, args: &ServeArgs) -> Result<()> {
    let begin = Instant::now();
    let folder = data.folder()?;
    let http = parse_http(&args.http)?;
    let limits = limits(&args.limits)?;
    let plugins = PluginHost::new(PluginOptions {
        isolation: args.isolation.into(),
        count_fuel: args.count_fuel,
        limits: limits.guest,
        grammar_limits: limits.grammar,
        ..guests::plugin_options(data)?
    })?;
    let state = Arc::new(load_models(&folder, args, &plugins)?);
    let tls = tls_files(&folder, args)?;
    let options = ServeOptions {
        listen: args.listen,
        http,
        tls,
        congestion: match args.congestion {
            CongestionArg::Bbr => Congestion::Bbr,
            CongestionArg::Cubic => Congestion::Cubic,
        },
        limits: TransportLimits {
            drain_timeout: Duration::from_secs(args.drain_seconds),
            ..TransportLimits::default()
        },
    };
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let bound = serve::bind(options, api::router(Arc::clone(&state))).await?;
        announce(bound.local_addr(), bound.http_addr(), begin.elapsed());
        state.set_ready(true);
        let draining = Arc::clone(&state);
        let shutdown = async move {
            stop_signal().await;
            draining.set_ready(false);
            eprintln!("galerne: stopping; running answers may finish, a second signal stops at once");
            tokio::spawn(async {
                stop_signal().await;
                std::process::exit(130);
            });
        };
        bound.serve(shutdown).await;
        anyhow::Ok(())
    })?;
    for model in state.models().values() {
        model.engine.shutdown();
    }
    Ok(())
}

/// The default limits with those that were set.
fn limits(set: &[String]) -> Result<HostLimits> {
    let mut limits = HostLimits::default();
    for setting in set {
        let parts = setting.split_once('=');
        let parts =
            parts.and_then(|(name, value)| Some((name, value.parse().ok().filter(|value| *value > 0)?)));
        let (name, value) =
            parts.with_context(|| format!("--limit: expected NAME=NUMBER, got \"{setting}\""))?;
        if !limits.set(name, value) {
            let known: Vec<&str> = HostLimits::names().collect();
            bail!("--limit: expected one of {}, got \"{name}\"", known.join(", "));
        }
    }
    Ok(limits)
}

fn parse_http(text: &str) -> Result<Option<SocketAddr>> {
    if text == "off" {
        return Ok(None);
    }
    text.parse()
        .map(Some)
        .with_context(|| format!("--http: expected ADDR:PORT or off, got \"{text}\""))
}

fn load_models(folder: &Path, args: &ServeArgs, plugins: &PluginHost) -> Result<ApiState> {
    let store = Store::new(folder);
    let names = if args.models.is_empty() {
        store.list()?.into_iter().map(|entry| entry.name).collect()
    } else {
        args.models.clone()
    };
    ensure!(
        !names.is_empty(),
        "no models in {}; import one with `galerne model import SOURCE --name NAME`",
        folder.display()
    );
    let load::ChosenDevice { device, note } = load::device(&args.device)?;
    if let Some(reason) = note {
        eprintln!("galerne: no GPU is used: {reason}; models run on the CPU");
    }
    let mut models = BTreeMap::new();
    for name in names {
        match load_model(&store, &name, args, plugins, &*device) {
            Ok(model) => {
                models.insert(name, Arc::new(model));
            }
            // One bad package must not keep the others from being served; asked for by name it is an error.
            Err(error) if args.models.is_empty() => eprintln!(
                "galerne: model \"{name}\" is not served: {}",
                crate::report(&error)
            ),
            Err(error) => return Err(error),
        }
    }
    if models.is_empty() {
        bail!("no model could be loaded");
    }
    let samplers = guests::samplers(plugins, &args.samplers)?;
    let deployments = load_deployments(folder, args, plugins, models.keys().cloned().collect())?;
    let token = admin_token::load_or_create(folder)?;
    let limits = ApiLimits {
        piece_tokens_max: if args.count_fuel { 1 } else { usize::MAX },
        ..ApiLimits::default()
    };
    Ok(ApiState::new(models, samplers, deployments, Some(token), limits))
}

/// What was deployed when the host stopped. One deployment that does not load must not keep the others from being served.
fn load_deployments(
    folder: &Path,
    args: &ServeArgs,
    plugins: &PluginHost,
    models: Vec<String>,
) -> Result<Deployments> {
    let limits = limits(&args.limits)?;
    let services = Services::new(folder, args.reach.clone(), limits);
    let deployments = Deployments::new(
        Registry::new(folder),
        Arc::new(plugins.clone()),
        Box::new(move |tenant, deployment| services.capabilities(tenant, deployment)),
        guests::by_embedded_name(),
        models,
        limits,
    );
    for (name, error) in deployments.load_all()? {
        eprintln!("galerne: deployment \"{name}\" is not served: {error}");
    }
    Ok(deployments)
}

fn load_model(
    store: &Store,
    name: &str,
    args: &ServeArgs,
    plugins: &PluginHost,
    device: &dyn galerne_kernels::device::Device,
) -> Result<ServedModel> {
    let package = store.open(name)?;
    let running = load::start(&package, plugins, device, &args.device)?;
    let manifest = package.manifest();
    Ok(ServedModel {
        name: manifest.name.clone(),
        created_unix_s: created_unix_s(package.dir()),
        engine: running.engine,
        tokenizer: running.tokenizer,
        chat: running.chat,
        grammars: running.grammars,
        template: manifest.chat.template.clone(),
        stop_tokens: running.stop_tokens,
        prompt_prefix: running.prompt_prefix,
    })
}

/// When the package was made: its manifest is the last file an import writes.
fn created_unix_s(package: &Path) -> u64 {
    let modified = package
        .join("galerne.toml")
        .metadata()
        .and_then(|metadata| metadata.modified());
    let since = modified
        .ok()
        .and_then(|time| time.duration_since(SystemTime::UNIX_EPOCH).ok());
    since.map_or(0, |since| since.as_secs())
}

fn tls_files(folder: &Path, args: &ServeArgs) -> Result<TlsFiles> {
    if let (Some(cert), Some(key)) = (&args.cert, &args.key) {
        return Ok(TlsFiles {
            cert: cert.clone(),
            key: key.clone(),
        });
    }
    let names = vec!["localhost".to_owned(), args.listen.ip().to_string()];
    Ok(DevCertificate::load_or_create(&folder.join("tls"), SystemTime::now(), &names)?.files)
}

/// One line per address, then `ready`: programs that start a host read these. A closed output is no reason to stop.
fn announce(listen: SocketAddr, http: Option<SocketAddr>, took: Duration) {
    let mut out = std::io::stdout().lock();
    let host = if listen.ip().is_loopback() {
        "localhost".to_owned()
    } else {
        listen.ip().to_string()
    };
    let _ = writeln!(
        out,
        "https https://{host}:{} (HTTP/3, HTTP/2, HTTP/1.1)",
        listen.port()
    );
    if let Some(http) = http {
        let _ = writeln!(out, "http http://{http} (this machine only)");
    }
    let _ = writeln!(out, "ready after {:.2} s", took.as_secs_f64());
    let _ = out.flush();
}

async fn stop_signal() {
    use tokio::signal::unix::{SignalKind, signal};
    let Ok(mut terminate) = signal(SignalKind::terminate()) else {
        return std::future::pending().await;
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        _ = terminate.recv() => {}
    }
}
