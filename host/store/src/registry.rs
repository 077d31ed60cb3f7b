//! Tenants' plugins and deployments on disk: immutable versions, components by digest, which version takes the traffic.
//! Runs no guest; says nothing about whether a component fits.
//!
//! ```text
//! DATA/components/sha256-….wasm                       every component, once
//! DATA/tenants/TENANT/plugins/NAME/VERSION.toml       a plugin's version: its digest, worlds, imports
//! DATA/tenants/TENANT/deployments/NAME/N.toml         version N of a deployment, guests pinned by digest
//! DATA/tenants/TENANT/deployments/NAME/traffic.toml   which version answers
//! ```
//!
//! Each file is written whole beside its place and then renamed into it.

use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use galerne_core::deployment::Deployment;
use galerne_core::guest::GuestFacts;
use galerne_core::name::{NAME_FORM, is_name};
use semver::Version;
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::digest;
use crate::timestamp::rfc3339;

mod records;
#[cfg(test)]
mod tests;

pub use records::{Canary, DeploymentRecord, PluginRecord, Published, RegistryError, Traffic};

/// Former versions of a deployment that rollback can return to.
const HISTORY_MAX: usize = 32;
const TRAFFIC_FILE: &str = "traffic.toml";

/// The tenants' part of a data folder. One per process: it orders its own writers.
pub struct Registry {
    data: PathBuf,
    // Held while a version number is chosen and written, and while traffic is read and changed.
    writing: Mutex<()>,
}

impl Registry {
    /// The registry in the folder `data`; its folders are made when something is written.
    #[must_use]
    pub fn new(data: &Path) -> Self {
        Self {
            data: data.to_owned(),
            writing: Mutex::new(()),
        }
    }

    fn writer(&self) -> MutexGuard<'_, ()> {
        // It guards files, which are whole at any time.
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All tenants that have something here, by name.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn tenants(&self) -> Result<Vec<String>, RegistryError> {
        names(&self.data.join("tenants"))
    }

