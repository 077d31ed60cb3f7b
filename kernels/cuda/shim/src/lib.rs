//! A driver that runs the CUDA kernels' sources on the CPU, for tests: each thread of a block a fiber, in an order
//! that a seed decides. What goes wrong in a kernel is an error or the end of the process. Knows no kernel.
#![expect(unsafe_code, reason = "it calls C++ and hands out raw memory")]

mod lazy;
mod mapping;
mod memory;
mod product;
mod rig;

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytemuck::Pod;
use galerne_kernels::cuda::driver::{
    DevicePtr, Driver, DriverError, Graph, HostPtr, Launch, Products, Properties,
};
pub use lazy::Lazy;
use mapping::Mapping;
pub use memory::Memory;
pub use rig::Rig;

unsafe extern "C" {
    fn shim_find(name: *const c_char) -> c_int;
    fn shim_kernel(index: c_int, params_bytes: *mut usize) -> *const c_char;
    fn shim_launch(
        index: c_int,
        params: *const c_void,
        params_bytes: usize,
        grid: *const u32,
        threads: u32,
        shared_bytes: usize,
        seed: u64,
        error: *mut c_char,
        error_bytes: usize,
    ) -> usize;
}

/// Names of all kernels of this build, and the bytes of each one's parameter struct.
#[must_use]
pub fn kernels() -> Vec<(String, usize)> {
    let mut kernels = Vec::new();
    loop {
        let mut params_bytes = 0;
        let index = c_int::try_from(kernels.len()).expect("few kernels");
        // SAFETY: past the last kernel it answers null.
        let name = unsafe { shim_kernel(index, &raw mut params_bytes) };
        if name.is_null() {
            return kernels;
        }
        // SAFETY: a string literal of the kernel's file.
        let name = unsafe { CStr::from_ptr(name) };
        kernels.push((name.to_string_lossy().into_owned(), params_bytes));
    }
}

/// Numbers from `mean - 1` to `mean + 1`, other ones for each seed.
#[must_use]
pub fn numbers(count: usize, seed: u32, mean: f32) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0 + mean
    };
    (0..count).map(|_| next()).collect()
}

/// The driver. What is enqueued has run when the call returns, on the caller's thread.
///
/// Device memory is filled with 0xff, and ends where a page begins that nobody may touch; so it begins at a multiple of
/// 16 bytes only. A kernel that reads or writes past an end, or 16 bytes at an address that is no multiple of 16, ends the
/// process, which says the kernel's name.
#[derive(Debug)]
pub struct Shim {
    seed: u64,
    products: Products,
    ran: Mutex<BTreeMap<&'static str, u64>>,
    mappings: Mutex<BTreeMap<u64, Mapping>>,
}

impl Shim {
    /// A driver that runs a block's threads in an order made from `seed`.
    #[must_use]
    pub const fn new(seed: u64) -> Self {
        Self {
            seed,
            products: Products::None,
            ran: Mutex::new(BTreeMap::new()),
            mappings: Mutex::new(BTreeMap::new()),
        }
    }

    /// The same with a library for matrix products.
    #[must_use]
    pub fn with_products(self) -> Self {
        Self {
            products: Products::Floats8,
            ..self
        }
    }

    /// How many launches of kernels, or of products, whose names end so it has run, other than in graphs.
    #[must_use]
    pub fn ran(&self, ending: &str) -> u64 {
        let ran = locked(&self.ran);
        let such = ran.iter().filter(|(name, _)| name.ends_with(ending));
        such.map(|(_, times)| times).sum()
    }

