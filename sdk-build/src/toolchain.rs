//! Finds a way to compile for wasm32, or says what a person can run.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::BuildError;

/// What guests are compiled for.
pub const TARGET: &str = "wasm32-unknown-unknown";
/// Debian's compiler for the web and its standard library's sources.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "rust-web-src"];
/// LLVM's linker by its names on Debian.
const LINKERS: [&str; 4] = ["wasm-ld-22", "wasm-ld-21", "wasm-ld-19", "wasm-ld"];
/// cargo refuses the workspace with an older compiler.
const RUSTC_MIN: &str = env!("CARGO_PKG_RUST_VERSION");
/// Bounds on each download of apt-get, and on its wait for another package manager; it is not killed, because that
/// can leave a package half installed.
const APT_LIMITS: [&str; 6] = [
    "-o",
    "Acquire::http::Timeout=20",
    "-o",
    "Acquire::Retries=2",
    "-o",
    "DPkg::Lock::Timeout=120",
];
/// rustup retries for minutes where its server cannot be reached.
const RUSTUP_LIMIT: Duration = Duration::from_secs(25);

/// A way to compile for wasm32.
pub struct Toolchain {
    kind: Kind,
    /// What the compiler says of itself, in one line.
    version: String,
}

enum Kind {
    /// The compiler at hand has the target's standard library.
    Installed,
    /// Debian's compiler, the standard library built from source, and a linker.
    Debian { linker: PathBuf },
}

impl Toolchain {
    /// What is there already.
    pub fn present() -> Option<Self> {
        installed().or_else(debian)
    }

    /// Installs one. `say` is told what is tried.
    ///
    /// # Errors
    /// Nothing could be installed; the message names two commands that help.
    pub fn install(say: &dyn Fn(&str)) -> Result<Self, BuildError> {
        say(&format!(
            "no wasm32 target yet; trying: rustup target add {TARGET}"
        ));
        if rustup_add()
            && let Some(found) = installed()
        {
            return Ok(found);
        }
        if apt_install(say)
            && let Some(found) = debian()
        {
            return Ok(found);
        }
        Err(BuildError::NoCompiler)
    }

    /// What the compiler says of itself, in one line.
    pub fn version(&self) -> &str {
        &self.version
    }

    /// For the progress line.
    pub fn describe(&self) -> String {
        match &self.kind {
            Kind::Installed => format!("the installed {TARGET} target"),
            Kind::Debian { linker } => {
                format!(
                    "Debian's rustc-web, std from source, {} (the first time takes minutes)",
                    linker.display()
                )
            }
        }
    }

    /// Sets up a `cargo rustc` command for a crate in `folder`.
    pub(crate) fn apply(&self, command: &mut Command, folder: &Path) {
        for inherited in ["RUSTFLAGS", "RUSTC_WRAPPER", "RUSTC_WORKSPACE_WRAPPER", "RUSTC"] {
            command.env_remove(inherited);
        }
        // Wins over every other source of flags, which are meant for the host's machine. Panic messages name source
        // files; without this a guest would tell, and differ by, the home folder of whoever built it.
        command.env("CARGO_ENCODED_RUSTFLAGS", remapped_paths(folder).join("\x1f"));
        if let Kind::Debian { linker } = &self.kind {
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

fn installed() -> Option<Toolchain> {
    let library = sysroot()?.join("lib/rustlib").join(TARGET).join("lib");
    library.is_dir().then_some(())?;
    Some(Toolchain {
        kind: Kind::Installed,
        version: output_of("rustc", &["--version"])?,
    })
}

fn debian() -> Option<Toolchain> {
    let version = output_of(DEBIAN_RUSTC, &["--version"])?;
    let sysroot = PathBuf::from(output_of(DEBIAN_RUSTC, &["--print", "sysroot"])?);
    let sources = sysroot.join("lib/rustlib/src/rust/library/std/Cargo.toml");
    if minor(version.split_whitespace().nth(1)?)? < minor(RUSTC_MIN)? || !sources.exists() {
        return None;
    }
    Some(Toolchain {
        kind: Kind::Debian { linker: linker()? },
        version,
    })
}

/// `95` of `1.95.0`.
fn minor(version: &str) -> Option<u32> {
    version.split('.').nth(1)?.parse().ok()
}

/// A linker for wasm: the one that comes with rustup's toolchain, which fits its compiler, or LLVM's, newest first.
fn linker() -> Option<PathBuf> {
    if let Some(bundled) = sysroot().and_then(|sysroot| bundled_linker(&sysroot)) {
        return Some(bundled);
    }
    let folders: Vec<PathBuf> =
        std::env::var_os("PATH").map(|path| std::env::split_paths(&path).collect())?;
    LINKERS.iter().find_map(|name| {
        folders
            .iter()
            .map(|folder| folder.join(name))
            .find(|file| file.exists())
    })
}

/// rustup's `rust-lld`, which takes its flavour from an argument that rustc passes.
fn bundled_linker(sysroot: &Path) -> Option<PathBuf> {
    let host = output_of("rustc", &["-vV"])?;
    let host = host.lines().find_map(|line| line.strip_prefix("host: "))?;
    let linker = sysroot.join("lib/rustlib").join(host).join("bin/rust-lld");
    linker.exists().then_some(linker)
}

/// Flags that replace this machine's folders in what the compiler writes.
fn remapped_paths(folder: &Path) -> Vec<String> {
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from).or_else(|| {
        let home = std::env::var_os("HOME")?;
        Some(Path::new(&home).join(".cargo"))
    });
    let remap = |folder: &Path, name: &str| format!("--remap-path-prefix={}={name}", folder.display());
    let mut flags = vec![remap(folder, "/galerne")];
    flags.extend(cargo_home.map(|folder| remap(&folder, "/cargo")));
    flags
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
fn apt_install(say: &dyn Fn(&str)) -> bool {
    let prefix: &[&str] = match output_of("id", &["-u"]).as_deref() {
        Some("0") => &[],
        // sudo drops the environment, so `env` sets it after.
        Some(_) if output_of("sudo", &["-n", "true"]).is_some() => &["sudo", "-n"],
        _ => return false,
    };
    if !Path::new("/usr/bin/apt-get").exists() {
        return false;
    }
    say(&format!(
        "installing Debian's {} and lld with apt-get",
        DEBIAN_PACKAGES.join(", ")
    ));
    let run = |args: &[&str]| -> Option<bool> {
        let mut words = prefix.to_vec();
        words.extend(["env", "DEBIAN_FRONTEND=noninteractive", "apt-get"]);
        words.extend(APT_LIMITS);
        words.extend_from_slice(args);
        let (program, rest) = words.split_first()?;
        let status = Command::new(program)
            .args(rest)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .ok()?;
        Some(status.success())
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
