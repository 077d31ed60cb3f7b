//! What the device needs of a GPU's driver: memory, copies, launches in order. Knows no kernel.

use std::time::Instant;

use bytemuck::{Pod, Zeroable};

use crate::program::View;

/// An address in device memory; 0 is none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Pod, Zeroable)]
#[repr(transparent)]
pub struct DevicePtr(pub u64);

impl DevicePtr {
    /// No address: an operand that is not there.
    pub const NULL: Self = Self(0);

    /// The address `bytes` further.
    #[must_use]
    pub const fn offset(self, bytes: usize) -> Self {
        Self(self.0 + bytes as u64)
    }
}

/// Columns of a buffer in device memory, as kernels take them: `View` in `galerne.cuh`. Elements are f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Pod, Zeroable)]
#[repr(C)]
pub struct DeviceView {
    /// The first row's first column.
    pub at: DevicePtr,
    /// Elements from one row to the next.
    pub stride: u32,
    /// Columns.
    pub width: u32,
}

impl DeviceView {
    /// No operand.
    pub const NONE: Self = Self {
        at: DevicePtr::NULL,
        stride: 0,
        width: 0,
    };

    /// A view of a buffer whose rows have `stride` elements and begin at `buffer`.
    #[must_use]
    pub const fn new(buffer: DevicePtr, stride: u32, view: View) -> Self {
        Self {
            at: buffer.offset(view.start as usize * 4),
            stride,
            width: view.width,
        }
    }

    /// Whether every row can be read four columns at a time.
    #[must_use]
    pub const fn is_vector_aligned(self) -> bool {
        self.at.0.is_multiple_of(16) && self.stride.is_multiple_of(4) && self.width.is_multiple_of(4)
    }
}

/// One kernel to run. Launchers make it from shapes and addresses; it holds all it needs, so that it can run again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launch {
    /// The entry point's name, or [`Product::KERNEL`].
    pub kernel: &'static str,
    /// Blocks in x, y and z; with a 0 among them nothing runs.
    pub grid: [u32; 3],
    /// Threads per block, all in x.
    pub threads: u32,
    /// Shared memory per block.
    pub shared_bytes: u32,
    /// The kernel's parameter struct.
    pub params: Vec<u8>,
    /// What the driver writes into the parameters.
    pub tensor_map: Option<TensorMap>,
}

/// A matrix of 16-bit numbers as a GPU's copying unit (TMA) takes it: 128 bytes of a launch's parameters that only the driver can
/// make. Boxes of it are put into shared memory with rows of 128 bytes, swizzled by 128 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TensorMap {
    /// Where in the parameters they are, a multiple of 128.
    pub at: usize,
    /// The first row, a multiple of 16.
    pub base: DevicePtr,
    /// Numbers of a row, a multiple of 8. The next row follows at once; there are as many as 31 bits count.
    pub width: u32,
    /// Rows of a box, at most 256, each of 64 numbers.
    pub box_rows: u32,
}

impl Launch {
    /// A launch with this parameter struct.
    #[must_use]
    pub fn new<P: Pod>(
        kernel: &'static str,
        grid: [u32; 3],
        threads: u32,
        shared_bytes: u32,
        params: &P,
    ) -> Self {
        Self {
            kernel,
            grid,
            threads,
            shared_bytes,
            params: bytemuck::bytes_of(params).to_vec(),
            tensor_map: None,
        }
    }

    /// The same with a tensor map in its parameters.
    #[must_use]
    pub fn with_tensor_map(self, map: TensorMap) -> Self {
        assert!(map.at.is_multiple_of(TensorMap::BYTES) && map.at + TensorMap::BYTES <= self.params.len());
        Self {
            tensor_map: Some(map),
            ..self
        }
    }

    /// If it is not a kernel but a product: which.
    #[must_use]
    pub fn product(&self) -> Option<Product> {
        (self.kernel == Product::KERNEL).then(|| bytemuck::pod_read_unaligned(&self.params))
    }
}

impl TensorMap {
    /// Of the description.
    pub const BYTES: usize = 128;
}

