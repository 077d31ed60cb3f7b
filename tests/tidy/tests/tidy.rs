//! The rules of the design as a test: who may import whom, where `unsafe` lives, how a file begins, what a
//! released contract says. Reads manifests and sources only; builds nothing and needs no network.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use cargo_metadata::{DependencyKind, Metadata, MetadataCommand, Package};
use galerne_tidy::{code_only, has_word};

/// Think again at 600 lines; at this many the file holds two things.
const FILE_LINES_MAX: usize = 800;

/// Which of our crates each crate may depend on, in any way.
const MAY_IMPORT: &[(&str, &[&str])] = &[
    ("galerne-core", &[]),
    // The shim runs the CUDA device's kernels in tests, the trap those for AMX.
    (
        "galerne-kernels",
        &["galerne-core", "galerne-amx-trap", "galerne-cuda-shim"],
    ),
    ("galerne-amx-trap", &[]),
    ("galerne-cuda-shim", &["galerne-kernels"]),
    (
        "galerne-engine",
        &["galerne-core", "galerne-kernels", "galerne-cuda-shim"],
    ),
    ("galerne-plugin", &["galerne-core"]),
    ("galerne-store", &["galerne-core"]),
    (
        "galerne-server",
        &[
            "galerne-core",
            "galerne-engine",
            "galerne-plugin",
            "galerne-store",
        ],
    ),
    (
        "galerne",
        &[
            "galerne-core",
            "galerne-kernels",
            "galerne-engine",
            "galerne-plugin",
            "galerne-store",
            "galerne-server",
            "galerne-sdk-build",
        ],
    ),
    ("galerne-sdk", &[]),
    ("galerne-sdk-build", &[]),
    ("galerne-tidy", &[]),
    ("xtask", &["galerne-core", "galerne-sdk-build"]),
];

/// Libraries that only one crate may know. A name also stands for its family: `h3` for `h3-quinn`.
const ONLY_IN: &[(&str, &str)] = &[
    ("wasmtime", "galerne-plugin"),
    ("llguidance", "galerne-plugin"),
    ("quinn", "galerne-server"),
    ("h3", "galerne-server"),
    ("hyper", "galerne-server"),
    ("axum", "galerne-server"),
];

fn root() -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    root.canonicalize().expect("the workspace is two folders up")
}

fn metadata() -> Metadata {
    let mut command = MetadataCommand::new();
    command.manifest_path(root().join("Cargo.toml"));
    command.no_deps().other_options(["--offline".to_owned()]);
    command.exec().expect("cargo metadata reads the manifests")
}

/// Fails with every finding, not only the first.
fn none(findings: &[String], rule: &str) {
    assert!(findings.is_empty(), "{rule}:\n  {}", findings.join("\n  "));
}

fn is_guest(package: &Package) -> bool {
    package.name.starts_with("galerne-guest-")
}

/// The folder of a member below the root, such as `host/core`.
fn folder(package: &Package) -> String {
    let folder = package
        .manifest_path
        .parent()
        .expect("a manifest lies in a folder");
    let folder = Path::new(folder).canonicalize().expect("the folder exists");
    folder
        .strip_prefix(root())
        .expect("members lie below the root")
        .to_string_lossy()
        .replace('\\', "/")
}

fn may_import(package: &Package) -> Option<&'static [&'static str]> {
    if is_guest(package) {
        return Some(&["galerne-sdk"]);
    }
    let known = MAY_IMPORT.iter().find(|(name, _)| *name == package.name.as_str());
    known.map(|(_, allowed)| *allowed)
}

#[test]
fn crates_import_only_what_the_design_allows() {
    let metadata = metadata();
    let members: BTreeSet<&str> = metadata
        .packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let mut findings = Vec::new();
    for package in &metadata.packages {
        let Some(allowed) = may_import(package) else {
            // End-to-end tests and benches look at the whole from outside.
            if !["tests/", "benches/"]
                .iter()
                .any(|outside| folder(package).starts_with(outside))
            {
                findings.push(format!(
                    "{}: unknown crate; say in tests/tidy what it may import",
                    package.name
                ));
            }
            continue;
        };
        let ours = package.dependencies.iter().filter(|dependency| {
            // A crate may name itself, to switch on a feature for its own tests.
            members.contains(dependency.name.as_str()) && dependency.name != package.name.as_str()
        });
        for dependency in ours.filter(|dependency| !allowed.contains(&dependency.name.as_str())) {
            let name = &dependency.name;
            findings.push(format!(
                "{}: may import {allowed:?}, imports {name}",
                package.name
            ));
        }
    }
    none(&findings, "imports between our crates (DESIGN.md, section 3)");
}

