//! HTTP/1.1 and HTTP/2 over TLS, and plain HTTP/1.1 for loopback, within limits. Knows no routes.

use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use http::header::ALT_SVC;
use http::{HeaderValue, Request, Response};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tower::ServiceExt;
use tracing::debug;

use crate::limits::{Protocol, TransportInfo, TransportLimits};
use crate::quic::listener::drain_tasks;
use crate::serve::Drain;

/// Pause after an accept failure such as "too many open files", which would otherwise spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// Time to tell a client that it is one too many.
const REFUSE_TIMEOUT: Duration = Duration::from_millis(500);
/// Ping interval and patience of HTTP/2 connections: a vanished peer is noticed without traffic of ours.
const H2_KEEP_ALIVE: Duration = Duration::from_secs(20);
/// Said to a client beyond the bound of connections, before any request is read.
const BUSY: &[u8] =
    b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 1\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

/// How bytes reach the listener.
#[derive(Clone)]
pub(crate) enum Wrap {
    /// TLS; the protocol comes from ALPN, and every response points at HTTP/3.
    Tls {
        acceptor: TlsAcceptor,
        alt_svc: HeaderValue,
    },
    /// Nothing around them; HTTP/1.1 only.
    Plain,
}

/// A bound TCP socket.
pub(crate) struct HttpListener {
    pub(crate) listener: TcpListener,
    pub(crate) wrap: Wrap,
    pub(crate) limits: TransportLimits,
}

/// The header that sends clients to HTTP/3 on `port`.
pub(crate) fn alt_svc(port: u16) -> HeaderValue {
    let text = format!("h3=\":{port}\"; ma=86400");
    HeaderValue::from_str(&text).expect("digits and punctuation make a header value")
}

impl HttpListener {
    /// Serves until `drain` begins and the last connection has ended or the deadline has passed.
    pub(crate) async fn serve(self, router: Router, mut drain: Drain) {
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = drain.begun() => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, remote)) => self.admit(stream, remote, &mut connections, &router, &drain).await,
                    Err(error) => {
                        debug!(%error, "accept failed");
                        sleep(ACCEPT_PAUSE).await;
                    }
                }
            }
        }
        // New connections are refused by the system from here on, rather than left waiting in the backlog.
        drop(self.listener);
        drain_tasks(&mut connections, self.limits.drain_timeout).await;
    }

    async fn admit(
        &self,
        mut stream: TcpStream,
        remote: SocketAddr,
        connections: &mut JoinSet<()>,
        router: &Router,
        drain: &Drain,
    ) {
        if connections.len() >= self.limits.connections_max {
            debug!(%remote, "connection refused: too many");
            if matches!(self.wrap, Wrap::Plain) {
                let _ = timeout(REFUSE_TIMEOUT, stream.write_all(BUSY)).await;
            }
            return;
        }
        let (wrap, limits) = (self.wrap.clone(), self.limits.clone());
        let (router, drain) = (router.clone(), drain.clone());
        connections.spawn(async move {
            // Tokens are small and must not wait for the acknowledgement of the last one.
            let _ = stream.set_nodelay(true);
            match wrap {
                Wrap::Plain => {
                    let info = TransportInfo {
                        protocol: Protocol::Http1,
                        remote,
                        encrypted: false,
                    };
                    serve_connection(
                        stream,
                        Service {
                            router,
                            info,
                            alt_svc: None,
                        },
                        &limits,
                        drain,
                    )
                    .await;
                }
                Wrap::Tls { acceptor, alt_svc } => {
                    let shaken = tokio::select! {
                        shaken = timeout(limits.handshake_timeout, acceptor.accept(stream)) => shaken,
                        () = begun(drain.clone()) => return,
                    };
                    let stream = match shaken {
                        Ok(Ok(stream)) => stream,
                        Ok(Err(error)) => return debug!(%remote, %error, "TLS handshake failed"),
                        Err(_) => return debug!(%remote, "TLS handshake timed out"),
                    };
                    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                    let protocol = if is_h2 { Protocol::Http2 } else { Protocol::Http1 };
                    let info = TransportInfo {
                        protocol,
                        remote,
                        encrypted: true,
                    };
                    let service = Service {
                        router,
                        info,
                        alt_svc: Some(alt_svc),
                    };
                    serve_connection(stream, service, &limits, drain).await;
                }
            }
        });
    }
}

async fn begun(mut drain: Drain) {
    drain.begun().await;
}

/// What every request of one connection gets.
#[derive(Clone)]
struct Service {
    router: Router,
    info: TransportInfo,
    alt_svc: Option<HeaderValue>,
}

impl Service {
    async fn call(self, request: Request<Incoming>) -> Result<Response<Body>, std::convert::Infallible> {
        let mut request = request.map(Body::new);
        request.extensions_mut().insert(self.info);
        let mut response = self.router.oneshot(request).await?;
        if let Some(alt_svc) = self.alt_svc {
            response.headers_mut().insert(ALT_SVC, alt_svc);
        }
        Ok(response)
    }
}

fn builder(protocol: Protocol, limits: &TransportLimits) -> auto::Builder<TokioExecutor> {
    let builder = auto::Builder::new(TokioExecutor::new());
    // ALPN has decided; guessing from the first bytes would let a silent client wait without end.
    let mut builder = match protocol {
        Protocol::Http2 => builder.http2_only(),
        Protocol::Http1 | Protocol::Http3 => builder.http1_only(),
    };
    let header_bytes = u32::try_from(limits.header_bytes).unwrap_or(u32::MAX);
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.header_timeout)
        .max_buf_size(limits.header_bytes.max(8 << 10));
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(limits.requests_max)
        .max_header_list_size(header_bytes)
        .initial_stream_window_size(limits.stream_window_bytes)
        .initial_connection_window_size(limits.connection_window_bytes)
        .keep_alive_interval(H2_KEEP_ALIVE)
        .keep_alive_timeout(H2_KEEP_ALIVE);
    builder
}

async fn serve_connection(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    service: Service,
    limits: &TransportLimits,
    mut drain: Drain,
) {
    let remote = service.info.remote;
    let builder = builder(service.info.protocol, limits);
    let service = service_fn(move |request| service.clone().call(request));
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let mut draining = false;
    loop {
        tokio::select! {
            biased;
            () = drain.begun(), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    debug!(%remote, %error, "HTTP connection ended");
                }
                return;
            }
        }
    }
}
