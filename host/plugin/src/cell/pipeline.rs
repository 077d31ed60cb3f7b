//! Pipelines in a cell, as the trait of core. What they ask is answered on this side, by whoever answers those of this
//! process.

use std::sync::{Arc, Mutex};

use galerne_core::capability::CapabilitySession;
use galerne_core::filter::{FilterRequest, Refusal, RequestInfo};
use galerne_core::guest::PipelineFactory;
use galerne_core::pipeline::{PipelineError, PipelineFinish};

use super::guests::CellGuest;
use super::protocol::{Call, Failure, Reply};
use crate::filter::checked_refusal;
use crate::pipeline::{RUN, answering};

/// A pipeline in a cell.
pub(crate) struct CellPipeline(pub(crate) Arc<CellGuest>);

impl PipelineFactory for CellPipeline {
    fn run(
        &self,
        params_json: &str,
        info: &RequestInfo,
        request: FilterRequest,
        model: Box<dyn CapabilitySession>,
    ) -> Result<PipelineFinish, PipelineError> {
        let Self(guest) = self;
        let answerer = answering(model, guest.core.capability_session(info));
        let session = guest.session(RUN, Some(Arc::new(Mutex::new(answerer))))?;
        let connection = &session.connection;
        let call = Call::Pipeline {
            guest: guest.id,
            session: session.id,
            params_json: params_json.to_owned(),
            info: info.clone(),
            request,
        };
        let limits = guest.core.limits();
        let deadline = limits.pipeline_deadline.saturating_add(limits.pipeline_wait_max);
        connection
            .call(call, deadline)
            .and_then(|reply| match reply {
                Reply::Finish(finish) => Ok(finish),
                other => Err(connection.nonsense(&other)),
            })
            .map_err(|failure| match failure {
                Failure::Pipeline(PipelineError::Refused(Refusal { status, reason, .. })) => {
                    checked_refusal(&guest.core, RUN, status, &reason)
                }
                other => guest.failure(RUN, other).into(),
            })
    }
}