#[test]
fn every_crate_of_the_design_is_checked() {
    let metadata = metadata();
    let members: BTreeSet<&str> = metadata
        .packages
        .iter()
        .map(|package| package.name.as_str())
        .collect();
    let missing: Vec<String> = MAY_IMPORT
        .iter()
        .filter(|(name, _)| !members.contains(name))
        .map(|(name, _)| format!("{name}: in the rules of tests/tidy, but no member of the workspace"))
        .collect();
    none(&missing, "crates of the workspace");
}

#[test]
fn libraries_stay_in_the_crate_that_owns_them() {
    let mut findings = Vec::new();
    for package in &metadata().packages {
        for dependency in &package.dependencies {
            let owner = ONLY_IN.iter().find(|(library, _)| {
                dependency.name == *library || dependency.name.starts_with(&format!("{library}-"))
            });
            if let Some((_, owner)) = owner.filter(|(_, owner)| *owner != package.name.as_str()) {
                findings.push(format!(
                    "{}: {} belongs in {owner} alone",
                    package.name, dependency.name
                ));
            }
        }
    }
    none(&findings, "libraries with one owner");
}

#[test]
fn anyhow_stays_in_the_binary_xtask_and_tests() {
    let mut findings = Vec::new();
    for package in &metadata().packages {
        let allowed = ["galerne", "xtask"].contains(&package.name.as_str());
        let used = package
            .dependencies
            .iter()
            .any(|dependency| dependency.name == "anyhow" && dependency.kind != DependencyKind::Development);
        if used && !allowed {
            findings.push(format!(
                "{}: use a thiserror enum instead of anyhow",
                package.name
            ));
        }
    }
    none(&findings, "anyhow");
}

#[test]
fn the_shim_and_the_trap_are_for_tests_only() {
    const TESTS_ONLY: [&str; 2] = ["galerne-cuda-shim", "galerne-amx-trap"];
    let packages = metadata().packages;
    let uses = packages.iter().flat_map(|package| {
        let ours = package.dependencies.iter();
        ours.filter(|dependency| {
            TESTS_ONLY.contains(&dependency.name.as_str()) && dependency.kind != DependencyKind::Development
        })
        .map(move |dependency| format!("{}: make {} a dev-dependency", package.name, dependency.name))
    });
    none(&uses.collect::<Vec<_>>(), "dependencies of tests");
}

#[test]
fn every_crate_takes_the_workspace_lints() {
    let mut findings = Vec::new();
    for package in &metadata().packages {
        let manifest = std::fs::read_to_string(&package.manifest_path).expect("the manifest is readable");
        let mut lines = manifest
            .lines()
            .map(str::trim)
            .skip_while(|line| *line != "[lints]");
        if (lines.next(), lines.next()) != (Some("[lints]"), Some("workspace = true")) {
            findings.push(format!("{}: add `[lints]` with `workspace = true`", package.name));
        }
    }
    none(&findings, "lints");
}

/// A Rust file: its path below the root with `/`, and its text.
struct Source {
    path: String,
    text: String,
}

/// All Rust files of the repository, whether committed yet or not.
fn sources() -> Vec<Source> {
    let root = root();
    let mut files = Vec::new();
    for folder in [
        "host",
        "kernels",
        "sdk-guest",
        "plugins",
        "xtask",
        "tests",
        "benches",
    ] {
        collect(&root.join(folder), &mut files);
    }
    files.sort();
    let read = |file: PathBuf| {
        let path = file
            .strip_prefix(&root)
            .expect("found below the root")
            .to_string_lossy()
            .replace('\\', "/");
        let text = std::fs::read_to_string(&file).expect("sources are readable UTF-8");
        Source { path, text }
    };
    files.into_iter().map(read).collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    // `benches` appears when it has something in it.
    let Ok(entries) = std::fs::read_dir(folder) else {
        return;
    };
    for entry in entries {
        let entry = entry.expect("the folder is readable");
        let name = entry.file_name().to_string_lossy().into_owned();
        let kind = entry.file_type().expect("the entry has a type");
        // Build outputs, virtual environments and tool folders are ignored by git too.
        let ignored = name == "target" || name == "node_modules" || name.starts_with('.');
        if kind.is_dir() && !ignored {
            collect(&entry.path(), files);
        } else if kind.is_file() && name.ends_with(".rs") {
            files.push(entry.path());
        }
    }
}

/// Applies a rule to every file; the rule returns what is wrong, if anything.
fn check_sources(rule: &str, wrong: impl Fn(&Source) -> Option<String>) {
    let sources = sources();
    assert!(
        sources.len() > 20,
        "expected the repository's sources, found {} files",
        sources.len()
    );
    let findings: Vec<String> = sources
        .iter()
        .filter_map(|source| wrong(source).map(|wrong| format!("{}: {wrong}", source.path)))
        .collect();
    none(&findings, rule);
}

fn in_plugin(source: &Source) -> bool {
    source.path.starts_with("host/plugin/")
}

fn uses_unsafe(source: &Source) -> bool {
    has_word(&code_only(&source.text), "unsafe")
}

