//! CPU devices with any instruction set that this machine has, or that can be computed for it.
#![expect(
    unsafe_code,
    reason = "a device whose instructions are trapped is made without a check"
)]
#![expect(
    clippy::print_stdout,
    reason = "which instruction sets were skipped belongs in the test's output"
)]

use std::num::NonZeroUsize;

use galerne_kernels::cpu::{CpuDevice, CpuOptions, Isa};

/// Whether AMX instructions can be executed: by this machine or, if it has what else the kernels need, by a trap.
pub(crate) fn has_amx() -> bool {
    let detected = Isa::detect();
    #[cfg(target_arch = "x86_64")]
    let has_the_rest = detected >= Isa::Avx512 && is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let has_the_rest = false;
    detected == Isa::Amx || has_the_rest && galerne_amx_trap::install()
}

/// A device, or `None` with a word about it if that instruction set cannot be executed here.
pub(crate) fn device(isa: Isa, threads: usize) -> Option<CpuDevice> {
    if isa > Isa::detect() && !(isa == Isa::Amx && has_amx()) {
        println!("skipped: this machine has no {isa}");
        return None;
    }
    let options = CpuOptions {
        threads: NonZeroUsize::new(threads),
        isa: Some(isa),
    };
    // SAFETY: the machine has the instruction set, or the trap computes what it lacks.
    let device = unsafe { CpuDevice::new_unchecked(options) };
    Some(device.expect("a device with an instruction set that can be executed"))
}
