//! Tenants' plugins and deployments of a running host: publishing, switching, and which version answers a request.
//! Knows neither HTTP nor how a guest is isolated.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};
use std::time::SystemTime;

use galerne_core::capability::{Capabilities, CapabilityError, LogTail};
use galerne_core::chat::ToolSpec;
use galerne_core::deployment::{Deployment, DeploymentError, GuestUse};
use galerne_core::guest::{
    FilterFactory, GuestError, GuestFacts, GuestLoader, GuestSource, GuestStats, PipelineFactory,
    SamplerFactory, ToolFactory,
};
use galerne_core::limits::HostLimits;
use galerne_store::registry::{
    Canary, DeploymentRecord, PluginRecord, Published, Registry, RegistryError, Traffic,
};

/// The tenant of every request until keys tell tenants apart.
pub const DEFAULT_TENANT: &str = "default";

/// Makes what the guests of a tenant's deployment may call.
pub type MakeCapabilities =
    Box<dyn Fn(&str, &Deployment) -> Result<Arc<dyn Capabilities>, CapabilityError> + Send + Sync>;

/// A guest with its parameters.
pub struct Bound<G: ?Sized> {
    /// Makes its sessions.
    pub guest: Arc<G>,
    /// As the deployment gives them.
    pub params_json: String,
}

/// A tool guest with the functions it offers.
pub struct BoundTool {
    /// The guest.
    pub tool: Bound<dyn ToolFactory>,
    /// Asked once, when the deployment was loaded.
    pub functions: Vec<ToolSpec>,
}

/// A version of a deployment with its guests loaded. A request keeps the version it began with.
pub struct Live {
    /// What was published.
    pub published: Published,
    /// What its guests may call.
    pub capabilities: Arc<dyn Capabilities>,
    /// Instead of the request's own sampling.
    pub sampler: Option<Bound<dyn SamplerFactory>>,
    /// In the order of the request.
    pub filters: Vec<Bound<dyn FilterFactory>>,
    /// Called by the host. No two functions have the same name.
    pub tools: Vec<BoundTool>,
    /// Writes the answers.
    pub pipeline: Option<Bound<dyn PipelineFactory>>,
}

impl Live {
    /// Name and version, for headers and messages.
    #[must_use]
    pub fn label(&self) -> String {
        format!("{}@{}", self.published.deployment.name, self.published.version)
    }
}

