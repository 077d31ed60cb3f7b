//! Errors in OpenAI's shape, with the right status.

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use galerne_core::chat::ChatError;
use galerne_core::filter::{FilterError, Refusal};
use galerne_core::grammar::GrammarError;
use galerne_core::guest::GuestError;
use galerne_core::pipeline::PipelineError;
use galerne_engine::request::{SequenceError, SubmitError};
use galerne_store::tokenizer::TokenizerError;
use serde_json::{Value, json};

/// A refusal or failure a client is told.
#[derive(Debug, Clone, PartialEq)]
pub struct ApiError {
    /// Of the response.
    pub status: StatusCode,
    /// OpenAI's `type`.
    pub kind: &'static str,
    /// What happened and what to do.
    pub message: String,
    /// The field of the request that is wrong.
    pub param: Option<String>,
    /// A word a program can branch on.
    pub code: Option<&'static str>,
    /// When to try again.
    pub retry_after_s: Option<u64>,
}

impl ApiError {
    fn new(status: StatusCode, kind: &'static str, message: impl Into<String>) -> Self {
        Self {
            status,
            kind,
            message: message.into(),
            param: None,
            code: None,
            retry_after_s: None,
        }
    }

    /// The request is wrong as a whole.
    pub(crate) fn invalid(message: impl Into<String>) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "invalid_request_error", message)
    }

    /// One field of the request is wrong.
    pub(crate) fn field(param: impl Into<String>, expected: &str, got: impl std::fmt::Display) -> Self {
        let param = param.into();
        let mut error = Self::invalid(format!("{param}: expected {expected}, got {got}"));
        error.param = Some(param);
        error
    }

    /// No such route.
    pub(crate) fn no_route(method: &str, path: &str) -> Self {
        Self::new(
            StatusCode::NOT_FOUND,
            "invalid_request_error",
            format!("no route {method} {path}"),
        )
    }

    /// The route has other methods.
    pub(crate) fn no_method(method: &str, path: &str) -> Self {
        let message = format!("{path} does not take {method}");
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "invalid_request_error", message)
    }

    /// The body is too large or broke off.
    pub(crate) fn body(status: StatusCode, message: String) -> Self {
        Self::new(status, "invalid_request_error", message)
    }

    /// No such model.
    pub(crate) fn no_model(name: &str, known: &[&str]) -> Self {
        let message = format!("model \"{name}\" is not served here; known: {}", known.join(", "));
        let mut error = Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message);
        error.param = Some("model".to_owned());
        error.code = Some("model_not_found");
        error
    }

    /// Something named in the path does not exist.
    pub(crate) fn not_found(message: impl Into<String>) -> Self {
        Self::new(StatusCode::NOT_FOUND, "invalid_request_error", message)
    }

    /// It contradicts what is.
    pub(crate) fn conflict(message: impl Into<String>) -> Self {
        Self::new(StatusCode::CONFLICT, "invalid_request_error", message)
    }

    /// No or a wrong token.
    pub(crate) fn unauthorized(message: impl Into<String>) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "authentication_error", message)
    }

    /// The host is starting or draining.
    pub(crate) fn not_ready() -> Self {
        let message = "the host is not ready: it is starting or shutting down; try again";
        let mut error = Self::new(StatusCode::SERVICE_UNAVAILABLE, "service_unavailable", message);
        error.retry_after_s = Some(1);
        error
    }

    /// A bug of the host.
    pub(crate) fn internal(message: impl Into<String>) -> Self {
        Self::new(StatusCode::INTERNAL_SERVER_ERROR, "internal_error", message)
    }

    /// The body alone, as it also appears inside a stream.
    pub(crate) fn to_json(&self) -> Value {
        json!({"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code,
            "status": self.status.as_u16()}})
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.to_json())).into_response();
        if let Some(seconds) = self.retry_after_s {
            response
                .headers_mut()
                .insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

impl From<SubmitError> for ApiError {
    fn from(error: SubmitError) -> Self {
        let message = error.to_string();
        match error {
            SubmitError::QueueFull { retry_after_ms, .. } => {
                let mut error = Self::new(StatusCode::TOO_MANY_REQUESTS, "rate_limit_error", message);
                error.retry_after_s = Some(retry_after_ms.div_ceil(1_000).max(1));
                error
            }
            SubmitError::ShuttingDown => Self {
                message,
                ..Self::not_ready()
            },
            SubmitError::PromptTooLong { .. } | SubmitError::NeverFits { .. } => {
                let mut error = Self::invalid(message);
                error.code = Some("context_length_exceeded");
                error
            }
            SubmitError::EmptyPrompt
            | SubmitError::UnknownToken { .. }
            | SubmitError::NoOutput
            | SubmitError::Plan(_) => Self::invalid(message),
        }
    }
}

impl From<SequenceError> for ApiError {
    fn from(error: SequenceError) -> Self {
        let message = error.to_string();
        match error {
            SequenceError::Guest(error) => error.into(),
            SequenceError::Plan(_) | SequenceError::Choice { .. } => {
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, "guest_error", message)
            }
            SequenceError::Grammar(error) => error.into(),
            SequenceError::Device(_) => Self::internal(message),
            SequenceError::EngineStopped => Self {
                message,
                ..Self::not_ready()
            },
        }
    }
}

impl From<GuestError> for ApiError {
    fn from(error: GuestError) -> Self {
        match error {
            GuestError::Refused { message, .. } => Self::invalid(message),
            other => Self::new(
                StatusCode::INTERNAL_SERVER_ERROR,
                "guest_error",
                other.to_string(),
            ),
        }
    }
}

impl From<GrammarError> for ApiError {
    fn from(error: GrammarError) -> Self {
        let message = error.to_string();
        match error {
            GrammarError::Host { .. } => Self::internal(message),
            GrammarError::Source { .. }
            | GrammarError::TooLarge { .. }
            | GrammarError::TooComplex { .. }
            | GrammarError::Stuck { .. } => Self::invalid(message),
        }
    }
}

impl From<ChatError> for ApiError {
    fn from(error: ChatError) -> Self {
        match error {
            ChatError::Messages(text) => {
                let mut error = Self::invalid(format!("messages: {text}"));
                error.param = Some("messages".to_owned());
                error
            }
            ChatError::Guest(error) => error.into(),
        }
    }
}

impl From<FilterError> for ApiError {
    fn from(error: FilterError) -> Self {
        match error {
            FilterError::Refused(refusal) => Self {
                code: Some("content_filter"),
                ..refusal.into()
            },
            FilterError::Guest(error) => error.into(),
        }
    }
}

impl From<PipelineError> for ApiError {
    fn from(error: PipelineError) -> Self {
        match error {
            PipelineError::Refused(refusal) => refusal.into(),
            PipelineError::Guest(error) => error.into(),
        }
    }
}

impl From<Refusal> for ApiError {
    fn from(refusal: Refusal) -> Self {
        let status = StatusCode::from_u16(refusal.status).unwrap_or(StatusCode::FORBIDDEN);
        let kind = match status.is_client_error() {
            true => "invalid_request_error",
            false => "guest_error",
        };
        Self::new(status, kind, refusal.reason)
    }
}

impl From<TokenizerError> for ApiError {
    fn from(error: TokenizerError) -> Self {
        Self::internal(error.to_string())
    }
}
