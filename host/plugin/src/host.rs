//! The front door: options, and loading a guest of each world. Knows no world's functions.

use std::path::PathBuf;
use std::sync::Arc;

use galerne_core::grammar::{GrammarError, TokenTexts};
use galerne_core::guest::{
    Architecture, ChatFormat, FilterFactory, GuestError, GuestFacts, SamplerFactory, ToolFactory,
};
use galerne_core::limits::{CompileLimits, EngineLimits, GrammarLimits, GuestLimits};
use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre};

use crate::chat::ChatGuest;
use crate::compile::Compiler;
use crate::compile_process::CompileError;
use crate::errors::PluginError;
use crate::filter::FilterGuest;
use crate::grammar::Grammars;
use crate::inspect;
use crate::instance::GuestCore;
use crate::limiter::StoreState;
use crate::model::ModelGuest;
use crate::runtime;
use crate::sampler::SamplerGuest;
use crate::tool::ToolGuest;
use crate::workers::Workers;

/// Settings of a [`PluginHost`].
#[derive(Debug, Clone)]
pub struct PluginOptions {
    /// Bounds on every guest and its calls.
    pub limits: GuestLimits,
    /// Bounds on every answer's grammar.
    pub grammar_limits: GrammarLimits,
    /// Threads that answer questions to samplers and grammars, 1 to 64.
    pub workers: usize,
    /// Guest instances that may live at once: one per sampling session, chat parser and filter session, and
    /// one per running call. Each reserves 4 GiB of address space (not memory), so that bounds checks cost nothing.
    pub instances_max: u32,
    /// Most candidates a sampler may ask to see.
    pub candidates_max: usize,
    /// The program whose sub-command `compile-guest` compiles components, usually the one that runs. Without it this
    /// process compiles, and a component that takes minutes to compile takes them here.
    pub worker: Option<PathBuf>,
    /// Bounds on each compilation in a process of its own.
    pub compile: CompileLimits,
    /// Where compiled components are kept from one start to the next. Made, readable for this user only.
    pub artifacts: Option<PathBuf>,
}

impl Default for PluginOptions {
    fn default() -> Self {
        Self {
            limits: GuestLimits::default(),
            grammar_limits: GrammarLimits::default(),
            workers: 2,
            instances_max: 1_024,
            candidates_max: EngineLimits::default().candidates_max,
            worker: None,
            compile: CompileLimits::default(),
            artifacts: None,
        }
    }
}

/// Loads guests. Make one per process: its instance pool and threads are shared by all guests, and no object of
/// one runtime can then meet another's. Cloning is cheap; threads end when the last clone and guest are gone.
#[derive(Clone)]
pub struct PluginHost {
    shared: Arc<HostShared>,
}

/// What all guests of a host share.
pub(crate) struct HostShared {
    pub(crate) options: PluginOptions,
    pub(crate) engine: Engine,
    pub(crate) compiler: Compiler,
    pub(crate) workers: Workers,
}

impl std::fmt::Debug for PluginHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PluginHost")
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

impl PluginHost {
    /// Reserves the pool and starts the threads.
    ///
    /// # Errors
    /// Options out of range, or the operating system refuses address space or threads.
    pub fn new(options: PluginOptions) -> Result<Self, PluginError> {
        if !(1..=64).contains(&options.workers) {
            return Err(PluginError::Option {
                option: "workers",
                expected: "from 1 to 64",
                got: options.workers,
            });
        }
        if options.instances_max == 0 {
            return Err(PluginError::Option {
                option: "instances_max",
                expected: "above 0",
                got: 0,
            });
        }
        let engine = runtime::engine(&options.limits, options.instances_max)?;
        // A session has one open question at most, so that a queue of this length is only ever full of
        // questions whose sessions are gone.
        let workers = Workers::start(options.workers, options.instances_max as usize)?;
        let compiler = Compiler::new(engine.clone(), &options)?;
        Ok(Self {
            shared: Arc::new(HostShared {
                options,
                engine,
                compiler,
                workers,
            }),
        })
    }

