//! The functions of grammars that a sampler imports, each one question. Converts and decides nothing.

use galerne_core::capability::{Ask, CapabilityError, Reply};
use galerne_core::grammar::{GrammarAsk, GrammarId, GrammarReply, GrammarStatus, GrammarText};
use galerne_core::ids::TokenId;
use wasmtime::component::Resource;

use super::asking::OverLimit;
use super::host_calls::mixed_up;
use crate::bindings::grammar::galerne::grammar::grammars as wit;
use crate::limiter::StoreState;

/// What a guest's handle of a grammar stands for: its number, which whoever answers checks.
#[expect(unreachable_pub, reason = "the generated bindings export it again")]
pub struct Grammar;

type Asked<T> = wasmtime::Result<Result<T, wit::Error>>;

impl StoreState {
    /// Asks; what ends the request is a trap.
    fn grammar(&mut self, ask: GrammarAsk) -> Asked<GrammarReply> {
        match self.asking().ask(Ask::Grammar(ask)) {
            Ok(Reply::Grammar(reply)) => Ok(Ok(reply)),
            Ok(other) => Ok(Err(wit::Error::Failed(mixed_up(&other).to_string()))),
            Err(CapabilityError::Over(text)) => Err(OverLimit(text).into()),
            Err(CapabilityError::Limit(text)) => Ok(Err(wit::Error::Limit(text))),
            Err(CapabilityError::Invalid(text)) => Ok(Err(wit::Error::Invalid(text))),
            Err(
                CapabilityError::Denied(text)
                | CapabilityError::Timeout(text)
                | CapabilityError::Failed(text),
            ) => Ok(Err(wit::Error::Failed(text))),
        }
    }

    fn new_grammar(&mut self, ask: GrammarAsk) -> Asked<Resource<Grammar>> {
        Ok(self.grammar(ask)?.and_then(|reply| match reply {
            GrammarReply::Grammar(GrammarId(id)) => Ok(Resource::new_own(id)),
            other => Err(unexpected(other)),
        }))
    }

    fn grammar_done(&mut self, ask: GrammarAsk) -> Asked<()> {
        Ok(self.grammar(ask)?.and_then(|reply| match reply {
            GrammarReply::Done => Ok(()),
            other => Err(unexpected(other)),
        }))
    }
}

fn unexpected(reply: GrammarReply) -> wit::Error {
    wit::Error::Failed(mixed_up(&Reply::Grammar(reply)).to_string())
}

fn id(handle: &Resource<Grammar>) -> GrammarId {
    GrammarId(handle.rep())
}

impl wit::HostGrammar for StoreState {
    fn compile(&mut self, source: wit::Source) -> Asked<Resource<Grammar>> {
        self.new_grammar(GrammarAsk::Compile(match source {
            wit::Source::JsonSchema(text) => GrammarText::JsonSchema(text),
            wit::Source::Regex(text) => GrammarText::Regex(text),
            wit::Source::Lark(text) => GrammarText::Lark(text),
        }))
    }

    fn id(&mut self, handle: Resource<Grammar>) -> wasmtime::Result<u32> {
        Ok(handle.rep())
    }

    fn fork(&mut self, handle: Resource<Grammar>) -> Asked<Resource<Grammar>> {
        self.new_grammar(GrammarAsk::Fork(id(&handle)))
    }

    fn accept(&mut self, handle: Resource<Grammar>, tokens: Vec<u32>) -> Asked<u32> {
        let tokens = tokens.into_iter().map(TokenId).collect();
        let accepted = self.grammar(GrammarAsk::Accept(id(&handle), tokens))?;
        Ok(accepted.and_then(|reply| match reply {
            GrammarReply::Accepted(tokens) => Ok(tokens),
            other => Err(unexpected(other)),
        }))
    }

    fn rollback(&mut self, handle: Resource<Grammar>, tokens: u32) -> Asked<()> {
        self.grammar_done(GrammarAsk::Rollback(id(&handle), tokens))
    }

    fn status(&mut self, handle: Resource<Grammar>) -> Asked<wit::Status> {
        let status = self.grammar(GrammarAsk::Status(id(&handle)))?;
        Ok(status.and_then(|reply| match reply {
            GrammarReply::Status(GrammarStatus::Open) => Ok(wit::Status::Open),
            GrammarReply::Status(GrammarStatus::Complete) => Ok(wit::Status::Complete),
            GrammarReply::Status(GrammarStatus::Ended) => Ok(wit::Status::Ended),
            other => Err(unexpected(other)),
        }))
    }

    fn drop(&mut self, handle: Resource<Grammar>) -> wasmtime::Result<()> {
        // There is nobody to tell that it was not there.
        let _ = self.grammar_done(GrammarAsk::Drop(id(&handle)))?;
        Ok(())
    }
}

impl wit::Host for StoreState {}
