//! `POST /v1/chat/completions`.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use galerne_core::chat::{ChatError, ChatOptions, Delta, Message, ToolCall, ToolSpec};
use galerne_core::guest::ChatParser;
use galerne_core::ids::TokenId;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, short};
use super::format::Verbatim;
use super::generation::{Generation, Piece, token_text};
use super::params::{Decoding, Params};
use super::sse::{self, Answer, Frame};
use super::state::{ApiState, ServedModel};
use super::{blocking, parse_body};

/// A chat request, checked.
struct ChatRequest {
    params: Params,
    messages: Vec<Message>,
    tools: Vec<ToolSpec>,
    logprobs: Option<u32>,
}

pub(super) async fn chat(
    State(state): State<Arc<ApiState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let body = parse_body(body)?;
    let fields = Fields::of(&body, "")?;
    let model = Arc::clone(state.model(fields.required_text("model")?)?);
    let request = read(&fields, &state, &model)?;
    let (prompt, decoding, parser, request) = prepare(&state, &model, request).await?;
    let ids = request.params.return_token_ids.then(|| prompt.clone());
    let generation = Generation::start(
        &state,
        &model,
        &request.params,
        prompt,
        decoding,
        request.logprobs,
    )?;
    let id = format!("chatcmpl-{:016x}", state.unique());
    let answer = ChatAnswer {
        generation,
        parser: Some(parser),
        head: Head {
            id,
            created: super::now_unix_s(),
            model: model.name.clone(),
        },
        logprobs: request.logprobs.is_some(),
        prompt_token_ids: ids,
        return_token_ids: request.params.return_token_ids,
        include_usage: request.params.include_usage,
        calls: 0,
        stage: Stage::First,
    };
    if request.params.stream {
        Ok(sse::respond(answer))
    } else {
        answer.whole().await
    }
}

fn read(fields: &Fields<'_>, state: &ApiState, model: &ServedModel) -> Result<ChatRequest, ApiError> {
    let params = Params::read(fields, state, model)?;
    let list = fields
        .list("messages")?
        .ok_or_else(|| ApiError::field("messages", "an array", "nothing"))?;
    if list.is_empty() || list.len() > state.limits().messages_max {
        let expected = format!("from 1 to {} messages", state.limits().messages_max);
        return Err(ApiError::field("messages", &expected, list.len()));
    }
    let messages = list
        .iter()
        .enumerate()
        .map(|(index, value)| message(value, &format!("messages[{index}]")))
        .collect::<Result<_, _>>()?;
    let logprobs = match (fields.flag("logprobs")?, fields.integer("top_logprobs", 0, 20)?) {
        (true, top) => Some(u32::try_from(top.unwrap_or(0)).unwrap_or(0)),
        (false, None | Some(0)) => None,
        (false, Some(_)) => {
            return Err(ApiError::field(
                "top_logprobs",
                "logprobs to be true with it",
                "false",
            ));
        }
    };
    let tools = tools(fields)?;
    if let Some(format) = params.format.as_ref().filter(|_| !tools.is_empty()) {
        return Err(ApiError::field(
            format.param(),
            "no tools with it, or tool_choice none (an answer that may call tools cannot be kept to a format yet)",
            "both",
        ));
    }
    Ok(ChatRequest {
        params,
        messages,
        tools,
        logprobs,
    })
}

fn message(value: &Value, path: &str) -> Result<Message, ApiError> {
    let fields = Fields::of(value, path)?;
    let role = match fields.required_text("role")? {
        "developer" => "system",
        role @ ("system" | "user" | "assistant" | "tool") => role,
        other => {
            let expected = "system, developer, user, assistant or tool";
            return Err(ApiError::field(
                format!("{path}.role"),
                expected,
                format!("\"{other}\""),
            ));
        }
    };
    let calls = match fields.list("tool_calls")? {
        None => Vec::new(),
        Some(calls) => calls
            .iter()
            .map(|call| tool_call(call, path))
            .collect::<Result<_, _>>()?,
    };
    let content = match fields.value("content") {
        Some(content) => text_of(content, &format!("{path}.content"))?,
        None if role == "assistant" => String::new(),
        None => return Err(ApiError::field(format!("{path}.content"), "a string", "nothing")),
    };
    Ok(Message {
        role: role.to_owned(),
        content,
        tool_calls: calls,
        tool_call_id: fields.text("tool_call_id")?.map(str::to_owned),
    })
}

