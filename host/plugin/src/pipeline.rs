//! A loaded pipeline guest and its one call. Knows no engine and no model: it passes on what the guest asks.

use std::time::Duration;

use galerne_core::capability::{Ask, CapabilityError, CapabilitySession, Reply};
use galerne_core::filter::{FilterRequest, RequestInfo};
use galerne_core::guest::{GuestError, PipelineFactory};
use galerne_core::pipeline::{PipelineError, PipelineFinish};
use wasmtime::component::InstancePre;

use crate::bindings::pipeline::exports::galerne::pipeline::pipelines as wit;
use crate::bindings::pipeline::{Pipeline, PipelinePre};
use crate::convert::pipeline as convert;
use crate::filter::checked_refusal;
use crate::instance::GuestCore;
use crate::limiter::StoreState;

pub(crate) const RUN: &str = "run";

/// A guest of the world `galerne:pipeline/pipeline@0.1.0`. Each request runs in a fresh instance. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct PipelineGuest {
    core: GuestCore,
    pre: PipelinePre<StoreState>,
}

impl PipelineGuest {
    pub(crate) fn new(core: GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let pre = PipelinePre::new(pre).map_err(|error| core.link_error(&error))?;
        core.try_out(pre.instance_pre(), |store, instance| {
            Pipeline::new(store, instance)
        })?;
        Ok(Self { core, pre })
    }

    /// Answers a request; `asked` answers all that the guest asks.
    pub(crate) fn answer(
        &self,
        params_json: &str,
        info: &RequestInfo,
        request: FilterRequest,
        asked: Box<dyn CapabilitySession>,
    ) -> Result<PipelineFinish, PipelineError> {
        let info = wit::RequestInfo {
            params_json: params_json.to_owned(),
            id: info.id.clone(),
            model: info.model.clone(),
        };
        let request = wit::Request {
            messages: request
                .messages
                .into_iter()
                .map(convert::message_to_guest)
                .collect(),
            tools: request.tools.into_iter().map(convert::tool_to_guest).collect(),
        };
        let core = &self.core;
        let mut store = core.store();
        store.data_mut().asking().set_session(Some(asked));
        let limits = core.limits();
        let ended = core.call_waiting(
            &mut store,
            RUN,
            limits.pipeline_deadline,
            limits.pipeline_wait_max,
            |store| {
                let pipeline: Pipeline = self.pre.instantiate(&mut *store)?;
                pipeline
                    .galerne_pipeline_pipelines()
                    .call_run(store, &info, &request)
            },
        )?;
        ended
            .map(convert::finish_from_guest)
            .map_err(|refusal| checked_refusal(core, RUN, refusal.status, &refusal.reason))
    }
}

impl PipelineFactory for PipelineGuest {
    fn run(
        &self,
        params_json: &str,
        info: &RequestInfo,
        request: FilterRequest,
        model: Box<dyn CapabilitySession>,
    ) -> Result<PipelineFinish, PipelineError> {
        let asked = answering(model, self.core.capability_session(info));
        self.answer(params_json, info, request, asked)
    }
}

/// Who answers a pipeline: the model and, if its deployment grants something, its capabilities.
pub(crate) fn answering(
    model: Box<dyn CapabilitySession>,
    capabilities: Option<Box<dyn CapabilitySession>>,
) -> Box<dyn CapabilitySession> {
    Box::new(Answering { model, capabilities })
}

struct Answering {
    model: Box<dyn CapabilitySession>,
    capabilities: Option<Box<dyn CapabilitySession>>,
}

impl CapabilitySession for Answering {
    fn ask(&mut self, ask: Ask, time_left: Duration) -> Result<Reply, CapabilityError> {
        match (&ask, &mut self.capabilities) {
            (Ask::Pipeline(_), _) => self.model.ask(ask, time_left),
            (_, Some(capabilities)) => capabilities.ask(ask, time_left),
            (_, None) => Err(CapabilityError::Denied("nothing is granted".to_owned())),
        }
    }
}