#[test]
fn unsafe_lives_in_kernels_and_plugin() {
    check_sources("unsafe outside kernels/ and host/plugin/", |source| {
        let free = source.path.starts_with("kernels/") || in_plugin(source);
        (!free && uses_unsafe(source)).then(|| "uses unsafe".to_owned())
    });
}

/// Where it loads compiled code, and where it sets a thread's scheduling policy.
const UNSAFE_OF_PLUGIN: [&str; 2] = ["host/plugin/src/runtime.rs", "host/plugin/src/standing.rs"];

#[test]
fn unsafe_of_plugin_lives_in_two_files() {
    check_sources("unsafe elsewhere in host/plugin", |source| {
        let free = !in_plugin(source) || UNSAFE_OF_PLUGIN.contains(&source.path.as_str());
        (!free && uses_unsafe(source)).then(|| "uses unsafe".to_owned())
    });
}

#[test]
fn every_file_says_what_it_does_on_its_first_line() {
    check_sources("first lines", |source| {
        let first = source.text.lines().next().unwrap_or_default();
        let says = first
            .strip_prefix("//!")
            .is_some_and(|words| !words.trim().is_empty());
        (!says).then(|| format!("expected `//! what it does`, got {first:?}"))
    });
}

#[test]
fn nothing_is_left_to_do_or_to_debug() {
    check_sources("stubs and debug output", |source| {
        let code = code_only(&source.text);
        let found = ["todo", "unimplemented", "dbg"]
            .into_iter()
            .find(|name| has_word_before_bang(&code, name));
        found.map(|name| format!("uses {name}!"))
    });
}

fn has_word_before_bang(code: &str, name: &str) -> bool {
    has_word(code, name)
        && code.match_indices(name).any(|(start, _)| {
            let before = code[..start].chars().next_back();
            let is_word = before.is_some_and(|before| before.is_alphanumeric() || before == '_');
            !is_word && code[start + name.len()..].trim_start().starts_with("!(")
        })
}

#[test]
fn no_file_is_too_long() {
    check_sources("file lengths", |source| {
        let lines = source.text.lines().count();
        (lines > FILE_LINES_MAX).then(|| format!("{lines} lines; split it, it holds two things"))
    });
}

/// Folders directly below a folder, by name.
fn folders_below(folder: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(folder)
        .expect("the folder exists")
        .map(|entry| entry.expect("readable"));
    let folders = entries.filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = folders
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

/// All text of the WIT files directly in a folder.
fn wit_text(folder: &Path) -> String {
    let entries = std::fs::read_dir(folder)
        .expect("the folder exists")
        .map(|entry| entry.expect("readable"));
    let files = entries
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "wit"));
    files
        .map(|path| std::fs::read_to_string(path).expect("WIT is UTF-8"))
        .collect()
}

#[test]
fn released_contracts_say_the_version_of_their_folder() {
    let wit = root().join("wit");
    let packages = folders_below(&wit);
    for expected in ["chat", "model", "sampling"] {
        assert!(
            packages.iter().any(|package| package == expected),
            "wit/{expected} is missing"
        );
    }
    let mut findings = Vec::new();
    for package in packages {
        let versions = folders_below(&wit.join(&package));
        if versions.is_empty() {
            findings.push(format!(
                "wit/{package}: expected a folder per released version, got none"
            ));
        }
        for version in versions {
            let text = wit_text(&wit.join(&package).join(&version));
            let expected = format!("package galerne:{package}@{version};");
            if !text.lines().any(|line| line.trim() == expected) {
                findings.push(format!("wit/{package}/{version}: expected `{expected}`"));
            }
        }
    }
    none(&findings, "released WIT packages");
}

#[test]
fn the_readme_begins_with_the_two_commands() {
    let readme = std::fs::read_to_string(root().join("README.md")).expect("README.md exists");
    let mut in_code = false;
    let mut commands = Vec::new();
    for line in readme.lines() {
        if line.starts_with("```") {
            in_code = !in_code;
        } else if in_code {
            let command = line.split(" #").next().unwrap_or_default().trim();
            if !command.is_empty() && !command.starts_with('#') {
                commands.push(command);
            }
        }
    }
    assert_eq!(
        commands.get(..2),
        Some(&["cargo xtask demo", "cargo xtask test"][..])
    );
}

/// Nobody has to guess what of the CUDA kernels was run where.
#[test]
fn every_cuda_kernel_is_in_the_table() {
    let folder = root().join("kernels/cuda");
    let table = std::fs::read_to_string(folder.join("README.md")).expect("the table of kernels");
    let files = std::fs::read_dir(&folder).expect("the kernels' folder");
    let names = files.map(|file| file.expect("a file").file_name().to_string_lossy().into_owned());
    let missing: Vec<_> = names
        .filter(|name| name.ends_with(".cu") && !table.contains(&format!("`{name}`")))
        .collect();
    none(&missing, "kernels/cuda/README.md has no row");
}