/// A string, or parts of which all are text.
fn text_of(content: &Value, path: &str) -> Result<String, ApiError> {
    match content {
        Value::String(text) => Ok(text.clone()),
        Value::Array(parts) => parts
            .iter()
            .map(|part| match (part["type"].as_str(), part["text"].as_str()) {
                (Some("text"), Some(text)) => Ok(text),
                _ => Err(ApiError::field(path, "text parts only", short(&part["type"]))),
            })
            .collect(),
        other => Err(ApiError::field(
            path,
            "a string or an array of text parts",
            short(other),
        )),
    }
}

fn tool_call(value: &Value, path: &str) -> Result<ToolCall, ApiError> {
    let path = format!("{path}.tool_calls");
    let call = Fields::of(value, &path)?;
    let inner = call.value("function").unwrap_or(&Value::Null);
    let path = format!("{path}.function");
    let function = Fields::of(inner, &path)?;
    Ok(ToolCall {
        id: call.text("id")?.unwrap_or_default().to_owned(),
        name: function.required_text("name")?.to_owned(),
        arguments_json: function.text("arguments")?.unwrap_or("{}").to_owned(),
    })
}

fn tools(fields: &Fields<'_>) -> Result<Vec<ToolSpec>, ApiError> {
    let choice = match fields.value("tool_choice") {
        None => "auto",
        Some(Value::String(choice)) if choice == "auto" || choice == "none" => choice,
        Some(other) => {
            return Err(ApiError::field(
                "tool_choice",
                "auto or none (forced calls are not supported yet)",
                short(other),
            ));
        }
    };
    let list = match fields.list("tools")? {
        Some(list) if choice == "auto" => list,
        _ => return Ok(Vec::new()),
    };
    list.iter()
        .map(|tool| {
            let tool = Fields::of(&tool["function"], "tools.function")?;
            let parameters = tool
                .value("parameters")
                .map_or_else(|| json!({"type": "object"}).to_string(), Value::to_string);
            Ok(ToolSpec {
                name: tool.required_text("name")?.to_owned(),
                description: tool.text("description")?.unwrap_or_default().to_owned(),
                parameters_json: parameters,
            })
        })
        .collect()
}

type Prepared = (Vec<TokenId>, Decoding, Box<dyn ChatParser>, ChatRequest);

/// Runs the guests that come before the first token, off the async threads.
async fn prepare(
    state: &Arc<ApiState>,
    model: &Arc<ServedModel>,
    request: ChatRequest,
) -> Result<Prepared, ApiError> {
    let (state, model) = (Arc::clone(state), Arc::clone(model));
    blocking(move || {
        let options = ChatOptions {
            add_generation_prompt: true,
            template: model.template.clone(),
        };
        let segments = model.chat.render(&request.messages, &request.tools, &options)?;
        let prompt = model.tokenizer.encode_segments(&segments)?;
        let decoding = request.params.decoding(&state, &model)?;
        let parser = match decoding.grammar {
            None => model.chat.parser(&options)?,
            Some(_) => Box::new(Verbatim),
        };
        Ok::<_, ApiError>((prompt, decoding, parser, request))
    })
    .await
}

/// What every chunk of an answer repeats.
struct Head {
    id: String,
    created: u64,
    model: String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    First,
    Running,
    Usage,
    Done,
}

