//! From a package on disk to a running engine: the wiring of store, plugin, core, engine and device.

use std::num::NonZeroUsize;
use std::sync::{Arc, OnceLock};

use anyhow::{Context, Result, bail};
use galerne_core::grammar::{
    GrammarError, GrammarFactory, GrammarSession, GrammarSource, HeldGrammar, TokenText, TokenTexts,
};
use galerne_core::guest::{ChatFormat, Waker};
use galerne_core::ids::TokenId;
use galerne_core::limits::{EngineLimits, GraphLimits};
use galerne_core::validate::{ValidGraph, validate};
use galerne_core::weights::WeightSource as _;
use galerne_engine::handle::{self, EngineHandle, EngineOptions};
use galerne_engine::lowering::lower;
use galerne_kernels::cpu::trim_heap;
use galerne_kernels::cpu::{CpuDevice, CpuOptions, Isa};
use galerne_kernels::device::{Device, KvSpec, LoadOptions, LoadedProgram, MemoryUse};
use galerne_kernels::program::Program;
use galerne_plugin::{Grammars, PluginHost};
use galerne_store::package::Package;
use galerne_store::tokenizer::Tokenizer;

use crate::config::{DeviceArgs, DeviceChoice};
use crate::{guests, kernels};

/// A model on a device, before an engine owns it.
pub struct LoadedModel {
    /// On the device.
    pub program: Box<dyn LoadedProgram>,
    /// Entries of its output.
    pub vocabulary: u32,
    /// Most tokens of one sequence.
    pub context_tokens_max: u32,
    /// Queues and steps.
    pub limits: EngineLimits,
}

/// A model that runs.
pub struct RunningModel {
    /// To submit sequences.
    pub engine: EngineHandle,
    /// Its tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// Its chat format.
    pub chat: Arc<dyn ChatFormat>,
    /// What its answers can be made to match.
    pub grammars: Arc<dyn GrammarFactory>,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<TokenId>,
    /// Token a text prompt begins with, where the model wants one.
    pub prompt_prefix: Option<TokenId>,
    /// Bytes on the device.
    pub memory: MemoryUse,
}

/// A device, and why it is not a better one.
pub struct ChosenDevice {
    /// Where models run.
    pub device: Box<dyn Device>,
    /// Why no GPU is used, if none was asked for by name.
    pub note: Option<String>,
}

/// The device these options ask for. Left to choose, a GPU if there is one that this build has kernels for.
///
/// # Errors
/// What was asked for by name is not there, or cannot be used.
pub fn device(args: &DeviceArgs) -> Result<ChosenDevice> {
    let chosen = |device: Box<dyn Device>, note| Ok(ChosenDevice { device, note });
    match args.device {
        DeviceChoice::Cpu => chosen(Box::new(cpu(args)?), None),
        DeviceChoice::Cuda(ordinal) => {
            let device =
                kernels::open(ordinal).context("--device cuda; with --device cpu the CPU is used")?;
            chosen(Box::new(device), None)
        }
        DeviceChoice::Auto => match kernels::open(0) {
            Ok(device) => chosen(Box::new(device), None),
            Err(error) => chosen(Box::new(cpu(args)?), Some(crate::report(&error))),
        },
    }
}

/// The CPU with these options.
///
/// # Errors
/// An unknown instruction set, or one this machine lacks.
pub fn cpu(args: &DeviceArgs) -> Result<CpuDevice> {
    let isa = match &args.isa {
        None => None,
        Some(name) => Some(
            Isa::ALL
                .into_iter()
                .find(|isa| isa.name() == name)
                .with_context(|| {
                    format!(
                        "--isa: expected {}, got \"{name}\"",
                        Isa::ALL.map(Isa::name).join(", ")
                    )
                })?,
        ),
    };
    Ok(CpuDevice::new(CpuOptions {
        threads: args.threads,
        isa,
    })?)
}

/// Runs the package's architecture guest and passes its graph through the gate.
///
/// # Errors
/// The guest or the graph, with the reason.
pub fn build_graph(package: &Package, plugins: &PluginHost) -> Result<ValidGraph> {
    let name = format!("{}/architecture", package.manifest().name);
    let component = package.architecture()?;
    let guest = guests::place(plugins, &component).load_model(&name, &component)?;
    let graph = guest.build(package.config_json())?;
    let weights = package.weights()?;
    Ok(validate(graph, weights.index(), &GraphLimits::default())?)
}

