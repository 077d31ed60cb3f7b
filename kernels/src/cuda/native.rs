//! The driver of an NVIDIA GPU, found at run time: a thin layer over CUDA's driver API. Knows no kernel and no program.
//!
//! All work goes to one stream. A machine without driver or GPU is an ordinary answer ([`Absence`]), never a panic.

use std::collections::HashMap;
use std::ffi::{CString, c_int, c_void};
use std::sync::{Arc, OnceLock};

use cudarc::driver::result::{self, DriverError as CudaError};
use cudarc::driver::sys;

use super::clock::{Gaps, Moment};
use super::cublaslt::Library;
use super::driver::{
    DevicePtr, Driver, DriverError, Graph, HostPtr, Launch, Products, Properties, TensorMap,
};

/// Compiled kernels: one module of code and the entry points in it.
#[derive(Debug, Clone)]
pub struct Module {
    /// A cubin for the GPU's architecture, or PTX ending in a zero byte.
    pub code: Vec<u8>,
    /// Its entry points.
    pub kernels: Vec<String>,
}

/// Why there is no GPU to use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Absence {
    /// No `libcuda` can be loaded.
    #[error("no NVIDIA driver is installed (libcuda.so.1 is not found)")]
    NoDriver,
    /// The library is there but does not start.
    #[error("the NVIDIA driver does not start: {reason}")]
    DriverFails {
        /// What it said.
        reason: String,
    },
    /// The driver sees no GPU.
    #[error("the NVIDIA driver sees no GPU")]
    NoGpu,
}

/// What a GPU is, found without taking it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// For example `NVIDIA H200`.
    pub name: String,
    /// Compute capability.
    pub capability: (i32, i32),
    /// Its memory.
    pub memory_bytes: usize,
    /// The newest CUDA the driver knows, for example `13.0`.
    pub driver_cuda: String,
}

impl Found {
    /// What kernels are compiled for on this GPU, for example `sm_90a`.
    #[must_use]
    pub fn arch(&self) -> String {
        let (major, minor) = self.capability;
        // Code that uses one architecture's own instructions exists from Hopper on.
        format!("sm_{major}{minor}{}", if major >= 9 { "a" } else { "" })
    }
}

/// The GPUs of this machine.
///
/// # Errors
/// There is none, with the reason.
pub fn find() -> Result<Vec<Found>, Absence> {
    // SAFETY: it loads the driver's library, if there is one, as the process is allowed to.
    if !unsafe { sys::is_culib_present() } {
        return Err(Absence::NoDriver);
    }
    let fails = |error: CudaError| match error.0 {
        sys::CUresult::CUDA_ERROR_NO_DEVICE => Absence::NoGpu,
        _ => Absence::DriverFails { reason: text(error) },
    };
    result::init().map_err(fails)?;
    let mut version: c_int = 0;
    // SAFETY: the library is there; it writes one number.
    unsafe { sys::cuDriverGetVersion(&raw mut version) }
        .result()
        .map_err(fails)?;
    let driver_cuda = format!("{}.{}", version / 1_000, version % 1_000 / 10);
    let count = result::device::get_count().map_err(fails)?;
    if count == 0 {
        return Err(Absence::NoGpu);
    }
    (0..count)
        .map(|ordinal| describe(ordinal, &driver_cuda).map_err(fails))
        .collect()
}

fn describe(ordinal: c_int, driver_cuda: &str) -> Result<Found, CudaError> {
    let device = result::device::get(ordinal)?;
    // SAFETY: the device was just named by the driver.
    let attribute = |attribute| unsafe { result::device::get_attribute(device, attribute) };
    use sys::CUdevice_attribute as Attribute;
    Ok(Found {
        name: result::device::get_name(device)?,
        capability: (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        ),
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device)? },
        driver_cuda: driver_cuda.to_owned(),
    })
}

/// What the driver says of an error.
fn text(error: CudaError) -> String {
    match error.error_string() {
        Ok(text) => text.to_string_lossy().into_owned(),
        Err(_) => format!("error {}", error.0 as u32),
    }
}

/// How launches follow each other.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Overlap {
    /// A kernel starts when the one before it is done.
    #[default]
    None,
    /// A kernel may start while the one before it ends (programmatic dependent launch); it waits for its results itself.
    Dependent,
}