struct ChatAnswer {
    generation: Generation,
    /// Away while a guest call runs; gone after a failed one.
    parser: Option<Box<dyn ChatParser>>,
    head: Head,
    logprobs: bool,
    prompt_token_ids: Option<Vec<TokenId>>,
    return_token_ids: bool,
    include_usage: bool,
    calls: usize,
    stage: Stage,
}

impl ChatAnswer {
    async fn parse(&mut self, piece: &Piece) -> Result<Vec<Delta>, ApiError> {
        let finished = piece.finish.is_some();
        if piece.text.is_empty() && !finished {
            return Ok(Vec::new());
        }
        let Some(mut parser) = self.parser.take() else {
            return Err(ApiError::internal("the answer's parser is gone"));
        };
        let text = piece.text.clone();
        let (parser, deltas) = blocking(move || {
            let mut deltas = if text.is_empty() {
                Vec::new()
            } else {
                parser.push(&text)?
            };
            if finished {
                deltas.extend(parser.finish()?);
            }
            Ok::<_, ChatError>((parser, deltas))
        })
        .await?;
        self.parser = Some(parser);
        Ok(deltas)
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
        if !self.logprobs {
            return Value::Null;
        }
        let model = self.generation.model();
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
        let (mut content, mut reasoning, mut calls) = (String::new(), String::new(), Vec::new());
        let (mut tokens, mut logprobs, mut finish) = (Vec::new(), Vec::new(), None);
        while let Some(piece) = self.generation.next().await? {
            for delta in self.parse(&piece).await? {
                match delta {
                    Delta::Content(text) => content.push_str(&text),
                    Delta::Reasoning(text) => reasoning.push_str(&text),
                    Delta::ToolCall { name, arguments_json } => calls.push(self.call(&name, &arguments_json)),
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
        let logprobs = if self.logprobs {
            json!({"content": logprobs})
        } else {
            Value::Null
        };
        let mut choice =
            json!({"index": 0, "message": message, "logprobs": logprobs, "finish_reason": finish});
        let mut body = json!({"id": self.head.id, "object": "chat.completion", "created": self.head.created,
            "model": self.head.model, "usage": self.generation.usage()});
        if self.return_token_ids {
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

    /// The deltas of one piece as chunks; token ids and log-probabilities go with the last of them.
    fn chunks(&mut self, deltas: Vec<Delta>, piece: &Piece) -> Vec<Value> {
        let mut parts: Vec<Value> = deltas
            .into_iter()
            .map(|delta| match delta {
                Delta::Content(text) => json!({"content": text}),
                Delta::Reasoning(text) => json!({"reasoning_content": text}),
                Delta::ToolCall { name, arguments_json } => {
                    json!({"tool_calls": [self.call(&name, &arguments_json)]})
                }
            })
            .collect();
        let finish = self.finish_reason(piece);
        let carries = finish.is_some() || self.return_token_ids || !piece.logprobs.is_empty();
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
                    if self.return_token_ids {
                        choice["token_ids"] = json!(piece.tokens);
                    }
                }
                self.chunk(&json!([choice]))
            })
            .collect()
    }
}

impl Answer for ChatAnswer {
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
                let Some(piece) = self.generation.next().await? else {
                    self.stage = Stage::Usage;
                    return Ok(Some(Vec::new()));
                };
                let deltas = self.parse(&piece).await?;
                if piece.finish.is_some() {
                    self.stage = Stage::Usage;
                }
                Ok(Some(
                    self.chunks(deltas, &piece).into_iter().map(Frame::Json).collect(),
                ))
            }
            Stage::Usage => {
                self.stage = Stage::Done;
                let mut frames = Vec::new();
                if self.include_usage {
                    let mut chunk = self.chunk(&json!([]));
                    chunk["usage"] = self.generation.usage();
                    frames.push(Frame::Json(chunk));
                }
                frames.push(Frame::Done);
                Ok(Some(frames))
            }
            Stage::Done => Ok(None),
        }
    }
}
