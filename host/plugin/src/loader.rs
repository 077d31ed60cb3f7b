//! The plugin host as a loader of tenants' guests. Knows no world's functions.

use std::sync::Arc;

use galerne_core::capability::Capabilities;
use galerne_core::guest::{
    FilterFactory, GuestError, GuestFacts, GuestLoader, GuestSource, GuestStats, PipelineFactory,
    SamplerFactory, ToolFactory,
};

use crate::host::PluginHost;

impl GuestLoader for PluginHost {
    fn inspect(&self, source: GuestSource<'_>) -> Result<GuestFacts, GuestError> {
        self.for_tenant(source.tenant)
            .facts(source.name, source.component)
    }

    fn load_sampler(&self, source: GuestSource<'_>) -> Result<Arc<dyn SamplerFactory>, GuestError> {
        Self::load_sampler(&self.for_tenant(source.tenant), source.name, source.component)
    }

    fn load_filter(&self, source: GuestSource<'_>) -> Result<Arc<dyn FilterFactory>, GuestError> {
        Self::load_filter(&self.for_tenant(source.tenant), source.name, source.component)
    }

    fn load_tool(&self, source: GuestSource<'_>) -> Result<Arc<dyn ToolFactory>, GuestError> {
        Self::load_tool(&self.for_tenant(source.tenant), source.name, source.component)
    }

    fn load_pipeline(&self, source: GuestSource<'_>) -> Result<Arc<dyn PipelineFactory>, GuestError> {
        Self::load_pipeline(&self.for_tenant(source.tenant), source.name, source.component)
    }

    fn stats(&self) -> GuestStats {
        self.stats()
    }

    fn fuel(&self) -> Vec<(String, u64)> {
        self.fuel()
    }

    fn with_capabilities(&self, capabilities: Arc<dyn Capabilities>) -> Arc<dyn GuestLoader> {
        Arc::new(self.with_capabilities(capabilities))
    }
}