    /// Keeps a component; the answer is its digest.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&self, component: &[u8]) -> Result<String, RegistryError> {
        let digest = digest::of_bytes(component);
        let file = self.component_file(&digest);
        if !file.exists() {
            write(&file, component)?;
        }
        Ok(digest)
    }

    /// The component with this digest.
    ///
    /// # Errors
    /// If it is not there, or its file was changed.
    pub fn component(&self, digest: &str) -> Result<Vec<u8>, RegistryError> {
        let file = self.component_file(digest);
        let bytes = std::fs::read(&file).map_err(|source| io("read", &file, source))?;
        let got = digest::of_bytes(&bytes);
        if got != digest {
            return Err(RegistryError::Damaged {
                path: file.display().to_string(),
                problem: format!("its digest is {got}"),
            });
        }
        Ok(bytes)
    }

    fn component_file(&self, digest: &str) -> PathBuf {
        // A digest that comes from outside was looked up in a tenant's records before it gets here.
        let plain = digest.replace(|c: char| !c.is_ascii_alphanumeric(), "-");
        self.data.join("components").join(format!("{plain}.wasm"))
    }

    /// Adds a version of a plugin. Pushing the same component again changes nothing.
    ///
    /// # Errors
    /// Bad names, a version that exists with another component, or a file that cannot be written.
    pub fn push(
        &self,
        tenant: &str,
        name: &str,
        version: &str,
        facts: &GuestFacts,
        component: &[u8],
        now: SystemTime,
    ) -> Result<PluginRecord, RegistryError> {
        let dir = self.dir(tenant, "plugins", name)?;
        let version = parse_version(version)?;
        let _writer = self.writer();
        let file = dir.join(format!("{version}.toml"));
        let digest = self.keep(component)?;
        if file.exists() {
            let old: PluginRecord = read(&file)?;
            if old.digest == digest {
                return Ok(old);
            }
            return Err(RegistryError::VersionTaken {
                name: name.to_owned(),
                version: version.to_string(),
                digest: old.digest,
            });
        }
        let record = PluginRecord {
            name: name.to_owned(),
            version: version.to_string(),
            digest,
            size_bytes: component.len() as u64,
            worlds: facts.worlds.clone(),
            imports: facts.imports.clone(),
            created: rfc3339(now),
        };
        write_toml(&file, &record)?;
        Ok(record)
    }

    /// All versions of all plugins of a tenant, by name and version.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn plugins(&self, tenant: &str) -> Result<Vec<PluginRecord>, RegistryError> {
        let dir = self.tenant_dir(tenant)?.join("plugins");
        let mut all = Vec::new();
        for name in names(&dir)? {
            all.extend(self.plugin_versions(tenant, &name)?);
        }
        Ok(all)
    }

    /// The versions of one plugin, lowest first; empty if there is none.
    ///
    /// # Errors
    /// A bad name, or a file that cannot be read.
    pub fn plugin_versions(&self, tenant: &str, name: &str) -> Result<Vec<PluginRecord>, RegistryError> {
        let dir = self.dir(tenant, "plugins", name)?;
        let mut versions = Vec::new();
        for stem in stems(&dir)? {
            if let Ok(version) = Version::parse(&stem) {
                let record: PluginRecord = read(&dir.join(format!("{stem}.toml")))?;
                versions.push((version, record));
            }
        }
        versions.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(versions.into_iter().map(|(_, record)| record).collect())
    }

    /// Adds a version of a deployment; the answer is its number, counted from 1. No traffic goes to it yet.
    ///
    /// # Errors
    /// A bad name, or a file that cannot be written.
    pub fn publish(
        &self,
        tenant: &str,
        deployment: &Deployment,
        now: SystemTime,
    ) -> Result<Published, RegistryError> {
        let dir = self.dir(tenant, "deployments", &deployment.name)?;
        let _writer = self.writer();
        let last = version_numbers(&dir)?.last().copied().unwrap_or(0);
        let published = Published {
            version: last + 1,
            created: rfc3339(now),
            deployment: deployment.clone(),
        };
        write_toml(&dir.join(format!("{}.toml", published.version)), &published)?;
        Ok(published)
    }

    /// One version of a deployment.
    ///
    /// # Errors
    /// If there is none, or its file cannot be read.
    pub fn published(&self, tenant: &str, name: &str, version: u32) -> Result<Published, RegistryError> {
        let dir = self.dir(tenant, "deployments", name)?;
        let file = dir.join(format!("{version}.toml"));
        if !file.exists() {
            return Err(RegistryError::NoVersion {
                name: name.to_owned(),
                version,
                known: version_numbers(&dir)?,
            });
        }
        read(&file)
    }

    /// All deployments of a tenant that ever took traffic, by name.
    ///
    /// # Errors
    /// If a file cannot be read.
    pub fn deployments(&self, tenant: &str) -> Result<Vec<DeploymentRecord>, RegistryError> {
        let dir = self.tenant_dir(tenant)?.join("deployments");
        let mut all = Vec::new();
        for name in names(&dir)? {
            if dir.join(&name).join(TRAFFIC_FILE).exists() {
                all.push(self.deployment(tenant, &name)?);
            }
        }
        Ok(all)
    }

    /// One deployment.
    ///
    /// # Errors
    /// If there is none, or a file cannot be read.
    pub fn deployment(&self, tenant: &str, name: &str) -> Result<DeploymentRecord, RegistryError> {
        let dir = self.dir(tenant, "deployments", name)?;
        let file = dir.join(TRAFFIC_FILE);
        if !file.exists() {
            return Err(RegistryError::NoDeployment {
                name: name.to_owned(),
                known: names(&self.tenant_dir(tenant)?.join("deployments"))?,
            });
        }
        Ok(DeploymentRecord {
            name: name.to_owned(),
            traffic: read(&file)?,
            versions: version_numbers(&dir)?,
        })
    }

    /// Changes where a deployment's traffic goes. `change` sees what is, `None` for a new deployment.
    ///
    /// # Errors
    /// What `change` refuses with, or a file that cannot be written.
    pub fn route<E: From<RegistryError>>(
        &self,
        tenant: &str,
        name: &str,
        change: impl FnOnce(Option<Traffic>) -> Result<Traffic, E>,
    ) -> Result<Traffic, E> {
        let file = self.dir(tenant, "deployments", name)?.join(TRAFFIC_FILE);
        let _writer = self.writer();
        let now = if file.exists() { Some(read(&file)?) } else { None };
        let mut traffic = change(now)?;
        let surplus = traffic.history.len().saturating_sub(HISTORY_MAX);
        traffic.history.drain(..surplus);
        write_toml(&file, &traffic)?;
        Ok(traffic)
    }

    fn tenant_dir(&self, tenant: &str) -> Result<PathBuf, RegistryError> {
        check_name("tenant", tenant)?;
        Ok(self.data.join("tenants").join(tenant))
    }

    fn dir(&self, tenant: &str, kind: &'static str, name: &str) -> Result<PathBuf, RegistryError> {
        let what = if kind == "plugins" { "plugin" } else { "deployment" };
        check_name(what, name)?;
        Ok(self.tenant_dir(tenant)?.join(kind).join(name))
    }
}