/// Why something about deployments was refused.
#[derive(Debug, thiserror::Error)]
pub enum DeployError {
    /// The text is wrong.
    #[error(transparent)]
    Deployment(#[from] DeploymentError),
    /// No such model is served.
    #[error("deployment: model: expected one of {}, got \"{got}\"", .known.join(", "))]
    Model {
        /// The model named.
        got: String,
        /// Models of this host.
        known: Vec<String>,
    },
    /// A model has the name.
    #[error("deployment: name: a model is served as \"{0}\"; choose another name")]
    NameOfModel(String),
    /// No such plugin, version, or digest.
    #[error("deployment: {field}: {reason}")]
    Plugin {
        /// By its path in `deployment.toml`.
        field: String,
        /// What is missing, and what there is.
        reason: String,
    },
    /// A guest does not fit its place.
    #[error("deployment: {field}: {error}")]
    Guest {
        /// By its path in `deployment.toml`.
        field: String,
        /// What the loader said.
        error: Box<GuestError>,
    },
    /// What its guests may call cannot be offered.
    #[error("deployment: capabilities: {0}")]
    Capabilities(CapabilityError),
    /// Two tools offer a function of the same name.
    #[error("deployment: {field}: another tool offers a function \"{name}\" too; leave one of them out")]
    SameFunction {
        /// The second tool.
        field: String,
        /// The function.
        name: String,
    },
    /// A pushed component does not fit.
    #[error(transparent)]
    Component(#[from] Box<GuestError>),
    /// Nothing to go back or forward to.
    #[error("deployment \"{name}\": {reason}")]
    Traffic {
        /// The deployment.
        name: String,
        /// Why it stays as it is.
        reason: &'static str,
    },
    /// The registry refused or failed.
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

/// Where a deployment's requests go.
struct Entry {
    stable: Arc<Live>,
    canary: Option<(Arc<Live>, u8)>,
}

/// All tenants' deployments.
pub struct Deployments {
    registry: Registry,
    loader: Arc<dyn GuestLoader>,
    capabilities: MakeCapabilities,
    /// Components that come with the host, by name.
    builtin: BTreeMap<String, &'static [u8]>,
    models: Vec<String>,
    limits: HostLimits,
    /// By tenant and name. The lock is held to look up and to switch, never while a guest is loaded.
    table: RwLock<BTreeMap<(String, String), Arc<Entry>>>,
}

impl Deployments {
    /// Nothing is live until [`load_all`](Self::load_all).
    #[must_use]
    pub fn new(
        registry: Registry,
        loader: Arc<dyn GuestLoader>,
        capabilities: MakeCapabilities,
        builtin: BTreeMap<String, &'static [u8]>,
        models: Vec<String>,
        limits: HostLimits,
    ) -> Self {
        Self {
            registry,
            loader,
            capabilities,
            builtin,
            models,
            limits,
            table: RwLock::default(),
        }
    }

    /// Loads what was live when the host stopped. What cannot be loaded any more is told and left out. Blocks.
    ///
    /// # Errors
    /// If the registry cannot be read.
    pub fn load_all(&self) -> Result<Vec<(String, DeployError)>, DeployError> {
        let mut failed = Vec::new();
        for tenant in self.registry.tenants()? {
            for record in self.registry.deployments(&tenant)? {
                let entry = self.entry(&tenant, &record.name, &record.traffic);
                match entry {
                    Ok(entry) => self.switch(&tenant, &record.name, entry),
                    Err(error) => failed.push((record.name, error)),
                }
            }
        }
        Ok(failed)
    }

    /// The version that answers this request; `draw` is uniform in 0..100 and decides between stable and canary.
    #[must_use]
    pub fn find(&self, tenant: &str, name: &str, draw: u8) -> Option<Arc<Live>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let entry = table.get(&(tenant.to_owned(), name.to_owned()))?;
        match &entry.canary {
            Some((canary, percent)) if draw < *percent => Some(Arc::clone(canary)),
            _ => Some(Arc::clone(&entry.stable)),
        }
    }

    /// The stable versions of a tenant's deployments, by name.
    #[must_use]
    pub fn stable(&self, tenant: &str) -> Vec<Arc<Live>> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let own = table.iter().filter(|((owner, _), _)| owner == tenant);
        own.map(|(_, entry)| Arc::clone(&entry.stable)).collect()
    }

    /// Checks a component and keeps it as a version of a plugin. Blocks while it compiles.
    ///
    /// # Errors
    /// It does not fit, or the version exists with another component.
    pub fn push(
        &self,
        tenant: &str,
        name: &str,
        version: &str,
        component: &[u8],
    ) -> Result<PluginRecord, DeployError> {
        let facts = self.inspect(tenant, name, component).map_err(Box::new)?;
        let now = SystemTime::now();
        Ok(self
            .registry
            .push(tenant, name, version, &facts, component, now)?)
    }

    fn inspect(&self, tenant: &str, name: &str, component: &[u8]) -> Result<GuestFacts, GuestError> {
        self.loader.inspect(GuestSource {
            tenant,
            name,
            component,
        })
    }

    /// What became of guests' calls.
    #[must_use]
    pub fn guest_stats(&self) -> GuestStats {
        self.loader.stats()
    }

    /// What guests have executed, by their names, where that is counted.
    #[must_use]
    pub fn guest_fuel(&self) -> Vec<(String, u64)> {
        self.loader.fuel()
    }

    /// The bounds on every guest; deployments may lower them.
    #[must_use]
    pub fn limits(&self) -> HostLimits {
        self.limits
    }

    /// All versions of a tenant's plugins.
    ///
    /// # Errors
    /// If the registry cannot be read.
    pub fn plugins(&self, tenant: &str) -> Result<Vec<PluginRecord>, DeployError> {
        Ok(self.registry.plugins(tenant)?)
    }

    /// Names of the plugins that come with the host.
    #[must_use]
    pub fn builtin(&self) -> Vec<&str> {
        self.builtin.keys().map(String::as_str).collect()
    }

    /// Publishes a version and gives it the traffic: all of it, or `canary_percent` of it. Requests that run go on with
    /// the version they began with. Blocks while guests are loaded.
    ///
    /// # Errors
    /// Whatever does not fit, before anything changes.
    pub fn deploy(
        &self,
        tenant: &str,
        mut deployment: Deployment,
        canary_percent: Option<u8>,
    ) -> Result<(Published, Traffic), DeployError> {
        deployment.check()?;
        deployment.check_limits(&self.limits)?;
        if self.models.contains(&deployment.name) {
            return Err(DeployError::NameOfModel(deployment.name));
        }
        self.pin(tenant, &mut deployment)?;
        // Loaded before it is published: what cannot run gets no version number.
        let draft = Published {
            version: 0,
            created: String::new(),
            deployment: deployment.clone(),
        };
        self.load(tenant, draft)?;
        let published = self.registry.publish(tenant, &deployment, SystemTime::now())?;
        let version = published.version;
        let change = |traffic: Option<Traffic>| match (traffic, canary_percent) {
            (Some(traffic), Some(percent)) => Ok(Traffic {
                canary: Some(Canary { version, percent }),
                ..traffic
            }),
            (traffic, _) => Ok::<_, DeployError>(now_stable(traffic, version)),
        };
        let traffic = self.route(tenant, &deployment.name, change)?;
        Ok((published, traffic))
    }

    /// Ends the canary, or without one goes back to the version that was stable before.
    ///
    /// # Errors
    /// No such deployment, nothing to go back to, or the former version cannot be loaded any more.
    pub fn rollback(&self, tenant: &str, name: &str) -> Result<Traffic, DeployError> {
        self.registry.deployment(tenant, name)?;
        self.route(tenant, name, |traffic| {
            let refuse = |reason| DeployError::Traffic {
                name: name.to_owned(),
                reason,
            };
            let mut traffic = traffic.ok_or_else(|| refuse("it has no traffic"))?;
            if traffic.canary.take().is_none() {
                let former = traffic.history.pop();
                traffic.stable = former.ok_or_else(|| refuse("no version was stable before this one"))?;
            }
            Ok(traffic)
        })
    }

    /// Makes the canary the stable version.
    ///
    /// # Errors
    /// No such deployment, or it has no canary.
    pub fn promote(&self, tenant: &str, name: &str) -> Result<Traffic, DeployError> {
        self.registry.deployment(tenant, name)?;
        self.route(tenant, name, |traffic| {
            let canary = traffic.as_ref().and_then(|traffic| traffic.canary);
            let canary = canary.ok_or_else(|| DeployError::Traffic {
                name: name.to_owned(),
                reason: "it has no canary to promote",
            })?;
            Ok(now_stable(traffic, canary.version))
        })
    }

    /// A tenant's deployments.
    ///
    /// # Errors
    /// If the registry cannot be read.
    pub fn list(&self, tenant: &str) -> Result<Vec<DeploymentRecord>, DeployError> {
        Ok(self.registry.deployments(tenant)?)
    }

    /// One deployment and the version asked for, or its stable one.
    ///
    /// # Errors
    /// There is none.
    pub fn show(
        &self,
        tenant: &str,
        name: &str,
        version: Option<u32>,
    ) -> Result<(DeploymentRecord, Published), DeployError> {
        let record = self.registry.deployment(tenant, name)?;
        let version = version.unwrap_or(record.traffic.stable);
        let published = self.registry.published(tenant, name, version)?;
        Ok((record, published))
    }

    /// What the guests of a live deployment wrote to its log after the line of this number, whatever its version. `None` if no
    /// such deployment is live.
    #[must_use]
    pub fn log_after(&self, tenant: &str, name: &str, number: u64) -> Option<LogTail> {
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let entry = table.get(&(tenant.to_owned(), name.to_owned())).cloned();
        drop(table);
        Some(entry?.stable.capabilities.log_after(number))
    }

    /// Changes the traffic on disk and then for new requests, in this order: a crash between them loses nothing. The
    /// versions are loaded within the change, so that one that cannot be loaded changes nothing.
    fn route(
        &self,
        tenant: &str,
        name: &str,
        change: impl FnOnce(Option<Traffic>) -> Result<Traffic, DeployError>,
    ) -> Result<Traffic, DeployError> {
        let mut entry = None;
        let traffic = self.registry.route(tenant, name, |traffic| {
            let traffic = change(traffic)?;
            entry = Some(self.entry(tenant, name, &traffic)?);
            Ok::<_, DeployError>(traffic)
        })?;
        if let Some(entry) = entry {
            self.switch(tenant, name, entry);
        }
        Ok(traffic)
    }

    fn switch(&self, tenant: &str, name: &str, entry: Entry) {
        let key = (tenant.to_owned(), name.to_owned());
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let former = table.insert(key, Arc::new(entry));
        drop(table);
        // Its guests may be dropped here, outside the lock.
        drop(former);
    }

    fn entry(&self, tenant: &str, name: &str, traffic: &Traffic) -> Result<Entry, DeployError> {
        let live = |version| self.version(tenant, name, version);
        Ok(Entry {
            stable: live(traffic.stable)?,
            canary: match traffic.canary {
                Some(canary) => Some((live(canary.version)?, canary.percent)),
                None => None,
            },
        })
    }

    /// The version as it is live now, or loaded anew.
    fn version(&self, tenant: &str, name: &str, version: u32) -> Result<Arc<Live>, DeployError> {
        let key = (tenant.to_owned(), name.to_owned());
        let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
        let entry = table.get(&key).cloned();
        drop(table);
        let known = entry.iter().flat_map(|entry| {
            let canary = entry.canary.iter().map(|(live, _)| live);
            canary.chain([&entry.stable])
        });
        for live in known {
            if live.published.version == version {
                return Ok(Arc::clone(live));
            }
        }
        let published = self.registry.published(tenant, name, version)?;
        Ok(Arc::new(self.load(tenant, published)?))
    }

    /// Fills in every guest's version and digest, and keeps built-in components for as long as the version lives.
    fn pin(&self, tenant: &str, deployment: &mut Deployment) -> Result<(), DeployError> {
        if !self.models.contains(&deployment.model) {
            return Err(DeployError::Model {
                got: deployment.model.clone(),
                known: self.models.clone(),
            });
        }
        let fields: Vec<String> = deployment.guests().map(|(field, _)| field).collect();
        for (field, guest) in fields.into_iter().zip(deployment.guests_mut()) {
            let (version, digest) = self.resolve(tenant, &field, guest)?;
            if let Some(wanted) = guest.digest.as_ref().filter(|wanted| **wanted != digest) {
                let reason = format!("plugin \"{}\" has digest {digest}, not {wanted}", guest.plugin);
                return Err(DeployError::Plugin { field, reason });
            }
            guest.version = version;
            guest.digest = Some(digest);
        }
        Ok(())
    }

    /// Version and digest of a guest: the tenant's own plugin of that name, or one that comes with the host.
    fn resolve(
        &self,
        tenant: &str,
        field: &str,
        guest: &GuestUse,
    ) -> Result<(Option<String>, String), DeployError> {
        let refuse = |reason| DeployError::Plugin {
            field: field.to_owned(),
            reason,
        };
        let own = self.registry.plugin_versions(tenant, &guest.plugin)?;
        if own.is_empty() {
            let component = self.builtin.get(&guest.plugin).ok_or_else(|| {
                let known = self.builtin().join(", ");
                refuse(format!(
                    "no plugin \"{}\"; push it first, or use one that comes with the host: {known}",
                    guest.plugin
                ))
            })?;
            if let Some(version) = &guest.version {
                let reason = format!(
                    "plugin \"{}\" comes with the host, in no version {version}; leave the version out",
                    guest.plugin
                );
                return Err(refuse(reason));
            }
            return Ok((None, self.registry.keep(component)?));
        }
        let record = match &guest.version {
            None => own.last(),
            Some(version) => own.iter().find(|record| record.version == *version),
        };
        let record = record.ok_or_else(|| {
            let known: Vec<&str> = own.iter().map(|record| record.version.as_str()).collect();
            let wanted = guest.version.as_deref().unwrap_or_default();
            refuse(format!(
                "plugin \"{}\" has no version {wanted}; it has {}",
                guest.plugin,
                known.join(", ")
            ))
        })?;
        Ok((Some(record.version.clone()), record.digest.clone()))
    }

    /// Loads the guests of a version.
    fn load(&self, tenant: &str, published: Published) -> Result<Live, DeployError> {
        let deployment = &published.deployment;
        let capabilities = (self.capabilities)(tenant, deployment).map_err(DeployError::Capabilities)?;
        let loader = self.loader.with_capabilities(Arc::clone(&capabilities));
        let loading = Loading {
            registry: &self.registry,
            loader: loader.as_ref(),
            tenant,
        };
        let sampler = match &deployment.sampler {
            None => None,
            Some(guest) => Some(loading.guest("sampler", guest, |source| loader.load_sampler(source))?),
        };
        let mut filters = Vec::new();
        for (index, guest) in deployment.filters.iter().enumerate() {
            filters.push(loading.guest(&format!("filters[{index}]"), guest, |source| {
                loader.load_filter(source)
            })?);
        }
        let mut tools: Vec<BoundTool> = Vec::new();
        for (index, guest) in deployment.tools.iter().enumerate() {
            let tool = loading.tool(&format!("tools[{index}]"), guest, &tools)?;
            tools.push(tool);
        }
        let pipeline = match &deployment.pipeline {
            None => None,
            Some(guest) => Some(loading.guest("pipeline", guest, |source| loader.load_pipeline(source))?),
        };
        Ok(Live {
            published,
            capabilities,
            sampler,
            filters,
            tools,
            pipeline,
        })
    }
}

/// What loading every guest of one version needs.
struct Loading<'a> {
    registry: &'a Registry,
    loader: &'a dyn GuestLoader,
    tenant: &'a str,
}

