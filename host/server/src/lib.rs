//! The only crate that knows QUIC and HTTP: listeners, routes, streams, client.

pub mod api;
pub mod client;
pub mod error;
pub mod limits;
pub mod quic;
pub mod serve;
pub mod tcp;
pub mod tls;
