//! `POST /v1/chat/completions`.

mod agent;
mod answer;
mod filters;
mod guests;
mod pipeline;
mod request;
mod tools;
mod turns;

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::State;
use axum::extract::rejection::BytesRejection;
use axum::http::{HeaderName, HeaderValue};
use axum::response::Response;
use galerne_core::filter::RequestInfo;

use self::answer::{ChatAnswer, Head};
use self::guests::Guests;
use self::pipeline::PipelineRun;
use self::request::ChatRequest;
use self::turns::Turns;
use super::error::ApiError;
use super::fields::Fields;
use super::state::{ApiState, Target};
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
    state.metrics().chosen(&target);
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
    let mut response = if target.live.as_ref().is_some_and(|live| live.pipeline.is_some()) {
        piped(&state, &target, request, head, info).await?
    } else {
        turned(&state, &target, request, head, info).await?
    };
    if let Some(live) = &target.live
        && let Ok(label) = HeaderValue::from_str(&live.label())
    {
        response.headers_mut().insert(DEPLOYMENT, label);
    }
    Ok(response)
}

/// The model answers, and calls the deployment's tools, if it has any.
async fn turned(
    state: &Arc<ApiState>,
    target: &Target,
    request: ChatRequest,
    head: Head,
    info: RequestInfo,
) -> Result<Response, ApiError> {
    let (params, logprobs) = (request.params.clone(), request.logprobs);
    let (guests, turn) = {
        let target = target.clone();
        blocking(move || Guests::start(target, request, &info)).await?
    };
    let prompt_token_ids = params.return_token_ids.then(|| turn.prompt.clone());
    let turns = Turns::start(state, &target.model, guests, turn, params.clone(), logprobs)?;
    let answer = ChatAnswer::new(head, turns, params, logprobs, prompt_token_ids);
    answer.respond().await
}

/// The deployment's pipeline answers.
async fn piped(
    state: &Arc<ApiState>,
    target: &Target,
    request: ChatRequest,
    head: Head,
    info: RequestInfo,
) -> Result<Response, ApiError> {
    let params = request.params.clone();
    let run = {
        let (state, target) = (Arc::clone(state), target.clone());
        blocking(move || PipelineRun::start(&state, target, request, info)).await?
    };
    let answer = ChatAnswer::new(head, run.begun().await?, params, None, None);
    answer.respond().await
}
