//! One HTTP/3 request: from its header to the router and back, dropped the moment the client goes. Knows no routes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use bytes::Bytes;
use h3::error::{Code, StreamError};
use h3::server::RequestStream;
use http::header::{CONNECTION, CONTENT_LENGTH, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, Method, Request, Response, StatusCode};
use http_body::Body as _;
use http_body_util::BodyExt;
use tokio::time::timeout;
use tower::ServiceExt;
use tracing::debug;

use super::adapter::{Connection, StreamWatch};
use super::body::BodyReader;
use super::stream::{BidiStream, SendStream};
use crate::limits::{Protocol, TransportInfo, TransportLimits};

pub(super) type Resolver = h3::server::RequestResolver<Connection, Bytes>;
type Responder = RequestStream<SendStream<Bytes>, Bytes>;

/// Time for a finished response to be acknowledged before its connection may close over it.
const DELIVERY_TIMEOUT: Duration = Duration::from_secs(30);
/// Meaningless between HTTP/3 peers and forbidden there (RFC 9114, 4.2).
const HOP_HEADERS: [HeaderName; 5] = [
    CONNECTION,
    TRANSFER_ENCODING,
    UPGRADE,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
];

/// What the requests of one connection have in common.
pub(super) struct RequestContext {
    pub(super) router: Router,
    pub(super) remote: SocketAddr,
    pub(super) limits: TransportLimits,
}

/// How a request ended.
pub(super) enum Outcome {
    /// A whole response went out.
    Answered,
    /// The client left before the response began.
    CancelledEarly,
    /// The client left, or the handler broke off, after the response had begun.
    CancelledLate,
    /// No usable header came.
    Malformed,
}

/// Serves one request to its end.
pub(super) async fn serve_request(
    resolver: Resolver,
    mut watch: StreamWatch,
    context: Arc<RequestContext>,
) -> Outcome {
    let (request, stream) = match timeout(context.limits.header_timeout, resolver.resolve_request()).await {
        Ok(Ok(resolved)) => resolved,
        Ok(Err(error)) => {
            debug!(remote = %context.remote, %error, "request header unusable");
            return Outcome::Malformed;
        }
        // Dropping the resolver resets the stream.
        Err(_) => {
            debug!(remote = %context.remote, "request header timed out");
            return Outcome::Malformed;
        }
    };
    let begun = AtomicBool::new(false);
    // In a block, so that the handler and its body are gone before the wait for delivery below.
    let answered = {
        let respond = respond(request, stream, &watch.gate, &context, &begun);
        tokio::select! {
            biased;
            _ = &mut watch.stopped => None,
            answered = respond => Some(answered),
        }
    };
    match answered {
        Some(Ok(())) => {
            // Until the client has it all, closing the connection would throw the rest away.
            let _ = timeout(DELIVERY_TIMEOUT, watch.stopped).await;
            Outcome::Answered
        }
        Some(Err(error)) => {
            debug!(remote = %context.remote, %error, "response broken off");
            Outcome::CancelledLate
        }
        None if begun.load(Ordering::Relaxed) => Outcome::CancelledLate,
        None => Outcome::CancelledEarly,
    }
}

/// Why a response did not reach its end.
#[derive(Debug, thiserror::Error)]
enum RespondError {
    #[error("send: {0}")]
    Send(#[from] StreamError),
    #[error("response body: {0}")]
    Body(#[from] axum::Error),
}

async fn respond(
    request: Request<()>,
    stream: RequestStream<BidiStream<Bytes>, Bytes>,
    gate: &Arc<super::stream::ReadGate>,
    context: &RequestContext,
    begun: &AtomicBool,
) -> Result<(), RespondError> {
    let is_head = request.method() == Method::HEAD;
    let (mut send, recv) = stream.split();
    let response = if header_bytes(request.headers()) > context.limits.header_bytes {
        let mut refused = Response::new(Body::empty());
        *refused.status_mut() = StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE;
        refused
    } else {
        let body = Body::new(BodyReader::new(recv, gate.clone(), request.headers()));
        let mut request = request.map(|()| body);
        request.extensions_mut().insert(TransportInfo {
            protocol: Protocol::Http3,
            remote: context.remote,
            encrypted: true,
        });
        match context.router.clone().oneshot(request).await {
            Ok(response) => response,
            Err(never) => match never {},
        }
    };
    begun.store(true, Ordering::Relaxed);
    send_response(&mut send, response, is_head)
        .await
        .inspect_err(|_| gate.abandon_with(Code::H3_INTERNAL_ERROR))
}

/// Size of a field section as RFC 9114, 4.2.2 counts it.
fn header_bytes(headers: &HeaderMap) -> usize {
    headers
        .iter()
        .map(|(name, value)| name.as_str().len() + value.len() + 32)
        .sum()
}

async fn send_response(
    send: &mut Responder,
    response: Response<Body>,
    is_head: bool,
) -> Result<(), RespondError> {
    let (mut parts, mut body) = response.into_parts();
    for name in &HOP_HEADERS {
        parts.headers.remove(name);
    }
    if let (false, Some(length)) = (
        parts.headers.contains_key(CONTENT_LENGTH),
        body.size_hint().exact(),
    ) && length > 0
    {
        parts.headers.insert(CONTENT_LENGTH, length.into());
    }
    let bodyless = is_head || matches!(parts.status, StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED);
    send.send_response(Response::from_parts(parts, ())).await?;
    while !bodyless && let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) if data.is_empty() => {}
            Ok(data) => send.send_data(data).await?,
            Err(frame) => {
                if let Ok(trailers) = frame.into_trailers() {
                    send.send_trailers(trailers).await?;
                    break;
                }
            }
        }
    }
    send.finish().await?;
    Ok(())
}
