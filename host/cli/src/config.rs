//! Options that several commands share, and where things live.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::{Args, ValueEnum};
use galerne_kernels::device::{KvDtype, Precision, Quantization};

/// Where models, certificates and caches are kept.
#[derive(Debug, Clone, Args)]
pub struct DataArgs {
    /// Data folder: models, certificate [default: ~/.local/share/galerne]
    #[arg(long, value_name = "DIR", env = "GALERNE_DATA", global = true)]
    pub data: Option<PathBuf>,
}

impl DataArgs {
    /// The folder, made if it is not there.
    ///
    /// # Errors
    /// No home folder is known, or the folder cannot be made.
    pub fn folder(&self) -> Result<PathBuf> {
        let folder = match &self.data {
            Some(folder) => folder.clone(),
            None => default_data().context("no home folder is known; pass --data DIR")?,
        };
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("make the data folder {}", folder.display()))?;
        Ok(folder)
    }
}

fn default_data() -> Option<PathBuf> {
    let set = |name| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    set("XDG_DATA_HOME")
        .or_else(|| Some(set("HOME")?.join(".local/share")))
        .map(|base| base.join("galerne"))
}

/// How exactly to compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PrecisionArg {
    /// The device's fast path: activations quantized or rounded, KV cache as --kv-dtype says
    Auto,
    /// Everything in f32, the KV cache too: slow, for comparisons
    F32,
}

impl From<PrecisionArg> for Precision {
    fn from(value: PrecisionArg) -> Self {
        match value {
            PrecisionArg::Auto => Self::Auto,
            PrecisionArg::F32 => Self::F32,
        }
    }
}

/// How keys and values are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum KvDtypeArg {
    /// 16 bits
    Bf16,
    /// 16 bits, more exact but slower on machines with fast bf16 products
    F16,
    /// 32 bits
    F32,
    /// 8 bits with a scale per token and head: half the memory of 16 bits
    Int8,
    /// 8-bit floats (e4m3) without scales: half the memory of 16 bits, less exact than int8 and made for GPUs
    Fp8,
}

impl From<KvDtypeArg> for KvDtype {
    fn from(value: KvDtypeArg) -> Self {
        match value {
            KvDtypeArg::Bf16 => Self::Bf16,
            KvDtypeArg::F16 => Self::F16,
            KvDtypeArg::F32 => Self::F32,
            KvDtypeArg::Int8 => Self::Int8,
            KvDtypeArg::Fp8 => Self::Fp8,
        }
    }
}

/// What a model's weights are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum QuantizeArg {
    /// 8-bit floats (e4m3), a factor per output
    Fp8,
    /// The same, and in steps of 512 rows and more activations too, a factor per row: faster prompts, less exact
    #[value(name = "fp8-w8a8")]
    Fp8W8A8,
    /// 4-bit integers, a scale per 128 inputs
    Int4,
    /// 4-bit floats (e2m1), a scale per 16 inputs
    Nvfp4,
}

impl From<QuantizeArg> for Quantization {
    fn from(value: QuantizeArg) -> Self {
        match value {
            QuantizeArg::Fp8 => Self::Fp8,
            QuantizeArg::Fp8W8A8 => Self::Fp8W8A8,
            QuantizeArg::Int4 => Self::Int4,
            QuantizeArg::Nvfp4 => Self::Nvfp4,
        }
    }
}

/// How the device computes and what memory it may take.
#[derive(Debug, Clone, Args)]
pub struct DeviceArgs {
    /// Where models run: auto (a GPU if there is one), cpu, cuda or cuda:N
    #[arg(long, value_name = "DEVICE", default_value = "auto", env = "GALERNE_DEVICE")]
    pub device: DeviceChoice,
    /// Worker threads of the CPU device [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
    /// How exactly to compute
    #[arg(long, value_enum, default_value = "auto")]
    pub precision: PrecisionArg,
    /// How keys and values are stored under --precision auto
    #[arg(long, value_enum, default_value = "bf16")]
    pub kv_dtype: KvDtypeArg,
    /// On a GPU: round the weights of linear maps that are stored in 16 or 32 bits to fewer while they are loaded, without
    /// calibration. Embeddings, norms, routers and the map to the logits stay as stored
    #[arg(long, value_enum)]
    pub quantize: Option<QuantizeArg>,
    /// Memory of each model's KV cache, in MiB [default: on the CPU 1024, at most a quarter of the machine's; on a GPU half of
    /// what is free beside the model]
    #[arg(long, value_name = "MIB")]
    pub kv_memory: Option<NonZeroUsize>,
    /// Most tokens computed in one step, prefill and decode together [default: 256 on the CPU, 2048 on a GPU]
    #[arg(long, value_name = "N")]
    pub step_tokens: Option<NonZeroUsize>,
    /// Most sequences computed together
    #[arg(long, value_name = "N", default_value = "64")]
    pub sequences: NonZeroUsize,
    /// Most sequences waiting; further ones are refused with "try again later"
    #[arg(long, value_name = "N", default_value = "256")]
    pub queue: NonZeroUsize,
    /// Instruction set of the CPU device, at most what the machine has: portable, avx2, avx512-vnni, avx512-bf16 or amx
    #[arg(long, value_name = "ISA", env = "GALERNE_ISA")]
    pub isa: Option<String>,
}

impl Default for DeviceArgs {
    fn default() -> Self {
        let positive = |n| NonZeroUsize::new(n).unwrap_or(NonZeroUsize::MIN);
        Self {
            device: DeviceChoice::Auto,
            threads: None,
            precision: PrecisionArg::Auto,
            kv_dtype: KvDtypeArg::Bf16,
            quantize: None,
            kv_memory: None,
            step_tokens: None,
            sequences: positive(64),
            queue: positive(256),
            isa: None,
        }
    }
}

impl DeviceArgs {
    /// Bytes of one model's KV cache, on a device that has so much memory of its own left beside the model.
    #[must_use]
    pub fn kv_bytes(&self, left_bytes: Option<usize>) -> usize {
        const MIB: usize = 1 << 20;
        let default = || match left_bytes {
            Some(left) => left / 2,
            None => memory_bytes().map_or(1_024 * MIB, |total| (total / 4).min(1_024 * MIB)),
        };
        self.kv_memory
            .map_or_else(default, |mib| mib.get().saturating_mul(MIB))
    }
}

/// Where models run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// A GPU if there is one that this build has kernels for, else the CPU.
    Auto,
    /// The CPU.
    Cpu,
    /// The GPU of this number.
    Cuda(usize),
}

impl std::str::FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "auto" => Ok(Self::Auto),
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            _ => text
                .strip_prefix("cuda:")
                .and_then(|number| number.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| format!("expected auto, cpu, cuda or cuda:N, got \"{text}\"")),
        }
    }
}

/// The machine's memory in bytes, where the kernel tells.
#[must_use]
pub fn memory_bytes() -> Option<usize> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("MemTotal:"))?;
    line.split_whitespace()
        .nth(1)?
        .parse::<usize>()
        .ok()?
        .checked_mul(1_024)
}
