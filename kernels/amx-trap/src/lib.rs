//! Executes AMX instructions on processors that have none, for tests: such an instruction raises SIGILL, whose handler
//! computes it on tiles in memory and goes on behind it. A trap takes about a microsecond. Knows no kernel.
//!
//! What it knows is what our kernels use: `ldtilecfg`, `tilerelease`, `tilezero`, `tileloadd`, `tileloaddt1`,
//! `tilestored`, the four `tdpb**d` and `tdpbf16ps`, as Intel's Software Developer's Manual, volume 2, describes them.
//! An instruction that hardware would refuse ends the process with the reason. Any other SIGILL goes to who had it before.
#![expect(unsafe_code, reason = "a signal handler works on raw memory and registers")]

#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod decode;
#[cfg(all(target_os = "linux", target_arch = "x86_64"))]
mod handler;
mod tiles;

use std::sync::atomic::{AtomicU64, Ordering};

pub use tiles::{Fault, ROW_BYTES, ROWS, Sign, Tiles};

/// Lets this process execute AMX instructions from now on; false where that cannot be: on systems other than Linux on
/// x86-64. Not for a machine whose AMX this process may use itself.
#[must_use]
pub fn install() -> bool {
    #[cfg(all(target_os = "linux", target_arch = "x86_64"))]
    return handler::install();
    #[cfg(not(all(target_os = "linux", target_arch = "x86_64")))]
    false
}

/// Instructions that were trapped and executed so far, in all threads.
static EXECUTED: AtomicU64 = AtomicU64::new(0);

/// How many instructions were trapped and executed so far, in all threads: so that a test sees whether a kernel was used.
#[must_use]
pub fn executed() -> u64 {
    EXECUTED.load(Ordering::Relaxed)
}
