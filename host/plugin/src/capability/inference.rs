//! The functions a pipeline imports, each one question. Converts and decides nothing.

use galerne_core::capability::{Ask, CapabilityError, Reply};
use galerne_core::pipeline::{ContextId, GenerationId, Next, PipelineAsk, PipelineReply};
use wasmtime::component::Resource;

use super::asking::OverLimit;
use super::host_calls::mixed_up;
use crate::bindings::pipeline::galerne::pipeline::inference as wit;
use crate::convert::pipeline as convert;
use crate::limiter::StoreState;

/// What a guest's handle of a context stands for: its number, which whoever answers checks.
#[expect(unreachable_pub, reason = "the generated bindings export it again")]
pub struct Context;

/// The same of a generation.
#[expect(unreachable_pub, reason = "the generated bindings export it again")]
pub struct Generation;

type Asked<T> = wasmtime::Result<Result<T, wit::Error>>;

impl StoreState {
    /// Asks; what ends the request is a trap.
    fn pipeline(&mut self, ask: PipelineAsk) -> Asked<PipelineReply> {
        let failed = |text| Ok(Err(wit::Error::Failed(text)));
        match self.asking().ask(Ask::Pipeline(ask)) {
            Ok(Reply::Pipeline(reply)) => Ok(Ok(reply)),
            Ok(other) => failed(mixed_up(&other).to_string()),
            Err(
                CapabilityError::Limit(text) | CapabilityError::Timeout(text) | CapabilityError::Over(text),
            ) => Err(OverLimit(text).into()),
            Err(CapabilityError::Denied(text) | CapabilityError::Invalid(text)) => {
                Ok(Err(wit::Error::Invalid(text)))
            }
            Err(CapabilityError::Failed(text)) => failed(text),
        }
    }

    fn pipeline_context(&mut self, ask: PipelineAsk) -> Asked<Resource<Context>> {
        Ok(self.pipeline(ask)?.and_then(|reply| match reply {
            PipelineReply::Context(ContextId(id)) => Ok(Resource::new_own(id)),
            other => Err(unexpected(other)),
        }))
    }

    fn pipeline_done(&mut self, ask: PipelineAsk) -> Asked<()> {
        Ok(self.pipeline(ask)?.and_then(|reply| match reply {
            PipelineReply::Done => Ok(()),
            other => Err(unexpected(other)),
        }))
    }
}

fn unexpected(reply: PipelineReply) -> wit::Error {
    wit::Error::Failed(mixed_up(&Reply::Pipeline(reply)).to_string())
}

fn context(handle: &Resource<Context>) -> ContextId {
    ContextId(handle.rep())
}

fn generation(handle: &Resource<Generation>) -> GenerationId {
    GenerationId(handle.rep())
}

impl wit::HostContext for StoreState {
    fn from_messages(
        &mut self,
        messages: Vec<wit::Message>,
        tools: Vec<wit::Tool>,
    ) -> Asked<Resource<Context>> {
        self.pipeline_context(PipelineAsk::FromMessages {
            messages: messages.into_iter().map(convert::message_from_guest).collect(),
            tools: tools.into_iter().map(convert::tool_from_guest).collect(),
        })
    }

    fn from_text(&mut self, text: String) -> Asked<Resource<Context>> {
        self.pipeline_context(PipelineAsk::FromText(text))
    }

    fn fork(&mut self, handle: Resource<Context>) -> Asked<Resource<Context>> {
        self.pipeline_context(PipelineAsk::Fork(context(&handle)))
    }

    fn append(&mut self, handle: Resource<Context>, text: String) -> Asked<()> {
        self.pipeline_done(PipelineAsk::Append(context(&handle), text))
    }

    fn truncate(&mut self, handle: Resource<Context>, tokens: u32) -> Asked<()> {
        self.pipeline_done(PipelineAsk::Truncate(context(&handle), tokens))
    }

    fn length(&mut self, handle: Resource<Context>) -> Asked<u32> {
        let length = self.pipeline(PipelineAsk::Length(context(&handle)))?;
        Ok(length.and_then(|reply| match reply {
            PipelineReply::Length(tokens) => Ok(tokens),
            other => Err(unexpected(other)),
        }))
    }

