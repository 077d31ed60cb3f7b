//! Cells: processes that run a tenant's guests, so that what breaks out of the runtime finds nothing to take.
//!
//! A cell is this host's own program (`galerne cell`), confined before it reads a byte, with one end of a socket pair. The
//! host compiles; a cell gets code, runs it under the same limits as the host would, and answers. One that dies or
//! falls silent ends the requests it had and is started again. Nothing it says is believed: the same checks are made again
//! on this side of the socket. What a guest asks of the host goes the other way over the same socket.

mod filter;
mod frames;
mod guests;
mod link;
mod outbox;
mod pipeline;
mod protocol;
mod questions;
mod remote;
mod sampler;
mod serve;
mod worlds;

pub(crate) use filter::CellFilter;
pub(crate) use guests::{CellGuest, inspect};
pub(crate) use link::Cell;
pub(crate) use pipeline::CellPipeline;
pub(crate) use protocol::Settings;
pub(crate) use sampler::CellSampler;
pub use serve::{CellError, cell};
pub(crate) use worlds::{CellChat, CellModel, CellTool};
