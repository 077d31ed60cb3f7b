//! A deployment's tools within one request: which function is whose, and its calls. Calls block.

use std::sync::Arc;

use galerne_core::chat::ToolSpec;
use galerne_core::filter::RequestInfo;
use galerne_core::guest::ToolSession;
use galerne_core::tool::ToolError;

use crate::deployments::Live;

/// The tools of one request.
pub(super) struct ToolCalls {
    live: Arc<Live>,
    info: RequestInfo,
    /// As many as the deployment has tools; started with the first call.
    sessions: Vec<Option<Box<dyn ToolSession>>>,
}

/// All functions of a deployment's tools.
pub(super) fn functions(live: &Live) -> Vec<ToolSpec> {
    let tools = live.tools.iter();
    tools.flat_map(|tool| tool.functions.clone()).collect()
}

impl ToolCalls {
    pub(super) fn new(live: &Arc<Live>, info: RequestInfo) -> Self {
        Self {
            live: Arc::clone(live),
            info,
            sessions: live.tools.iter().map(|_| None).collect(),
        }
    }

    pub(super) fn live(&self) -> &Live {
        &self.live
    }

    pub(super) fn request_id(&self) -> &str {
        &self.info.id
    }

    /// Runs a function; what it gives, or why it gives nothing, is for the model to read.
    pub(super) fn call(&mut self, name: &str, arguments_json: &str) -> Result<String, String> {
        self.run(name, arguments_json).map_err(|error| error.to_string())
    }

    fn run(&mut self, name: &str, arguments_json: &str) -> Result<String, ToolError> {
        let offers = |functions: &[ToolSpec]| functions.iter().any(|function| function.name == name);
        let place = self.live.tools.iter().position(|tool| offers(&tool.functions));
        let Some(place) = place else {
            let known = functions(&self.live);
            let known: Vec<&str> = known.iter().map(|function| function.name.as_str()).collect();
            return Err(ToolError::Arguments(format!(
                "there is no function \"{name}\"; there are: {}",
                known.join(", ")
            )));
        };
        let session = match &mut self.sessions[place] {
            Some(session) => session,
            empty => {
                let tool = &self.live.tools[place].tool;
                empty.insert(tool.guest.session(&tool.params_json, &self.info)?)
            }
        };
        session.call(name, arguments_json)
    }
}
