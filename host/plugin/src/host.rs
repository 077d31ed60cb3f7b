//! The front door: options, and loading a guest of each world, here or in its tenant's cell. Knows no world's functions.

use std::collections::{BTreeSet, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use galerne_core::capability::{Capabilities, Grants};
use galerne_core::grammar::{GrammarError, TokenTexts};
use galerne_core::guest::{
    Architecture, ChatFormat, FilterFactory, GuestError, GuestFacts, GuestStats, PipelineFactory,
    SamplerFactory, ToolFactory, World,
};
use galerne_core::limits::{
    Allowance, CellLimits, CompileLimits, EngineLimits, GrammarLimits, GuestLimits, HostLimits,
};
use wasmtime::Engine;
use wasmtime::component::InstancePre;

use crate::capability::Offer;
use crate::cell::{
    self, Cell, CellChat, CellFilter, CellGuest, CellModel, CellPipeline, CellSampler, CellTool, Settings,
};
use crate::chat::ChatGuest;
use crate::compile::{CodeSource, Compiler};
use crate::compile_process::CompileError;
use crate::counters::Counters;
use crate::errors::PluginError;
use crate::filter::FilterGuest;
use crate::grammar::Grammars;
use crate::inspect;
use crate::instance::GuestCore;
use crate::limiter::StoreState;
use crate::model::ModelGuest;
use crate::pipeline::PipelineGuest;
use crate::runtime;
use crate::sampler::SamplerGuest;
use crate::standing::Share;
use crate::tool::ToolGuest;
use crate::workers::{GRAMMAR_STACK_BYTES, WORKERS_MAX, Workers};

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
    /// one per running call. Each reserves 4 GiB of address space (not memory), so that bounds checks cost nothing. A
    /// guest with several linear memories counts once for each.
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
    /// Where tenants' guests run.
    pub isolation: Isolation,
    /// Bounds on each cell.
    pub cell: CellLimits,
    /// Whether guests' code counts what it executes, see [`PluginHost::fuel`]: for tests of guests, which it slows down.
    /// Only in this process.
    pub count_fuel: bool,
}

impl PluginOptions {
    /// The limits given here, the others as they are by default.
    pub(crate) fn host_limits(&self) -> HostLimits {
        HostLimits {
            guest: self.limits,
            grammar: self.grammar_limits,
            ..HostLimits::default()
        }
    }
}

/// Where tenants' guests run; guests without a tenant run in this process in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Isolation {
    /// In this process: what breaks out of the runtime has all that the host has.
    #[default]
    InProcess,
    /// In a process of their tenant, without files, network and privileges. Needs [`PluginOptions::worker`].
    Process,
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
            isolation: Isolation::default(),
            cell: CellLimits::default(),
            count_fuel: false,
        }
    }
}

/// Loads guests. Make one per process: its instance pool and threads are shared by all guests, and no object of
/// one runtime can then meet another's. Cloning is cheap; threads end when the last clone and guest are gone.
#[derive(Clone)]
pub struct PluginHost {
    shared: Arc<HostShared>,
    /// Whose guests are loaded through this clone.
    tenant: Option<Arc<str>>,
    granted: Granted,
}

/// Where there is no deployment.
static NOTHING: Grants = Grants {
    log: false,
    http: Vec::new(),
    kv: false,
    secrets: BTreeSet::new(),
    grammar: false,
};

/// What guests loaded from here may do outside themselves.
#[derive(Clone)]
enum Granted {
    /// Nothing.
    Nothing,
    /// What a deployment grants.
    Deployment(Arc<dyn Capabilities>),
    /// They may import everything, and are told that nothing works: for a look at them.
    Look,
}

/// What all guests of a host share.
pub(crate) struct HostShared {
    pub(crate) options: PluginOptions,
    pub(crate) engine: Engine,
    pub(crate) compiler: Compiler,
    pub(crate) workers: Workers,
    /// In a cell: what its guests may use before they stand back.
    pub(crate) share: Option<Arc<Share>>,
    pub(crate) counters: Counters,
    // A std Mutex: held for a look-up.
    cells: Mutex<HashMap<Arc<str>, Arc<Cell>>>,
}

