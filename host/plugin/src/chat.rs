//! A loaded chat format guest and its parsers. Knows nothing of tokens.

use galerne_core::chat::{ChatError, ChatOptions, Delta, Message, Segment, ToolSpec};
use galerne_core::guest::{ChatFormat, ChatParser, GuestError};
use wasmtime::Store;
use wasmtime::component::{InstancePre, ResourceAny};

use crate::bindings::chat::exports::galerne::chat::format::Error;
use crate::bindings::chat::{Chat, ChatPre};
use crate::convert;
use crate::errors::bounded;
use crate::instance::GuestCore;
use crate::limiter::StoreState;

/// A guest of the world `galerne:chat/chat@0.1.0`. Calls other than a parser's run in a fresh instance each.
pub(crate) struct ChatGuest {
    core: GuestCore,
    pre: ChatPre<StoreState>,
}

impl ChatGuest {
    pub(crate) fn new(core: GuestCore, pre: InstancePre<StoreState>) -> Result<Self, GuestError> {
        let pre = ChatPre::new(pre).map_err(|error| core.link_error(&error))?;
        core.try_out(pre.instance_pre(), |store, instance| Chat::new(store, instance))?;
        Ok(Self { core, pre })
    }
}

impl ChatFormat for ChatGuest {
    fn recognises(&self, template: Option<&str>, special_tokens: &[String]) -> Result<bool, GuestError> {
        let mut store = self.core.store();
        let limit = self.core.limits().request_deadline;
        self.core.call(&mut store, "recognises", limit, |store| {
            let chat: Chat = self.pre.instantiate(&mut *store)?;
            chat.galerne_chat_format()
                .call_recognises(store, template, special_tokens)
        })
    }

    fn render(
        &self,
        messages: &[Message],
        tools: &[ToolSpec],
        options: &ChatOptions,
    ) -> Result<Vec<Segment>, ChatError> {
        let messages = convert::chat::messages(messages);
        let tools = convert::chat::tools(tools);
        let options = convert::chat::options(options);
        let mut store = self.core.store();
        let limit = self.core.limits().request_deadline;
        let rendered = self.core.call(&mut store, "render", limit, |store| {
            let chat: Chat = self.pre.instantiate(&mut *store)?;
            chat.galerne_chat_format()
                .call_render(store, &messages, &tools, &options)
        })?;
        match rendered {
            Ok(segments) => Ok(convert::chat::segments(segments)),
            Err(Error::Messages(message)) => Err(ChatError::Messages(bounded(&message))),
        }
    }

    fn parser(&self, options: &ChatOptions) -> Result<Box<dyn ChatParser>, ChatError> {
        let options = convert::chat::options(options);
        let mut store = self.core.store();
        let limit = self.core.limits().request_deadline;
        let (chat, resource) = self.core.call(&mut store, "parser", limit, |store| {
            let chat: Chat = self.pre.instantiate(&mut *store)?;
            let resource = chat
                .galerne_chat_format()
                .parser()
                .call_constructor(store, &options)?;
            Ok((chat, resource))
        })?;
        Ok(Box::new(Parser {
            core: self.core.clone(),
            state: Ok(Live {
                store,
                chat,
                resource,
            }),
        }))
    }
}

/// A parser's own instance. Dropped without running the guest's destructor: the instance goes as a whole.
struct Live {
    store: Store<StoreState>,
    chat: Chat,
    resource: ResourceAny,
}

/// The parser of one answer, until its first error.
struct Parser {
    core: GuestCore,
    state: Result<Live, GuestError>,
}

impl Parser {
    fn deltas(
        &mut self,
        call: &'static str,
        run: impl FnOnce(
            &Chat,
            &mut Store<StoreState>,
            ResourceAny,
        )
            -> wasmtime::Result<Vec<crate::bindings::chat::exports::galerne::chat::format::Delta>>,
    ) -> Result<Vec<Delta>, ChatError> {
        let limit = self.core.limits().step_deadline;
        let Live {
            store,
            chat,
            resource,
        } = self.state.as_mut().map_err(|error| error.clone())?;
        match self
            .core
            .call(store, call, limit, |store| run(chat, store, *resource))
        {
            Ok(deltas) => Ok(convert::chat::deltas(deltas)),
            Err(error) => {
                self.state = Err(error.clone());
                Err(error.into())
            }
        }
    }
}

impl ChatParser for Parser {
    fn push(&mut self, text: &str) -> Result<Vec<Delta>, ChatError> {
        self.deltas("push", |chat, store, parser| {
            chat.galerne_chat_format().parser().call_push(store, parser, text)
        })
    }

    fn finish(&mut self) -> Result<Vec<Delta>, ChatError> {
        self.deltas("finish", |chat, store, parser| {
            chat.galerne_chat_format().parser().call_finish(store, parser)
        })
    }
}
