//! `/v1/admin/deployments/NAME/logs`: what a deployment's guests wrote, once or as it comes.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::{Path, Query, State};
use axum::response::{IntoResponse as _, Response};
use galerne_core::capability::LogTail;
use serde::Deserialize;
use serde_json::json;

use super::super::error::ApiError;
use super::super::sse::{self, Answer, Frame};
use super::super::state::ApiState;
use crate::deployments::DEFAULT_TENANT;

/// How often a log that is followed is looked at. Guests write to memory and wake nobody for it.
const LOOK: Duration = Duration::from_millis(200);

#[derive(Debug, Deserialize)]
pub(super) struct LogQuery {
    tenant: Option<String>,
    /// Lines behind this number only.
    #[serde(default)]
    after: u64,
    /// The newest of these, at most so many; all that are kept without it.
    lines: Option<usize>,
    /// Go on with what comes, as events.
    #[serde(default)]
    follow: bool,
}

pub(super) async fn logs(
    State(state): State<Arc<ApiState>>,
    Path(name): Path<String>,
    Query(query): Query<LogQuery>,
) -> Result<Response, ApiError> {
    let mut reader = Reader {
        state,
        tenant: query.tenant.unwrap_or_else(|| DEFAULT_TENANT.to_owned()),
        name,
        after: query.after,
    };
    let mut tail = reader.read()?;
    let lines_max = query.lines.unwrap_or(usize::MAX);
    tail.lines.drain(..tail.lines.len().saturating_sub(lines_max));
    if query.follow {
        return Ok(sse::respond(Following {
            reader,
            first: Some(tail),
            over: false,
        }));
    }
    Ok(Json(json!({"object": "list", "data": tail.lines, "last": tail.last})).into_response())
}

/// Where somebody reads in a log.
struct Reader {
    state: Arc<ApiState>,
    tenant: String,
    name: String,
    /// The last number read.
    after: u64,
}

impl Reader {
    fn read(&mut self) -> Result<LogTail, ApiError> {
        let deployments = self.state.deployments();
        let tail = deployments.log_after(&self.tenant, &self.name, self.after);
        let tail = tail.ok_or_else(|| {
            ApiError::not_found(format!(
                "no deployment \"{}\" is live; `galerne deployments` shows what there is",
                self.name
            ))
        })?;
        self.after = tail.lines.last().map_or(self.after, |line| line.number);
        Ok(tail)
    }
}

/// A log that is read as it is written.
struct Following {
    reader: Reader,
    first: Option<LogTail>,
    over: bool,
}

impl Answer for Following {
    fn id(&self) -> &str {
        &self.reader.name
    }

    /// Ends when the host stops: nobody must wait for who only looks on.
    async fn frames(&mut self) -> Result<Option<Vec<Frame>>, ApiError> {
        if let Some(tail) = self.first.take() {
            return Ok(Some(frames(&tail)));
        }
        if self.over {
            return Ok(None);
        }
        loop {
            let tail = self.reader.read()?;
            if !tail.lines.is_empty() {
                return Ok(Some(frames(&tail)));
            }
            if !self.reader.state.is_ready() {
                self.over = true;
                return Ok(Some(vec![Frame::Done]));
            }
            tokio::time::sleep(LOOK).await;
        }
    }
}

fn frames(tail: &LogTail) -> Vec<Frame> {
    tail.lines.iter().map(|line| Frame::Json(json!(line))).collect()
}
