//! `galerne doctor`: what this machine offers, and what is in the way.

use std::net::{TcpListener, UdpSocket};
use std::path::Path;

use anyhow::Result;
use clap::Args;
use galerne_kernels::cpu::Isa;
use galerne_kernels::cuda::image::Arch;
use galerne_kernels::cuda::native;
use galerne_kernels::device::Device as _;
use galerne_store::store::Store;
use indicatif::HumanBytes;

use crate::config::{DataArgs, DeviceArgs, memory_bytes};
use crate::{guests, kernels, load};

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
    let info = load::cpu(&DeviceArgs::default())?.info();
    if args.measure {
        return doctor_measure::run(&info, args.json);
    }
    println!("version      {}", env!("CARGO_PKG_VERSION"));
    println!(
        "cpu          {} with {} threads (detected: {}{})",
        info.isa,
        info.threads,
        Isa::detect().name(),
        if Isa::amx_is_refused() {
            "; the system refuses amx"
        } else {
            ""
        }
    );
    let memory = memory_bytes().map_or_else(
        || "unknown".to_owned(),
        |bytes| HumanBytes(bytes as u64).to_string(),
    );
    println!("memory       {memory}");
    println!("gpu          {}", gpus());
    println!("kernels      {}", cuda_kernels());
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

fn gpus() -> String {
    let found = match native::find() {
        Ok(found) => found,
        Err(absence) => return format!("none: {absence}"),
    };
    let describe = |gpu: &native::Found| {
        let (major, minor) = gpu.capability;
        let code = Arch::of_capability(gpu.capability);
        format!(
            "{}, {}, compute capability {major}.{minor}{}, driver for CUDA {}",
            gpu.name,
            HumanBytes(gpu.memory_bytes as u64),
            if code.is_none() { " (kernels need 9.0)" } else { "" },
            gpu.driver_cuda
        )
    };
    let found: Vec<String> = found.iter().map(describe).collect();
    found.join("; ")
}

fn cuda_kernels() -> String {
    if kernels::EMBEDDED.is_none() {
        return "no CUDA kernels in this build; run `cargo xtask kernels` and build again".to_owned();
    }
    let image = match kernels::image() {
        Ok(image) => image,
        Err(error) => return format!("cannot be used: {error:#}"),
    };
    let counts = Arch::ALL.map(|arch| {
        let count: usize = image.modules(arch).map(|module| module.kernels.len()).sum();
        format!("{count} for {arch}")
    });
    format!("CUDA: {}; by {}", counts.join(", "), image.compiler())
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
