//! Numbers in the memory of a driver, for tests.

use bytemuck::Pod;
use galerne_kernels::cuda::driver::{DevicePtr, DeviceView, Driver};
use galerne_kernels::program::{BufferId, View};

/// Numbers in device memory, given back when dropped.
pub struct Memory<'s, T> {
    driver: &'s dyn Driver,
    at: DevicePtr,
    count: usize,
    numbers: std::marker::PhantomData<T>,
}

impl<'s, T: Pod> Memory<'s, T> {
    pub(crate) fn new(driver: &'s dyn Driver, numbers: &[T]) -> Self {
        Self::with_bytes(driver, bytemuck::cast_slice(numbers))
    }

    /// All bytes 0xff: NaN in every format of floats.
    pub(crate) fn poisoned(driver: &'s dyn Driver, count: usize) -> Self {
        Self::with_bytes(driver, &vec![0xff; count * size_of::<T>()])
    }

    fn with_bytes(driver: &'s dyn Driver, bytes: &[u8]) -> Self {
        let at = driver.allocate(bytes.len()).expect("memory for a test");
        // SAFETY: allocated just now, of this size.
        let written = unsafe { driver.write(at, bytes) };
        written.expect("the driver writes memory");
        Self {
            driver,
            at,
            count: bytes.len() / size_of::<T>(),
            numbers: std::marker::PhantomData,
        }
    }

    /// Where the first lies.
    #[must_use]
    pub const fn at(&self) -> DevicePtr {
        self.at
    }

    /// What they are now.
    #[must_use]
    pub fn read(&self) -> Vec<T> {
        let mut numbers = vec![T::zeroed(); self.count];
        // SAFETY: allocated, of this size.
        let read = unsafe { self.driver.read(self.at, bytemuck::cast_slice_mut(&mut numbers)) };
        read.expect("the driver reads memory");
        numbers
    }
}

impl Memory<'_, f32> {
    /// Columns `start .. start + width` of rows of `stride` numbers.
    #[must_use]
    pub const fn view(&self, stride: u32, start: u32, width: u32) -> DeviceView {
        let view = View {
            buffer: BufferId(0),
            start,
            width,
        };
        DeviceView::new(self.at, stride, view)
    }
}

impl<T> Drop for Memory<'_, T> {
    fn drop(&mut self) {
        // A lost device runs nothing either.
        let _ = self.driver.finish();
        // SAFETY: it came from this driver, and nothing runs any more.
        unsafe { self.driver.release(self.at) };
    }
}
