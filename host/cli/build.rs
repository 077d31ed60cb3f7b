//! Embeds what makes the binary one file: the first-party guests that `cargo xtask guests` built, the CUDA kernels that
//! `cargo xtask kernels` built, and what a new plugin begins with.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Guests that ship with the host, by file name under `target/guests`.
const GUESTS: [&str; 12] = [
    "llama",
    "chatml",
    "mirostat",
    "watermark",
    "ngram-speculate",
    "choices",
    "pii-redact",
    "calculator",
    "http-get",
    "best-of-n",
    "self-consistency",
    "agent",
];
/// Folders whose files a new plugin begins with.
const SDK: [&str; 5] = [
    "sdk-guest/src",
    "sdk-guest/Cargo.toml",
    "wit",
    "plugins/llama/src",
    "plugins/chatml/src",
];
/// What the SDK inherits from the workspace's manifest.
const SDK_DEPENDENCIES: [&str; 2] = ["serde_json", "wit-bindgen"];

fn main() {
    let manifest =
        PathBuf::from(std::env::var_os("CARGO_MANIFEST_DIR").expect("cargo sets CARGO_MANIFEST_DIR"));
    let root = manifest
        .join("../..")
        .canonicalize()
        .expect("the workspace is two folders up");
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    println!("cargo::rerun-if-changed=build.rs");

    let mut guests = Vec::new();
    for name in GUESTS {
        let file = root.join("target/guests").join(format!("{name}.wasm"));
        println!("cargo::rerun-if-changed={}", file.display());
        // A build without guests is allowed: commands that need them say how to get them.
        if file.exists() {
            guests.push((name.to_owned(), file));
        }
    }
    write(&out.join("guests.rs"), &table(&guests));

    write(&out.join("kernels.rs"), &kernels(&root));

    let mut sdk = Vec::new();
    for part in SDK {
        println!("cargo::rerun-if-changed={}", root.join(part).display());
        collect(&root, &root.join(part), &mut sdk);
    }
    sdk.sort();
    write(&out.join("sdk.rs"), &table(&sdk));

    let workspace = root.join("Cargo.toml");
    println!("cargo::rerun-if-changed={}", workspace.display());
    let workspace = std::fs::read_to_string(&workspace).expect("read the workspace's manifest");
    let is_inherited = |line: &&str| {
        let name = line.split_once(" = ").map(|(name, _)| name);
        name.is_some_and(|name| SDK_DEPENDENCIES.contains(&name))
    };
    let lines: Vec<&str> = workspace.lines().filter(is_inherited).collect();
    assert_eq!(
        lines.len(),
        SDK_DEPENDENCIES.len(),
        "the SDK's dependencies are pinned in the workspace"
    );
    write(&out.join("sdk-dependencies.toml"), &lines.join("\n"));
}

/// A Rust expression: the archive of compiled kernels, if there is one and it was made of the sources that are there.
fn kernels(root: &Path) -> String {
    let (sources, built) = (root.join("kernels/cuda"), root.join("target/cuda-kernels"));
    // Watched as a folder, which is there: a file that is not would mean a new build each time.
    std::fs::create_dir_all(&built).expect("make a folder under target");
    println!("cargo::rerun-if-changed={}", built.display());
    println!("cargo::rerun-if-changed={}", sources.display());
    let archive = built.join("kernels.bin");
    // What `cargo xtask kernels` compiled, name and text of each file.
    let Ok(compiled) = std::fs::read(built.join("sources")) else {
        return "None".to_owned();
    };
    let mut files = Vec::new();
    for entry in std::fs::read_dir(&sources).expect("list a folder of the workspace") {
        let file = entry.expect("read a folder's entry").path();
        if file
            .extension()
            .is_some_and(|ending| ending == "cu" || ending == "cuh")
        {
            files.push(file);
        }
    }
    files.sort();
    let mut present = Vec::new();
    for file in files {
        let name = file.file_name().expect("a file has a name").to_string_lossy();
        present.extend(format!("{name}\n").into_bytes());
        present.extend(std::fs::read(&file).expect("read a source"));
    }
    if present != compiled || !archive.exists() {
        println!(
            "cargo::warning=no CUDA kernels in this build: kernels/cuda changed; run `cargo xtask kernels`"
        );
        return "None".to_owned();
    }
    format!("Some(include_bytes!({archive:?}).as_slice())")
}

/// Every file below `path`, by its path from the root.
fn collect(root: &Path, path: &Path, files: &mut Vec<(String, PathBuf)>) {
    if path.is_dir() {
        for entry in std::fs::read_dir(path).expect("list a folder of the workspace") {
            collect(root, &entry.expect("read a folder's entry").path(), files);
        }
        return;
    }
    let name = path.strip_prefix(root).expect("it lies below the root");
    files.push((name.to_string_lossy().into_owned(), path.to_owned()));
}

/// A Rust expression: names and contents.
fn table(files: &[(String, PathBuf)]) -> String {
    let mut table = String::from("&[\n");
    for (name, file) in files {
        writeln!(table, "    ({name:?}, include_bytes!({file:?}).as_slice()),").expect("writing to a string");
    }
    table.push(']');
    table
}

fn write(file: &Path, text: &str) {
    std::fs::write(file, text).expect("write a generated file");
}
