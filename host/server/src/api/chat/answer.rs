//! A chat answer on its way out, whole or in chunks, whoever writes it.

use axum::Json;
use axum::response::{IntoResponse as _, Response};
use galerne_core::chat::Delta;
use galerne_core::ids::TokenId;
use serde_json::{Map, Value, json};

use super::super::error::ApiError;
use super::super::generation::{Piece, Usage, token_text};
use super::super::params::Params;
use super::super::sse::{self, Answer, Frame};
use super::super::state::ServedModel;
use super::agent::HostCall;

/// A part of the answer to the client.
#[derive(Debug)]
pub(super) enum Part {
    Delta(Delta),
    HostCall(HostCall),
    /// Of a pipeline, beside the answer.
    Event {
        name: String,
        data: Value,
    },
}

/// Who writes the answer.
pub(super) trait Writer: Send + 'static {
    /// The next tokens, if the client may see any, and the parts that came; `None` after those with the finish reason.
    fn next(&mut self) -> impl Future<Output = Result<Option<(Piece, Vec<Part>)>, ApiError>> + Send;
    /// What it took so far.
    fn usage(&self) -> Usage;
    /// Whose tokens they are.
    fn model(&self) -> &ServedModel;
}

/// What every chunk of an answer repeats.
pub(super) struct Head {
    pub(super) id: String,
    pub(super) created: u64,
    pub(super) model: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    First,
    Running,
    Usage,
    Done,
}

/// The answer to one request.
pub(super) struct ChatAnswer<W> {
    writer: W,
    head: Head,
    params: Params,
    logprobs: Option<u32>,
    prompt_token_ids: Option<Vec<TokenId>>,
    calls: usize,
    stage: Stage,
}

impl<W: Writer> ChatAnswer<W> {
    pub(super) fn new(
        head: Head,
        writer: W,
        params: Params,
        logprobs: Option<u32>,
        prompt_token_ids: Option<Vec<TokenId>>,
    ) -> Self {
        Self {
            writer,
            head,
            params,
            logprobs,
            prompt_token_ids,
            calls: 0,
            stage: Stage::First,
        }
    }

    /// As a stream or whole, as the request asks.
    pub(super) async fn respond(self) -> Result<Response, ApiError> {
        if self.params.stream {
            Ok(sse::respond(self))
        } else {
            self.whole().await
        }
    }

