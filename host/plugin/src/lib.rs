//! Runs guests: the only crate that knows wasmtime. Knows no engine, no server, no model files and no tokenizer.
//!
//! A guest is a component of one of six worlds (see `wit/`). [`PluginHost`] compiles and links it, and gives it as one of
//! the traits of [`galerne_core::guest`]; each call then runs in a store with limits of its own:
//!
//! - **Time**: a deadline per call. One thread advances the epoch every 10 ms while guests exist, and compiled
//!   code checks it at every loop and function entry, so a call ends at most two ticks late.
//! - **Memory**: a cap on all linear memories of an instance together, on table elements, and on the number of
//!   instances, memories and tables.
//! - **The boundary**: a cap on what one call may make the host allocate, and on live resource handles.
//! - **Stack**: 512 KiB of wasm stack, on the caller's thread. Threads that call guests need the usual 2 MiB.
//!
//! A call that traps, runs late or exceeds a limit gives a [`GuestError`](galerne_core::guest::GuestError) and its
//! store is dropped; the next call of the guest starts in a new one. Calls are plain function calls:
//! no fibers, and no async stacks to zero.
//!
//! Filters, tools and pipelines may import capabilities that their deployment grants
//! ([`PluginHost::with_capabilities`]), pipelines the model too; all other guests import nothing. A call that asks the host for something waits on its own thread. What it waited is put on its
//! deadline again, and has a limit of its own.
//!
//! # Compiling
//!
//! A running compilation cannot be stopped from within its process. With [`PluginOptions::worker`] each runs in a process
//! of its own, without files and network and with limits on time and memory; without it, as in tests, it runs here,
//! bounded by nothing but the component's size. [`PluginOptions::artifacts`] keeps compiled code from one start to the
//! next, each file under a MAC.
//!
//! # Cells
//!
//! Under [`Isolation::Process`] a tenant's guests run in a process of their own, and the traits forward to it:
//! `galerne cell`, which is [`cell()`]. All of the above holds there too, by the same code. Capabilities do not move: a guest's
//! question comes to this process, which answers those of requests it knows and gives time only up to a call's limit.
//!
//! # Fairness
//!
//! Questions to samplers wait in one queue and are answered by [`PluginOptions::workers`] threads, first come,
//! first served. A guest that loops holds one worker until the per-step deadline and then loses its session; with
//! two workers (the default) the others' plans go on meanwhile.

mod artifact;
mod bindings;
mod capability;
mod cell;
mod chat;
mod compile;
mod compile_process;
mod convert;
mod counters;
mod errors;
mod filter;
mod grammar;
mod host;
mod http;
mod inspect;
mod instance;
mod limiter;
mod loader;
mod model;
mod pipeline;
mod question;
mod runtime;
mod sampler;
mod sandbox;
mod standing;
mod tool;
mod workers;

pub use capability::kv::MemoryKv;
pub use capability::log::GuestLog;
pub use capability::service::{CapabilityParts, HostCapabilities};
pub use cell::{CellError, cell};
pub use compile_process::{CompileProcessError, compile_guest};
pub use errors::PluginError;
pub use grammar::Grammars;
pub use host::{Isolation, PluginHost, PluginOptions};
pub use http::{AddressRange, AddressRangeError, HttpClient, Lookup, SystemLookup};
pub use sandbox::SandboxError;
