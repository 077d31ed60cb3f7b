//! `POST /v1/completions`: text or token ids in, text out, no chat format.

use std::sync::Arc;

use axum::Json;
use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::response::{IntoResponse as _, Response};
use galerne_core::ids::TokenId;
use serde_json::{Map, Value, json};

use super::error::ApiError;
use super::fields::{Fields, short};
use super::generation::{Generation, Piece, token_text};
use super::params::Params;
use super::sse::{self, Answer, Frame};
use super::state::{ApiState, ServedModel};
use super::{blocking, parse_body};

/// OpenAI's default, unlike chat's, is short.
const TOKENS_MAX_DEFAULT: u32 = 16;

enum Prompt {
    Text(String),
    Tokens(Vec<TokenId>),
}

pub(super) async fn completions(
    State(state): State<Arc<ApiState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let mut body = parse_body(body)?;
    let name = Fields::of(&body, "")?.required_text("model")?.to_owned();
    let target = state.target(&name)?;
    state.metrics().chosen(&target);
    target.fill_in_defaults(&mut body);
    let fields = Fields::of(&body, "")?;
    if let Some(live) = &target.live
        && !(live.filters.is_empty() && live.tools.is_empty() && live.pipeline.is_none())
    {
        return Err(ApiError::field(
            "model",
            "a deployment without filters, tools and pipeline, which work on messages: use /v1/chat/completions",
            format!("\"{name}\""),
        ));
    }
    let mut params = Params::read(&fields, &state, &target)?;
    let model = Arc::clone(&target.model);
    params.tokens_max = params.tokens_max.or(Some(TOKENS_MAX_DEFAULT));
    if fields.text("suffix")?.is_some_and(|suffix| !suffix.is_empty()) {
        return Err(ApiError::field(
            "suffix",
            "nothing (filling in the middle is not supported yet)",
            "a string",
        ));
    }
    let logprobs = fields
        .integer("logprobs", 0, 20)?
        .and_then(|top| u32::try_from(top).ok());
    let echo = fields.flag("echo")?;
    if echo && logprobs.is_some() {
        return Err(ApiError::field(
            "echo",
            "no logprobs with it (not supported yet)",
            "both",
        ));
    }
    let prompt = prompt(&fields)?;
    let (prompt, decoding, params) = {
        let model = Arc::clone(&model);
        blocking(move || {
            let tokens = encode(prompt, &model)?;
            let decoding = params.decoding(&model, &tokens)?;
            Ok::<_, ApiError>((tokens, decoding, params))
        })
        .await?
    };
    let echoed = echo.then(|| model.tokenizer.decode(&prompt));
    let ids = params.return_token_ids.then(|| prompt.clone());
    let generation = Generation::start(&state, &model, &params, prompt, decoding, logprobs)?;
    let answer = TextAnswer {
        generation,
        id: format!("cmpl-{:016x}", state.unique()),
        created: super::now_unix_s(),
        echoed,
        prompt_token_ids: ids,
        return_token_ids: params.return_token_ids,
        include_usage: params.include_usage,
        logprobs: logprobs.is_some(),
        text_offset: 0,
        ended: false,
        done: false,
    };
    if params.stream {
        Ok(sse::respond(answer))
    } else {
        answer.whole().await
    }
}

/// One prompt, as text or token ids, bare or in an array of one.
fn prompt(fields: &Fields<'_>) -> Result<Prompt, ApiError> {
    let value = fields
        .value("prompt")
        .ok_or_else(|| ApiError::field("prompt", "a string or token ids", "nothing"))?;
    let several = || {
        ApiError::field(
            "prompt",
            "one prompt (several at once are not supported yet)",
            "several",
        )
    };
    match value {
        Value::String(text) => Ok(Prompt::Text(text.clone())),
        Value::Array(list) => match list.as_slice() {
            [Value::String(text)] => Ok(Prompt::Text(text.clone())),
            [Value::Array(tokens)] => token_ids(tokens).map(Prompt::Tokens),
            [Value::String(_) | Value::Array(_), ..] => Err(several()),
            tokens => token_ids(tokens).map(Prompt::Tokens),
        },
        other => Err(ApiError::field(
            "prompt",
            "a string or an array of token ids",
            short(other),
        )),
    }
}

fn token_ids(list: &[Value]) -> Result<Vec<TokenId>, ApiError> {
    list.iter()
        .map(|id| {
            id.as_u64()
                .and_then(|id| u32::try_from(id).ok())
                .map(TokenId)
                .ok_or_else(|| ApiError::field("prompt", "token ids", short(id)))
        })
        .collect()
}

