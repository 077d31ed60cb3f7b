//! Architectures, chat formats and tools in a cell, as the traits of core. Believes nothing a cell answers.

use std::sync::Arc;

use galerne_core::chat::{ChatError, ChatOptions, Delta, Message, Segment, ToolSpec};
use galerne_core::filter::RequestInfo;
use galerne_core::graph::Graph;
use galerne_core::guest::{Architecture, ChatFormat, ChatParser, GuestError, ToolFactory, ToolSession};
use galerne_core::tool::ToolError;

use super::guests::{CellGuest, CellSession};
use super::protocol::{Call, Failure, Reply};
use super::questions::Answerer;
use crate::errors::bounded;
use crate::tool;

/// An architecture in a cell. Its graph goes through the same gate as any.
pub(crate) struct CellModel(pub(crate) Arc<CellGuest>);

impl Architecture for CellModel {
    fn model_types(&self) -> Result<Vec<String>, GuestError> {
        let Self(guest) = self;
        let limit = guest.core.limits().request_deadline;
        let reply = guest.call("model-types", limit, Call::ModelTypes(guest.id));
        reply
            .and_then(|(connection, reply)| match reply {
                Reply::Types(types) => Ok(types),
                other => Err(connection.nonsense(&other)),
            })
            .map_err(|failure| guest.failure("model-types", failure))
    }

    fn build(&self, config_json: &str) -> Result<Graph, GuestError> {
        let Self(guest) = self;
        let limit = guest.core.limits().build_deadline;
        let reply = guest.call("build", limit, Call::Build(guest.id, config_json.to_owned()));
        reply
            .and_then(|(connection, reply)| match reply {
                Reply::Graph(graph) => Ok(graph),
                other => Err(connection.nonsense(&other)),
            })
            .map_err(|failure| guest.failure("build", failure))
    }
}

/// A chat format in a cell.
pub(crate) struct CellChat(pub(crate) Arc<CellGuest>);

fn chat_error(guest: &CellGuest, call: &'static str, failure: Failure) -> ChatError {
    match failure {
        Failure::Chat(ChatError::Messages(text)) => ChatError::Messages(bounded(&text)),
        other => guest.failure(call, other).into(),
    }
}

impl ChatFormat for CellChat {
    fn recognises(&self, template: Option<&str>, special_tokens: &[String]) -> Result<bool, GuestError> {
        let Self(guest) = self;
        let limit = guest.core.limits().request_deadline;
        let call = Call::Recognises {
            guest: guest.id,
            template: template.map(str::to_owned),
            special_tokens: special_tokens.to_vec(),
        };
        guest
            .call("recognises", limit, call)
            .and_then(|(connection, reply)| match reply {
                Reply::Recognised(recognised) => Ok(recognised),
                other => Err(connection.nonsense(&other)),
            })
            .map_err(|failure| guest.failure("recognises", failure))
    }

    fn render(
        &self,
        messages: &[Message],
        tools: &[ToolSpec],
        options: &ChatOptions,
    ) -> Result<Vec<Segment>, ChatError> {
        let Self(guest) = self;
        let limit = guest.core.limits().request_deadline;
        let call = Call::Render {
            guest: guest.id,
            messages: messages.to_vec(),
            tools: tools.to_vec(),
            options: options.clone(),
        };
        guest
            .call("render", limit, call)
            .and_then(|(connection, reply)| match reply {
                Reply::Segments(segments) => Ok(segments),
                other => Err(connection.nonsense(&other)),
            })
            .map_err(|failure| chat_error(guest, "render", failure))
    }

    fn parser(&self, options: &ChatOptions) -> Result<Box<dyn ChatParser>, ChatError> {
        let Self(guest) = self;
        let session = guest
            .open("parser", None, |session| {
                Call::Parser(guest.id, session, options.clone())
            })
            .map_err(|failure| chat_error(guest, "parser", failure))?;
        Ok(Box::new(CellParser {
            session,
            failed: None,
        }))
    }
}

/// The parser of one answer, until its first error.
struct CellParser {
    session: CellSession,
    failed: Option<ChatError>,
}

impl CellParser {
    fn deltas(&mut self, name: &'static str, call: Call) -> Result<Vec<Delta>, ChatError> {
        if let Some(error) = &self.failed {
            return Err(error.clone());
        }
        let CellSession {
            guest, connection, ..
        } = &self.session;
        let result = match connection.call(call, guest.core.limits().step_deadline) {
            Ok(Reply::Deltas(deltas)) => Ok(deltas),
            Ok(other) => Err(connection.nonsense(&other)),
            Err(failure) => Err(failure),
        };
        result.map_err(|failure| {
            let error = chat_error(guest, name, failure);
            self.failed = Some(error.clone());
            error
        })
    }
}

impl ChatParser for CellParser {
    fn push(&mut self, text: &str) -> Result<Vec<Delta>, ChatError> {
        self.deltas("push", Call::Push(self.session.id, text.to_owned()))
    }

    fn finish(&mut self) -> Result<Vec<Delta>, ChatError> {
        self.deltas("finish", Call::ParserFinish(self.session.id))
    }
}

/// A tool in a cell.
pub(crate) struct CellTool(pub(crate) Arc<CellGuest>);

impl ToolFactory for CellTool {
    fn list(&self, params_json: &str) -> Result<Vec<ToolSpec>, GuestError> {
        let Self(guest) = self;
        let limit = guest.core.limits().request_deadline;
        let listed = guest
            .call("list", limit, Call::ToolList(guest.id, params_json.to_owned()))
            .and_then(|(connection, reply)| match reply {
                Reply::Tools(tools) => Ok(tools),
                other => Err(connection.nonsense(&other)),
            })
            .map_err(|failure| guest.failure("list", failure))?;
        tool::checked_list(&guest.core, listed)
    }

    fn session(&self, params_json: &str, info: &RequestInfo) -> Result<Box<dyn ToolSession>, GuestError> {
        Ok(Box::new(CellToolSession {
            guest: Arc::clone(&self.0),
            answerer: self.0.answerer(info),
            params_json: params_json.to_owned(),
            info: info.clone(),
        }))
    }
}

/// The tool calls of one request. Each goes to the process that runs then: in it nothing is left of earlier ones.
struct CellToolSession {
    guest: Arc<CellGuest>,
    answerer: Option<Answerer>,
    params_json: String,
    info: RequestInfo,
}

impl ToolSession for CellToolSession {
    fn call(&mut self, name: &str, arguments_json: &str) -> Result<String, ToolError> {
        let guest = &self.guest;
        let session = guest.session("call", self.answerer.clone())?;
        let connection = &session.connection;
        let call = Call::Tool {
            guest: guest.id,
            session: session.id,
            params_json: self.params_json.clone(),
            info: self.info.clone(),
            name: name.to_owned(),
            arguments_json: arguments_json.to_owned(),
        };
        let text = connection
            .call(call, guest.core.limits().tool_deadline)
            .and_then(|reply| match reply {
                Reply::Text(text) => Ok(text),
                other => Err(connection.nonsense(&other)),
            })
            .map_err(|failure| match failure {
                Failure::Tool(ToolError::Arguments(message)) => ToolError::Arguments(bounded(&message)),
                Failure::Tool(ToolError::Failed(message)) => ToolError::Failed(bounded(&message)),
                other => guest.failure("call", other).into(),
            })?;
        Ok(tool::checked_answer(&guest.core, text)?)
    }
}