fn check_name(what: &'static str, name: &str) -> Result<(), RegistryError> {
    if is_name(name) {
        return Ok(());
    }
    Err(RegistryError::Name {
        what,
        expected: NAME_FORM,
        got: name.chars().take(80).collect(),
    })
}

fn parse_version(version: &str) -> Result<Version, RegistryError> {
    Version::parse(version)
        .ok()
        .filter(|_| version.len() <= 64)
        .ok_or_else(|| RegistryError::Name {
            what: "version",
            expected: "MAJOR.MINOR.PATCH, as in 0.1.0",
            got: version.chars().take(80).collect(),
        })
}

fn io(operation: &'static str, path: &Path, source: std::io::Error) -> RegistryError {
    RegistryError::Io {
        operation,
        path: path.display().to_string(),
        source,
    }
}

/// The folders of `dir` whose names are names, in order; none if there is no `dir`.
fn names(dir: &Path) -> Result<Vec<String>, RegistryError> {
    let mut names = entries(dir)?;
    names.retain(|name| is_name(name) && dir.join(name).is_dir());
    Ok(names)
}

/// The names of the TOML files of `dir`, without their ending.
fn stems(dir: &Path) -> Result<Vec<String>, RegistryError> {
    let stem = |name: String| name.strip_suffix(".toml").map(str::to_owned);
    Ok(entries(dir)?.into_iter().filter_map(stem).collect())
}

fn version_numbers(dir: &Path) -> Result<Vec<u32>, RegistryError> {
    let mut numbers: Vec<u32> = stems(dir)?.iter().filter_map(|stem| stem.parse().ok()).collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn entries(dir: &Path) -> Result<Vec<String>, RegistryError> {
    let listing = match std::fs::read_dir(dir) {
        Ok(listing) => listing,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(io("read", dir, source)),
    };
    let mut names = Vec::new();
    for entry in listing {
        let entry = entry.map_err(|source| io("read", dir, source))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort_unstable();
    Ok(names)
}

fn read<T: DeserializeOwned>(file: &Path) -> Result<T, RegistryError> {
    let text = std::fs::read_to_string(file).map_err(|source| io("read", file, source))?;
    toml::from_str(&text).map_err(|error| RegistryError::Damaged {
        path: file.display().to_string(),
        problem: error.to_string(),
    })
}

fn write_toml(file: &Path, value: &impl Serialize) -> Result<(), RegistryError> {
    let text = toml::to_string(value).map_err(|error| RegistryError::Damaged {
        path: file.display().to_string(),
        problem: format!("what belongs there is no TOML: {error}"),
    })?;
    write(file, text.as_bytes())
}

/// Readers see the old file or the new one, also after a crash.
fn write(file: &Path, bytes: &[u8]) -> Result<(), RegistryError> {
    let dir = file.parent().unwrap_or(Path::new("."));
    let failed = |source| io("write", file, source);
    std::fs::create_dir_all(dir).map_err(failed)?;
    let mut whole = tempfile::NamedTempFile::new_in(dir).map_err(failed)?;
    whole.write_all(bytes).map_err(failed)?;
    whole.as_file().sync_all().map_err(failed)?;
    whole.persist(file).map_err(|error| failed(error.error))?;
    Ok(())
}
