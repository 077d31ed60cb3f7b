//! A loaded architecture guest. Knows nothing of what a graph means.

use galerne_core::graph::Graph;
use galerne_core::guest::{Architecture, GuestError};
use wasmtime::component::InstancePre;

use crate::bindings::model::exports::galerne::model::architecture::Error;
use crate::bindings::model::{Model, ModelPre};
use crate::convert;
use crate::instance::GuestCore;
use crate::limiter::StoreState;

/// A guest of the world `galerne:model/model@0.1.0`. Each call runs in a fresh instance.
pub(crate) struct ModelGuest {
    core: GuestCore,
    pre: ModelPre<StoreState>,
}

impl ModelGuest {
    pub(crate) fn new(core: GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let pre = ModelPre::new(pre).map_err(|error| core.link_error(&error))?;
        core.try_out(pre.instance_pre(), |store, instance| Model::new(store, instance))?;
        Ok(Self { core, pre })
    }
}

impl Architecture for ModelGuest {
    fn model_types(&self) -> Result<Vec<String>, GuestError> {
        let mut store = self.core.store();
        let limit = self.core.limits().request_deadline;
        self.core.call(&mut store, "model-types", limit, |store| {
            let model: Model = self.pre.instantiate(&mut *store)?;
            model.galerne_model_architecture().call_model_types(store)
        })
    }

    fn build(&self, config_json: &str) -> Result<Graph, GuestError> {
        let mut store = self.core.store();
        let limit = self.core.limits().build_deadline;
        let built = self.core.call(&mut store, "build", limit, |store| {
            let model: Model = self.pre.instantiate(&mut *store)?;
            model.galerne_model_architecture().call_build(store, config_json)
        })?;
        match built {
            Ok(graph) => {
                convert::model::graph(graph).map_err(|error| self.core.refused("build", &error.to_string()))
            }
            Err(Error::Config(message)) => {
                Err(self.core.refused("build", &format!("config.json: {message}")))
            }
            Err(Error::Unsupported(what)) => Err(self.core.refused("build", &format!("unsupported: {what}"))),
        }
    }
}