fn encode(prompt: Prompt, model: &ServedModel) -> Result<Vec<TokenId>, ApiError> {
    match prompt {
        Prompt::Tokens(tokens) => Ok(tokens),
        // A raw prompt is the caller's own format, so special tokens in it are meant.
        Prompt::Text(text) => {
            let mut tokens: Vec<TokenId> = model.prompt_prefix.into_iter().collect();
            tokens.extend(model.tokenizer.encode_special(&text)?);
            Ok(tokens)
        }
    }
}

struct TextAnswer {
    generation: Generation,
    id: String,
    created: u64,
    echoed: Option<String>,
    prompt_token_ids: Option<Vec<TokenId>>,
    return_token_ids: bool,
    include_usage: bool,
    logprobs: bool,
    text_offset: usize,
    ended: bool,
    done: bool,
}

impl TextAnswer {
    fn body(&self, choices: &Value) -> Value {
        json!({"id": self.id, "object": "text_completion", "created": self.created,
            "model": self.generation.model().name, "choices": choices})
    }

    fn logprobs_of(&mut self, piece: &Piece) -> Value {
        if !self.logprobs {
            return Value::Null;
        }
        let model = self.generation.model();
        let (mut offsets, mut tokens, mut own, mut tops) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut offset = self.text_offset;
        for (token, logprobs) in &piece.logprobs {
            let (text, _) = token_text(model, *token);
            offsets.push(offset);
            offset += text.chars().count();
            tokens.push(text);
            own.push(logprobs.logprob);
            let mut top: Map<String, Value> = logprobs
                .top
                .iter()
                .map(|top| (token_text(model, top.token).0, json!(top.logprob)))
                .collect();
            // OpenAI adds the drawn token where it is not among the best.
            top.entry(token_text(model, *token).0)
                .or_insert(json!(logprobs.logprob));
            tops.push(Value::Object(top));
        }
        self.text_offset = offset;
        json!({"text_offset": offsets, "token_logprobs": own, "tokens": tokens, "top_logprobs": tops})
    }

    async fn whole(mut self) -> Result<Response, ApiError> {
        let mut all = Piece {
            text: self.echoed.take().unwrap_or_default(),
            ..Piece::default()
        };
        while let Some(piece) = self.generation.next().await? {
            all.text.push_str(&piece.text);
            all.tokens.extend(piece.tokens);
            all.logprobs.extend(piece.logprobs);
            all.finish = piece.finish;
        }
        let mut choice = json!({"index": 0, "text": all.text, "logprobs": self.logprobs_of(&all),
            "finish_reason": all.finish});
        if self.return_token_ids {
            choice["token_ids"] = json!(all.tokens);
            choice["prompt_token_ids"] = json!(self.prompt_token_ids);
        }
        let mut body = self.body(&json!([choice]));
        body["usage"] = self.generation.spent().to_json();
        Ok(Json(body).into_response())
    }
}

impl Answer for TextAnswer {
    fn id(&self) -> &str {
        &self.id
    }

    async fn frames(&mut self) -> Result<Option<Vec<Frame>>, ApiError> {
        if self.done {
            return Ok(None);
        }
        if self.ended {
            self.done = true;
            let mut frames = Vec::new();
            if self.include_usage {
                let mut chunk = self.body(&json!([]));
                chunk["usage"] = self.generation.spent().to_json();
                frames.push(Frame::Json(chunk));
            }
            frames.push(Frame::Done);
            return Ok(Some(frames));
        }
        let Some(mut piece) = self.generation.next().await? else {
            self.ended = true;
            return Ok(Some(Vec::new()));
        };
        self.ended = piece.finish.is_some();
        if let Some(echoed) = self.echoed.take() {
            piece.text.insert_str(0, &echoed);
        }
        let carries = self.ended || self.return_token_ids || !piece.logprobs.is_empty();
        if piece.text.is_empty() && !carries {
            return Ok(Some(Vec::new()));
        }
        let mut choice = json!({"index": 0, "text": piece.text, "logprobs": self.logprobs_of(&piece),
            "finish_reason": piece.finish});
        if self.return_token_ids {
            choice["token_ids"] = json!(piece.tokens);
            if let Some(ids) = self.prompt_token_ids.take() {
                choice["prompt_token_ids"] = json!(ids);
            }
        }
        Ok(Some(vec![Frame::Json(self.body(&json!([choice])))]))
    }
}
