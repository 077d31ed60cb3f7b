//! A loaded tool guest and its calls. Knows no agent loop, and of JSON only whether a schema is an object.

use std::collections::BTreeSet;

use galerne_core::capability::CapabilitySession;
use galerne_core::chat::ToolSpec;
use galerne_core::filter::RequestInfo;
use galerne_core::guest::{GuestError, ToolFactory, ToolSession};
use galerne_core::tool::{ToolError, is_tool_name};
use wasmtime::component::InstancePre;

use crate::bindings::tool::exports::galerne::tool::tools as wit;
use crate::bindings::tool::{Tool, ToolPre};
use crate::errors::bounded;
use crate::instance::GuestCore;
use crate::limiter::StoreState;

const LIST: &str = "list";
const CALL: &str = "call";

/// A guest of the world `galerne:tool/tool@0.1.0`. Each call runs in a fresh instance. Cloning is cheap.
#[derive(Clone)]
pub(crate) struct ToolGuest {
    core: GuestCore,
    pre: ToolPre<StoreState>,
}

impl ToolGuest {
    pub(crate) fn new(core: GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let pre = ToolPre::new(pre).map_err(|error| core.link_error(&error))?;
        core.try_out(pre.instance_pre(), |store, instance| Tool::new(store, instance))?;
        Ok(Self { core, pre })
    }

    /// A request's calls, whose questions `capabilities` answers.
    pub(crate) fn open(
        &self,
        params_json: &str,
        info: &RequestInfo,
        capabilities: Option<Box<dyn CapabilitySession>>,
    ) -> Box<dyn ToolSession> {
        Box::new(Session {
            guest: self.clone(),
            info: wit::RequestInfo {
                params_json: params_json.to_owned(),
                id: info.id.clone(),
                model: info.model.clone(),
            },
            capabilities,
        })
    }
}

/// What a guest lists, if it is as the contract wants it.
pub(crate) fn checked_list(core: &GuestCore, tools: Vec<ToolSpec>) -> Result<Vec<ToolSpec>, GuestError> {
    let limits = core.limits();
    let (count, count_max) = (tools.len(), limits.tools_max);
    if count > count_max {
        let limit = format!("at most {count_max} functions in one list, got {count}");
        return Err(core.over_named(LIST, &limit, "tools_max"));
    }
    let text_bytes = |tool: &ToolSpec| tool.description.len() + tool.parameters_json.len();
    let (bytes, bytes_max) = (
        tools.iter().map(text_bytes).sum::<usize>(),
        limits.tools_bytes_max,
    );
    if bytes > bytes_max {
        let limit = format!("descriptions and schemas of at most {bytes_max} bytes, got {bytes}");
        return Err(core.over_named(LIST, &limit, "tools_bytes_max"));
    }
    let mut names = BTreeSet::new();
    for tool in &tools {
        let (expected, got) = if !is_tool_name(&tool.name) {
            (
                "names of 1 to 64 letters, digits, _ and -",
                format!("{:?}", tool.name),
            )
        } else if !names.insert(tool.name.as_str()) {
            ("each name once", format!("\"{}\" again", tool.name))
        } else if let Err(reason) = check_schema(&tool.parameters_json) {
            let expected = "a JSON object as the schema of each function's arguments";
            (expected, format!("that of \"{}\": {reason}", tool.name))
        } else {
            continue;
        };
        return Err(core.bad_answer(LIST, expected, &got));
    }
    Ok(tools)
}

fn spec(tool: wit::Tool) -> ToolSpec {
    ToolSpec {
        name: tool.name,
        description: tool.description,
        parameters_json: tool.parameters_json,
    }
}

/// A tool's answer, if it is not too long.
pub(crate) fn checked_answer(core: &GuestCore, text: String) -> Result<String, GuestError> {
    let (bytes, bytes_max) = (text.len(), core.limits().tool_answer_bytes_max);
    if bytes > bytes_max {
        let limit = format!("an answer of at most {bytes_max} bytes, got {bytes}");
        return Err(core.over_named(CALL, &limit, "tool_answer_bytes_max"));
    }
    Ok(text)
}

fn check_schema(json: &str) -> Result<(), String> {
    // The parser bounds its own depth.
    match serde_json::from_str::<serde_json::Value>(json) {
        Ok(schema) if schema.is_object() => Ok(()),
        Ok(_) => Err("JSON, but no object".to_owned()),
        Err(error) => Err(format!("no JSON: {error}")),
    }
}

impl ToolFactory for ToolGuest {
    fn list(&self, params_json: &str) -> Result<Vec<ToolSpec>, GuestError> {
        let mut store = self.core.store();
        let limit = self.core.limits().request_deadline;
        let listed = self.core.call(&mut store, LIST, limit, |store| {
            let tool: Tool = self.pre.instantiate(&mut *store)?;
            tool.galerne_tool_tools().call_list(store, params_json)
        })?;
        let tools = listed.map_err(|message| self.core.refused(LIST, &message))?;
        checked_list(&self.core, tools.into_iter().map(spec).collect())
    }

    fn session(&self, params_json: &str, info: &RequestInfo) -> Result<Box<dyn ToolSession>, GuestError> {
        Ok(self.open(params_json, info, self.core.capability_session(info)))
    }
}

/// The calls of one request.
struct Session {
    guest: ToolGuest,
    info: wit::RequestInfo,
    /// Goes from call to call: it counts what the request uses.
    capabilities: Option<Box<dyn CapabilitySession>>,
}

impl ToolSession for Session {
    fn call(&mut self, name: &str, arguments_json: &str) -> Result<String, ToolError> {
        let core = &self.guest.core;
        let mut store = core.store();
        store.data_mut().asking().set_session(self.capabilities.take());
        let limit = core.limits().tool_deadline;
        let answer = core.call(&mut store, CALL, limit, |store| {
            let tool: Tool = self.guest.pre.instantiate(&mut *store)?;
            tool.galerne_tool_tools()
                .call_call(store, &self.info, name, arguments_json)
        });
        self.capabilities = store.data_mut().asking().take_session();
        let text = answer?.map_err(|error| match error {
            wit::Error::Arguments(message) => ToolError::Arguments(bounded(&message)),
            wit::Error::Failed(message) => ToolError::Failed(bounded(&message)),
        })?;
        Ok(checked_answer(core, text)?)
    }
}
