//! The shim as late as a GPU can be: what is enqueued runs only when somebody waits for it. A host that changes memory too early,
//! or reads it, gets other numbers.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use galerne_kernels::cuda::driver::{DevicePtr, Driver, DriverError, Graph, HostPtr, Launch, Properties};

use crate::Shim;

/// The driver.
#[derive(Debug)]
pub struct Lazy {
    shim: Shim,
    queue: Arc<Mutex<Queue>>,
}

#[derive(Default)]
struct Queue {
    work: VecDeque<Work>,
    /// Of `work`, how much is before the mark.
    marked: usize,
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Queue")
            .field("work", &self.work.len())
            .finish_non_exhaustive()
    }
}

enum Work {
    Write(DevicePtr, HostPtr, usize),
    Read(DevicePtr, HostPtr, usize),
    Copy(DevicePtr, DevicePtr, usize),
    Zero(DevicePtr, usize),
    Launches(Vec<Launch>),
    Graph(Arc<dyn Graph>),
}

struct LazyGraph {
    graph: Arc<dyn Graph>,
    queue: Arc<Mutex<Queue>>,
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Graph for LazyGraph {
    unsafe fn enqueue(&self) -> Result<(), DriverError> {
        lock(&self.queue)
            .work
            .push_back(Work::Graph(Arc::clone(&self.graph)));
        Ok(())
    }
}

impl Lazy {
    /// A driver that runs a block's threads in an order made from `seed`.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self {
            shim: Shim::new(seed),
            queue: Arc::default(),
        }
    }

    fn enqueue(&self, work: Work) -> Result<(), DriverError> {
        lock(&self.queue).work.push_back(work);
        Ok(())
    }

    /// Runs the first `count` of what is enqueued.
    fn run(&self, queue: &mut Queue, count: usize) -> Result<(), DriverError> {
        queue.marked = queue.marked.saturating_sub(count);
        for work in queue.work.drain(..count) {
            // SAFETY: whoever enqueued it promised that it may run until somebody has waited for it.
            unsafe {
                match work {
                    Work::Write(to, from, bytes) => self.shim.enqueue_write(to, from, bytes)?,
                    Work::Read(from, to, bytes) => self.shim.enqueue_read(from, to, bytes)?,
                    Work::Copy(from, to, bytes) => self.shim.enqueue_copy(from, to, bytes)?,
                    Work::Zero(at, bytes) => self.shim.enqueue_zero(at, bytes)?,
                    Work::Launches(launches) => self.shim.enqueue(&launches)?,
                    Work::Graph(graph) => graph.enqueue()?,
                }
            }
        }
        Ok(())
    }
}

impl Driver for Lazy {
    fn properties(&self) -> Result<Properties, DriverError> {
        self.shim.properties()
    }

    fn allocate(&self, bytes: usize) -> Result<DevicePtr, DriverError> {
        self.shim.allocate(bytes)
    }

    unsafe fn release(&self, at: DevicePtr) {
        // SAFETY: the caller's contract.
        unsafe { self.shim.release(at) };
    }

    fn allocate_host(&self, bytes: usize) -> Result<HostPtr, DriverError> {
        self.shim.allocate_host(bytes)
    }

    unsafe fn release_host(&self, at: HostPtr) {
        // SAFETY: the caller's contract.
        unsafe { self.shim.release_host(at) };
    }

    unsafe fn write(&self, to: DevicePtr, from: &[u8]) -> Result<(), DriverError> {
        // SAFETY: the caller's contract.
        unsafe { self.shim.write(to, from) }
    }

    unsafe fn read(&self, from: DevicePtr, to: &mut [u8]) -> Result<(), DriverError> {
        self.finish()?;
        // SAFETY: the caller's contract.
        unsafe { self.shim.read(from, to) }
    }

    unsafe fn enqueue_write(&self, to: DevicePtr, from: HostPtr, bytes: usize) -> Result<(), DriverError> {
        self.enqueue(Work::Write(to, from, bytes))
    }

    unsafe fn enqueue_read(&self, from: DevicePtr, to: HostPtr, bytes: usize) -> Result<(), DriverError> {
        self.enqueue(Work::Read(from, to, bytes))
    }

    unsafe fn enqueue_copy(&self, from: DevicePtr, to: DevicePtr, bytes: usize) -> Result<(), DriverError> {
        self.enqueue(Work::Copy(from, to, bytes))
    }

    unsafe fn enqueue_zero(&self, at: DevicePtr, bytes: usize) -> Result<(), DriverError> {
        self.enqueue(Work::Zero(at, bytes))
    }

    unsafe fn enqueue(&self, launches: &[Launch]) -> Result<(), DriverError> {
        Self::enqueue(self, Work::Launches(launches.to_vec()))
    }

    fn graph(&self, launches: &[Launch]) -> Result<Box<dyn Graph>, DriverError> {
        Ok(Box::new(LazyGraph {
            graph: Arc::from(self.shim.graph(launches)?),
            queue: Arc::clone(&self.queue),
        }))
    }

    fn is_idle(&self) -> Result<bool, DriverError> {
        Ok(lock(&self.queue).work.is_empty())
    }

    fn finish(&self) -> Result<(), DriverError> {
        let mut queue = lock(&self.queue);
        let count = queue.work.len();
        self.run(&mut queue, count)
    }

    fn mark(&self) -> Result<(), DriverError> {
        let mut queue = lock(&self.queue);
        queue.marked = queue.work.len();
        Ok(())
    }

    fn wait_for_mark(&self) -> Result<(), DriverError> {
        let mut queue = lock(&self.queue);
        let count = queue.marked;
        self.run(&mut queue, count)
    }
}
