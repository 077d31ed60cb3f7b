//! The CPU as a [`Device`]: loading, the gate every batch passes, submitting and waiting. Knows no kernel.

use std::num::NonZeroUsize;
use std::sync::Arc;

use galerne_core::ids::BlockId;
use galerne_core::weights::WeightSource;

use super::exec::{Step, StepJob};
use super::isa::Isa;
use super::load::Loaded;
use super::memory::Rect;
use super::pool::{Pool, Task, Ticket};
use super::sample_job::Samplers;
use crate::batch::{BatchGate, check_requests};
use crate::check::check;
use crate::device::{
    Device, DeviceError, DeviceInfo, LoadOptions, LoadedProgram, MemoryUse, SampleOutcome, SampleRequest,
    StepBatch,
};
use crate::program::Program;

const NAME: &str = "cpu";

/// How to use the CPU.
#[derive(Debug, Clone, Copy, Default)]
pub struct CpuOptions {
    /// Worker threads; all cores this process may use if not given.
    pub threads: Option<NonZeroUsize>,
    /// An instruction set at most as capable as the machine's, which is taken if not given.
    pub isa: Option<Isa>,
}

/// The CPU and its worker threads.
pub struct CpuDevice {
    isa: Isa,
    pool: Arc<Pool>,
}

impl CpuDevice {
    /// Starts the worker threads.
    ///
    /// # Errors
    /// The machine lacks the instruction set, or threads cannot be started.
    pub fn new(options: CpuOptions) -> Result<Self, DeviceError> {
        let detected = Isa::detect();
        let isa = options.isa.unwrap_or(detected);
        if isa > detected {
            return Err(DeviceError::Unsupported {
                device: NAME,
                op: format!("instruction set {isa} (this machine has {detected})"),
            });
        }
        // SAFETY: the machine has the instruction set.
        unsafe {
            Self::new_unchecked(CpuOptions {
                isa: Some(isa),
                ..options
            })
        }
    }

    /// Like [`CpuDevice::new`] with an instruction set that is taken as it is, [`Isa::detect`]'s if not given.
    ///
    /// # Errors
    /// Threads cannot be started.
    ///
    /// # Safety
    /// This process can execute the instruction set: the machine has it, or its instructions are trapped and computed by
    /// something else, as tests do for AMX.
    pub unsafe fn new_unchecked(options: CpuOptions) -> Result<Self, DeviceError> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        let available = || std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
        let threads = options.threads.unwrap_or_else(available);
        let pool = Pool::new(threads).map_err(|error| DeviceError::Failed {
            device: NAME,
            reason: format!("{threads} threads could not be started: {error}"),
        })?;
        Ok(Self {
            isa,
            pool: Arc::new(pool),
        })
    }
}

impl Device for CpuDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: NAME.to_owned(),
            isa: self.isa.name().to_owned(),
            threads: self.pool.workers(),
            block_tokens: 16,
            step_tokens: 256,
            free_bytes: None,
        }
    }

    fn load(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        options: LoadOptions,
    ) -> Result<Box<dyn LoadedProgram>, DeviceError> {
        if options.quantization.is_some() {
            return Err(DeviceError::Unsupported {
                device: NAME,
                op: "rounding weights while they are loaded (--quantize)".to_owned(),
            });
        }
        check(program)?;
        let gate = BatchGate::new(program, options)?;
        let loaded = Loaded::load(program, weights, options, self.isa, self.pool.workers())?;
        Ok(Box::new(CpuProgram {
            gate,
            loaded: Arc::new(loaded),
            pool: Arc::clone(&self.pool),
            samplers: Samplers::new(self.isa, self.pool.workers()),
            state: State::Idle,
            last: [None, None],
            outputs: 0,
        }))
    }
}

enum State {
    Idle,
    /// Submitted; its other worker threads are at it.
    Running(Arc<Task>),
    Failed(String),
}

struct CpuProgram {
    loaded: Arc<Loaded>,
    pool: Arc<Pool>,
    samplers: Samplers,
    state: State,
    /// The last two steps, by their turn with the tickets.
    last: [Option<Arc<Task>>; 2],
    /// Rows of the last step's output.
    outputs: usize,
    gate: BatchGate,
}

impl Drop for CpuProgram {
    fn drop(&mut self) {
        // Workers hold the program's memory themselves; waiting only keeps the order of events simple.
        let _ = self.idle();
    }
}

impl CpuProgram {
    /// Waits for a running step, so that the program's memory is this thread's alone.
    fn idle(&mut self) -> Result<(), DeviceError> {
        if let State::Running(task) = &self.state {
            self.state = match self.pool.wait(task) {
                Ok(()) => State::Idle,
                Err(reason) => State::Failed(reason),
            };
        }
        match &self.state {
            State::Failed(reason) => Err(DeviceError::Failed {
                device: NAME,
                reason: reason.clone(),
            }),
            State::Idle | State::Running(_) => Ok(()),
        }
    }

    fn output(&self) -> Rect {
        self.loaded.rect(self.loaded.program.output, self.outputs)
    }
}

impl LoadedProgram for CpuProgram {
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        self.idle()?;
        self.gate.check(batch)?;
        let turn = self.gate.steps() as usize % 2;
        if let Some(task) = self.last[turn].take() {
            task.wait_empty();
        }
        self.loaded.tickets[turn].iter().for_each(Ticket::reset);
        self.outputs = self.gate.outputs(batch);
        let job = StepJob {
            loaded: Arc::clone(&self.loaded),
            turn,
            step: Step::new(batch.clone()),
        };
        let task = self.pool.submit(Box::new(job));
        self.last[turn] = Some(Arc::clone(&task));
        self.state = State::Running(task);
        Ok(())
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        self.idle()
    }

    fn sample(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError> {
        self.idle()?;
        let output = self.output();
        check_requests(requests, output.rows, output.width)?;
        // SAFETY: no step is running, and `&mut self` keeps one from starting.
        let outcomes = unsafe { self.samplers.sample(&self.pool, output, requests) };
        outcomes.map_err(|reason| {
            self.state = State::Failed(reason.clone());
            DeviceError::Failed { device: NAME, reason }
        })
    }

    fn read_output(&mut self) -> Result<Vec<f32>, DeviceError> {
        self.idle()?;
        let output = self.output();
        let mut all = Vec::with_capacity(output.rows * output.width);
        for row in 0..output.rows {
            // SAFETY: no step is running, and `&mut self` keeps one from starting.
            all.extend_from_slice(unsafe { output.row(row) });
        }
        Ok(all)
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), DeviceError> {
        self.idle()?;
        self.gate.check_copies(pairs)?;
        for &(from, to) in pairs {
            // SAFETY: no step is running, and `&mut self` keeps one from starting.
            unsafe { self.loaded.kv.copy_block(from, to) };
        }
        Ok(())
    }

    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.idle()?;
        self.gate.check_blocks("zeroed blocks", blocks)?;
        for &block in blocks {
            // SAFETY: no step is running, and `&mut self` keeps one from starting.
            unsafe { self.loaded.kv.zero_block(block) };
        }
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        self.loaded.memory()
    }
}