/// A component that was loaded, and where.
enum Loaded {
    Here(GuestCore, InstancePre<StoreState>),
    Cell(Arc<CellGuest>),
}

impl std::fmt::Debug for PluginHost {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PluginHost")
            .field("options", &self.shared.options)
            .finish_non_exhaustive()
    }
}

impl PluginHost {
    /// Reserves the pool and starts what measures time.
    ///
    /// # Errors
    /// Options out of range, or the operating system refuses address space or threads.
    pub fn new(options: PluginOptions) -> Result<Self, PluginError> {
        if !(1..=WORKERS_MAX).contains(&options.workers) {
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
        if options.count_fuel && options.isolation == Isolation::Process {
            return Err(PluginError::FuelInCells);
        }
        let source = match (&options.worker, options.isolation) {
            (Some(program), _) => CodeSource::Worker(program.clone()),
            (None, Isolation::InProcess) => CodeSource::Here,
            (None, Isolation::Process) => return Err(PluginError::NoWorker),
        };
        Self::start(options, source)
    }

    /// In a cell: threads for calls that block, which stand back like the others.
    pub(crate) fn more_workers(&self, threads_max: usize, jobs_max: usize, stack_bytes: usize) -> Workers {
        Workers::new(threads_max, jobs_max, stack_bytes, self.shared.share.clone())
    }

    /// In a cell: what is loaded is code that the host compiled.
    pub(crate) fn in_cell(options: PluginOptions) -> Result<Self, PluginError> {
        Self::start(options, CodeSource::Given)
    }

    fn start(options: PluginOptions, source: CodeSource) -> Result<Self, PluginError> {
        let engine = runtime::engine(&options.limits, options.instances_max, options.count_fuel)?;
        // A session has one open question at most, so that a queue of this length is only ever full of
        // questions whose sessions are gone.
        let (threads_max, jobs_max) = (options.workers, options.instances_max as usize);
        let in_cell = matches!(source, CodeSource::Given);
        let share = in_cell.then(|| Arc::new(Share::of_this_machine()));
        let mut workers = Workers::new(threads_max, jobs_max, GRAMMAR_STACK_BYTES, share.clone());
        // In a cell the thread that reads helps.
        if in_cell {
            workers = workers.with_help();
        }
        let compiler = Compiler::new(engine.clone(), &options, source)?;
        Ok(Self {
            shared: Arc::new(HostShared {
                options,
                engine,
                compiler,
                workers,
                share,
                counters: Counters::default(),
                cells: Mutex::default(),
            }),
            tenant: None,
            granted: Granted::Nothing,
        })
    }

    /// The same host, to load guests of this tenant: under [`Isolation::Process`] they run in the tenant's cell.
    #[must_use]
    pub fn for_tenant(&self, tenant: &str) -> Self {
        Self {
            tenant: Some(Arc::from(tenant)),
            ..self.clone()
        }
    }

    /// The same host for the guests of one deployment: they may import what is granted and their world may have, and ask
    /// for it.
    #[must_use]
    pub fn with_capabilities(&self, capabilities: Arc<dyn Capabilities>) -> Self {
        Self {
            granted: Granted::Deployment(capabilities),
            ..self.clone()
        }
    }

    /// Loads a component of the world `galerne:model/model@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_model(&self, name: &str, component: &[u8]) -> Result<Arc<dyn Architecture>, GuestError> {
        match self.load(name, World::Model, component)? {
            Loaded::Here(core, pre) => Ok(Arc::new(ModelGuest::new(core, pre)?)),
            Loaded::Cell(guest) => Ok(Arc::new(CellModel(guest))),
        }
    }

