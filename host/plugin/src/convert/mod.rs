//! Between the bindings' types and core's, one file per world. Plain data on both sides; calls nothing.

pub(crate) mod chat;
pub(crate) mod filter;
pub(crate) mod model;
pub(crate) mod pipeline;
pub(crate) mod sampling;
pub(crate) mod sampling_0_1;
