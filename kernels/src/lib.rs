//! `trait Device`, the programs it runs, and the devices. Knows nothing of sequences' lives, guests or files.
#![allow(
    unsafe_code,
    reason = "kernels are where raw memory and vector instructions live"
)]

mod batch;
mod check;
pub mod conformance;
pub mod cpu;
pub mod cuda;
mod dataflow;
pub mod device;
mod layout;
pub mod program;
pub mod quant;
mod stored;