/// Loads a package onto the device.
///
/// # Errors
/// Anything on the way, with what to do.
pub fn load_program(
    package: &Package,
    plugins: &PluginHost,
    device: &dyn Device,
    args: &DeviceArgs,
) -> Result<LoadedModel> {
    let graph = build_graph(package, plugins)?;
    let Some(vocabulary) = graph.vocabulary() else {
        bail!(
            "model \"{}\" gives no logits: encoders are not served yet",
            package.manifest().name
        );
    };
    let program = lower(&graph)?;
    let info = device.info();
    let mut options = LoadOptions {
        precision: args.precision.into(),
        quantization: args.quantize.map(Into::into),
        kv: KvSpec {
            blocks: 0,
            block_tokens: info.block_tokens,
            dtype: args.kv_dtype.into(),
        },
        step_tokens_max: args.step_tokens.map_or(info.step_tokens, NonZeroUsize::get),
        sequences_max: args.sequences.get(),
    };
    let weights = package.weights()?;
    let package_bytes = package.size_bytes()?;
    let left = info
        .free_bytes
        .map(|free| free.saturating_sub(usize::try_from(package_bytes).unwrap_or(usize::MAX)));
    options.kv.blocks = kv_blocks(&program, options, args.kv_bytes(left), args.sequences.get())?;
    let limits = EngineLimits {
        step_tokens_max: options.step_tokens_max,
        sequences_max: options.sequences_max,
        queue_max: args.queue.get(),
        block_tokens: options.kv.block_tokens,
        blocks: options.kv.blocks,
        ..EngineLimits::default()
    };
    let context_tokens_max = program.context_tokens_max;
    trim_heap();
    let program = device.load(&program, &weights, options)?;
    Ok(LoadedModel {
        program,
        vocabulary,
        context_tokens_max,
        limits,
    })
}

/// How many blocks fit in the KV memory; no more than all sequences at full context could use.
fn kv_blocks(program: &Program, options: LoadOptions, bytes: usize, sequences: usize) -> Result<usize> {
    let (dtype, block_tokens) = (options.kv_dtype(), options.kv.block_tokens);
    let token_bytes: usize = program
        .layers
        .iter()
        .map(|layer| layer.kv_heads as usize * dtype.token_bytes(layer.head_width as usize))
        .sum();
    if token_bytes == 0 {
        return Ok(1);
    }
    let block_bytes = token_bytes * block_tokens;
    let fits = bytes / block_bytes;
    if fits == 0 {
        bail!(
            "--kv-memory: one block needs {} KiB, more than given; give more",
            block_bytes.div_ceil(1_024)
        );
    }
    let useful = (program.context_tokens_max as usize).div_ceil(block_tokens) * sequences;
    Ok(fits.min(useful))
}

/// Loads a package and starts its engine.
///
/// # Errors
/// Anything on the way, with what to do.
pub fn start(
    package: &Package,
    plugins: &PluginHost,
    device: &dyn Device,
    args: &DeviceArgs,
) -> Result<RunningModel> {
    let name = &package.manifest().name;
    // The small things first: what reading them takes for a moment is free again when the weights come.
    let tokenizer = package.tokenizer()?;
    let component = package.chat()?;
    let chat = guests::place(plugins, &component).load_chat(&format!("{name}/chat"), &component)?;
    let model =
        load_program(package, plugins, device, args).with_context(|| format!("load model \"{name}\""))?;
    let stop_tokens = package.eos_tokens(&tokenizer)?;
    let grammars = LazyGrammars {
        plugins: plugins.clone(),
        tokenizer: Arc::clone(&tokenizer),
        vocabulary: model.vocabulary,
        ends: stop_tokens.clone(),
        made: OnceLock::new(),
    };
    let memory = model.program.memory();
    // What loading left behind would stay beside the weights for good.
    trim_heap();
    let engine = handle::start(
        model.program,
        model.vocabulary,
        model.context_tokens_max,
        EngineOptions {
            limits: model.limits,
            ..EngineOptions::default()
        },
    );
    Ok(RunningModel {
        engine,
        stop_tokens,
        prompt_prefix: package.prompt_prefix(&tokenizer)?,
        tokenizer,
        chat,
        grammars: Arc::new(grammars),
        memory,
    })
}

/// Grammars that are prepared for the first answer that wants one: most hosts never see such a request, and the vocabulary
/// as a tree takes megabytes.
struct LazyGrammars {
    plugins: PluginHost,
    tokenizer: Arc<Tokenizer>,
    vocabulary: u32,
    ends: Vec<TokenId>,
    made: OnceLock<Result<Grammars, GrammarError>>,
}

impl GrammarFactory for LazyGrammars {
    fn session(&self, source: &GrammarSource, waker: Waker) -> Result<Box<dyn GrammarSession>, GrammarError> {
        self.made()?.session(source, waker)
    }

    fn hold(&self, source: &GrammarSource) -> Result<Arc<dyn HeldGrammar>, GrammarError> {
        self.made()?.hold(source)
    }
}

impl LazyGrammars {
    fn made(&self) -> Result<&Grammars, GrammarError> {
        let made = self.made.get_or_init(|| {
            let texts = token_texts(&self.tokenizer, self.vocabulary, &self.ends);
            self.plugins.grammars(&texts)
        });
        made.as_ref().map_err(Clone::clone)
    }
}

/// What each of the model's outputs stands for. An output beyond the tokenizer's vocabulary is padding, and a vocabulary
/// beyond the outputs is never drawn.
fn token_texts(tokenizer: &Tokenizer, vocabulary: u32, ends: &[TokenId]) -> TokenTexts {
    let text = |id| match tokenizer.token_name(id) {
        Some(name) if tokenizer.is_special(id) => TokenText::Control(name.to_owned()),
        _ => TokenText::Bytes(tokenizer.token_bytes(id)),
    };
    TokenTexts {
        tokens: (0..vocabulary).map(TokenId).map(text).collect(),
        ends: ends
            .iter()
            .copied()
            .filter(|token| token.0 < vocabulary)
            .collect(),
    }
}
