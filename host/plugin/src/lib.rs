//! The only crate that knows wasmtime: bindings, conversions, limits.
