//! One file of kernels for one architecture: compiling it, keeping the result under the digest of all it was made of.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::toolchain::{COMPILER, Toolchain};
use super::{listing, source, source_files};
use crate::{guests, workspace_root};

/// Flags of every compilation.
const FLAGS: [&str; 5] = ["-std=c++17", "-O3", "--Werror=all-warnings", "-Xptxas", "-v"];

/// What kernels are compiled for: the name in the archive, the flags, and what a file's name ends with that is for it alone.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Target {
    pub(super) name: &'static str,
    flags: &'static [&'static str],
    ending: &'static str,
}

/// PTX is what drivers compile for GPUs that are newer than this list.
pub(super) const TARGETS: [Target; 3] = [
    Target {
        name: "sm_90a",
        flags: &["-cubin", "-gencode=arch=compute_90a,code=sm_90a"],
        ending: "_sm90",
    },
    Target {
        name: "sm_100a",
        flags: &["-cubin", "-gencode=arch=compute_100a,code=sm_100a"],
        ending: "_sm100",
    },
    Target {
        name: "compute_90",
        flags: &["-ptx", "-arch=compute_90"],
        ending: "_ptx",
    },
];

/// What the compiler says of a kernel, and what is in it.
#[derive(Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kernel {
    /// Per thread.
    pub(super) registers: u32,
    /// Per thread, stored and loaded.
    pub(super) spill_bytes: u32,
    /// Per thread: arrays that are indexed at run time.
    pub(super) stack_bytes: u32,
    /// Declared with fixed sizes; ours ask for it at launch.
    pub(super) static_shared_bytes: u32,
    /// How often each machine instruction occurs, with its modifiers.
    pub(super) instructions: BTreeMap<String, u32>,
}

/// A compiled module.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Compiled {
    /// The file, without its ending.
    pub(super) module: String,
    /// The target's name.
    pub(super) target: String,
    /// By entry point; nothing is known of those in PTX but their names.
    pub(super) kernels: BTreeMap<String, Kernel>,
    /// Of the code.
    pub(super) bytes: usize,
    #[serde(skip)]
    pub(super) code: Vec<u8>,
}

/// What the cache keeps beside the code.
#[derive(Serialize, Deserialize)]
struct Stamp {
    key: String,
    compiled: Compiled,
}

/// A file to be compiled for a target.
pub(super) struct Job {
    file: PathBuf,
    target: &'static Target,
    key: String,
}

impl Job {
    /// Every file for every target it is for.
    pub(super) fn all() -> Result<Vec<Self>> {
        let files = source_files()?;
        let mut headers = Sha256::new();
        for header in files
            .iter()
            .filter(|file| file.extension().is_some_and(|e| e == "cuh"))
        {
            headers.update(source(header)?);
        }
        let mut jobs = Vec::new();
        for file in files
            .iter()
            .filter(|file| file.extension().is_some_and(|e| e == "cu"))
        {
            for target in TARGETS.iter().filter(|target| target.takes(&stem(file))) {
                let mut key = headers.clone();
                key.update(source(file)?);
                key.update(format!("{COMPILER} {FLAGS:?} {:?}", target.flags));
                let key = key.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
                jobs.push(Self {
                    file: file.clone(),
                    target,
                    key,
                });
            }
        }
        Ok(jobs)
    }

    /// The module's name.
    pub(super) fn name(&self) -> String {
        stem(&self.file)
    }

    /// What was made of the same sources before.
    pub(super) fn cached(&self) -> Option<Compiled> {
        let stamp: Stamp = serde_json::from_slice(&std::fs::read(self.kept("json")).ok()?).ok()?;
        let code = std::fs::read(self.kept("code")).ok()?;
        let mut compiled = stamp.compiled;
        (stamp.key == self.key && code.len() == compiled.bytes).then(|| {
            compiled.code = code;
            compiled
        })
    }

    /// Compiles, looks at the result and keeps it.
    pub(super) fn run(&self, toolchain: &Toolchain) -> Result<Compiled> {
        let begin = Instant::now();
        let code = self.kept("code");
        std::fs::create_dir_all(code.parent().unwrap_or(&code))?;
        let _ = std::fs::remove_file(self.kept("json"));
        let messages = text(
            toolchain
                .nvcc()
                .args(FLAGS)
                .args(self.target.flags)
                .arg("-o")
                .arg(&code)
                .arg(self.file.file_name().unwrap_or_default()),
        )
        .with_context(|| format!("compile {} for {}", self.file.display(), self.target.name))?;
        let mut bytes = std::fs::read(&code)?;
        let kernels = if self.target.is_ptx() {
            // The driver's loader takes it as a C string.
            bytes.push(0);
            listing::ptx_kernels(&String::from_utf8_lossy(&bytes))
        } else {
            let mut kernels = listing::resources(&messages)?;
            listing::add_instructions(
                &text(toolchain.cuobjdump().arg("-sass").arg(&code))?,
                &mut kernels,
            )?;
            kernels
        };
        ensure!(!kernels.is_empty(), "{} declares no kernel", self.file.display());
        let compiled = Compiled {
            module: self.name(),
            target: self.target.name.to_owned(),
            kernels,
            bytes: bytes.len(),
            code: bytes,
        };
        guests::write_atomically(&code, &compiled.code)?;
        eprintln!(
            "  {} for {}: {} kernels, {} KiB in {:.1} s",
            compiled.module,
            compiled.target,
            compiled.kernels.len(),
            compiled.bytes.div_ceil(1_024),
            begin.elapsed().as_secs_f64()
        );
        let stamp = Stamp {
            key: self.key.clone(),
            compiled,
        };
        guests::write_atomically(&self.kept("json"), &serde_json::to_vec(&stamp)?)?;
        Ok(stamp.compiled)
    }

    fn kept(&self, ending: &str) -> PathBuf {
        workspace_root().join("target/cuda-build").join(format!(
            "{}.{}.{ending}",
            self.name(),
            self.target.name
        ))
    }
}

impl Target {
    /// A file whose name ends as a target's is for that alone.
    fn takes(&self, stem: &str) -> bool {
        stem.ends_with(self.ending) || !TARGETS.iter().any(|target| stem.ends_with(target.ending))
    }

    fn is_ptx(&self) -> bool {
        self.flags.contains(&"-ptx")
    }
}

fn stem(file: &std::path::Path) -> String {
    file.file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Everything a successful program says.
fn text(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("run {command:?}"))?;
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    said.push_str(&String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{said}");
    Ok(said)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_can_be_for_one_architecture() {
        let targets = |stem: &str| {
            let targets = TARGETS.iter().filter(|target| target.takes(stem));
            targets.map(|target| target.name).collect::<Vec<_>>()
        };
        assert_eq!(targets("norm"), ["sm_90a", "sm_100a", "compute_90"]);
        assert_eq!(targets("attention_prefill_sm90"), ["sm_90a"]);
        assert_eq!(targets("linear_nvfp4_sm100"), ["sm_100a"]);
        assert_eq!(targets("linear_ptx"), ["compute_90"]);
    }
}
