//! The OpenAI-compatible routes. Knows engine, tokenizer and guests' traits; not which transport carries a request.

mod admin;
mod chat;
mod completions;
mod error;
mod fields;
mod format;
mod generation;
mod metrics;
mod params;
mod sse;
mod state;
mod stop;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Request, State};
use axum::http::{HeaderName, HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use serde_json::{Value, json};

pub use error::ApiError;
pub use state::{ApiLimits, ApiState, ServedModel};

use crate::deployments::DEFAULT_TENANT;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_BYTES_MAX: usize = 128;

/// All routes over this state.
pub fn router(state: Arc<ApiState>) -> Router {
    Router::new()
        .route("/v1/chat/completions", post(chat::chat))
        .route("/v1/completions", post(completions::completions))
        .route("/v1/models", get(models))
        .route("/v1/models/{id}", get(model))
        .nest("/v1/admin", admin::routes(&state))
        .route("/health/live", get(|| async { Json(json!({"status": "live"})) }))
        .route("/health/ready", get(ready))
        .route("/metrics", get(metrics::metrics))
        .fallback(|method: Method, uri: Uri| async move { ApiError::no_route(method.as_str(), uri.path()) })
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
            ApiError::no_method(method.as_str(), uri.path())
        })
        .layer(DefaultBodyLimit::max(state.limits().body_bytes_max))
        .layer(middleware::from_fn_with_state(Arc::clone(&state), request_id))
        .with_state(state)
}

/// Gives each response an id to ask about: the client's own if it is sane.
async fn request_id(State(state): State<Arc<ApiState>>, request: Request, next: Next) -> Response {
    let own = request
        .headers()
        .get(REQUEST_ID)
        .filter(|id| id.len() <= REQUEST_ID_BYTES_MAX)
        .cloned();
    let mut response = next.run(request).await;
    let id = own.or_else(|| HeaderValue::from_str(&format!("req-{:016x}", state.unique())).ok());
    if let Some(id) = id {
        response.headers_mut().insert(REQUEST_ID, id);
    }
    response
}

async fn models(State(state): State<Arc<ApiState>>) -> Json<Value> {
    let models = state.models().values().map(|model| describe(model));
    let deployments = state.deployments().stable(DEFAULT_TENANT);
    let deployments = deployments.iter().filter_map(|live| {
        let deployment = &live.published.deployment;
        let mut described = describe(state.models().get(&deployment.model)?);
        described["id"] = json!(deployment.name);
        described["parent"] = json!(deployment.model);
        Some(described)
    });
    let data: Vec<Value> = models.chain(deployments).collect();
    Json(json!({"object": "list", "data": data}))
}

async fn model(State(state): State<Arc<ApiState>>, Path(id): Path<String>) -> Result<Json<Value>, ApiError> {
    let target = state.target(&id)?;
    let mut described = describe(&target.model);
    described["id"] = json!(id);
    Ok(Json(described))
}

fn describe(model: &ServedModel) -> Value {
    json!({"id": model.name, "object": "model", "created": model.created_unix_s, "owned_by": "galerne",
        "max_model_len": model.engine.context_tokens_max()})
}

/// Ready only while requests are taken and every engine lives.
async fn ready(State(state): State<Arc<ApiState>>) -> Response {
    let alive = state.models().values().all(|model| model.engine.is_alive());
    if state.is_ready() && alive {
        Json(json!({"status": "ready"})).into_response()
    } else {
        ApiError::not_ready().into_response()
    }
}

fn body_bytes(body: Result<Bytes, BytesRejection>) -> Result<Bytes, ApiError> {
    body.map_err(|rejection| {
        let status = rejection.status();
        let message = if status == StatusCode::PAYLOAD_TOO_LARGE {
            "body: larger than this host takes".to_owned()
        } else {
            format!("body: {}", rejection.body_text())
        };
        ApiError::body(status, message)
    })
}

fn parse_body(body: Result<Bytes, BytesRejection>) -> Result<Value, ApiError> {
    let body = body_bytes(body)?;
    serde_json::from_slice(&body).map_err(|error| ApiError::invalid(format!("body: expected JSON: {error}")))
}

/// Runs guest calls and tokenizing off the async threads.
async fn blocking<T, E, F>(work: F) -> Result<T, ApiError>
where
    F: FnOnce() -> Result<T, E> + Send + 'static,
    T: Send + 'static,
    E: Into<ApiError> + Send + 'static,
{
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result.map_err(Into::into),
        Err(error) => Err(ApiError::internal(format!("a task of the host failed: {error}"))),
    }
}

fn now_unix_s() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}