    /// Loads a component of the world `galerne:chat/chat@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_chat(&self, name: &str, component: &[u8]) -> Result<Arc<dyn ChatFormat>, GuestError> {
        match self.load(name, World::Chat, component)? {
            Loaded::Here(core, pre) => Ok(Arc::new(ChatGuest::new(core, pre)?)),
            Loaded::Cell(guest) => Ok(Arc::new(CellChat(guest))),
        }
    }

    /// Loads a component of the world `galerne:sampling/sampler`, in any version this host speaks. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_sampler(&self, name: &str, component: &[u8]) -> Result<Arc<dyn SamplerFactory>, GuestError> {
        match self.load(name, World::Sampler, component)? {
            Loaded::Here(core, pre) => Ok(Arc::new(SamplerGuest::new(core, pre)?)),
            Loaded::Cell(guest) => Ok(Arc::new(CellSampler(guest))),
        }
    }

    /// Loads a component of the world `galerne:filter/filter@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_filter(&self, name: &str, component: &[u8]) -> Result<Arc<dyn FilterFactory>, GuestError> {
        match self.load(name, World::Filter, component)? {
            Loaded::Here(core, pre) => Ok(Arc::new(FilterGuest::new(core, pre)?)),
            Loaded::Cell(guest) => Ok(Arc::new(CellFilter(guest))),
        }
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
        match self.load(name, World::Tool, component)? {
            Loaded::Here(core, pre) => Ok(Arc::new(ToolGuest::new(core, pre)?)),
            Loaded::Cell(guest) => Ok(Arc::new(CellTool(guest))),
        }
    }

    /// Loads a component of the world `galerne:pipeline/pipeline@0.1.0`. `name` is for messages.
    ///
    /// # Errors
    /// Too large, no component, or it does not fit the world.
    pub fn load_pipeline(
        &self,
        name: &str,
        component: &[u8],
    ) -> Result<Arc<dyn PipelineFactory>, GuestError> {
        match self.load(name, World::Pipeline, component)? {
            Loaded::Here(core, pre) => Ok(Arc::new(PipelineGuest::new(core, pre)?)),
            Loaded::Cell(guest) => Ok(Arc::new(CellPipeline(guest))),
        }
    }

    /// The worlds and imports of a component. A component that fits them by name only is refused.
    pub(crate) fn facts(&self, name: &str, component: &[u8]) -> Result<GuestFacts, GuestError> {
        let core = self.core(name, "of any package of galerne's contract");
        if let Some(cell) = self.cell() {
            let artifact = self.compiled(&core, component, Compiler::artifact)?;
            return cell::inspect(&core, &cell, &artifact);
        }
        let compiled = self.compiled(&core, component, Compiler::component)?;
        let engine = &self.shared.engine;
        let worlds = inspect::worlds(engine, &compiled).map_err(|reason| core.link_reason(reason))?;
        // Loading finds what the names of exports do not tell: other types, an instance that does not start.
        // Which imports are granted is its deployment's to say.
        let look = Self {
            granted: Granted::Look,
            ..self.clone()
        };
        for world in &worlds {
            match world {
                World::Model => drop(look.load_model(name, component)?),
                World::Chat => drop(look.load_chat(name, component)?),
                World::Sampler => drop(look.load_sampler(name, component)?),
                World::Filter => drop(look.load_filter(name, component)?),
                World::Tool => drop(look.load_tool(name, component)?),
                World::Pipeline => drop(look.load_pipeline(name, component)?),
            }
        }
        Ok(GuestFacts {
            worlds,
            imports: inspect::imports(engine, &compiled),
        })
    }

    /// What became of guests' calls.
    pub(crate) fn stats(&self) -> GuestStats {
        let cells = self.shared.cells.lock().unwrap_or_else(PoisonError::into_inner);
        let running = cells.values().filter(|cell| cell.is_running()).count() as u64;
        let started = cells.values().map(|cell| cell.started()).sum();
        drop(cells);
        GuestStats {
            cells: running,
            cells_started: started,
            ..self.shared.counters.stats()
        }
    }

    /// What guests have executed since the host started, by their names: about one unit for each WebAssembly instruction, so
    /// the same for the same calls on every machine. Empty unless [`PluginOptions::count_fuel`] is set.
    #[must_use]
    pub fn fuel(&self) -> Vec<(String, u64)> {
        self.shared.counters.fuel()
    }

    /// Lets this thread answer questions to samplers until none waits.
    pub(crate) fn help(&self) {
        // Whatever is left of the share: what is quick is asked once per step, which the host paces.
        self.shared.workers.help();
    }

    fn core(&self, name: &str, world: &'static str) -> GuestCore {
        let options = &self.shared.options;
        let allowance = match &self.granted {
            Granted::Deployment(capabilities) => capabilities
                .allowance()
                .on(options.limits, options.grammar_limits),
            Granted::Nothing | Granted::Look => Allowance::of_host(options.host_limits()),
        };
        GuestCore {
            allowance: Arc::new(allowance),
            host: Arc::clone(&self.shared),
            name: Arc::from(name),
            world,
            capabilities: None,
        }
    }

    /// The tenant's cell, if its guests run in one.
    fn cell(&self) -> Option<Arc<Cell>> {
        let options = &self.shared.options;
        let (Isolation::Process, Some(tenant), Some(program)) =
            (options.isolation, &self.tenant, &options.worker)
        else {
            return None;
        };
        let mut cells = self.shared.cells.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let settings = Settings {
                limits: options.limits,
                workers: options.workers,
                instances_max: options.instances_max,
                candidates_max: options.candidates_max,
            };
            Arc::new(Cell::new(tenant, program.clone(), options.cell, settings))
        };
        Some(Arc::clone(cells.entry(Arc::clone(tenant)).or_insert_with(new)))
    }

    /// Checks what can be told from a component's bytes, and compiles it to what `compile` gives.
    fn compiled<T>(
        &self,
        core: &GuestCore,
        component: &[u8],
        compile: impl FnOnce(&Compiler, &[u8]) -> Result<T, CompileError>,
    ) -> Result<T, GuestError> {
        let compiler = &self.shared.compiler;
        if compiler.takes_components() {
            let limit_bytes = self.shared.options.limits.component_bytes_max;
            if component.len() > limit_bytes {
                let got = component.len();
                let limit = format!("component of at most {limit_bytes} bytes, got {got}");
                return Err(core.over_named("load", &limit, "component_bytes_max"));
            }
            inspect::check_header(component).map_err(|reason| core.link_reason(reason))?;
        }
        compile(compiler, component).map_err(|error| match error {
            CompileError::Broken(reason) => core.link_reason(inspect::broken(&reason)),
            CompileError::Limit(limit) => core.over_limit("compile", limit),
            CompileError::Process(reason) => core.process_gone("compile", reason),
        })
    }

    fn load(&self, name: &str, world: World, component: &[u8]) -> Result<Loaded, GuestError> {
        let mut core = self.core(name, inspect::full_name(world));
        let offer = self.offer(&mut core, world);
        if let Some(cell) = self.cell() {
            let artifact = self.compiled(&core, component, Compiler::artifact)?;
            return CellGuest::load(core, cell, world, artifact).map(Loaded::Cell);
        }
        let pre = self.linked(&core, component, world, offer)?;
        Ok(Loaded::Here(core, pre))
    }

    /// In a cell: a guest that may import what is granted, is bounded as its host says, and whose sessions are each told
    /// who answers them.
    pub(crate) fn load_granted(
        &self,
        name: &str,
        world: World,
        code: &[u8],
        grants: &Grants,
        allowance: &Allowance,
    ) -> Result<(GuestCore, InstancePre<StoreState>), GuestError> {
        let core = GuestCore {
            allowance: Arc::new(allowance.clone()),
            ..self.core(name, inspect::full_name(world))
        };
        let pre = self.linked(&core, code, world, Offer::Granted(grants))?;
        Ok((core, pre))
    }

    fn linked(
        &self,
        core: &GuestCore,
        component: &[u8],
        world: World,
        offer: Offer<'_>,
    ) -> Result<InstancePre<StoreState>, GuestError> {
        let compiled = self.compiled(core, component, Compiler::component)?;
        let linked = self.shared.compiler.link(&compiled, world, offer);
        linked.map_err(|reason| core.link_reason(reason))
    }

    /// What a guest of this world may import; one that may import anything is given its way to the host.
    fn offer<'a>(&'a self, core: &mut GuestCore, world: World) -> Offer<'a> {
        match (world, &self.granted) {
            // These are loaded for a model, and no deployment grants them anything.
            (World::Model | World::Chat, _) | (_, Granted::Nothing) => Offer::Granted(&NOTHING),
            (_, Granted::Deployment(capabilities)) => {
                core.capabilities = Some(Arc::clone(capabilities));
                Offer::Granted(capabilities.grants())
            }
            (_, Granted::Look) => Offer::All,
        }
    }
}