    fn finish_reason(&self, piece: &Piece) -> Option<&'static str> {
        piece.finish.map(|reason| {
            if self.calls > 0 && reason == "stop" {
                "tool_calls"
            } else {
                reason
            }
        })
    }

    fn logprobs_of(&self, piece: &Piece) -> Value {
        if self.logprobs.is_none() {
            return Value::Null;
        }
        let model = self.writer.model();
        let entry = |token: TokenId, logprob: f32| {
            let (text, bytes) = token_text(model, token);
            json!({"token": text, "logprob": logprob, "bytes": bytes})
        };
        let content: Vec<Value> = piece
            .logprobs
            .iter()
            .map(|(token, logprobs)| {
                let mut value = entry(*token, logprobs.logprob);
                value["top_logprobs"] = logprobs
                    .top
                    .iter()
                    .map(|top| entry(top.token, top.logprob))
                    .collect();
                value
            })
            .collect();
        json!({"content": content})
    }

    fn call(&mut self, name: &str, arguments_json: &str) -> Value {
        let index = self.calls;
        self.calls += 1;
        let id = format!("call_{}_{index}", self.head.id.trim_start_matches("chatcmpl-"));
        json!({"index": index, "id": id, "type": "function",
            "function": {"name": name, "arguments": arguments_json}})
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        let (mut content, mut reasoning) = (String::new(), String::new());
        let (mut calls, mut host_calls, mut events) = (Vec::new(), Vec::new(), Vec::new());
        let (mut tokens, mut logprobs, mut finish) = (Vec::new(), Vec::new(), None);
        while let Some((piece, parts)) = self.writer.next().await? {
            for part in parts {
                match part {
                    Part::Delta(Delta::Content(text)) => content.push_str(&text),
                    Part::Delta(Delta::Reasoning(text)) => reasoning.push_str(&text),
                    Part::Delta(Delta::ToolCall { name, arguments_json }) => {
                        calls.push(self.call(&name, &arguments_json));
                    }
                    Part::HostCall(call) => host_calls.push(call.to_json()),
                    Part::Event { name, data } => events.push(json!({"name": name, "data": data})),
                }
            }
            finish = self.finish_reason(&piece);
            logprobs.extend(
                self.logprobs_of(&piece)["content"]
                    .as_array()
                    .cloned()
                    .unwrap_or_default(),
            );
            tokens.extend(piece.tokens);
        }
        let mut message = Map::new();
        message.insert("role".to_owned(), json!("assistant"));
        let empty = content.is_empty() && !calls.is_empty();
        message.insert(
            "content".to_owned(),
            if empty { Value::Null } else { json!(content) },
        );
        if !reasoning.is_empty() {
            message.insert("reasoning_content".to_owned(), json!(reasoning));
        }
        if !calls.is_empty() {
            message.insert("tool_calls".to_owned(), json!(calls));
        }
        if !host_calls.is_empty() {
            message.insert("host_tool_calls".to_owned(), json!(host_calls));
        }
        if !events.is_empty() {
            message.insert("pipeline_events".to_owned(), json!(events));
        }
        let logprobs = if self.logprobs.is_some() {
            json!({"content": logprobs})
        } else {
            Value::Null
        };
        let mut choice =
            json!({"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish});
        let mut body = json!({"id": self.head.id, "object": "chat.completion", "created": self.head.created,
            "model": self.head.model, "usage": self.writer.usage().to_json()});
        if self.params.return_token_ids {
            choice["token_ids"] = json!(tokens);
            body["prompt_token_ids"] = json!(self.prompt_token_ids);
        }
        body["choices"] = json!([choice]);
        Ok(Json(body).into_response())
    }

    fn chunk(&self, choices: &Value) -> Value {
        json!({"id": self.head.id, "object": "chat.completion.chunk", "created": self.head.created,
            "model": self.head.model, "choices": choices})
    }

    /// The parts of one piece as chunks; token ids and log-probabilities go with the last of them.
    fn chunks(&mut self, parts: Vec<Part>, piece: &Piece) -> Vec<Value> {
        let mut parts: Vec<Value> = parts
            .into_iter()
            .map(|part| match part {
                Part::Delta(Delta::Content(text)) => json!({"content": text}),
                Part::Delta(Delta::Reasoning(text)) => json!({"reasoning_content": text}),
                Part::Delta(Delta::ToolCall { name, arguments_json }) => {
                    json!({"tool_calls": [self.call(&name, &arguments_json)]})
                }
                Part::HostCall(call) => json!({"host_tool_calls": [call.to_json()]}),
                Part::Event { name, data } => {
                    json!({"pipeline_events": [{"name": name, "data": data}]})
                }
            })
            .collect();
        let finish = self.finish_reason(piece);
        let carries = finish.is_some() || self.params.return_token_ids || !piece.logprobs.is_empty();
        if parts.is_empty() && carries {
            parts.push(json!({}));
        }
        let last = parts.len().saturating_sub(1);
        parts
            .into_iter()
            .enumerate()
            .map(|(index, delta)| {
                let mut choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
                if index == last {
                    choice["finish_reason"] = json!(finish);
                    choice["logprobs"] = self.logprobs_of(piece);
                    if self.params.return_token_ids {
                        choice["token_ids"] = json!(piece.tokens);
                    }
                }
                self.chunk(&json!([choice]))
            })
            .collect()
    }
}

impl<W: Writer> Answer for ChatAnswer<W> {
    fn id(&self) -> &str {
        &self.head.id
    }

    async fn frames(&mut self) -> Result<Option<Vec<Frame>>, ApiError> {
        match self.stage {
            Stage::First => {
                self.stage = Stage::Running;
                let delta = json!({"role": "assistant", "content": ""});
                let choice = json!({"index": 0, "delta": delta, "logprobs": null, "finish_reason": null});
                let mut chunk = self.chunk(&json!([choice]));
                if let Some(ids) = self.prompt_token_ids.take() {
                    chunk["prompt_token_ids"] = json!(ids);
                }
                Ok(Some(vec![Frame::Json(chunk)]))
            }
            Stage::Running => {
                let Some((piece, parts)) = self.writer.next().await? else {
                    self.stage = Stage::Usage;
                    return Ok(Some(Vec::new()));
                };
                if piece.finish.is_some() {
                    self.stage = Stage::Usage;
                }
                Ok(Some(
                    self.chunks(parts, &piece).into_iter().map(Frame::Json).collect(),
                ))
            }
            Stage::Usage => {
                self.stage = Stage::Done;
                let mut frames = Vec::new();
                if self.params.include_usage {
                    let mut chunk = self.chunk(&json!([]));
                    chunk["usage"] = self.writer.usage().to_json();
                    frames.push(Frame::Json(chunk));
                }
                frames.push(Frame::Done);
                Ok(Some(frames))
            }
            Stage::Done => Ok(None),
        }
    }
}