/// A matrix product of many rows that a library of the GPU's vendor runs, where the driver has one
/// ([`Properties::products`]): `out[r, c] = (accumulate ? out[r, c] : 0) + bias[c] + x_factors[r] w_factors[c] sum_k x[r, k] w[c, k]`,
/// sums in f32.
///
/// All addresses and strides are multiples of 16 bytes. Of 8-bit floats there is no bias, and columns are a multiple of 16.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct Product {
    /// `[rows, depth]`
    pub x: DevicePtr,
    /// `[columns, depth]`
    pub w: DevicePtr,
    /// `[rows]` f32 if x and w are 8-bit floats, or [`DevicePtr::NULL`].
    pub x_factors: DevicePtr,
    /// `[columns]` f32, likewise.
    pub w_factors: DevicePtr,
    /// `[columns]` f32, or [`DevicePtr::NULL`].
    pub bias: DevicePtr,
    /// `[rows, columns]` f32.
    pub out: DevicePtr,
    /// The rest.
    pub shape: ProductShape,
}

/// What a library needs to know of a product to choose how to run it. Strides are elements from one row to the next.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Pod, Zeroable)]
#[repr(C)]
pub struct ProductShape {
    /// Of x and out.
    pub rows: u32,
    /// Of out; rows of w.
    pub columns: u32,
    /// Columns of x and w.
    pub depth: u32,
    /// Of x.
    pub x_stride: u32,
    /// Of w.
    pub w_stride: u32,
    /// Of out.
    pub out_stride: u32,
    /// What x and w are: a [`ProductElement`].
    pub element: u32,
    /// Whether to add to what is in out.
    pub accumulate: u32,
}

/// Numbers of a product's factors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum ProductElement {
    /// 16 bits with f32's range.
    Bf16 = 0,
    /// 16 bits, more exact.
    F16 = 1,
    /// 8 bits (e4m3), with a factor per row.
    Fp8 = 2,
}

impl ProductElement {
    /// All.
    pub const ALL: [Self; 3] = [Self::Bf16, Self::F16, Self::Fp8];

    /// Its bytes.
    #[must_use]
    pub const fn bytes(self) -> u32 {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::Fp8 => 1,
        }
    }
}

impl ProductShape {
    /// What x and w are.
    #[must_use]
    pub const fn element(&self) -> ProductElement {
        ProductElement::ALL[self.element as usize]
    }
}

/// Which products a driver runs: each kind stands for those before it too.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Products {
    /// None.
    None,
    /// Of 16-bit floats.
    Floats16,
    /// Of 8-bit floats.
    Floats8,
}

impl Product {
    /// What a launch of a product has for a kernel's name.
    pub const KERNEL: &'static str = "product";

    /// As a launch.
    #[must_use]
    pub fn launch(&self) -> Launch {
        Launch::new(Self::KERNEL, [1; 3], 0, 0, self)
    }
}

/// What a GPU is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Properties {
    /// For example `NVIDIA H200`.
    pub name: String,
    /// What its kernels are compiled for, for example `sm_90a`.
    pub arch: String,
    /// Streaming multiprocessors.
    pub multiprocessors: u32,
    /// Memory nobody has taken yet.
    pub free_bytes: usize,
    /// Which [`Product`]s the driver runs.
    pub products: Products,
}

/// Why a driver could not do something.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriverError {
    /// There is not so much memory.
    #[error("{bytes} bytes of device memory could not be allocated")]
    Memory {
        /// How much was asked for.
        bytes: usize,
    },
    /// A kernel is not in this build.
    #[error("kernel {name} is not in this build's kernels for {arch}; build them with cargo xtask kernels")]
    Kernel {
        /// The entry point.
        name: String,
        /// Compiled for.
        arch: String,
    },
    /// A call failed; after most of them the device's context is lost.
    #[error("{call}: {reason}")]
    Failed {
        /// The driver's function, or the kernel.
        call: String,
        /// What it said.
        reason: String,
    },
}

/// Host memory that the device copies from and to on its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostPtr(pub *mut u8);

// SAFETY: an address; whoever reads or writes behind it keeps `Driver`'s contract.
unsafe impl Send for HostPtr {}
// SAFETY: as above.
unsafe impl Sync for HostPtr {}

