//! `/v1/admin`: plugins and deployments of a tenant. Only for whoever holds the host's admin token.

mod logs;

use std::sync::Arc;

use axum::Json;
use axum::Router;
use axum::body::Bytes;
use axum::extract::rejection::BytesRejection;
use axum::extract::{DefaultBodyLimit, Path, Query, Request, State};
use axum::http::{StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse as _, Response};
use axum::routing::{get, post};
use galerne_core::deployment::Deployment;
use galerne_core::limits::HostLimits;
use galerne_store::registry::{RegistryError, Traffic};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use sha2::{Digest as _, Sha256};

use super::blocking;
use super::error::ApiError;
use super::state::ApiState;
use crate::deployments::{DEFAULT_TENANT, DeployError};

/// The routes below `/v1/admin`.
pub(super) fn routes(state: &Arc<ApiState>) -> Router<Arc<ApiState>> {
    Router::new()
        .route("/plugins", get(plugins).post(push))
        .route("/plugins/{name}", get(plugin))
        .route("/deployments", get(list).post(deploy))
        .route("/deployments/{name}", get(show))
        .route("/deployments/{name}/logs", get(logs::logs))
        .route("/deployments/{name}/rollback", post(rollback))
        .route("/deployments/{name}/promote", post(promote))
        .layer(DefaultBodyLimit::max(state.limits().component_bytes_max))
        .layer(middleware::from_fn_with_state(Arc::clone(state), authorize))
}

/// Refuses whoever does not bring the token, before anything of the body is read.
async fn authorize(
    State(state): State<Arc<ApiState>>,
    request: Request,
    next: Next,
) -> Result<Response, ApiError> {
    let brought = request.headers().get(header::AUTHORIZATION);
    let brought = brought.and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
    // Digests are compared: how long the comparison takes says nothing about the token.
    let digest = |text: &str| Sha256::digest(text.as_bytes());
    match (brought, state.admin_token()) {
        (Some(brought), Some(token)) if digest(brought) == digest(token) => Ok(next.run(request).await),
        _ => Err(ApiError::unauthorized(
            "this route needs the host's admin token as \"Authorization: Bearer TOKEN\"; `galerne serve` keeps it in \
             the file admin.token of its data folder",
        )),
    }
}

/// What every route takes in its query.
#[derive(Debug, Deserialize)]
struct Whose {
    tenant: Option<String>,
}

impl Whose {
    fn tenant(self) -> String {
        self.tenant.unwrap_or_else(|| DEFAULT_TENANT.to_owned())
    }
}

#[derive(Debug, Deserialize)]
struct PushQuery {
    name: String,
    version: String,
    tenant: Option<String>,
}

async fn push(
    State(state): State<Arc<ApiState>>,
    Query(query): Query<PushQuery>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    let component = super::body_bytes(body)?;
    let record = blocking(move || {
        let tenant = query.tenant.as_deref().unwrap_or(DEFAULT_TENANT);
        state
            .deployments()
            .push(tenant, &query.name, &query.version, &component)
    })
    .await?;
    Ok((StatusCode::CREATED, Json(record)).into_response())
}

async fn plugins(
    State(state): State<Arc<ApiState>>,
    Query(whose): Query<Whose>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let data = state.deployments().plugins(&whose.tenant())?;
        Ok::<_, DeployError>(Json(json!({"object": "list", "data": data,
            "builtin": state.deployments().builtin()})))
    })
    .await
}

async fn plugin(
    State(state): State<Arc<ApiState>>,
    Path(name): Path<String>,
    Query(whose): Query<Whose>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let mut data = state.deployments().plugins(&whose.tenant())?;
        data.retain(|record| record.name == name);
        if data.is_empty() {
            return Err(ApiError::not_found(format!(
                "no plugin \"{name}\" was pushed; `galerne plugin list` shows what there is"
            )));
        }
        Ok(Json(json!({"object": "list", "data": data})))
    })
    .await
}

