//! `galerne doctor`: what this machine offers, and what is in the way.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;

use anyhow::Result;
use clap::Args;
use galerne_kernels::cpu::Isa;
use galerne_kernels::device::Device as _;
use galerne_store::store::Store;
use indicatif::HumanBytes;

use crate::config::{DataArgs, DeviceArgs, memory_bytes};
use crate::{guests, load};

use super::doctor_measure;

/// Options of `galerne doctor`.
#[derive(Debug, Args)]
pub(super) struct DoctorArgs {
    /// Port whose availability is checked
    #[arg(long, default_value = "8443")]
    port: u16,
    /// Port of plain HTTP whose availability is checked
    #[arg(long, default_value = "8000")]
    http_port: u16,
    /// Measure memory and arithmetic instead: a few seconds on all cores, best on a quiet machine
    #[arg(long)]
    measure: bool,
    /// Print JSON
    #[arg(long, requires = "measure")]
    json: bool,
}

pub(super) fn run(data: &DataArgs, args: &DoctorArgs) -> Result<()> {
    let info = load::device(&DeviceArgs::default())?.info();
    if args.measure {
        return doctor_measure::run(&info, args.json);
    }
    println!("version      {}", env!("CARGO_PKG_VERSION"));
    println!(
        "cpu          {} with {} threads (detected: {})",
        info.isa,
        info.threads,
        Isa::detect().name()
    );
    let memory = memory_bytes().map_or_else(
        || "unknown".to_owned(),
        |bytes| HumanBytes(bytes as u64).to_string(),
    );
    println!("memory       {memory}");
    println!(
        "gpu          none used: this build has no CUDA device{}",
        driver_note()
    );
    println!("guests       {}", embedded());
    println!("ports        {}", ports(args));
    let folder = data.folder()?;
    println!("data folder  {}{}", folder.display(), writable(&folder));
    match Store::new(&folder).list() {
        Ok(models) if models.is_empty() => {
            println!("models       none; import one with `galerne model import SOURCE --name NAME`");
        }
        Ok(models) => {
            let names: Vec<String> = models.into_iter().map(|model| model.name).collect();
            println!("models       {}", names.join(", "));
        }
        Err(error) => println!("models       cannot be read: {error}"),
    }
    Ok(())
}

fn driver_note() -> &'static str {
    if Path::new("/proc/driver/nvidia/version").exists() {
        " (an NVIDIA driver is installed)"
    } else {
        " (and no NVIDIA driver is installed)"
    }
}

fn embedded() -> String {
    if guests::EMBEDDED.is_empty() {
        return "none in this build; run `cargo xtask guests` and build again".to_owned();
    }
    let names: Vec<String> = guests::EMBEDDED
        .iter()
        .map(|(name, component)| format!("{name} ({})", HumanBytes(component.len() as u64)))
        .collect();
    names.join(", ")
}

fn ports(args: &DoctorArgs) -> String {
    let mut parts = Vec::new();
    let mut check = |what: &str, port: u16, free: std::io::Result<()>| match free {
        Ok(()) => parts.push(format!("{what} {port} free")),
        Err(error) => parts.push(format!("{what} {port} not free ({error})")),
    };
    check(
        "udp",
        args.port,
        UdpSocket::bind(("127.0.0.1", args.port)).map(drop),
    );
    check(
        "tcp",
        args.port,
        TcpListener::bind(("127.0.0.1", args.port)).map(drop),
    );
    check(
        "tcp",
        args.http_port,
        TcpListener::bind(("127.0.0.1", args.http_port)).map(drop),
    );
    parts.join(", ")
}

fn writable(folder: &Path) -> String {
    let probe = folder.join(".doctor");
    match std::fs::write(&probe, b"").and_then(|()| std::fs::remove_file(&probe)) {
        Ok(()) => " (writable)".to_owned(),
        Err(error) => format!(" (NOT writable: {error})"),
    }
}
