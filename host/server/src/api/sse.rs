//! Server-sent events: frames of an answer with ids, `[DONE]` last, comments while nothing comes.

use std::collections::VecDeque;
use std::convert::Infallible;
use std::time::Duration;

use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use futures_util::stream::unfold;
use serde_json::Value;

use super::error::ApiError;

/// Keeps proxies from closing a connection whose answer is queued or in prefill.
const KEEP_ALIVE: Duration = Duration::from_secs(15);

/// One event of a stream.
pub(super) enum Frame {
    Json(Value),
    Done,
}

/// An answer that is sent as it comes.
pub(super) trait Answer: Send + 'static {
    /// The response's id; events are numbered under it.
    fn id(&self) -> &str;
    /// The next frames, maybe none yet; `None` after the last.
    fn frames(&mut self) -> impl Future<Output = Result<Option<Vec<Frame>>, ApiError>> + Send;
}

struct Stream<A> {
    answer: A,
    ready: VecDeque<Frame>,
    events: u64,
    over: bool,
}

impl<A: Answer> Stream<A> {
    async fn next(mut self) -> Option<(Result<Event, Infallible>, Self)> {
        loop {
            if let Some(frame) = self.ready.pop_front() {
                let event = Event::default().id(format!("{}-{}", self.answer.id(), self.events));
                self.events += 1;
                let event = match frame {
                    Frame::Json(value) => event.data(value.to_string()),
                    Frame::Done => event.data("[DONE]"),
                };
                return Some((Ok(event), self));
            }
            if self.over {
                return None;
            }
            match self.answer.frames().await {
                Ok(Some(frames)) => self.ready.extend(frames),
                Ok(None) => return None,
                // The status is long sent; the error goes where the text went.
                Err(error) => {
                    self.over = true;
                    self.ready.extend([Frame::Json(error.to_json()), Frame::Done]);
                }
            }
        }
    }
}

/// The response that streams this answer. Dropping its body drops the answer.
pub(super) fn respond<A: Answer>(answer: A) -> Response {
    let stream = Stream {
        answer,
        ready: VecDeque::new(),
        events: 0,
        over: false,
    };
    Sse::new(unfold(stream, Stream::next))
        .keep_alive(KeepAlive::new().interval(KEEP_ALIVE))
        .into_response()
}
