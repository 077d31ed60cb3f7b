//! Finds a way to compile for wasm32, or says what a person can run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// What guests are compiled for.
pub(crate) const TARGET: &str = "wasm32-unknown-unknown";
/// Debian's compiler for the web and its standard library's sources.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
/// The workspace's edition needs this minor version.
const RUSTC_MINOR_MIN: u32 = 85;
/// rustup retries for minutes where its server cannot be reached.
const RUSTUP_LIMIT: Duration = Duration::from_secs(25);

/// A way to compile for wasm32.
pub(crate) enum Toolchain {
    /// The compiler at hand has the target's standard library.
    Installed,
    /// Debian's compiler, the standard library built from source, and a linker.
    Debian {
        /// `wasm-ld` or `rust-lld`.
        linker: PathBuf,
    },
}

impl Toolchain {
    /// Looks for what is there, then tries to install.
    ///
    /// # Errors
    /// Nothing is there and nothing could be installed; the message names two commands that help.
    pub(crate) fn find() -> Result<Self> {
        if has_target() {
            return Ok(Self::Installed);
        }
        if let Some(found) = debian() {
            return Ok(found);
        }
        eprintln!("no wasm32 target yet; trying: rustup target add {TARGET}");
        if rustup_add() && has_target() {
            return Ok(Self::Installed);
        }
        if apt_install()
            && let Some(found) = debian()
        {
            return Ok(found);
        }
        bail!(
            "no compiler for {TARGET}; run one of these and try again:\n  rustup target add {TARGET}\n  \
             sudo apt-get install rustc-web rust-web-src lld"
        )
    }

    /// For the progress line.
    pub(crate) fn describe(&self) -> String {
        match self {
            Self::Installed => format!("the installed {TARGET} target"),
            Self::Debian { linker } => {
                format!(
                    "Debian's rustc-web, std from source, {} (the first time takes minutes)",
                    linker.display()
                )
            }
        }
    }

    /// Sets up a `cargo rustc` command.
    pub(crate) fn apply(&self, command: &mut Command) {
        for inherited in [
            "RUSTFLAGS",
            "CARGO_ENCODED_RUSTFLAGS",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "RUSTC",
        ] {
            command.env_remove(inherited);
        }
        if let Self::Debian { linker } = self {
            command
                .arg("-Zbuild-std=std,panic_abort")
                .env("RUSTC", DEBIAN_RUSTC)
                // build-std is unstable in name; with a fixed compiler it does not move under us.
                .env("RUSTC_BOOTSTRAP", "1")
                .env("CARGO_TARGET_WASM32_UNKNOWN_UNKNOWN_LINKER", linker);
        }
    }
}

fn output_of(program: impl AsRef<std::ffi::OsStr>, args: &[&str]) -> Option<String> {
    let output = Command::new(program)
        .args(args)
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output
        .status
        .success()
        .then(|| String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

fn sysroot() -> Option<PathBuf> {
    output_of("rustc", &["--print", "sysroot"]).map(PathBuf::from)
}

fn has_target() -> bool {
    sysroot().is_some_and(|sysroot| sysroot.join("lib/rustlib").join(TARGET).join("lib").is_dir())
}

fn debian() -> Option<Toolchain> {
    let version = output_of(DEBIAN_RUSTC, &["--version"])?;
    let minor: u32 = version.split('.').nth(1)?.parse().ok()?;
    let sysroot = PathBuf::from(output_of(DEBIAN_RUSTC, &["--print", "sysroot"])?);
    let sources = sysroot.join("lib/rustlib/src/rust/library/std/Cargo.toml");
    if minor < RUSTC_MINOR_MIN || !sources.exists() {
        return None;
    }
    Some(Toolchain::Debian { linker: linker()? })
}

/// A linker for wasm: LLVM's by its names, or the one that comes with rustup's toolchain.
fn linker() -> Option<PathBuf> {
    let folders: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect())?;
    let by_name = ["wasm-ld", "wasm-ld-19", "wasm-ld-16", "wasm-ld-15", "wasm-ld-14"]
        .iter()
        .find_map(|name| {
            folders
                .iter()
                .map(|folder| folder.join(name))
                .find(|file| file.exists())
        });
    by_name.or_else(|| bundled_linker(&sysroot()?))
}

/// rustup's `rust-lld` takes its flavour from the name it is called by.
fn bundled_linker(sysroot: &Path) -> Option<PathBuf> {
    let host = output_of("rustc", &["-vV"])?;
    let host = host.lines().find_map(|line| line.strip_prefix("host: "))?;
    let linker = sysroot.join("lib/rustlib").join(host).join("bin/gcc-ld/wasm-ld");
    linker.exists().then_some(linker)
}

fn rustup_add() -> bool {
    let child = Command::new("rustup")
        .args(["target", "add", TARGET])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    let Ok(mut child) = child else { return false };
    let deadline = Instant::now() + RUSTUP_LIMIT;
    while Instant::now() < deadline {
        match child.try_wait() {
            Ok(Some(status)) => return status.success(),
            Ok(None) => std::thread::sleep(Duration::from_millis(100)),
            Err(_) => return false,
        }
    }
    let _ = child.kill();
    let _ = child.wait();
    false
}

/// Installs Debian's packages where that needs no password.
fn apt_install() -> bool {
    let prefix: &[&str] = match output_of("id", &["-u"]).as_deref() {
        Some("0") => &[],
        Some(_) if output_of("sudo", &["-n", "true"]).is_some() => &["sudo", "-n"],
        _ => return false,
    };
    if !Path::new("/usr/bin/apt-get").exists() {
        return false;
    }
    eprintln!(
        "installing Debian's {} and lld with apt-get",
        DEBIAN_PACKAGES.join(", ")
    );
    let run = |args: &[&str]| -> Result<bool> {
        let mut words = prefix.to_vec();
        words.push("apt-get");
        words.extend_from_slice(args);
        let (program, rest) = words.split_first().context("apt-get")?;
        let status = Command::new(program)
            .args(rest)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()?;
        Ok(status.success())
    };
    let install = |linker: &str| {
        let mut args = vec!["install", "-y", "--no-install-recommends"];
        args.extend(DEBIAN_PACKAGES);
        args.push(linker);
        run(&args).unwrap_or(false)
    };
    // An outdated list of packages is reason enough to refresh it, but not to give up.
    let _ = run(&["update"]);
    install("lld-19") || install("lld")
}