    /// Loads a component of the world `galerne:model/model@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_model(&self, name: &str, component: &[u8]) -> Result<Arc<dyn Architecture>, GuestError> {
        let (core, pre) = self.load(name, "galerne:model/model@0.1.0", component)?;
        Ok(Arc::new(ModelGuest::new(core, pre)?))
    }

    /// Loads a component of the world `galerne:chat/chat@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_chat(&self, name: &str, component: &[u8]) -> Result<Arc<dyn ChatFormat>, GuestError> {
        let (core, pre) = self.load(name, "galerne:chat/chat@0.1.0", component)?;
        Ok(Arc::new(ChatGuest::new(core, pre)?))
    }

    /// Loads a component of the world `galerne:sampling/sampler@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_sampler(&self, name: &str, component: &[u8]) -> Result<Arc<dyn SamplerFactory>, GuestError> {
        let (core, pre) = self.load(name, "galerne:sampling/sampler@0.1.0", component)?;
        Ok(Arc::new(SamplerGuest::new(core, pre)?))
    }

    /// Loads a component of the world `galerne:filter/filter@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_filter(&self, name: &str, component: &[u8]) -> Result<Arc<dyn FilterFactory>, GuestError> {
        let (core, pre) = self.load(name, "galerne:filter/filter@0.1.0", component)?;
        Ok(Arc::new(FilterGuest::new(core, pre)?))
    }

    /// Prepares grammars over a model's vocabulary. Takes some milliseconds.
    ///
    /// # Errors
    /// The vocabulary cannot be used.
    pub fn grammars(&self, texts: &TokenTexts) -> Result<Grammars, GrammarError> {
        Grammars::new(Arc::clone(&self.shared), texts)
    }

    /// Loads a component of the world `galerne:tool/tool@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_tool(&self, name: &str, component: &[u8]) -> Result<Arc<dyn ToolFactory>, GuestError> {
        let (core, pre) = self.load(name, "galerne:tool/tool@0.1.0", component)?;
        Ok(Arc::new(ToolGuest::new(core, pre)?))
    }

    /// The worlds and imports of a component.
    pub(crate) fn facts(&self, name: &str, component: &[u8]) -> Result<GuestFacts, GuestError> {
        let core = self.core(name, "of any package of galerne's contract");
        let compiled = self.compile(&core, component)?;
        let engine = &self.shared.engine;
        Ok(GuestFacts {
            worlds: inspect::worlds(engine, &compiled).map_err(|reason| core.link_reason(reason))?,
            imports: inspect::imports(engine, &compiled),
        })
    }

    fn core(&self, name: &str, world: &'static str) -> GuestCore {
        GuestCore {
            host: Arc::clone(&self.shared),
            name: Arc::from(name),
            world,
        }
    }

    fn compile(&self, core: &GuestCore, component: &[u8]) -> Result<Component, GuestError> {
        let limit_bytes = self.shared.options.limits.component_bytes_max;
        if component.len() > limit_bytes {
            let got = component.len();
            let limit = format!("component of at most {limit_bytes} bytes, got {got}");
            return Err(core.over_limit("load", limit));
        }
        inspect::check_header(component).map_err(|reason| core.link_reason(reason))?;
        self.shared
            .compiler
            .component(component)
            .map_err(|error| match error {
                CompileError::Broken(reason) => core.link_reason(inspect::broken(&reason)),
                CompileError::Limit(limit) => core.over_limit("compile", limit),
                CompileError::Process(reason) => core.process_gone("compile", reason),
            })
    }

    fn load(
        &self,
        name: &str,
        world: &'static str,
        component: &[u8],
    ) -> Result<(GuestCore, InstancePre<StoreState>), GuestError> {
        let core = self.core(name, world);
        let compiled = self.compile(&core, component)?;
        let pre = self
            .shared
            .compiler
            .link(&compiled)
            .map_err(|reason| core.link_reason(reason))?;
        Ok((core, pre))
    }
}
