//! Instruction sets the CPU device has kernels for, and which of them this machine has.

/// An instruction set, from least to most capable.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Isa {
    /// Plain Rust.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, VL, DQ and VNNI.
    Avx512,
    /// The same with BF16, on machines where its dot product is faster than f32's.
    Avx512Bf16,
    /// AVX-512 as before, and AMX with int8 and bf16 tiles.
    Amx,
}

impl Isa {
    /// All, from least to most capable.
    pub const ALL: [Self; 5] = [
        Self::Portable,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// The most capable one of this machine. If that is AMX, the system has been asked to let this process use it.
    #[must_use]
    pub fn detect() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2")
                && is_x86_feature_detected!("fma")
                && is_x86_feature_detected!("f16c");
            let avx512 = is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512dq")
                && is_x86_feature_detected!("avx512vnni");
            let bf16 = is_x86_feature_detected!("avx512bf16");
            if avx2 && avx512 && bf16 && super::amx::available() {
                return Self::Amx;
            }
            if avx2 && avx512 && bf16 && bf16_dot_is_fast() {
                return Self::Avx512Bf16;
            }
            if avx2 && avx512 {
                return Self::Avx512;
            }
            if avx2 {
                return Self::Avx2;
            }
        }
        Self::Portable
    }

    /// Whether the processor has AMX, which the system does not let this process use: kernels of Linux before 5.16, some
    /// sandboxes and virtual machines.
    #[must_use]
    pub fn amx_is_refused() -> bool {
        #[cfg(target_arch = "x86_64")]
        return super::amx::in_processor() && !super::amx::available();
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// Whether a core reads weights faster in several streams than in one: on Intel's servers by half, on AMD's not at all.
    /// By vendor, once.
    #[must_use]
    pub(crate) fn reads_in_streams(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        {
            // To ask the processor takes tens of microseconds in a virtual machine.
            static INTEL: std::sync::LazyLock<bool> =
                std::sync::LazyLock::new(|| vendor_is(*b"GenuineIntel"));
            *INTEL
        }
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    /// The name shown to operators.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512-vnni",
            Self::Avx512Bf16 => "avx512-bf16",
            Self::Amx => "amx",
        }
    }
}

/// Whether `vdpbf16ps` does more than `vfmadd`: at full rate on AMD since Zen 4 (twice f32), at a quarter of that
/// on Intel up to Sapphire Rapids (half of f32). By vendor, so that a machine always gives the same results.
#[cfg(target_arch = "x86_64")]
fn bf16_dot_is_fast() -> bool {
    vendor_is(*b"AuthenticAMD")
}

#[cfg(target_arch = "x86_64")]
fn vendor_is(name: [u8; 12]) -> bool {
    let vendor = std::arch::x86_64::__cpuid(0);
    let words = [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes);
    words.as_flattened() == name
}

impl std::fmt::Display for Isa {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}
