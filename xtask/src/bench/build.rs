//! The peers, built from source under `target/peers` once: a file written last says that a build is whole.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, bail, ensure};

use super::machine;
use crate::{demo, workspace_root};

/// The Python package whose source archive carries all of llama.cpp (MIT).
const SDIST: &str = "llama-cpp-python";
pub(super) const SDIST_VERSION: &str = "0.3.36";
/// Tools of the build, in a folder of their own.
const BUILD_TOOLS: [&str; 2] = ["cmake==4.1.2", "ninja==1.13.0"];
const TARGETS: [&str; 5] = [
    "llama-bench",
    "llama-batched-bench",
    "llama-server",
    "llama-perplexity",
    "llama-quantize",
];

/// llama.cpp, built for this machine.
pub(super) struct Llama {
    source: PathBuf,
    build: PathBuf,
    pub(super) compiler: String,
}

impl Llama {
    pub(super) fn tool(&self, name: &str) -> PathBuf {
        self.build.join("bin").join(name)
    }
}

/// Fetches and builds llama.cpp unless a whole build by the same compiler is there.
pub(super) fn llama(peers: &Path) -> Result<Llama> {
    let (cc, cxx) = compilers()?;
    let home = peers.join(format!("llama.cpp-{SDIST_VERSION}"));
    let llama = Llama {
        source: home.join("source/vendor/llama.cpp"),
        build: home.join("build"),
        compiler: first_line(Command::new(&cxx).arg("--version"))?,
    };
    let whole = home.join("whole");
    let wanted = format!(
        "{SDIST} {SDIST_VERSION}, {}, {}, {}\n",
        llama.compiler,
        machine::cpu(),
        TARGETS.join(" ")
    );
    if !std::fs::read_to_string(&whole).is_ok_and(|made| made == wanted) {
        fetch_source(peers, &home)?;
        build_llama(peers, &home, &llama, (&cc, &cxx), &wanted)?;
        std::fs::write(whole, wanted)?;
    }
    build_logits(&llama, &cc)?;
    Ok(llama)
}

/// Configures and builds; what an interrupted run built is continued if it is of the same compiler and machine.
fn build_llama(
    peers: &Path,
    home: &Path,
    llama: &Llama,
    (cc, cxx): (&str, &str),
    wanted: &str,
) -> Result<()> {
    let begun = home.join("begun");
    if llama.build.exists() && !std::fs::read_to_string(&begun).is_ok_and(|made| made == wanted) {
        std::fs::remove_dir_all(&llama.build)?;
    }
    std::fs::write(&begun, wanted)?;
    let tools = build_tools(peers)?;
    eprintln!("building llama.cpp for this machine (5 to 10 minutes on two cores)");
    let cmake = |command: &mut Command| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let mut folders = vec![tools.clone()];
        folders.extend(std::env::split_paths(&path));
        run(
            command.env("PATH", std::env::join_paths(folders)?),
            "build llama.cpp",
        )
    };
    cmake(
        Command::new(tools.join("cmake"))
            .args(["-G", "Ninja", "-S"])
            .arg(&llama.source)
            .arg("-B")
            .arg(&llama.build)
            .args([
                "-DCMAKE_BUILD_TYPE=Release",
                "-DGGML_NATIVE=ON",
                "-DLLAMA_CURL=OFF",
            ])
            .args(["-DLLAMA_OPENSSL=OFF", "-DLLAMA_BUILD_UI=OFF"])
            .args([
                "-DLLAMA_BUILD_TESTS=OFF",
                "-DLLAMA_BUILD_EXAMPLES=OFF",
                "-DCMAKE_CXX_FLAGS=-w",
            ])
            .args(["-DCMAKE_C_FLAGS=-w", &format!("-DCMAKE_C_COMPILER={cc}")])
            .arg(format!("-DCMAKE_CXX_COMPILER={cxx}")),
    )?;
    cmake(
        Command::new(tools.join("cmake"))
            .arg("--build")
            .arg(&llama.build)
            .arg("--target")
            .args(TARGETS),
    )
}

/// C and C++ compilers: the machine's, or clang where it has AMX.
///
/// GCC 12 drops the stores to a tile configuration before it is loaded, and what it builds crashes at the first
/// matmul; other versions are not known to be right.
fn compilers() -> Result<(String, String)> {
    let candidates: &[(&str, &str)] = if machine::has("amx_tile") {
        &[("clang-19", "clang++-19"), ("clang", "clang++")]
    } else {
        &[("cc", "c++"), ("gcc", "g++"), ("clang", "clang++")]
    };
    for (cc, cxx) in candidates {
        if first_line(Command::new(cc).arg("--version")).is_ok()
            && first_line(Command::new(cxx).arg("--version")).is_ok()
        {
            return Ok(((*cc).to_owned(), (*cxx).to_owned()));
        }
    }
    bail!(
        "no compiler for llama.cpp; on Debian: sudo apt-get install {}",
        if machine::has("amx_tile") {
            "clang-19 libomp-19-dev"
        } else {
            "g++"
        }
    )
}

