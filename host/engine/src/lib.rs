//! Sans-IO, deterministic: sequences, block pool, prefix index, scheduler, lowering, runner.
//!
//! [`engine::Engine`] is a pure state machine that takes time as an argument; [`handle`] gives it a thread and
//! a device. Knows nothing of wasm, files, networks or async runtimes.

pub mod admission;
pub mod ahead;
pub mod blocks;
mod constraint;
pub mod engine;
mod guesses;
pub mod handle;
mod integrity;
pub mod lowering;

pub mod prefix;
pub mod request;
mod runner;
mod sampler;
mod scheduler;
mod sequence;
pub mod stats;
