//! The transport as clients see it: one echo router over HTTP/3, HTTP/2 and HTTP/1.1, in process.

mod cancel;
mod drain;
mod hostile;
mod routes;
mod support;
mod trust;
