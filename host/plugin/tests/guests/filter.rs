//! A filter written in WebAssembly text, and requests for it. Knows no test.

use galerne_core::chat::{Message, ToolCall, ToolSpec};
use galerne_core::filter::{FilterRequest, RequestInfo};
use galerne_core::guest::FilterSession;
use galerne_plugin::PluginHost;

use super::{COMMON, component, component_with, words};

/// What a test changes in a filter. Each body leaves the address of its function's result; an ok result or a pass is at
/// 64, a result of `on-text` and `finish` is built at 128.
pub(crate) struct Filter<'a> {
    /// Body of `create`.
    pub(crate) create: &'a str,
    /// Body of `on-request`.
    pub(crate) on_request: &'a str,
    /// Body of `on-text`: the channel is in locals 1 and 2, the text's address and length in 3 and 4.
    pub(crate) on_text: &'a str,
    /// Body of `finish`, with the same locals.
    pub(crate) finish: &'a str,
}

impl Default for Filter<'_> {
    fn default() -> Self {
        Self {
            create: "(i32.store (i32.const 68) (call $new (i32.const 7))) (i32.const 64)",
            on_request: "(i32.const 96)",
            on_text: "(call $passage (local.get 3) (local.get 4) (local.get 4))",
            finish: "(call $passage (local.get 3) (local.get 4) (i32.const 0))",
        }
    }
}

impl Filter<'_> {
    /// The component.
    pub(crate) fn component(&self) -> Vec<u8> {
        component("filter", "filter", &self.module(""))
    }

    /// The component of one that imports a log as `$log`, called with a level and a line.
    pub(crate) fn logging_component(&self) -> Vec<u8> {
        let module =
            self.module(r#"(import "galerne:log/logging@0.1.0" "log" (func $log (param i32 i32 i32)))"#);
        component_with("filter", "filter", "log", &module)
    }

    fn module(&self, imports: &str) -> String {
        let Self {
            create,
            on_request,
            on_text,
            finish,
        } = self;
        let interface = "galerne:filter/filtering@0.1.0";
        format!(
            r#"(module
                {imports}
                (import "[export]{interface}" "[resource-new]session" (func $new (param i32) (result i32)))
                (memory (export "memory") 4) {COMMON}
                (func $passage (param i32 i32 i32) (result i32)
                    (call $reset)
                    (i32.store (i32.const 128) (i32.const 0))
                    (i32.store (i32.const 132) (local.get 0))
                    (i32.store (i32.const 136) (local.get 1))
                    (i32.store (i32.const 140) (local.get 2))
                    (i32.const 128))
                (func $refusal (param i32) (result i32)
                    (i32.store (i32.const 128) (i32.const 1))
                    (i32.store (i32.const 132) (local.get 0))
                    (i32.store (i32.const 136) (i32.const 192))
                    (i32.store (i32.const 140) (i32.const 2))
                    (i32.const 128))
                (func (export "{interface}#[static]session.create") (param i32 i32 i32 i32 i32 i32) (result i32)
                    {create})
                (func (export "{interface}#[method]session.on-request") (param i32 i32 i32 i32 i32) (result i32)
                    {on_request})
                (func (export "{interface}#[method]session.on-text") (param i32 i32 i32 i32 i32) (result i32)
                    {on_text})
                (func (export "{interface}#[method]session.finish") (param i32 i32 i32 i32 i32) (result i32)
                    {finish})
                (data (i32.const 64) "{zeros}")
                (data (i32.const 96) "{zeros}")
                (data (i32.const 192) "no"))"#,
            zeros = words(&[0; 5]),
        )
    }

    /// A session of this filter, called "evil".
    pub(crate) fn session(&self, host: &PluginHost) -> Box<dyn FilterSession> {
        let guest = host.load_filter("evil", &self.component()).expect("it fits");
        guest.session("{}", &info()).expect("a session")
    }
}

/// Some request's.
pub(crate) fn info() -> RequestInfo {
    RequestInfo {
        id: "chatcmpl-1".to_owned(),
        model: "smollm2".to_owned(),
    }
}

/// A request with one of everything.
pub(crate) fn request() -> FilterRequest {
    let call = ToolCall {
        id: "call-1".to_owned(),
        name: "add".to_owned(),
        arguments_json: "{\"a\": \"é\"}".to_owned(),
    };
    FilterRequest {
        messages: vec![
            user("hello"),
            Message {
                role: "assistant".to_owned(),
                tool_calls: vec![call],
                ..user("")
            },
            Message {
                role: "tool".to_owned(),
                tool_call_id: Some("call-1".to_owned()),
                ..user("2")
            },
        ],
        tools: vec![ToolSpec {
            name: "add".to_owned(),
            description: "adds".to_owned(),
            parameters_json: "{}".to_owned(),
        }],
    }
}

/// A user's message.
pub(crate) fn user(content: &str) -> Message {
    Message {
        role: "user".to_owned(),
        content: content.to_owned(),
        tool_calls: vec![],
        tool_call_id: None,
    }
}
