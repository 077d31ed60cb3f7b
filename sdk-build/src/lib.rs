//! From a guest crate to a component: a compiler for wasm32, cargo, and the wrapping of the module. Knows no host.

mod toolchain;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

use wit_component::DecodedWasm;

pub use toolchain::{TARGET, Toolchain};

/// Why a guest could not be built.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// No way to compile for wasm32 was found, and none could be installed.
    #[error(
        "no compiler for {TARGET}; run one of these and try again:\n  rustup target add {TARGET}\n  \
         sudo apt-get install rustc-web rust-web-src lld"
    )]
    NoCompiler,
    /// cargo said no; its words are on the terminal.
    #[error("guest \"{package}\" does not build; the compiler's messages are above")]
    Cargo {
        /// The crate.
        package: String,
    },
    /// A program could not be run or a file not be read.
    #[error("{operation} {what}: {source}")]
    Io {
        /// What was tried.
        operation: &'static str,
        /// With what.
        what: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The module cannot be made a component.
    #[error(
        "make a component of the module: {0}; does the crate export a world with one of the SDK's macros?"
    )]
    Component(String),
}

/// A guest's crate.
#[derive(Debug, Clone, Copy)]
pub struct GuestCrate<'a> {
    /// The folder cargo runs in.
    pub folder: &'a Path,
    /// The crate's name.
    pub package: &'a str,
    /// The profile it is compiled with, which its workspace defines.
    pub profile: &'a str,
    /// Where cargo keeps what it makes.
    pub target_dir: &'a Path,
}

/// Compiles the crate to a component.
///
/// # Errors
/// See [`BuildError`].
pub fn build(toolchain: &Toolchain, guest: &GuestCrate<'_>) -> Result<Vec<u8>, BuildError> {
    componentize(&module(toolchain, guest)?)
}

/// The manifests stay plain libraries, so that guests are also tested on the host; only here one becomes a module.
fn module(toolchain: &Toolchain, guest: &GuestCrate<'_>) -> Result<Vec<u8>, BuildError> {
    let mut command = Command::new(cargo());
    command
        .args(["rustc", "--quiet", "--package", guest.package, "--lib"])
        .args(["--crate-type", "cdylib", "--profile", guest.profile])
        .args(["--target", TARGET, "--target-dir"])
        .arg(guest.target_dir)
        .current_dir(guest.folder);
    toolchain.apply(&mut command, guest.folder);
    let status = command.status().map_err(|source| BuildError::Io {
        operation: "run",
        what: format!("{command:?}"),
        source,
    })?;
    if !status.success() {
        return Err(BuildError::Cargo {
            package: guest.package.to_owned(),
        });
    }
    let file: PathBuf = guest
        .target_dir
        .join(TARGET)
        .join(guest.profile)
        .join(format!("{}.wasm", guest.package.replace('-', "_")));
    std::fs::read(&file).map_err(|source| BuildError::Io {
        operation: "read",
        what: file.display().to_string(),
        source,
    })
}

/// The cargo that runs this program, or the one on the path.
fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

fn componentize(module: &[u8]) -> Result<Vec<u8>, BuildError> {
    wit_component::ComponentEncoder::default()
        .module(module)
        .and_then(|encoder| encoder.validate(true).encode())
        .map_err(|error| BuildError::Component(format!("{error:#}")))
}

/// What a component imports and exports, by name, in order.
#[derive(Debug, PartialEq, Eq)]
pub struct Interfaces {
    /// What it needs.
    pub imports: Vec<String>,
    /// What it offers.
    pub exports: Vec<String>,
}

/// Reads a component's interfaces.
///
/// # Errors
/// It is no component.
pub fn interfaces(component: &[u8]) -> Result<Interfaces, BuildError> {
    let wrong = |error: String| BuildError::Component(error);
    let decoded = wit_component::decode(component).map_err(|error| wrong(format!("{error:#}")))?;
    let DecodedWasm::Component(resolve, world) = decoded else {
        return Err(wrong("expected a component, got a WIT package".to_owned()));
    };
    let world = &resolve.worlds[world];
    let mut imports: Vec<String> = world
        .imports
        .keys()
        .map(|key| resolve.name_world_key(key))
        .collect();
    let mut exports: Vec<String> = world
        .exports
        .keys()
        .map(|key| resolve.name_world_key(key))
        .collect();
    imports.sort_unstable();
    exports.sort_unstable();
    Ok(Interfaces { imports, exports })
}