/// Launches that run again and again, prepared once. Dropping it frees what the driver keeps for it.
pub trait Graph: Send + Sync {
    /// Enqueues all of them.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// As [`Driver::enqueue`].
    unsafe fn enqueue(&self) -> Result<(), DriverError>;
}

/// One GPU with one queue: what is enqueued runs in order.
pub trait Driver: Send + Sync {
    /// What it is.
    ///
    /// # Errors
    /// The device failed.
    fn properties(&self) -> Result<Properties, DriverError>;

    /// Takes device memory, aligned to 256 bytes, of any content.
    ///
    /// # Errors
    /// There is not so much.
    fn allocate(&self, bytes: usize) -> Result<DevicePtr, DriverError>;

    /// Gives device memory back.
    ///
    /// # Safety
    /// It came from `allocate`, and nothing that is enqueued uses it.
    unsafe fn release(&self, at: DevicePtr);

    /// Takes host memory, aligned to 64 bytes, zeroed.
    ///
    /// # Errors
    /// There is not so much.
    fn allocate_host(&self, bytes: usize) -> Result<HostPtr, DriverError>;

    /// Gives host memory back.
    ///
    /// # Safety
    /// It came from `allocate_host`, and nothing that is enqueued uses it.
    unsafe fn release_host(&self, at: HostPtr);

    /// Copies to the device and returns when it is done. For loading.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// The target is allocated, and nothing that is enqueued uses it.
    unsafe fn write(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError>;

    /// Waits for everything enqueued, copies from the device and returns when it is done. For tests and loading.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// The source is allocated.
    unsafe fn read(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), DriverError>;

    /// Enqueues a copy to the device.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// Both are allocated, and the host leaves `from` alone until the copy is done.
    unsafe fn enqueue_write(&self, to: DevicePtr, from: HostPtr, bytes: usize) -> Result<(), DriverError>;

    /// Enqueues a copy from the device.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// Both are allocated, and the host leaves `to` alone until the copy is done.
    unsafe fn enqueue_read(&self, from: DevicePtr, to: HostPtr, bytes: usize) -> Result<(), DriverError>;

    /// Enqueues a copy within the device's memory.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// Both are allocated and do not overlap.
    unsafe fn enqueue_copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), DriverError>;

    /// Enqueues zeroing.
    ///
    /// # Errors
    /// The device failed.
    ///
    /// # Safety
    /// The memory is allocated.
    unsafe fn enqueue_zero(&self, at: DevicePtr, bytes: usize) -> Result<(), DriverError>;

    /// Enqueues launches.
    ///
    /// # Errors
    /// A kernel that is not there, or the device failed.
    ///
    /// # Safety
    /// What the launches' parameters point to is allocated and as large as the kernels' files say, until they have run.
    unsafe fn enqueue(&self, launches: &[Launch]) -> Result<(), DriverError>;

    /// Prepares launches to be enqueued often.
    ///
    /// # Errors
    /// A kernel that is not there, or the device failed.
    fn graph(&self, launches: &[Launch]) -> Result<Box<dyn Graph>, DriverError>;

    /// Whether everything enqueued is done.
    ///
    /// # Errors
    /// The device failed.
    fn is_idle(&self) -> Result<bool, DriverError>;

    /// Waits for everything enqueued.
    ///
    /// # Errors
    /// The device failed.
    fn finish(&self) -> Result<(), DriverError>;

    /// Seconds that the device takes for what `work` enqueues, once everything before it is done: by its own clock where it has
    /// one, else by the host's, with the way to the device and back.
    ///
    /// # Errors
    /// Those of `work`, or the device failed.
    fn time(&self, work: &mut dyn FnMut() -> Result<(), DriverError>) -> Result<f64, DriverError> {
        self.finish()?;
        let begin = Instant::now();
        work()?;
        self.finish()?;
        Ok(begin.elapsed().as_secs_f64())
    }

    /// Marks the end of what is enqueued, for [`wait_for_mark`](Self::wait_for_mark). There is one mark.
    ///
    /// # Errors
    /// The device failed.
    fn mark(&self) -> Result<(), DriverError>;

    /// Waits for what was enqueued before the mark; what came behind it may still run.
    ///
    /// # Errors
    /// The device failed.
    fn wait_for_mark(&self) -> Result<(), DriverError>;
}
