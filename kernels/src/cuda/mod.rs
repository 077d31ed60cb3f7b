//! The CUDA device: a step is a list of launches over memory that one planner laid out. The kernels are in `kernels/cuda`.
//!
//! Everything above [`driver::Driver`] runs the same on a GPU and on the CPU shim that tests use.

pub mod attention_plan;
mod clock;
mod cublaslt;
mod device;
pub mod driver;
mod experts;
mod gates;
pub mod image;
pub mod kv;
pub mod launch;
mod load;
pub mod memory;
pub mod native;
mod plan;
pub mod sampler;
mod step;
pub mod tables;
pub mod timing;
pub mod weights;

pub use device::CudaDevice;

use crate::device::DeviceError;
use driver::DriverError;

/// What a driver's failure means to the engine.
fn failed(error: &DriverError) -> DeviceError {
    match error {
        DriverError::Memory { bytes } => DeviceError::Memory {
            what: "a program",
            needed_bytes: *bytes,
        },
        DriverError::Kernel { .. } | DriverError::Failed { .. } => DeviceError::Failed {
            device: "cuda",
            reason: error.to_string(),
        },
    }
}
