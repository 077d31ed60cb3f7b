//! NVIDIA's compiler from PyPI, pinned, under `target/cuda-toolchain`. Knows no kernel.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::venv;

/// What compiles, for reports and caches; one with [`PACKAGES`].
pub(super) const COMPILER: &str = "nvcc 13.0.88";
/// All pinned: nvcc's own requirements would bring parts of newer versions, which do not fit together.
const PACKAGES: [&str; 5] = [
    "nvidia-cuda-nvcc==13.0.88",
    "nvidia-cuda-crt==13.0.88",
    "nvidia-nvvm==13.0.88",
    "nvidia-cuda-runtime==13.0.88",
    "nvidia-cuda-cccl==13.0.85",
];
/// Tools that read what was compiled; there is no version of them beside the compiler's.
const TOOLS: [&str; 2] = ["nvidia-cuda-cuobjdump==13.2.78", "nvidia-cuda-nvdisasm==13.2.78"];

/// An installed toolchain.
pub(super) struct Toolchain {
    bin: PathBuf,
}

impl Toolchain {
    /// Installs it where it is not yet.
    ///
    /// # Errors
    /// The packages cannot be had, or there is no host compiler, which nvcc needs.
    pub(super) fn install() -> Result<Self> {
        let host = Command::new("g++").arg("--version").output();
        let has_host = host.is_ok_and(|output| output.status.success());
        ensure!(has_host, "nvcc needs g++; on Debian: sudo apt-get install g++");
        let venv = venv::bin_with("cuda-toolchain/venv", &PACKAGES, &TOOLS)?;
        let lib = venv.with_file_name("lib");
        let python = std::fs::read_dir(&lib)
            .with_context(|| format!("list {}", lib.display()))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.join("site-packages/nvidia/cu13/bin/nvcc").exists());
        let python = python.with_context(|| format!("nvcc is not below {}", lib.display()))?;
        Ok(Self {
            bin: python.join("site-packages/nvidia/cu13/bin"),
        })
    }

    /// The compiler, in the folder of the kernels: names of files, and so its output, are the same everywhere.
    pub(super) fn nvcc(&self) -> Command {
        let mut nvcc = Command::new(self.bin.join("nvcc"));
        nvcc.current_dir(super::kernels_dir());
        nvcc
    }

    /// The disassembler.
    pub(super) fn cuobjdump(&self) -> Command {
        let mut cuobjdump = Command::new(self.bin.join("cuobjdump"));
        // It looks for nvdisasm there.
        let path = std::env::var("PATH").unwrap_or_default();
        cuobjdump.env("PATH", format!("{}:{path}", self.bin.display()));
        cuobjdump
    }
}