    /// Device memory with these numbers.
    #[must_use]
    pub fn memory<T: Pod>(&self, numbers: &[T]) -> Memory<'_, T> {
        Memory::new(self, numbers)
    }

    /// Device memory for `count` numbers, all bytes 0xff: NaN in every format of floats.
    #[must_use]
    pub fn poisoned<T: Pod>(&self, count: usize) -> Memory<'_, T> {
        Memory::poisoned(self, count)
    }

    fn mappings(&self) -> MutexGuard<'_, BTreeMap<u64, Mapping>> {
        locked(&self.mappings)
    }

    fn map(&self, bytes: usize, fill: u8) -> Result<u64, DriverError> {
        let mapping = Mapping::new(bytes, fill).ok_or(DriverError::Memory { bytes })?;
        let at = mapping.at() as u64;
        self.mappings().insert(at, mapping);
        Ok(at)
    }

    /// Counts a launch; says how many there were before it.
    fn count(&self, kernel: &'static str) -> u64 {
        let mut ran = locked(&self.ran);
        let before = ran.values().sum();
        *ran.entry(kernel).or_default() += 1;
        before
    }

    fn launch(&self, launch: &Launch) -> Result<(), DriverError> {
        let number = self.count(launch.kernel);
        if let Some(product) = launch.product().filter(|_| self.products > Products::None) {
            // SAFETY: the business of whoever enqueued it, as for kernels.
            unsafe { product::run(&product) };
            return Ok(());
        }
        let kernel = find(launch.kernel)?;
        let mut params = vec![0_u64; launch.params.len().div_ceil(8)];
        bytemuck::cast_slice_mut(&mut params)[..launch.params.len()].copy_from_slice(&launch.params);
        let mut error = vec![0_u8; 400];
        // SAFETY: the kernel exists, parameters are of the length said and aligned, and what they point to is the
        // business of whoever enqueued them.
        let length = unsafe {
            shim_launch(
                kernel,
                params.as_ptr().cast(),
                launch.params.len(),
                launch.grid.as_ptr(),
                launch.threads,
                launch.shared_bytes as usize,
                self.seed.wrapping_mul(0x9e37_79b9).wrapping_add(number),
                error.as_mut_ptr().cast(),
                error.len(),
            )
        };
        if length == 0 {
            return Ok(());
        }
        error.truncate(length);
        Err(DriverError::Failed {
            call: format!("kernel {}", launch.kernel),
            reason: String::from_utf8_lossy(&error).into_owned(),
        })
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn find(name: &str) -> Result<c_int, DriverError> {
    let text = CString::new(name).unwrap_or_default();
    // SAFETY: a string that ends with a 0.
    let index = unsafe { shim_find(text.as_ptr()) };
    if index >= 0 {
        return Ok(index);
    }
    Err(DriverError::Kernel {
        name: name.to_owned(),
        arch: "the shim".to_owned(),
    })
}

/// Launches that were found, with the driver they run on. They know the driver by the number of its launches alone.
struct Replay {
    shim: Shim,
    launches: Vec<Launch>,
}

impl Graph for Replay {
    unsafe fn enqueue(&self) -> Result<(), DriverError> {
        self.launches
            .iter()
            .try_for_each(|launch| self.shim.launch(launch))
    }
}

impl Driver for Shim {
    fn properties(&self) -> Result<Properties, DriverError> {
        Ok(Properties {
            name: "shim".to_owned(),
            arch: "shim".to_owned(),
            multiprocessors: 4,
            free_bytes: 1 << 30,
            products: self.products,
        })
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, DriverError> {
        self.map(bytes, 0xff).map(DevicePtr)
    }

    unsafe fn release(&self, at: DevicePtr) {
        self.mappings().remove(&at.0);
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostPtr, DriverError> {
        // To whole cache lines, so that it begins with one.
        let at = self.map(bytes.next_multiple_of(64), 0)?;
        Ok(HostPtr(at as *mut u8))
    }

    unsafe fn release_host(&self, at: HostPtr) {
        self.mappings().remove(&(at.0 as u64));
    }

    unsafe fn write(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        // SAFETY: allocated by contract.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to.0 as *mut u8, from.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), DriverError> {
        // SAFETY: allocated by contract.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.as_mut_ptr(), to.len()) };
        Ok(())
    }

    unsafe fn enqueue_write(&self, to: DevicePtr, from: HostPtr, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: allocated by contract.
        unsafe { std::ptr::copy_nonoverlapping(from.0.cast_const(), to.0 as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn enqueue_read(&self, from: DevicePtr, to: HostPtr, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: allocated by contract.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0, bytes) };
        Ok(())
    }

    unsafe fn enqueue_copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: allocated and apart by contract.
        unsafe { std::ptr::copy_nonoverlapping(from.0 as *const u8, to.0 as *mut u8, bytes) };
        Ok(())
    }

    unsafe fn enqueue_zero(&self, at: DevicePtr, bytes: usize) -> Result<(), DriverError> {
        // SAFETY: allocated by contract.
        unsafe { std::ptr::write_bytes(at.0 as *mut u8, 0, bytes) };
        Ok(())
    }

    unsafe fn enqueue(&self, launches: &[Launch]) -> Result<(), DriverError> {
        launches.iter().try_for_each(|launch| self.launch(launch))
    }

    fn graph(&self, launches: &[Launch]) -> Result<Box<dyn Graph>, DriverError> {
        let is_kernel = |launch: &&Launch| self.products == Products::None || launch.product().is_none();
        for launch in launches.iter().filter(is_kernel) {
            find(launch.kernel)?;
        }
        let shim = Self::new(self.seed);
        Ok(Box::new(Replay {
            shim: Self {
                products: self.products,
                ..shim
            },
            launches: launches.to_vec(),
        }))
    }

    fn is_idle(&self) -> Result<bool, DriverError> {
        Ok(true)
    }

    fn finish(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn mark(&self) -> Result<(), DriverError> {
        Ok(())
    }

    fn wait_for_mark(&self) -> Result<(), DriverError> {
        Ok(())
    }
}
