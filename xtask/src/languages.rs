//! `cargo xtask languages`: builds the guests of `tests/languages` to components, and installs what that needs.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Error, Result, bail, ensure};

use crate::{guests, venv, workspace_root};

/// A guest in another language than Rust.
struct Language {
    /// Its folder under `tests/languages`, and that of its toolchain under `target/languages`.
    name: &'static str,
    /// The component, without its ending.
    component: &'static str,
    /// The contract's world, which is its package too.
    world: &'static str,
    /// Where the toolchain's program is, once it is installed.
    install: fn(&Path) -> Result<PathBuf>,
    /// The build: toolchain, contract, sources, component.
    build: fn(&Path, &Path, &Path, &Path) -> Command,
}

const LANGUAGES: [Language; 2] = [
    Language {
        name: "python",
        component: "python-filter",
        world: "filter",
        install: install_python,
        build: |program, wit, sources, component| {
            let mut command = Command::new(program);
            command
                .arg("--wit-path")
                .arg(wit)
                .args(["componentize", "filtering", "--stub-wasi", "--python-path"])
                .arg(sources)
                .arg("--output")
                .arg(component);
            command
        },
    },
    Language {
        name: "javascript",
        component: "javascript-tool",
        world: "tool",
        install: install_javascript,
        build: |program, wit, sources, component| {
            let mut command = Command::new(program);
            command
                .args(["--sync", "--stub-wasi", "--wit"])
                .arg(wit)
                .arg("--js")
                .arg(sources.join("tools.js"))
                .arg("--output")
                .arg(component);
            command
        },
    },
];

/// Builds all; a toolchain that cannot be installed is an error.
pub(crate) fn run() -> Result<()> {
    let missing = build_all()?;
    if missing.is_empty() {
        return Ok(());
    }
    let missing: Vec<String> = missing.iter().map(|error| format!("{error:#}")).collect();
    bail!("{}", missing.join("; "))
}

/// Builds what changed since its last build. Gives, for each language whose toolchain cannot be installed here, the
/// reason: its component is not there then.
pub(crate) fn build_all() -> Result<Vec<Error>> {
    let mut missing = Vec::new();
    for language in &LANGUAGES {
        let digest = guests::digest(&[&language.sources(), &language.wit()], &[])?;
        let component = guests::path(language.component);
        let stamp = component.with_extension("stamp");
        if component.exists() && std::fs::read_to_string(&stamp).is_ok_and(|built| built == digest) {
            continue;
        }
        // What is left of older sources must not pass for these.
        let _ = std::fs::remove_file(&component);
        let name = language.name;
        let program = match (language.install)(&language.sources()) {
            Ok(program) => program,
            Err(error) => {
                missing.push(error.context(format!("no toolchain for guests in {name}")));
                continue;
            }
        };
        language
            .build(&program, &component)
            .with_context(|| format!("build the guest in {name}"))?;
        guests::write_atomically(&stamp, digest.as_bytes())?;
    }
    Ok(missing)
}

impl Language {
    fn sources(&self) -> PathBuf {
        workspace_root().join("tests/languages").join(self.name)
    }

    fn wit(&self) -> PathBuf {
        workspace_root().join("wit").join(self.world).join("0.1.0")
    }

    fn build(&self, program: &Path, component: &Path) -> Result<()> {
        let begin = Instant::now();
        let work = work_folder(self.name)?;
        let built = work.join("built.wasm");
        let output = (self.build)(program, &self.wit(), &self.sources(), &built)
            .current_dir(work)
            .output()
            .with_context(|| format!("run {}", program.display()))?;
        ensure!(
            output.status.success(),
            "{}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        let bytes = std::fs::read(&built)?;
        std::fs::create_dir_all(workspace_root().join("target/guests"))?;
        guests::write_atomically(component, &bytes)?;
        let (kib, seconds) = (bytes.len().div_ceil(1_024), begin.elapsed().as_secs_f64());
        eprintln!("  {}: {kib} KiB in {seconds:.1} s", self.component);
        Ok(())
    }
}

/// Where a language's toolchain and what it writes on its way lie.
fn work_folder(language: &str) -> Result<PathBuf> {
    let folder = workspace_root().join("target/languages").join(language);
    std::fs::create_dir_all(&folder)?;
    Ok(folder)
}

fn install_python(sources: &Path) -> Result<PathBuf> {
    let requirements = std::fs::read_to_string(sources.join("requirements.txt"))?;
    let requirements: Vec<&str> = requirements.lines().collect();
    Ok(venv::bin("languages/python", &requirements)?.join("componentize-py"))
}

fn install_javascript(sources: &Path) -> Result<PathBuf> {
    let folder = work_folder("javascript")?;
    let program = folder.join("node_modules/.bin/componentize-qjs");
    let lock = std::fs::read(sources.join("package-lock.json"))?;
    let stamp = folder.join("pins");
    if std::fs::read(&stamp).is_ok_and(|installed| installed == lock) {
        return Ok(program);
    }
    for file in ["package.json", "package-lock.json"] {
        std::fs::copy(sources.join(file), folder.join(file))?;
    }
    let status = Command::new("npm")
        // Not "ci": it wants every platform's package in the lock file, and some do not exist.
        .args([
            "install",
            "--silent",
            "--no-audit",
            "--no-fund",
            "--ignore-scripts",
        ])
        .current_dir(&folder)
        .status()
        .context("run npm; on Debian: sudo apt-get install npm")?;
    ensure!(
        status.success(),
        "npm install failed in {}; is there a network?",
        folder.display()
    );
    std::fs::write(stamp, lock)?;
    Ok(program)
}
