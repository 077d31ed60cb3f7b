//! Accepts QUIC connections and HTTP/3 requests, within limits, until told to drain. Knows no routes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use axum::Router;
use bytes::Bytes;
use h3::error::Code;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};
use tracing::debug;

use super::adapter::{Connection, Shared, var_int};
use super::request::{Outcome, RequestContext, Resolver, serve_request};
use crate::limits::TransportLimits;
use crate::serve::Drain;

/// Time for the last packets of closed connections to leave.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

/// A bound QUIC endpoint.
pub(crate) struct QuicListener {
    pub(crate) endpoint: quinn::Endpoint,
    pub(crate) limits: TransportLimits,
}

/// Counts handshakes under way; one is over when its guard drops.
struct Handshake(Arc<AtomicUsize>);

impl Handshake {
    fn begin(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count.clone())
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl QuicListener {
    /// Serves until `drain` begins and the last request has ended or the deadline has passed.
    pub(crate) async fn serve(self, router: Router, mut drain: Drain) {
        let handshakes = Arc::new(AtomicUsize::new(0));
        let mut connections = JoinSet::new();
        loop {
            tokio::select! {
                biased;
                () = drain.begun() => break,
                Some(_) = connections.join_next(), if !connections.is_empty() => {}
                incoming = self.endpoint.accept() => {
                    let Some(incoming) = incoming else { break };
                    self.admit(incoming, &handshakes, &mut connections, &router, &drain);
                }
            }
        }
        self.endpoint.set_server_config(None);
        drain_tasks(&mut connections, self.limits.drain_timeout).await;
        self.endpoint
            .close(var_int(Code::H3_NO_ERROR.value()), b"server stopped");
        let _ = timeout(FLUSH_TIMEOUT, self.endpoint.wait_idle()).await;
    }

    fn admit(
        &self,
        incoming: quinn::Incoming,
        handshakes: &Arc<AtomicUsize>,
        connections: &mut JoinSet<()>,
        router: &Router,
        drain: &Drain,
    ) {
        if connections.len() >= self.limits.connections_max {
            debug!(remote = %incoming.remote_address(), "connection refused: too many");
            incoming.refuse();
            return;
        }
        let crowded = handshakes.load(Ordering::Relaxed) >= self.limits.handshakes_before_retry;
        if crowded && !incoming.remote_address_validated() && incoming.may_retry() {
            // Costs a spoofed sender nothing more of ours than this packet. It only fails where `may_retry` is false.
            let _ = incoming.retry();
            return;
        }
        let handshake = Handshake::begin(handshakes);
        let (limits, router, drain) = (self.limits.clone(), router.clone(), drain.clone());
        connections.spawn(async move {
            let remote = incoming.remote_address();
            let connected = match incoming.accept() {
                Ok(connecting) => timeout(limits.handshake_timeout, connecting).await,
                Err(error) => Ok(Err(error)),
            };
            drop(handshake);
            match connected {
                Ok(Ok(conn)) => serve_connection(conn, router, limits, drain).await,
                Ok(Err(error)) => debug!(%remote, %error, "QUIC handshake failed"),
                Err(_) => debug!(%remote, "QUIC handshake timed out"),
            }
        });
    }
}

/// Waits for `tasks` up to `timeout`, then ends what is left.
pub(crate) async fn drain_tasks(tasks: &mut JoinSet<()>, timeout: Duration) {
    let deadline = Instant::now() + timeout;
    while !tasks.is_empty() {
        if timeout_at(deadline, tasks.join_next()).await.is_err() {
            debug!(left = tasks.len(), "drain deadline passed: ending what is left");
            tasks.shutdown().await;
        }
    }
}

type ServerConnection = h3::server::Connection<Connection, Bytes>;

/// One HTTP/3 connection and the requests on it.
struct Served {
    h3: ServerConnection,
    shared: Arc<Shared>,
    context: Arc<RequestContext>,
    requests: JoinSet<Outcome>,
    early_cancels_left: u32,
}

async fn serve_connection(conn: quinn::Connection, router: Router, limits: TransportLimits, drain: Drain) {
    let remote = conn.remote_address();
    let handle = conn.clone();
    let (adapter, shared) = Connection::new(conn, limits.header_bytes);
    let built = h3::server::builder()
        // Headers between our budget and twice of it get a 431; beyond that the decoder gives up.
        .max_field_section_size(limits.header_bytes as u64 * 2)
        .send_grease(false)
        .build(adapter)
        .await;
    let h3 = match built {
        Ok(h3) => h3,
        Err(error) => return debug!(%remote, %error, "HTTP/3 set-up failed"),
    };
    let early_cancels_left = limits.early_cancels_max;
    let context = Arc::new(RequestContext {
        router,
        remote,
        limits,
    });
    let mut served = Served {
        h3,
        shared,
        context,
        requests: JoinSet::new(),
        early_cancels_left,
    };
    let code = served.run(drain, remote).await;
    handle.close(var_int(code.value()), b"");
}

impl Served {
    /// Runs to the connection's end and says with which code to close it.
    async fn run(&mut self, mut drain: Drain, remote: SocketAddr) -> Code {
        let mut draining = false;
        let mut unused_since = Instant::now();
        loop {
            if draining && self.requests.is_empty() {
                return Code::H3_NO_ERROR;
            }
            let unused_until = unused_since + self.context.limits.unused_timeout;
            tokio::select! {
                biased;
                () = drain.begun(), if !draining => {
                    draining = true;
                    self.go_away(remote).await;
                }
                Some(ended) = self.requests.join_next(), if !self.requests.is_empty() => {
                    unused_since = Instant::now();
                    if !self.may_go_on(ended) {
                        debug!(%remote, "connection closed: too many requests cancelled before their response");
                        return Code::H3_EXCESSIVE_LOAD;
                    }
                }
                accepted = self.h3.accept() => match accepted {
                    Ok(Some(resolver)) => self.begin(resolver),
                    // The client said GOAWAY and nothing is in flight.
                    Ok(None) => return Code::H3_NO_ERROR,
                    Err(error) => {
                        debug!(%remote, %error, "HTTP/3 connection ended");
                        // Requests see the loss through `stopped` and end by themselves at once.
                        while self.requests.join_next().await.is_some() {}
                        return Code::H3_NO_ERROR;
                    }
                },
                () = sleep_until(unused_until), if self.requests.is_empty() => {
                    debug!(%remote, "connection closed: unused");
                    self.go_away(remote).await;
                    return Code::H3_NO_ERROR;
                }
            }
        }
    }