/// One GPU, taken by this process.
pub struct NativeDriver {
    inner: Arc<Inner>,
}

struct Inner {
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    /// There from `open` on.
    mark: Option<Moment>,
    modules: Vec<sys::CUmodule>,
    kernels: HashMap<String, sys::CUfunction>,
    arch: String,
    overlap: Overlap,
    /// The library for matrix products, if there is one.
    products: Option<Library>,
    /// If they are measured.
    gaps: OnceLock<Gaps>,
}

// SAFETY: the driver's handles may be used by any thread that has made the context current, which every method does. The
// library locks what may not be used by two threads at once.
unsafe impl Send for Inner {}
// SAFETY: the driver's API locks by itself.
unsafe impl Sync for Inner {}

impl NativeDriver {
    /// Takes the GPU of this number (as [`find`] lists them) and loads kernels.
    ///
    /// # Errors
    /// The driver refuses.
    pub fn open(ordinal: usize, modules: &[Module], overlap: Overlap) -> Result<Self, DriverError> {
        let gpus = find().map_err(|absence| failed("open the GPU", absence))?;
        let found = gpus.get(ordinal).ok_or_else(|| {
            let expected = format!("one of {} GPUs, got number {ordinal}", gpus.len());
            failed("open the GPU", expected)
        })?;
        let device = check("cuDeviceGet", result::device::get(ordinal as c_int))?;
        // SAFETY: the device exists; the context is released in `drop`.
        let context = check("cuDevicePrimaryCtxRetain", unsafe {
            result::primary_ctx::retain(device)
        })?;
        let mut inner = Inner {
            device,
            context,
            stream: std::ptr::null_mut(),
            mark: None,
            modules: Vec::with_capacity(modules.len()),
            kernels: HashMap::new(),
            arch: found.arch(),
            overlap,
            products: None,
            gaps: OnceLock::new(),
        };
        inner.bind()?;
        inner.stream = check(
            "cuStreamCreate",
            result::stream::create(result::stream::StreamKind::NonBlocking),
        )?;
        inner.mark = Some(Moment::new()?);
        for module in modules {
            inner.load(module)?;
        }
        inner.products = Library::open();
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// From now on measures how long the GPU waits between decode steps. Nothing was captured before.
    ///
    /// # Errors
    /// The driver fails.
    pub fn measure_gaps(&self) -> Result<(), DriverError> {
        self.inner.bind()?;
        let gaps = Gaps::new()?;
        self.inner
            .gaps
            .set(gaps)
            .map_err(|_| failed("measure gaps", "they are measured already"))
    }

    /// Seconds from the end of a step's sampling to the beginning of the next step's first kernel, as often as a graph followed
    /// other launches since this was asked last.
    #[must_use]
    pub fn gaps(&self) -> Vec<f64> {
        self.inner.gaps.get().map(Gaps::take).unwrap_or_default()
    }
}

pub(super) fn failed(call: &str, reason: impl std::fmt::Display) -> DriverError {
    DriverError::Failed {
        call: call.to_owned(),
        reason: reason.to_string(),
    }
}

pub(super) fn check<T>(call: &str, result: Result<T, CudaError>) -> Result<T, DriverError> {
    result.map_err(|error| failed(call, text(error)))
}

/// The driver's description of a tensor.
fn tensor_map(map: &TensorMap) -> Result<[u8; TensorMap::BYTES], DriverError> {
    let mut made = sys::CUtensorMap { opaque: [0; 16] };
    let shape = [u64::from(map.width), 1 << 31];
    let row_bytes = u64::from(map.width) * 2;
    let (box_shape, steps) = ([64, map.box_rows], [1, 1]);
    // SAFETY: the driver is there; it reads arrays of the rank's length (one stride fewer) and writes the map.
    let encoded = unsafe {
        sys::cuTensorMapEncodeTiled(
            &raw mut made,
            sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_UINT16,
            2,
            map.base.0 as *mut c_void,
            shape.as_ptr(),
            &raw const row_bytes,
            box_shape.as_ptr(),
            steps.as_ptr(),
            sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    check("cuTensorMapEncodeTiled", encoded.result())?;
    let mut bytes = [0; TensorMap::BYTES];
    for (to, word) in bytes.chunks_exact_mut(8).zip(made.opaque) {
        to.copy_from_slice(&word.to_ne_bytes());
    }
    Ok(bytes)
}

impl Inner {
    /// Makes the context this thread's.
    fn bind(&self) -> Result<(), DriverError> {
        // SAFETY: the context is retained as long as `self` lives.
        check("cuCtxSetCurrent", unsafe {
            result::ctx::set_current(self.context)
        })
    }

    fn load(&mut self, module: &Module) -> Result<(), DriverError> {
        // SAFETY: the image is whole: our own build made it, and a cut or damaged one does not inflate.
        let handle = check("cuModuleLoadData", unsafe {
            result::module::load_data(module.code.as_ptr().cast())
        })?;
        self.modules.push(handle);
        let shared_max =
            self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?;
        for name in &module.kernels {
            let missing = || {
                failed(
                    "cuModuleGetFunction",
                    format!("a kernel's name with a zero byte: {name:?}"),
                )
            };
            let c_name = CString::new(name.as_str()).map_err(|_| missing())?;
            // SAFETY: the module was just loaded and lives as long as `self`.
            let function = check(name, unsafe { result::module::get_function(handle, c_name) })?;
            // SAFETY: the function is of a loaded module.
            let set = unsafe {
                result::function::set_function_attribute(
                    function,
                    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                    shared_max,
                )
            };
            check(name, set)?;
            self.kernels.insert(name.clone(), function);
        }
        Ok(())
    }

    fn attribute(&self, attribute: sys::CUdevice_attribute) -> Result<c_int, DriverError> {
        // SAFETY: the device exists.
        check("cuDeviceGetAttribute", unsafe {
            result::device::get_attribute(self.device, attribute)
        })
    }

    fn launch(&self, launch: &Launch) -> Result<(), DriverError> {
        if launch.grid.contains(&0) {
            return Ok(());
        }
        if let Some(product) = launch.product() {
            // SAFETY: the context is current, and the stream lives as long as `self`. The rest is the caller's contract.
            return unsafe { self.library()?.enqueue(&product, self.stream) };
        }
        let Some(&function) = self.kernels.get(launch.kernel) else {
            return Err(DriverError::Kernel {
                name: launch.kernel.to_owned(),
                arch: self.arch.clone(),
            });
        };
        let mut overlap = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue {
                programmaticStreamSerializationAllowed: 1,
            },
        };
        let [x, y, z] = launch.grid;
        let config = sys::CUlaunchConfig {
            gridDimX: x,
            gridDimY: y,
            gridDimZ: z,
            blockDimX: launch.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: launch.shared_bytes,
            hStream: self.stream,
            attrs: &raw mut overlap,
            numAttrs: u32::from(self.overlap == Overlap::Dependent),
        };
        let described = launch.tensor_map.map(|map| {
            let mut params = launch.params.clone();
            params[map.at..map.at + TensorMap::BYTES].copy_from_slice(&tensor_map(&map)?);
            Ok(params)
        });
        let described = described.transpose()?;
        let bytes = described.as_ref().unwrap_or(&launch.params);
        let mut params = [bytes.as_ptr().cast_mut().cast::<c_void>()];
        // SAFETY: the function's one parameter is a struct of which these are the bytes (the launcher made them, and tests
        // compare the sizes); the driver copies it before it returns. What it points to is the caller's contract.
        let launched = unsafe {
            sys::cuLaunchKernelEx(
                &raw const config,
                function,
                params.as_mut_ptr(),
                std::ptr::null_mut(),
            )
        };
        check(launch.kernel, launched.result())
    }

    fn mark(&self) -> Result<&Moment, DriverError> {
        let mark = self.mark.as_ref();
        mark.ok_or_else(|| failed("a mark", "the GPU was not opened"))
    }

    fn library(&self) -> Result<&Library, DriverError> {
        let library = self.products.as_ref();
        library.ok_or_else(|| failed("a matrix product", "there is no cuBLASLt; a kernel has to run it"))
    }

    fn finish(&self) -> Result<(), DriverError> {
        self.bind()?;
        // SAFETY: the stream lives as long as `self`.
        check("cuStreamSynchronize", unsafe {
            result::stream::synchronize(self.stream)
        })?;
        self.gaps.get().map_or(Ok(()), Gaps::finished)
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        // Nothing can be done about what fails here; a lost context fails at everything.
        let _ = self.finish();
        drop(self.products.take());
        drop(self.gaps.take());
        drop(self.mark.take());
        // SAFETY: each handle was made in `open`, is released once, and nothing runs any more.
        unsafe {
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            if !self.stream.is_null() {
                let _ = result::stream::destroy(self.stream);
            }
            let _ = result::primary_ctx::release(self.device);
        }
    }
}

/// A captured graph with the memory of nobody: launches hold addresses, whose owner outlives it by contract.
struct NativeGraph {
    inner: Arc<Inner>,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

// SAFETY: as for `Inner`.
unsafe impl Send for NativeGraph {}
// SAFETY: as for `Inner`.
unsafe impl Sync for NativeGraph {}

impl Graph for NativeGraph {
    unsafe fn enqueue(&self) -> Result<(), DriverError> {
        self.inner.bind()?;
        if let Some(gaps) = self.inner.gaps.get() {
            gaps.begins()?;
        }
        // SAFETY: the graph is instantiated; the rest is the caller's contract.
        check("cuGraphLaunch", unsafe {
            result::graph::launch(self.exec, self.inner.stream)
        })?;
        if let Some(gaps) = self.inner.gaps.get() {
            gaps.begun();
        }
        Ok(())
    }
}

impl Drop for NativeGraph {
    fn drop(&mut self) {
        if self.inner.finish().is_ok() {
            // SAFETY: both were made together in `graph`, and nothing runs any more.
            unsafe {
                let _ = result::graph::exec_destroy(self.exec);
                let _ = result::graph::destroy(self.graph);
            }
        }
    }
}

impl Driver for NativeDriver {
    fn properties(&self) -> Result<Properties, DriverError> {
        let inner = &self.inner;
        inner.bind()?;
        let (free_bytes, _) = check("cuMemGetInfo", result::mem_get_info())?;
        Ok(Properties {
            name: check("cuDeviceGetName", result::device::get_name(inner.device))?,
            arch: inner.arch.clone(),
            multiprocessors: inner
                .attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?
                .unsigned_abs(),
            free_bytes,
            products: inner.products.as_ref().map_or(Products::None, Library::products),
        })
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, DriverError> {
        self.inner.bind()?;
        // SAFETY: memory of any content; the caller releases it.
        match unsafe { result::malloc_sync(bytes.max(1)) } {
            Ok(at) => Ok(DevicePtr(at)),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                Err(DriverError::Memory { bytes })
            }
            Err(error) => check("cuMemAlloc", Err(error)),
        }
    }

    unsafe fn release(&self, at: DevicePtr) {
        if self.inner.bind().is_ok() {
            // SAFETY: the caller's contract. It fails only with a lost context, which has no memory any more.
            let _ = unsafe { result::free_sync(at.0) };
        }
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostPtr, DriverError> {
        self.inner.bind()?;
        // SAFETY: memory of any content; the caller releases it.
        let at = match unsafe { result::malloc_host(bytes.max(1), 0) } {
            Ok(at) => at.cast::<u8>(),
            Err(error) if error.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                return Err(DriverError::Memory { bytes });
            }
            Err(error) => return check("cuMemHostAlloc", Err(error)),
        };
        // SAFETY: it was just allocated with this size.
        unsafe { at.write_bytes(0, bytes) };
        Ok(HostPtr(at))
    }

    unsafe fn release_host(&self, at: HostPtr) {
        if self.inner.bind().is_ok() {
            // SAFETY: the caller's contract.
            let _ = unsafe { result::free_host(at.0.cast()) };
        }
    }

    unsafe fn write(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        self.inner.bind()?;
        // SAFETY: the caller's contract.
        check("cuMemcpyHtoD", unsafe { result::memcpy_htod_sync(to.0, from) })
    }

    unsafe fn read(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), DriverError> {
        self.inner.finish()?;
        // SAFETY: the caller's contract.
        check("cuMemcpyDtoH", unsafe { result::memcpy_dtoh_sync(to, from.0) })
    }

    unsafe fn enqueue_write(&self, to: DevicePtr, from: HostPtr, bytes: usize) -> Result<(), DriverError> {
        self.inner.bind()?;
        // SAFETY: the caller's contract.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to.0, from.0.cast(), bytes, self.inner.stream) };
        check("cuMemcpyHtoDAsync", copied.result())
    }

    unsafe fn enqueue_read(&self, from: DevicePtr, to: HostPtr, bytes: usize) -> Result<(), DriverError> {
        self.inner.bind()?;
        // SAFETY: the caller's contract.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to.0.cast(), from.0, bytes, self.inner.stream) };
        check("cuMemcpyDtoHAsync", copied.result())
    }

    unsafe fn enqueue_copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), DriverError> {
        self.inner.bind()?;
        // SAFETY: the caller's contract.
        check("cuMemcpyDtoDAsync", unsafe {
            result::memcpy_dtod_async(to.0, from.0, bytes, self.inner.stream)
        })
    }

    unsafe fn enqueue_zero(&self, at: DevicePtr, bytes: usize) -> Result<(), DriverError> {
        self.inner.bind()?;
        // SAFETY: the caller's contract.
        check("cuMemsetD8Async", unsafe {
            result::memset_d8_async(at.0, 0, bytes, self.inner.stream)
        })
    }

    unsafe fn enqueue(&self, launches: &[Launch]) -> Result<(), DriverError> {
        self.inner.bind()?;
        launches.iter().try_for_each(|launch| self.inner.launch(launch))?;
        match self.inner.gaps.get() {
            // SAFETY: the context is current, and the stream lives as long as the driver.
            Some(gaps) => unsafe { gaps.launched(self.inner.stream) },
            None => Ok(()),
        }
    }

    fn graph(&self, launches: &[Launch]) -> Result<Box<dyn Graph>, DriverError> {
        let inner = &self.inner;
        inner.bind()?;
        // A library may ask the device before it chooses, which it could not in the middle of a capture.
        for product in launches.iter().filter_map(Launch::product) {
            inner.library()?.prepare(&product)?;
        }
        // SAFETY: the stream lives, and the capture ends below whatever happens in between.
        check("cuStreamBeginCapture", unsafe {
            let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
            result::stream::begin_capture(inner.stream, mode)
        })?;
        let begun = match inner.gaps.get() {
            // SAFETY: the stream captures, and the graph holds `inner`.
            Some(gaps) => unsafe { gaps.capture(inner.stream) },
            None => Ok(()),
        };
        let captured = begun.and_then(|()| launches.iter().try_for_each(|launch| inner.launch(launch)));
        // SAFETY: the capture was begun above.
        let graph = check("cuStreamEndCapture", unsafe {
            result::stream::end_capture(inner.stream)
        });
        captured?;
        let graph = graph?;
        let mut exec = std::ptr::null_mut();
        // SAFETY: the graph is whole; the driver writes one handle.
        let made = unsafe { sys::cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) };
        if let Err(error) = made.result() {
            // SAFETY: made above, and used by nothing.
            let _ = unsafe { result::graph::destroy(graph) };
            return check("cuGraphInstantiate", Err(error));
        }
        Ok(Box::new(NativeGraph {
            inner: Arc::clone(inner),
            graph,
            exec,
        }))
    }

    fn is_idle(&self) -> Result<bool, DriverError> {
        self.inner.bind()?;
        // SAFETY: the stream lives as long as the driver.
        match unsafe { sys::cuStreamQuery(self.inner.stream) } {
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            done => check("cuStreamQuery", done.result()).map(|()| true),
        }
    }

    fn finish(&self) -> Result<(), DriverError> {
        self.inner.finish()
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<(), DriverError>) -> Result<f64, DriverError> {
        self.inner.finish()?;
        let (begin, end) = (Moment::new()?, Moment::new()?);
        // SAFETY: the context is current, and the stream lives as long as the driver.
        unsafe { begin.note(self.inner.stream) }?;
        work()?;
        // SAFETY: as above.
        unsafe { end.note(self.inner.stream) }?;
        self.inner.finish()?;
        end.since(&begin)
    }

    fn mark(&self) -> Result<(), DriverError> {
        self.inner.bind()?;
        if let Some(gaps) = self.inner.gaps.get() {
            gaps.sampled();
        }
        // SAFETY: the context is current, and the stream lives as long as the driver.
        unsafe { self.inner.mark()?.note(self.inner.stream) }
    }

    fn wait_for_mark(&self) -> Result<(), DriverError> {
        self.inner.bind()?;
        self.inner.mark()?.wait()
    }
}
