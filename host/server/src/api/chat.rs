//! `POST /v1/chat/completions`.

mod agent;
mod answer;
mod filters;
mod guests;
mod request;

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use galerne_core::filter::RequestInfo;

use self::answer::{ChatAnswer, Head};
use self::guests::Guests;
use super::error::ApiError;
use super::fields::Fields;
use super::generation::Generation;
use super::sse;
use super::state::ApiState;
use super::{blocking, parse_body};

/// Tells which version of a deployment answered.
const DEPLOYMENT: HeaderName = HeaderName::from_static("x-galerne-deployment");

pub(super) async fn chat(
    State(state): State<Arc<ApiState>>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let mut body = parse_body(body)?;
    let name = Fields::of(&body, "")?.required_text("model")?.to_owned();
    let target = state.target(&name)?;
    target.fill_in_defaults(&mut body);
    let request = request::read(&Fields::of(&body, "")?, &state, &target)?;
    let head = Head {
        id: format!("chatcmpl-{:016x}", state.unique()),
        created: super::now_unix_s(),
        model: name,
    };
    let info = RequestInfo {
        id: head.id.clone(),
        model: head.model.clone(),
    };
    let (params, logprobs) = (request.params.clone(), request.logprobs);
    let (guests, turn) = {
        let target = target.clone();
        blocking(move || Guests::start(target, request, &info)).await?
    };
    let prompt_token_ids = params.return_token_ids.then(|| turn.prompt.clone());
    let generation = Generation::start(
        &state,
        &target.model,
        &params,
        turn.prompt,
        turn.decoding,
        logprobs,
    )?;
    let stream = params.stream;
    let answer = ChatAnswer::new(head, guests, generation, params, logprobs, prompt_token_ids);
    let mut response = if stream {
        sse::respond(answer)
    } else {
        answer.whole().await?
    };
    if let Some(live) = &target.live
        && let Ok(label) = HeaderValue::from_str(&live.label())
    {
        response.headers_mut().insert(DEPLOYMENT, label);
    }
    Ok(response)
}
