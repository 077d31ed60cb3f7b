//! The CPU device. Kernels are written once over `simd` and compiled for plain Rust, AVX2 and AVX-512; the
//! one in use is chosen at run time. Only linear maps use AMX. Only `device` knows the engine's trait, only `exec` knows programs.

#[cfg(target_arch = "x86_64")]
mod amx;
mod attention;
#[cfg(target_arch = "x86_64")]
mod attention_amx;
mod attention_rows;
mod device;
mod elementwise;
mod exec;
mod exec_linear;
mod fuse;
mod isa;
mod kv;
mod kv_element;
mod linear;
#[cfg(target_arch = "x86_64")]
mod linear_bf16_amx;
mod linear_grouped;
mod linear_integer;
mod linear_plain;
mod linear_q4_0;
mod linear_q4_1;
mod linear_q8_0;
mod load;
pub mod measure;
mod measure_loops;
mod memory;
mod mixture;
mod norm;
mod pool;
mod quantize_rows;
mod rope;
#[cfg(target_arch = "x86_64")]
mod rough;
mod sample_job;
mod sampler;
mod sampler_ladder;
mod sampler_mask;
mod sampler_passes;
mod sampler_prefix;
mod simd;
#[cfg(target_arch = "x86_64")]
mod simd_avx2;
#[cfg(target_arch = "x86_64")]
mod simd_avx512;
mod simd_portable;
mod split_rows;
mod weights;

pub use device::{CpuDevice, CpuOptions};
pub use isa::Isa;
pub use memory::trim_heap;
