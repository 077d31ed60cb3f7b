//! Every bound of the transport in one place, and who sent a request over what. Knows no routes.

use std::net::SocketAddr;
use std::time::Duration;

/// Which HTTP version a request came over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// HTTP/3 over QUIC.
    Http3,
    /// HTTP/2 over TLS.
    Http2,
    /// HTTP/1.1, over TLS or plain on loopback.
    Http1,
}

impl Protocol {
    /// The ALPN spelling: `h3`, `h2` or `http/1.1`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Http3 => "h3",
            Self::Http2 => "h2",
            Self::Http1 => "http/1.1",
        }
    }
}

/// Request extension that every transport sets, so that a route can tell where a request came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TransportInfo {
    /// HTTP version of the request.
    pub protocol: Protocol,
    /// Address of the peer as the socket saw it.
    pub remote: SocketAddr,
    /// Whether the bytes were encrypted on the way.
    pub encrypted: bool,
}

/// Congestion controller of QUIC connections.
///
/// BBR is the default because loss that is not congestion (radio links, policers) makes CUBIC collapse: at 100 ms
/// round trip and 2% loss each way it delivers tokens seconds late where BBR keeps 95% within 50 ms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Congestion {
    /// Model-based: bandwidth and round-trip estimates.
    #[default]
    Bbr,
    /// Loss-based (RFC 9438).
    Cubic,
}

/// Bounds of the listeners. Byte counts end in `_bytes`, counts in `_max`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TransportLimits {
    /// Connections open at once, for each listener by itself.
    pub connections_max: usize,
    /// QUIC handshakes under way above which an unproven address must answer a Retry first.
    pub handshakes_before_retry: usize,
    /// QUIC connection attempts kept waiting for the accept loop.
    pub incoming_max: usize,
    /// Early packets kept for one attempt that waits for the accept loop.
    pub incoming_buffer_bytes: u64,
    /// Unread bytes that a peer may have in flight on one connection.
    pub connection_window_bytes: u32,
    /// Unread bytes that a peer may have in flight on one stream.
    pub stream_window_bytes: u32,
    /// Unacknowledged bytes kept for one connection's peer.
    pub send_window_bytes: u64,
    /// Requests open at once on one connection.
    pub requests_max: u32,
    /// Unidirectional streams a peer may open on one connection.
    pub uni_streams_max: u32,
    /// Silence after which a QUIC peer is taken for gone. The server pings three times as often, so that a request may
    /// wait in the queue for longer.
    pub idle_timeout: Duration,
    /// Time for which a QUIC connection may stay open without a request.
    pub unused_timeout: Duration,
    /// Time for a TLS or QUIC handshake.
    pub handshake_timeout: Duration,
    /// Time for a request's header to arrive in full.
    pub header_timeout: Duration,
    /// Size of a request's header, encoded and decoded.
    pub header_bytes: usize,
    /// Requests that one connection may cancel before their response begins; each finished request gives one back.
    pub early_cancels_max: u32,
    /// Time that requests in flight have to finish once shutdown has begun.
    pub drain_timeout: Duration,
}

impl Default for TransportLimits {
    fn default() -> Self {
        Self {
            connections_max: 4096,
            handshakes_before_retry: 256,
            incoming_max: 2048,
            incoming_buffer_bytes: 64 << 10,
            connection_window_bytes: 4 << 20,
            stream_window_bytes: 256 << 10,
            send_window_bytes: 1 << 20,
            requests_max: 64,
            uni_streams_max: 8,
            idle_timeout: Duration::from_secs(30),
            unused_timeout: Duration::from_secs(300),
            handshake_timeout: Duration::from_secs(5),
            header_timeout: Duration::from_secs(5),
            header_bytes: 32 << 10,
            early_cancels_max: 256,
            drain_timeout: Duration::from_secs(30),
        }
    }
}
