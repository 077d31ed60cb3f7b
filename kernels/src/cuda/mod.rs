//! The CUDA device: a step is a list of launches over memory that one planner laid out. The kernels are in `kernels/cuda`.
//!
//! Everything above [`driver::Driver`] runs the same on a GPU and on the CPU shim that tests use.

pub mod attention_plan;
pub mod driver;
pub mod image;
pub mod kv;
pub mod launch;
pub mod memory;
pub mod native;
pub mod sampler;
pub mod tables;
pub mod weights;
