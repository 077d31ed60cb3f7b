//! The plugin host as a loader of tenants' guests. Knows no world's functions.

use std::sync::Arc;

use galerne_core::guest::{
    FilterFactory, GuestError, GuestFacts, GuestLoader, GuestSource, SamplerFactory, ToolFactory, World,
};

use crate::host::PluginHost;

impl GuestLoader for PluginHost {
    fn inspect(&self, source: GuestSource<'_>) -> Result<GuestFacts, GuestError> {
        let facts = self.facts(source.name, source.component)?;
        // Loading finds what the names of exports do not tell: other types, an instance that does not start.
        for world in &facts.worlds {
            match world {
                World::Model => drop(self.load_model(source.name, source.component)?),
                World::Chat => drop(self.load_chat(source.name, source.component)?),
                World::Sampler => drop(self.load_sampler(source.name, source.component)?),
                World::Filter => drop(self.load_filter(source.name, source.component)?),
                World::Tool => drop(self.load_tool(source.name, source.component)?),
            }
        }
        Ok(facts)
    }

    fn load_sampler(&self, source: GuestSource<'_>) -> Result<Arc<dyn SamplerFactory>, GuestError> {
        Self::load_sampler(self, source.name, source.component)
    }

    fn load_filter(&self, source: GuestSource<'_>) -> Result<Arc<dyn FilterFactory>, GuestError> {
        Self::load_filter(self, source.name, source.component)
    }

    fn load_tool(&self, source: GuestSource<'_>) -> Result<Arc<dyn ToolFactory>, GuestError> {
        Self::load_tool(self, source.name, source.component)
    }
}