    async fn go_away(&mut self, remote: SocketAddr) {
        self.shared.refuse_requests();
        // `shutdown(0)` would disown the newest request that is still being served.
        if let Err(error) = self.h3.shutdown(1).await {
            debug!(%remote, %error, "GOAWAY not sent");
        }
    }

    fn begin(&mut self, resolver: Resolver) {
        let id = h3::quic::SendStream::<Bytes>::send_id(&resolver.frame_stream);
        let Some(watch) = self.shared.take_watch(id) else {
            debug_assert!(false, "stream {id} was accepted without a watch");
            return;
        };
        self.requests
            .spawn(serve_request(resolver, watch, self.context.clone()));
    }

    /// Books one ended request. A client that keeps cancelling before it is answered costs prefill for nothing.
    fn may_go_on(&mut self, ended: Result<Outcome, tokio::task::JoinError>) -> bool {
        match ended {
            Ok(Outcome::CancelledEarly) => {
                self.early_cancels_left = self.early_cancels_left.saturating_sub(1);
            }
            Ok(Outcome::Answered) => {
                let most = self.context.limits.early_cancels_max;
                self.early_cancels_left = (self.early_cancels_left + 1).min(most);
            }
            Ok(Outcome::CancelledLate | Outcome::Malformed) => {}
            Err(error) => tracing::error!(%error, "bug: a request's handler panicked"),
        }
        self.early_cancels_left > 0
    }
}