impl Loading<'_> {
    fn guest<G: ?Sized>(
        &self,
        field: &str,
        guest: &GuestUse,
        load: impl FnOnce(GuestSource<'_>) -> Result<Arc<G>, GuestError>,
    ) -> Result<Bound<G>, DeployError> {
        let digest = guest.digest.as_deref().unwrap_or_default();
        let component = self.registry.component(digest)?;
        let source = GuestSource {
            tenant: self.tenant,
            name: &guest.plugin,
            component: &component,
        };
        let loaded = load(source).map_err(|error| DeployError::Guest {
            field: field.to_owned(),
            error: Box::new(error),
        })?;
        Ok(Bound {
            guest: loaded,
            params_json: guest.params_json(),
        })
    }

    fn tool(&self, field: &str, guest: &GuestUse, others: &[BoundTool]) -> Result<BoundTool, DeployError> {
        let tool = self.guest(field, guest, |source| self.loader.load_tool(source))?;
        let functions = tool
            .guest
            .list(&tool.params_json)
            .map_err(|error| DeployError::Guest {
                field: field.to_owned(),
                error: Box::new(error),
            })?;
        let taken = |name: &str| {
            others
                .iter()
                .flat_map(|other| &other.functions)
                .any(|known| known.name == name)
        };
        if let Some(same) = functions.iter().find(|function| taken(&function.name)) {
            return Err(DeployError::SameFunction {
                field: field.to_owned(),
                name: same.name.clone(),
            });
        }
        Ok(BoundTool { tool, functions })
    }
}

/// All traffic to `version`.
fn now_stable(traffic: Option<Traffic>, version: u32) -> Traffic {
    let mut history = Vec::new();
    if let Some(traffic) = traffic {
        history = traffic.history;
        history.push(traffic.stable);
    }
    Traffic {
        stable: version,
        history,
        canary: None,
    }
}
