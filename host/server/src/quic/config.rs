//! Transport parameters of both roles. Knows no sockets.

use std::sync::Arc;
use std::time::Duration;

use quinn::congestion::{BbrConfig, CubicConfig};
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{IdleTimeout, TransportConfig, VarInt};

use crate::error::TlsError;
use crate::limits::{Congestion, TransportLimits};

/// QUIC idle time-outs are milliseconds in 62 bits; a longer wish means "none".
fn idle(timeout: Duration) -> Option<IdleTimeout> {
    IdleTimeout::try_from(timeout).ok()
}

/// Windows, stream counts and congestion control, the same for both roles.
pub(crate) fn transport(limits: &TransportLimits, congestion: Congestion) -> TransportConfig {
    let mut config = TransportConfig::default();
    config
        .max_concurrent_bidi_streams(VarInt::from_u32(limits.requests_max))
        .max_concurrent_uni_streams(VarInt::from_u32(limits.uni_streams_max))
        .receive_window(VarInt::from_u32(limits.connection_window_bytes))
        .stream_receive_window(VarInt::from_u32(limits.stream_window_bytes))
        .send_window(limits.send_window_bytes)
        .max_idle_timeout(idle(limits.idle_timeout))
        .datagram_receive_buffer_size(None);
    match congestion {
        Congestion::Bbr => config.congestion_controller_factory(Arc::new(BbrConfig::default())),
        Congestion::Cubic => config.congestion_controller_factory(Arc::new(CubicConfig::default())),
    };
    config
}

/// Server configuration. 0-RTT stays off: rustls accepts no early data unless told a size, so a POST is never replayed.
pub(crate) fn server(
    tls: rustls::ServerConfig,
    limits: &TransportLimits,
    congestion: Congestion,
) -> Result<quinn::ServerConfig, TlsError> {
    let crypto = QuicServerConfig::try_from(tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    let mut transport = transport(limits, congestion);
    transport.keep_alive_interval(Some(limits.idle_timeout / 3));
    config
        .transport_config(Arc::new(transport))
        .max_incoming(limits.incoming_max)
        .incoming_buffer_size(limits.incoming_buffer_bytes)
        .incoming_buffer_size_total(limits.incoming_buffer_bytes * 512);
    Ok(config)
}