    fn generate(&mut self, handle: Resource<Context>, options: wit::Options) -> Asked<Resource<Generation>> {
        let options = convert::options_from_guest(options);
        let begun = self.pipeline(PipelineAsk::Generate(context(&handle), options))?;
        Ok(begun.and_then(|reply| match reply {
            PipelineReply::Generation(GenerationId(id)) => Ok(Resource::new_own(id)),
            other => Err(unexpected(other)),
        }))
    }

    fn drop(&mut self, handle: Resource<Context>) -> wasmtime::Result<()> {
        // There is nobody to tell that it was not there.
        let _ = self.pipeline_done(PipelineAsk::DropContext(context(&handle)))?;
        Ok(())
    }
}

impl wit::HostGeneration for StoreState {
    fn next(&mut self, handle: Resource<Generation>) -> Asked<Vec<wit::Delta>> {
        let id = generation(&handle);
        // A pipeline that asks again is told again, and the host need not remember what has ended.
        if self.outcomes.contains_key(&id) {
            return Ok(Ok(Vec::new()));
        }
        Ok(match self.pipeline(PipelineAsk::Next(id))? {
            Ok(PipelineReply::Next(Next::Deltas(deltas))) => {
                Ok(deltas.into_iter().map(convert::delta_to_guest).collect())
            }
            Ok(PipelineReply::Next(Next::End(outcome))) => {
                self.outcomes.insert(id, outcome);
                Ok(Vec::new())
            }
            Ok(other) => Err(unexpected(other)),
            Err(error) => Err(error),
        })
    }

    fn outcome(&mut self, handle: Resource<Generation>) -> wasmtime::Result<Option<wit::Outcome>> {
        let outcome = self.outcomes.get(&generation(&handle));
        Ok(outcome.map(convert::outcome_to_guest))
    }

    fn drop(&mut self, handle: Resource<Generation>) -> wasmtime::Result<()> {
        let id = generation(&handle);
        self.outcomes.remove(&id);
        let _ = self.pipeline_done(PipelineAsk::DropGeneration(id))?;
        Ok(())
    }
}

impl wit::Host for StoreState {
    fn ready(&mut self, handles: Vec<Resource<Generation>>) -> Asked<Vec<u32>> {
        let ids: Vec<GenerationId> = handles.iter().map(generation).collect();
        // What has ended would not wait.
        let ended: Vec<u32> = (0..)
            .zip(&ids)
            .filter(|(_, id)| self.outcomes.contains_key(id))
            .map(|(place, _)| place)
            .collect();
        if !ended.is_empty() {
            return Ok(Ok(ended));
        }
        let ready = self.pipeline(PipelineAsk::Ready(ids))?;
        Ok(ready.and_then(|reply| match reply {
            PipelineReply::Ready(places) => Ok(places),
            other => Err(unexpected(other)),
        }))
    }

    fn call_tool(
        &mut self,
        name: String,
        arguments_json: String,
    ) -> wasmtime::Result<Result<String, String>> {
        let ask = PipelineAsk::CallTool { name, arguments_json };
        Ok(match self.pipeline(ask)? {
            Ok(PipelineReply::Tool(result)) => result,
            Ok(other) => Err(mixed_up(&Reply::Pipeline(other)).to_string()),
            Err(wit::Error::Invalid(text) | wit::Error::Failed(text)) => Err(text),
        })
    }

    fn emit(&mut self, delta: wit::Delta) -> wasmtime::Result<()> {
        let emitted = self.pipeline_done(PipelineAsk::Emit(convert::delta_from_guest(delta)))?;
        // What cannot be emitted must not be missing silently.
        emitted.map_err(|error| match error {
            wit::Error::Invalid(text) | wit::Error::Failed(text) => OverLimit(text).into(),
        })
    }

    fn emit_event(&mut self, name: String, data_json: String) -> Asked<()> {
        self.pipeline_done(PipelineAsk::EmitEvent { name, data_json })
    }
}
