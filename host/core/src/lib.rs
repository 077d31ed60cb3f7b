//! Plain data shared by every part of Galerne. Knows no I/O, no wasm runtime, no device and no clock.

pub mod capability;
pub mod chat;
pub mod deployment;
pub mod dtype;
pub mod filter;
pub mod grammar;
pub mod graph;
pub mod guest;
pub mod ids;
pub mod limits;
pub mod name;
pub mod pipeline;
pub mod sampling;
pub mod tool;
pub mod validate;
pub mod weights;
