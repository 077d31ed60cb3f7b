//! The only crate that knows QUIC and HTTP: listeners, routes, streams, client.
