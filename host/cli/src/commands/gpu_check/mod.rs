//! `galerne gpu-check`: what a machine with a GPU is asked once it is at hand, a section per process. `cargo xtask gpu-kit` packs
//! this binary with the script that runs the sections, and `benches/gpu` has that script.

mod conformance;
mod decode;
mod model;
mod timings;
mod tokens;

use std::sync::Arc;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use galerne_core::dtype::DType;
use galerne_kernels::conformance::rounded;
use galerne_kernels::cpu::{CpuDevice, CpuOptions};
use galerne_kernels::cuda::CudaDevice;
use galerne_kernels::cuda::native::{NativeDriver, Overlap};
use galerne_kernels::device::{Device, LoadOptions, LoadedProgram};
use serde::Serialize;

use crate::config::{DataArgs, KvDtypeArg, PrecisionArg, QuantizeArg};
use crate::kernels;
use model::{SeededModel, Shape};

/// Options of `galerne gpu-check`.
#[derive(Debug, Args)]
pub(super) struct GpuCheckArgs {
    /// What is checked; the CPU stands in where there is no GPU, to try the check itself
    #[arg(long, value_enum, default_value = "cuda", global = true)]
    device: DeviceArg,
    #[command(subcommand)]
    section: Section,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DeviceArg {
    Cuda,
    /// With what no GPU has checked yet
    CudaUnchecked,
    Cpu,
}

#[derive(Debug, Subcommand)]
enum Section {
    /// What the device is
    Info,
    /// The conformance suite, a line per case
    Conformance {
        #[arg(long, value_enum)]
        precision: PrecisionArg,
    },
    /// How long each kernel takes alone
    Kernels {
        /// Sizes that say nothing of speed
        #[arg(long)]
        quick: bool,
    },
    /// A model from a seed, token by token beside the CPU in f32
    Tokens {
        #[command(flatten)]
        model: ModelArgs,
        #[arg(long, value_enum)]
        precision: PrecisionArg,
        /// Tokens each sequence gets after its prompt
        #[arg(long, default_value = "24")]
        steps: usize,
    },
    /// How fast a model from a seed decodes, with a guest beside each sequence too
    Decode {
        #[command(flatten)]
        model: ModelArgs,
        /// Numbers of sequences decoded together
        #[arg(long, value_delimiter = ',', default_values_t = [1, 16, 64])]
        batch: Vec<u32>,
        /// Tokens already in each sequence's KV blocks
        #[arg(long, default_value = "2048")]
        context: u32,
        /// Steps of each measurement
        #[arg(long, default_value = "32")]
        steps: u32,
    },
}

/// A model's shape and how its weights are stored.
#[derive(Debug, Args)]
struct ModelArgs {
    #[arg(long, value_enum)]
    shape: Shape,
    /// As in a model's files, for example bf16, q8_0
    #[arg(long, value_parser = dtype, default_value = "bf16")]
    weights: DType,
    /// What they are rounded to while they are loaded
    #[arg(long, value_enum)]
    quantize: Option<QuantizeArg>,
    /// How keys and values are stored under --precision auto
    #[arg(long, value_enum, default_value = "bf16")]
    kv_dtype: KvDtypeArg,
    /// Fewer layers than the shape has
    #[arg(long)]
    layers: Option<u32>,
}

impl ModelArgs {
    /// In figures' names.
    fn name(&self) -> String {
        let weights = match self.quantize {
            Some(quantize) => value_name(&quantize),
            None => self.weights.to_string(),
        };
        let kv = match self.kv_dtype {
            KvDtypeArg::Bf16 => String::new(),
            other => format!(", KV in {}", value_name(&other)),
        };
        format!("{:?} {weights}{kv}", self.shape)
    }
}

fn value_name(value: &impl ValueEnum) -> String {
    let value = value.to_possible_value();
    value.map_or_else(String::new, |value| value.get_name().to_owned())
}

fn dtype(name: &str) -> Result<DType> {
    let named = serde_json::from_value(name.into());
    named.with_context(|| format!("expected a dtype of weights, got \"{name}\""))
}

/// One line of what a section prints.
#[derive(Debug, Default, Serialize)]
struct Figure {
    name: String,
    /// Whether what had to hold holds.
    #[serde(skip_serializing_if = "Option::is_none")]
    passed: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unit: Option<&'static str>,
    /// Memory read and written, where that is the limit.
    #[serde(skip_serializing_if = "Option::is_none")]
    bytes_per_s: Option<f64>,
    /// Names of what others took for the same.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    peers: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
}

impl Figure {
    /// At once, since a section that hangs later is killed.
    fn print(&self) -> Result<()> {
        println!("{}", serde_json::to_string(self)?);
        Ok(())
    }
}

pub(super) fn run(data: &DataArgs, args: &GpuCheckArgs) -> Result<()> {
    let checked = || Checked::open(args.device);
    match &args.section {
        Section::Info => info(&*checked()?.device),
        Section::Kernels { quick } => timings::run(*quick),
        Section::Conformance { precision } => conformance::run(&*checked()?.device, (*precision).into()),
        Section::Tokens {
            model,
            precision,
            steps,
        } => tokens::run(data, &checked()?, model, (*precision).into(), *steps),
        Section::Decode {
            model,
            batch,
            context,
            steps,
        } => {
            let load = decode::Load {
                batch,
                context: *context,
                steps: *steps,
            };
            decode::run(data, &checked()?, model, &load)
        }
    }
}

/// What is checked.
struct Checked {
    device: Box<dyn Device>,
    /// If it is a GPU.
    gpu: Option<Arc<NativeDriver>>,
}

impl Checked {
    fn open(device: DeviceArg) -> Result<Self> {
        let gpu = |overlap| Ok::<_, anyhow::Error>(Arc::new(kernels::driver(0, overlap)?));
        let (device, gpu): (Box<dyn Device>, _) = match device {
            DeviceArg::Cpu => (Box::new(cpu()?), None),
            DeviceArg::Cuda => {
                let gpu = gpu(Overlap::None)?;
                (Box::new(CudaDevice::new(gpu.clone())?), Some(gpu))
            }
            DeviceArg::CudaUnchecked => {
                let gpu = gpu(Overlap::Dependent)?;
                (
                    Box::new(CudaDevice::new(gpu.clone())?.with_unchecked()),
                    Some(gpu),
                )
            }
        };
        Ok(Self { device, gpu })
    }

    /// Seconds that the GPU waited between steps, each since this was asked last, if that is measured.
    fn gaps(&self) -> Vec<f64> {
        self.gpu.as_ref().map(|gpu| gpu.gaps()).unwrap_or_default()
    }

    /// The CPU, which does not round weights by itself, gets them rounded.
    fn load(&self, model: &SeededModel, options: LoadOptions) -> Result<Box<dyn LoadedProgram>> {
        let loaded = match options.quantization.filter(|_| self.gpu.is_none()) {
            None => self.device.load(&model.program, &model.weights, options),
            Some(quantization) => {
                let weights = rounded(&model.program, &model.weights, quantization);
                let options = LoadOptions {
                    quantization: None,
                    ..options
                };
                self.device.load(&model.program, &weights, options)
            }
        };
        Ok(loaded?)
    }
}

fn cpu() -> Result<CpuDevice> {
    Ok(CpuDevice::new(CpuOptions::default())?)
}

fn info(device: &dyn Device) -> Result<()> {
    let info = device.info();
    Figure {
        name: "device".to_owned(),
        note: Some(format!(
            "{} ({}), {} processors",
            info.name, info.isa, info.threads
        )),
        ..Figure::default()
    }
    .print()
}
