//! HTTP/3 over QUIC: the adapter between quinn and h3, the listener, and one request's way. Knows no routes.

pub(crate) mod adapter;
pub(crate) mod body;
pub(crate) mod config;
pub(crate) mod listener;
pub(crate) mod request;
pub(crate) mod stream;
