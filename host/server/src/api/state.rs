//! What the routes share: models, samplers, readiness, counters.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use galerne_core::grammar::GrammarFactory;
use galerne_core::guest::{ChatFormat, SamplerFactory};
use galerne_core::ids::{TenantId, TenantSalt, TokenId};
use galerne_core::limits::GuestLimits;
use galerne_engine::handle::EngineHandle;
use galerne_store::tokenizer::Tokenizer;
use serde_json::Value;

use super::error::ApiError;
use super::metrics::Metrics;
use crate::deployments::{DEFAULT_TENANT, Deployments, Live};

/// A model as the routes see it.
pub struct ServedModel {
    /// What clients put in `model`.
    pub name: String,
    /// When its package was made, seconds since 1970.
    pub created_unix_s: u64,
    /// Runs its sequences.
    pub engine: EngineHandle,
    /// Text to tokens and back.
    pub tokenizer: Arc<Tokenizer>,
    /// Messages to prompts, answers to parts.
    pub chat: Arc<dyn ChatFormat>,
    /// What its answers can be made to match.
    pub grammars: Arc<dyn GrammarFactory>,
    /// The template text of its tokenizer configuration.
    pub template: Option<String>,
    /// Tokens that end an answer.
    pub stop_tokens: Vec<TokenId>,
    /// Token a text prompt begins with, where the model wants one.
    pub prompt_prefix: Option<TokenId>,
}

/// Bounds of the routes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ApiLimits {
    /// Bytes of a request body.
    pub body_bytes_max: usize,
    /// Stop strings of one request.
    pub stops_max: usize,
    /// Messages of one conversation.
    pub messages_max: usize,
    /// Entries of `logit_bias`.
    pub biases_max: usize,
    /// Tokens that reach an answer's guests together at most, where several have come since they were last called. Of one
    /// token each, calls are the same on a slow machine and a fast one.
    pub piece_tokens_max: usize,
    /// Bytes of a component that is pushed.
    pub component_bytes_max: usize,
}

impl Default for ApiLimits {
    fn default() -> Self {
        Self {
            body_bytes_max: 4 << 20,
            stops_max: 16,
            messages_max: 4_096,
            biases_max: 1_024,
            piece_tokens_max: usize::MAX,
            component_bytes_max: GuestLimits::default().component_bytes_max,
        }
    }
}

/// What answers a request: a model alone, or within a deployment.
#[derive(Clone)]
pub(super) struct Target {
    /// Runs the sequences.
    pub(super) model: Arc<ServedModel>,
    /// The version of the deployment the request named. It stays this one to the request's end.
    pub(super) live: Option<Arc<Live>>,
}

impl Target {
    /// Gives fields that a request leaves out the deployment's values.
    pub(super) fn fill_in_defaults(&self, body: &mut Value) {
        let (Some(live), Some(fields)) = (&self.live, body.as_object_mut()) else {
            return;
        };
        for (field, value) in &live.published.deployment.defaults {
            let given = fields.get(field).is_some_and(|given| !given.is_null());
            if !given {
                fields.insert(field.clone(), value.clone());
            }
        }
    }
}

/// What the routes share.
pub struct ApiState {
    models: BTreeMap<String, Arc<ServedModel>>,
    samplers: BTreeMap<String, Arc<dyn SamplerFactory>>,
    deployments: Deployments,
    admin_token: Option<String>,
    limits: ApiLimits,
    ready: AtomicBool,
    salt: TenantSalt,
    random: RandomState,
    counter: AtomicU64,
    metrics: Metrics,
}

impl ApiState {
    /// Not ready until told so. Without an `admin_token` nobody may use `/v1/admin`.
    #[must_use]
    pub fn new(
        models: BTreeMap<String, Arc<ServedModel>>,
        samplers: BTreeMap<String, Arc<dyn SamplerFactory>>,
        deployments: Deployments,
        admin_token: Option<String>,
        limits: ApiLimits,
    ) -> Self {
        let random = RandomState::new();
        let mut salt = [0; 16];
        salt[..8].copy_from_slice(&random.hash_one("salt, first half").to_le_bytes());
        salt[8..].copy_from_slice(&random.hash_one("salt, second half").to_le_bytes());
        Self {
            models,
            samplers,
            deployments,
            admin_token,
            limits,
            ready: AtomicBool::new(false),
            salt: TenantSalt(salt),
            random,
            counter: AtomicU64::new(0),
            metrics: Metrics::default(),
        }
    }

    /// By name.
    #[must_use]
    pub fn models(&self) -> &BTreeMap<String, Arc<ServedModel>> {
        &self.models
    }

    /// Whether requests are taken.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        self.ready.load(Ordering::Acquire)
    }

    /// Starts or stops taking requests; running ones go on.
    pub fn set_ready(&self, ready: bool) {
        self.ready.store(ready, Ordering::Release);
    }

    pub(super) fn limits(&self) -> ApiLimits {
        self.limits
    }

    pub(super) fn metrics(&self) -> &Metrics {
        &self.metrics
    }

    /// Tenants' deployments.
    #[must_use]
    pub fn deployments(&self) -> &Deployments {
        &self.deployments
    }

    pub(super) fn admin_token(&self) -> Option<&str> {
        self.admin_token.as_deref()
    }

    /// What answers requests for this name.
    pub(super) fn target(&self, name: &str) -> Result<Target, ApiError> {
        let draw = u8::try_from(self.unique() % 100).unwrap_or(0);
        let live = self.deployments.find(DEFAULT_TENANT, name, draw);
        let model_name = live
            .as_ref()
            .map_or(name, |live| &live.published.deployment.model);
        if let Some(model) = self.models.get(model_name) {
            let model = Arc::clone(model);
            return Ok(Target { model, live });
        }
        let stable = self.deployments.stable(DEFAULT_TENANT);
        let deployments = stable.iter().map(|live| live.published.deployment.name.as_str());
        let known: Vec<&str> = self
            .models
            .keys()
            .map(String::as_str)
            .chain(deployments)
            .collect();
        Err(ApiError::no_model(name, &known))
    }

    pub(super) fn sampler(&self, name: &str) -> Result<&Arc<dyn SamplerFactory>, ApiError> {
        self.samplers.get(name).ok_or_else(|| {
            let known: Vec<&str> = self.samplers.keys().map(String::as_str).collect();
            ApiError::field(
                "sampler.name",
                &format!("one of: {}", known.join(", ")),
                format!("\"{name}\""),
            )
        })
    }

    /// One tenant until keys exist; its salt is new with each start.
    pub(super) fn tenant(&self) -> (TenantId, TenantSalt) {
        (TenantId(0), self.salt)
    }

    /// A number no earlier call gave, not guessable from outside.
    pub(super) fn unique(&self) -> u64 {
        self.random.hash_one(self.counter.fetch_add(1, Ordering::Relaxed))
    }
}