#[derive(Debug, Deserialize)]
struct DeployQuery {
    tenant: Option<String>,
    /// Percent of the requests that go to the new version.
    canary: Option<u8>,
}

async fn deploy(
    State(state): State<Arc<ApiState>>,
    Query(query): Query<DeployQuery>,
    body: Result<Bytes, BytesRejection>,
) -> Result<Response, ApiError> {
    if let Some(percent) = query.canary.filter(|percent| !(1..=99).contains(percent)) {
        return Err(ApiError::field("canary", "a percentage from 1 to 99", percent));
    }
    let text = super::body_bytes(body)?;
    let text = std::str::from_utf8(&text).map_err(|_| {
        ApiError::invalid("body: expected the text of a deployment.toml, got bytes that are no UTF-8")
    })?;
    let deployment: Deployment =
        toml::from_str(text).map_err(|error| ApiError::invalid(format!("deployment.toml: {error}")))?;
    let answer = blocking(move || {
        let tenant = query.tenant.as_deref().unwrap_or(DEFAULT_TENANT);
        let (published, traffic) = state.deployments().deploy(tenant, deployment, query.canary)?;
        Ok::<_, DeployError>(json!({"published": published, "traffic": traffic}))
    })
    .await?;
    Ok((StatusCode::CREATED, Json(answer)).into_response())
}

async fn list(
    State(state): State<Arc<ApiState>>,
    Query(whose): Query<Whose>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let data = state.deployments().list(&whose.tenant())?;
        Ok::<_, DeployError>(Json(json!({"object": "list", "data": data})))
    })
    .await
}

#[derive(Debug, Deserialize)]
struct ShowQuery {
    tenant: Option<String>,
    version: Option<u32>,
}

async fn show(
    State(state): State<Arc<ApiState>>,
    Path(name): Path<String>,
    Query(query): Query<ShowQuery>,
) -> Result<Json<Value>, ApiError> {
    blocking(move || {
        let tenant = query.tenant.as_deref().unwrap_or(DEFAULT_TENANT);
        let (record, published) = state.deployments().show(tenant, &name, query.version)?;
        let host = state.deployments().limits();
        let allowance = published.deployment.allowance(host);
        let limits: Map<String, Value> = HostLimits::names()
            .map(|name| {
                (
                    name.to_owned(),
                    json!({"value": allowance.limits.get(name), "host": host.get(name)}),
                )
            })
            .collect();
        Ok::<_, DeployError>(Json(
            json!({"deployment": record, "published": published, "limits": limits}),
        ))
    })
    .await
}

async fn rollback(
    State(state): State<Arc<ApiState>>,
    Path(name): Path<String>,
    Query(whose): Query<Whose>,
) -> Result<Json<Traffic>, ApiError> {
    blocking(move || state.deployments().rollback(&whose.tenant(), &name).map(Json)).await
}

async fn promote(
    State(state): State<Arc<ApiState>>,
    Path(name): Path<String>,
    Query(whose): Query<Whose>,
) -> Result<Json<Traffic>, ApiError> {
    blocking(move || state.deployments().promote(&whose.tenant(), &name).map(Json)).await
}

impl From<DeployError> for ApiError {
    fn from(error: DeployError) -> Self {
        let message = error.to_string();
        match error {
            DeployError::Registry(RegistryError::Io { .. } | RegistryError::Damaged { .. })
            | DeployError::Capabilities(_) => Self::internal(message),
            DeployError::Registry(RegistryError::NoDeployment { .. } | RegistryError::NoVersion { .. }) => {
                Self::not_found(message)
            }
            DeployError::Registry(RegistryError::VersionTaken { .. }) | DeployError::Traffic { .. } => {
                Self::conflict(message)
            }
            DeployError::Registry(RegistryError::Name { .. })
            | DeployError::Deployment(_)
            | DeployError::Model { .. }
            | DeployError::NameOfModel(_)
            | DeployError::Plugin { .. }
            | DeployError::Guest { .. }
            | DeployError::SameFunction { .. }
            | DeployError::Component(_) => Self::invalid(message),
        }
    }
}
