//! From bytes to a linked component, each component compiled once. Knows no world and no process.

use std::collections::VecDeque;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use galerne_core::guest::World;
use galerne_core::limits::CompileLimits;
use sha2::{Digest, Sha256};
use wasmtime::Engine;
use wasmtime::component::{Component, InstancePre, Linker};

use crate::artifact::{Artifact, ArtifactFolder, ArtifactKey};
use crate::capability::{self, Offer};
use crate::compile_process::{self, CompileError};
use crate::errors::{PluginError, reasons};
use crate::host::PluginOptions;
use crate::inspect;
use crate::limiter::{CORE_INSTANCES_MAX, MEMORIES_MAX, StoreState, TABLES_MAX};
use crate::runtime;

/// Components kept compiled. A host loads a handful; when there are more the oldest is compiled again.
const CACHED_MAX: usize = 64;

type Sha256Digest = [u8; 32];

/// Where compiled code comes from.
#[derive(Debug)]
pub(crate) enum CodeSource {
    /// This process compiles.
    Here,
    /// The program whose `compile-guest` compiles.
    Worker(PathBuf),
    /// What is loaded is compiled already: this is a cell, and its host compiled it.
    Given,
}

/// Compiles components and remembers them by the digest of their bytes: within this process, and in a folder if there is
/// one.
pub(crate) struct Compiler {
    engine: Engine,
    /// The runtime's hash of all that changes code.
    compatibility: u64,
    source: CodeSource,
    limits: CompileLimits,
    count_fuel: bool,
    folder: Option<ArtifactFolder>,
    // A std Mutex: held for a look-up, never while compiling. Two threads that bring the same new component
    // both compile it, which wastes time once and blocks nobody.
    compiled: Mutex<VecDeque<(Sha256Digest, Component)>>,
}

impl Compiler {
    /// Nothing compiled yet but what is in the folder.
    pub(crate) fn new(
        engine: Engine,
        options: &PluginOptions,
        source: CodeSource,
    ) -> Result<Self, PluginError> {
        let folder = options.artifacts.as_deref();
        Ok(Self {
            compatibility: runtime::compatibility(&engine),
            engine,
            source,
            limits: options.compile,
            count_fuel: options.count_fuel,
            folder: folder.map(ArtifactFolder::open).transpose()?,
            compiled: Mutex::default(),
        })
    }

    /// The compiled component. Only the binary format is accepted: the text format's parser is not built in.
    pub(crate) fn component(&self, bytes: &[u8]) -> Result<Component, CompileError> {
        let digest: Sha256Digest = Sha256::digest(bytes).into();
        let known = |cache: &VecDeque<(Sha256Digest, Component)>| {
            cache
                .iter()
                .find(|(known, _)| *known == digest)
                .map(|(_, component)| component.clone())
        };
        if let Some(component) = known(&self.compiled.lock().unwrap_or_else(PoisonError::into_inner)) {
            return Ok(component);
        }
        let artifact = self.artifact_of(&digest, bytes)?;
        // Code that was made is still refused here if it needs more than the pool of instances gives.
        let component = runtime::deserialize(&self.engine, &artifact)
            .map_err(|error| CompileError::Broken(reasons(&error)))?;
        let mut cache = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if known(&cache).is_none() {
            if cache.len() == CACHED_MAX {
                cache.pop_front();
            }
            cache.push_back((digest, component.clone()));
        }
        Ok(component)
    }

    /// Whether what is loaded are components, to be checked as such.
    pub(crate) fn takes_components(&self) -> bool {
        !matches!(self.source, CodeSource::Given)
    }

    /// The component's code, for another process.
    pub(crate) fn artifact(&self, bytes: &[u8]) -> Result<Artifact, CompileError> {
        self.artifact_of(&Sha256::digest(bytes).into(), bytes)
    }

    /// The component's code: from the folder, or compiled and put there.
    fn artifact_of(&self, digest: &Sha256Digest, bytes: &[u8]) -> Result<Artifact, CompileError> {
        let key = ArtifactKey::new(digest, self.compatibility);
        if let Some(artifact) = self.folder.as_ref().and_then(|folder| folder.get(&key)) {
            return Ok(artifact);
        }
        let artifact = match &self.source {
            CodeSource::Given => return Ok(Artifact::trusted(bytes.to_vec())),
            CodeSource::Worker(program) => {
                compile_process::compile(program, &self.limits, self.count_fuel, bytes)?
            }
            CodeSource::Here => self
                .engine
                .precompile_component(bytes)
                .map(Artifact::trusted)
                .map_err(|error| CompileError::Broken(reasons(&error)))?,
        };
        if let Some(folder) = &self.folder {
            folder.put(&key, &artifact);
        }
        Ok(artifact)
    }

    /// Resolves imports with what is offered, or says what does not fit.
    pub(crate) fn link(
        &self,
        component: &Component,
        world: World,
        offer: Offer<'_>,
    ) -> Result<InstancePre<StoreState>, String> {
        if let Some(needs) = component.resources_required() {
            let too_many =
                |what, got, limit| Err(format!("it has {got} {what}, at most {limit} are allowed"));
            if needs.num_memories > MEMORIES_MAX {
                return too_many("memories", needs.num_memories, MEMORIES_MAX);
            }
            if needs.num_tables > TABLES_MAX {
                return too_many("tables", needs.num_tables, TABLES_MAX);
            }
        } else {
            return Err(format!(
                "it instantiates a module that is not part of it; at most {CORE_INSTANCES_MAX} own instances are allowed"
            ));
        }
        let mut linker = Linker::new(&self.engine);
        capability::link(&mut linker, world, offer).map_err(|error| reasons(&error))?;
        linker.instantiate_pre(component).map_err(|error| {
            let imports = inspect::imports(&self.engine, component);
            if let Some(advice) = capability::advice(&imports, world, offer) {
                return advice;
            }
            let offered = match world {
                World::Model | World::Chat => "this world offers no imports",
                World::Sampler | World::Filter | World::Tool | World::Pipeline => {
                    "hosts offer nothing but capabilities"
                }
            };
            format!(
                "it imports {}, but {offered}: {}; {}",
                inspect::listed(&imports),
                reasons(&error),
                inspect::import_advice(&imports)
            )
        })
    }
}