fn fetch_source(peers: &Path, home: &Path) -> Result<()> {
    if home.join("source").exists() {
        return Ok(());
    }
    std::fs::create_dir_all(home)?;
    eprintln!("downloading llama.cpp (77 MB, MIT) as the Python package {SDIST} {SDIST_VERSION}");
    let python = demo::python()?;
    let wanted = format!("{SDIST}=={SDIST_VERSION}");
    run(
        Command::new(&python)
            .args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"])
            .args(["--no-deps", "--no-binary", SDIST, &wanted, "--dest"])
            .arg(peers),
        "download llama.cpp with pip",
    )?;
    let archive = peers.join(format!("llama_cpp_python-{SDIST_VERSION}.tar.gz"));
    let side = home.join("unpacking");
    let _ = std::fs::remove_dir_all(&side);
    run(
        Command::new(&python)
            .args(["-m", "tarfile", "-e"])
            .arg(&archive)
            .arg(&side),
        "unpack llama.cpp",
    )?;
    let inner = side.join(format!("llama_cpp_python-{SDIST_VERSION}"));
    std::fs::rename(inner, home.join("source"))?;
    std::fs::remove_dir_all(side)?;
    std::fs::remove_file(archive)?;
    Ok(())
}

/// The folder with cmake and ninja, of a Python environment under `peers`.
fn build_tools(peers: &Path) -> Result<PathBuf> {
    environment(
        &peers.join("build-tools"),
        &BUILD_TOOLS.join(" "),
        &BUILD_TOOLS.map(OsStr::new),
        "cmake and ninja with pip",
    )
}

/// The folder of programs of a Python environment in `home`, made unless a whole one of the same `wanted` is there.
pub(super) fn environment(home: &Path, wanted: &str, install: &[&OsStr], what: &str) -> Result<PathBuf> {
    let whole = home.join("whole");
    if !std::fs::read_to_string(&whole).is_ok_and(|made| made == wanted) {
        eprintln!("installing {what}");
        let _ = std::fs::remove_dir_all(home);
        run(
            Command::new(demo::python()?).args(["-m", "venv"]).arg(home),
            "make a Python environment (on Debian: sudo apt-get install python3-venv)",
        )?;
        run(
            Command::new(home.join("bin/pip"))
                .args(["install", "--quiet", "--disable-pip-version-check"])
                .args(install),
            &format!("install {what}"),
        )?;
        std::fs::write(whole, wanted)?;
    }
    Ok(home.join("bin"))
}

/// Our small program against llama.cpp's library, which writes logits.
fn build_logits(llama: &Llama, cc: &str) -> Result<()> {
    let libraries = llama.build.join("bin");
    run(
        Command::new(cc)
            .args(["-O2", "-o"])
            .arg(llama.tool("logits"))
            .arg(workspace_root().join("benches/peers/logits.c"))
            .arg("-I")
            .arg(llama.source.join("include"))
            .arg("-I")
            .arg(llama.source.join("ggml/include"))
            .arg("-L")
            .arg(&libraries)
            .arg(format!("-Wl,-rpath,{}", libraries.display()))
            .args(["-lllama", "-lggml", "-lggml-base"]),
        "build benches/peers/logits.c",
    )
}

/// A version of the model in another format, made by llama.cpp's quantizer; `quant` is its name for the format.
pub(super) fn quantized(llama: &Llama, gguf: &Path, quant: &str, folder: &Path) -> Result<PathBuf> {
    let made = folder.join(format!("demo-{quant}.gguf"));
    if made.exists() {
        return Ok(made);
    }
    std::fs::create_dir_all(folder)?;
    let side = made.with_extension("partial");
    super::process::finish(
        Command::new(llama.tool("llama-quantize"))
            .arg("--allow-requantize")
            .arg(gguf)
            .arg(&side)
            .arg(quant),
    )?;
    std::fs::rename(&side, &made)?;
    Ok(made)
}

fn run(command: &mut Command, what: &str) -> Result<()> {
    let status = command.status().with_context(|| what.to_owned())?;
    ensure!(status.success(), "could not {what}: it ended with {status}");
    Ok(())
}

/// The first line a program prints.
pub(super) fn first_line(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?} failed");
    Ok(String::from_utf8_lossy(&output.stdout)
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned())
}
