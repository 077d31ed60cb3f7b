//! The only crate that knows QUIC and HTTP: listeners, routes, streams, client.

pub mod api;
pub mod client;
pub mod deployments;
pub mod error;
pub mod limits;
mod quic;
pub mod serve;
mod tcp;
pub mod tls;
