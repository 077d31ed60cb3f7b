//! What tenants' guests may call, from this host's parts: one HTTP client, a store and secrets per tenant, a log per
//! deployment.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use galerne_core::capability::{Capabilities, CapabilityError, KvStore};
use galerne_core::deployment::Deployment;
use galerne_core::limits::HostLimits;
use galerne_plugin::{
    AddressRange, CapabilityParts, GuestLog, HostCapabilities, HttpClient, MemoryKv, SystemLookup,
};
use galerne_store::kv::KvDatabase;
use galerne_store::secrets::SecretFolder;

/// The parts, made when they are first needed.
pub struct Services {
    data: PathBuf,
    limits: HostLimits,
    http: Arc<HttpClient>,
    stores: Mutex<BTreeMap<String, Arc<KvDatabase>>>,
    logs: Mutex<BTreeMap<(String, String), Arc<GuestLog>>>,
}

impl Services {
    /// Over the data folder `data`. Guests reach private addresses in the ranges `reachable` only, and are bounded by
    /// `limits`.
    #[must_use]
    pub fn new(data: &Path, reachable: Vec<AddressRange>, limits: HostLimits) -> Self {
        Self {
            data: data.to_owned(),
            limits,
            http: Arc::new(HttpClient::new(Arc::new(SystemLookup), reachable)),
            stores: Mutex::default(),
            logs: Mutex::default(),
        }
    }

    /// What the guests of this deployment may do.
    ///
    /// # Errors
    /// The tenant's key-value store cannot be opened.
    pub fn capabilities(
        &self,
        tenant: &str,
        deployment: &Deployment,
    ) -> Result<Arc<dyn Capabilities>, CapabilityError> {
        let grants = deployment.capabilities.clone();
        let kv: Arc<dyn KvStore> = if grants.kv {
            self.store(tenant)?
        } else {
            // Nobody may ask it.
            Arc::new(MemoryKv::default())
        };
        Ok(Arc::new(HostCapabilities::new(CapabilityParts {
            tenant: tenant.to_owned(),
            deployment: deployment.name.clone(),
            grants,
            allowance: deployment.allowance(self.limits),
            log: self.log(tenant, &deployment.name),
            http: Arc::clone(&self.http),
            kv,
            secrets: Arc::new(SecretFolder::new(
                secrets_folder(&self.data, tenant),
                &self.limits.capability,
            )),
        })))
    }

    /// One store for all deployments of a tenant.
    fn store(&self, tenant: &str) -> Result<Arc<KvDatabase>, CapabilityError> {
        let mut stores = self.stores.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(store) = stores.get(tenant) {
            return Ok(Arc::clone(store));
        }
        let file = self.data.join("tenants").join(tenant).join("kv.sqlite");
        let store = KvDatabase::open(&file).map_err(|error| CapabilityError::Failed(error.to_string()))?;
        let store = Arc::new(store);
        stores.insert(tenant.to_owned(), Arc::clone(&store));
        Ok(store)
    }

    /// One log for all versions of a deployment.
    fn log(&self, tenant: &str, deployment: &str) -> Arc<GuestLog> {
        let mut logs = self.logs.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (tenant.to_owned(), deployment.to_owned());
        let log = logs
            .entry(key)
            .or_insert_with(|| Arc::new(GuestLog::new(&self.limits.capability)));
        Arc::clone(log)
    }
}

/// Where a tenant's secrets are.
#[must_use]
pub fn secrets_folder(data: &Path, tenant: &str) -> PathBuf {
    data.join("tenants").join(tenant).join("secrets")
}
