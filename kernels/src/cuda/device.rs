//! The CUDA device behind [`Device`]: loading, submitting, waiting. A step that only decodes is enqueued as one graph. Knows no
//! kernel.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use galerne_core::ids::BlockId;
use galerne_core::weights::WeightSource;

use super::driver::{Driver, DriverError, Graph, HostPtr, Properties};
use super::failed;
use super::launch::attention::Step;
use super::memory::{DeviceMemory, HostMemory, Planner};
use super::plan::ModelPlan;
use super::sampler::{Round, decode};
use super::step::{AttentionPlans, Model};
use super::tables::StepRows;
use crate::batch::{BatchGate, check_drawn, check_requests};
use crate::check::check;
use crate::device::{
    Device, DeviceError, DeviceInfo, LoadOptions, LoadedProgram, MemoryUse, SampleOutcome, SampleRequest,
    StepBatch, sample_then_submit,
};
use crate::program::Program;

const NAME: &str = "cuda";

/// Of the memory nobody has taken, this part is left alone: the driver and other processes need some.
const RESERVE_DIVISOR: usize = 20;

/// One GPU, or what stands in for it.
pub struct CudaDevice {
    driver: Arc<dyn Driver>,
    properties: Properties,
    with_unchecked: bool,
}

impl CudaDevice {
    /// On a driver.
    ///
    /// # Errors
    /// The driver fails.
    pub fn new(driver: Arc<dyn Driver>) -> Result<Self, DriverError> {
        let properties = driver.properties()?;
        Ok(Self {
            driver,
            properties,
            with_unchecked: false,
        })
    }

    /// Uses kernels too that only a GPU can check, and that none has checked yet.
    #[must_use]
    pub fn with_unchecked(self) -> Self {
        Self {
            with_unchecked: true,
            ..self
        }
    }

    fn budget_bytes(&self) -> Result<usize, DriverError> {
        let free = self.driver.properties()?.free_bytes;
        Ok(free - free / RESERVE_DIVISOR)
    }
}

impl Device for CudaDevice {
    fn info(&self) -> DeviceInfo {
        DeviceInfo {
            name: NAME.to_owned(),
            isa: format!("{} ({})", self.properties.arch, self.properties.name),
            threads: self.properties.multiprocessors as usize,
            block_tokens: 64,
            step_tokens: 2_048,
            free_bytes: self.budget_bytes().ok(),
        }
    }

    fn load(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        options: LoadOptions,
    ) -> Result<Box<dyn LoadedProgram>, DeviceError> {
        check(program)?;
        let gate = BatchGate::new(program, options)?;
        let mut planner = Planner::new(self.budget_bytes().map_err(|error| failed(&error))?);
        let plan = ModelPlan::new(
            program,
            weights,
            options,
            gate.positions(),
            (&self.properties, self.with_unchecked),
            &mut planner,
        )?;
        let memory = DeviceMemory::new(&self.driver, planner.bytes()).map_err(|error| failed(&error))?;
        let host = |bytes| HostMemory::new(&self.driver, bytes).map_err(|error| failed(&error));
        let tables = [host(plan.tables_bytes())?, host(plan.tables_bytes())?];
        let sampler = host(plan.sampler_bytes())?;
        let model = plan.load(weights, &*self.driver, &memory)?;
        Ok(Box::new(CudaProgram {
            graphs: HashMap::new(),
            tables,
            sampler,
            model,
            gate,
            plans: AttentionPlans::default(),
            state: State::Idle,
            outputs: 0,
            memory_use: planner.memory(),
            _memory: memory,
            driver: Arc::clone(&self.driver),
        }))
    }
}

#[derive(Debug)]
enum State {
    Idle,
    Running,
    Failed(String),
}

struct CudaProgram {
    /// Steps that only decode, by their rows. They go before the memory they use.
    graphs: HashMap<usize, Box<dyn Graph>>,
    /// Tables and plans on their way to the device: of the last step and, the second, of the one before it, which may run as
    /// long as nobody has seen what it draws.
    tables: [HostMemory; 2],
    /// Requests to sample on their way to the device, and results on their way back.
    sampler: HostMemory,
    model: Model,
    gate: BatchGate,
    plans: AttentionPlans,
    state: State,
    /// Rows of the last step's output.
    outputs: usize,
    memory_use: MemoryUse,
    _memory: DeviceMemory,
    driver: Arc<dyn Driver>,
}

impl CudaProgram {
    /// Waits for what is enqueued, so that host and device memory are this thread's alone.
    fn idle(&mut self) -> Result<(), DeviceError> {
        if let State::Running = self.state {
            let finished = self.driver.finish();
            self.note(finished)?;
            self.state = State::Idle;
        }
        self.alive()
    }

    fn alive(&self) -> Result<(), DeviceError> {
        match &self.state {
            State::Failed(reason) => Err(DeviceError::Failed {
                device: NAME,
                reason: reason.clone(),
            }),
            State::Idle | State::Running => Ok(()),
        }
    }

    /// After most failures a GPU's context is lost, so the first one is the last answer.
    fn note<T>(&mut self, done: Result<T, DriverError>) -> Result<T, DeviceError> {
        done.map_err(|error| {
            self.state = State::Failed(error.to_string());
            failed(&error)
        })
    }

    /// Enqueues tables, plans and kernels of a checked batch; if `drawn` is not empty, its tokens are those that these requests
    /// of the last round of sampling draw. Nothing but the last step and its sampling may be enqueued.
    fn enqueue(&mut self, batch: &StepBatch, drawn: &[usize]) -> Result<(), DriverError> {
        self.tables.swap(0, 1);
        let bucket = self.model.bucket(batch);
        let rows = bucket.unwrap_or_else(|| StepRows::of(batch));
        let model = &self.model;
        let [tables, _] = &mut self.tables;
        // SAFETY: the last step's tables are the other ones, and the step that had these is done.
        let staging = unsafe { tables.bytes() };
        let copies = model.stage((batch, drawn), rows, &mut self.plans, staging);
        for copy in copies {
            let from = HostPtr(tables.ptr().0.wrapping_add(copy.from));
            // SAFETY: `stage` keeps to the staging memory and to regions of its size; the host leaves it alone until the
            // step is done.
            unsafe { self.driver.enqueue_write(copy.to, from, copy.bytes) }?;
        }
        if !drawn.is_empty() {
            // SAFETY: a token in the tables for each, and a job's result.
            unsafe { self.driver.enqueue(&[model.place_drawn(drawn.len())]) }?;
        }
        let Some(rows) = bucket else {
            // SAFETY: launches point into the program's memory, planned for the largest step.
            return unsafe { self.driver.enqueue(&self.model.launches(rows, Step::Mixed)) };
        };
        let graph = match self.graphs.entry(rows.tokens) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => {
                let launches = self.model.launches(rows, Step::Decode);
                new.insert(self.driver.graph(&launches)?)
            }
        };
        // SAFETY: as above.
        unsafe { graph.enqueue() }
    }

    /// Enqueues one round of sampling: as many of the requests as find room, and the copy of their results. It does not wait
    /// for the step, so that the device goes from one to the other by itself.
    fn enqueue_round(&mut self, requests: &[SampleRequest<'_>]) -> Result<Round, DriverError> {
        let (room, addresses) = (self.model.sampler, self.model.addresses.sampler);
        let logits = self.model.view(self.model.program.output);
        // SAFETY: only rounds use this memory, and each waits at its end.
        let (upload, _) = unsafe { self.sampler.bytes() }.split_at_mut(room.upload_bytes);
        let round = room.encode(requests, logits, addresses, upload);
        let results = HostPtr(self.sampler.ptr().0.wrapping_add(room.upload_bytes));
        // SAFETY: regions of the program's memory and of the staging memory, as large as the room says; the host leaves the
        // staging memory alone until `finish`.
        unsafe {
            self.driver
                .enqueue_write(addresses.upload, self.sampler.ptr(), round.upload_bytes)?;
            self.driver.enqueue(&round.launches)?;
            self.driver
                .enqueue_read(addresses.results, results, round.result_bytes)?;
        }
        Ok(round)
    }

    /// The outcomes of a round that is done.
    fn outcomes(&mut self, requests: &[SampleRequest<'_>], round: &Round) -> Vec<SampleOutcome> {
        // SAFETY: the copies are done, and no other is enqueued before these results are decoded.
        let bytes = unsafe { self.sampler.bytes() };
        let results = &bytes[self.model.sampler.upload_bytes..][..round.result_bytes];
        decode(&requests[..round.requests], results)
    }

    /// One round of sampling and its outcomes.
    fn round(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DriverError> {
        let round = self.enqueue_round(requests)?;
        self.driver.finish()?;
        self.state = State::Idle;
        Ok(self.outcomes(requests, &round))
    }

    /// The last round of sampling and the step behind it, and the round's outcomes while the step runs.
    fn round_and_step(
        &mut self,
        requests: &[SampleRequest<'_>],
        next: &StepBatch,
        drawn: &[usize],
    ) -> Result<Vec<SampleOutcome>, DriverError> {
        let round = self.enqueue_round(requests)?;
        self.driver.mark()?;
        self.enqueue(next, drawn)?;
        self.driver.wait_for_mark()?;
        Ok(self.outcomes(requests, &round))
    }
}

impl LoadedProgram for CudaProgram {
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        self.idle()?;
        self.gate.check(batch)?;
        self.outputs = self.gate.outputs(batch);
        self.state = State::Running;
        let enqueued = self.enqueue(batch, &[]);
        self.note(enqueued)
    }

    fn wait(&mut self) -> Result<(), DeviceError> {
        self.idle()
    }

    fn is_running(&mut self) -> Result<bool, DeviceError> {
        if let State::Running = self.state {
            let idle = self.driver.is_idle();
            if self.note(idle)? {
                self.state = State::Idle;
            }
        }
        self.alive()?;
        Ok(matches!(self.state, State::Running))
    }

    fn sample(&mut self, requests: &[SampleRequest<'_>]) -> Result<Vec<SampleOutcome>, DeviceError> {
        self.alive()?;
        check_requests(requests, self.outputs, self.model.program.output.width as usize)?;
        let mut outcomes = Vec::with_capacity(requests.len());
        while outcomes.len() < requests.len() {
            let round = self.round(&requests[outcomes.len()..]);
            outcomes.extend(self.note(round)?);
        }
        Ok(outcomes)
    }

    fn runs_ahead(&self) -> bool {
        true
    }

    fn sample_and_submit(
        &mut self,
        requests: &[SampleRequest<'_>],
        next: &StepBatch,
        drawn: &[usize],
    ) -> Result<Vec<SampleOutcome>, DeviceError> {
        self.alive()?;
        check_requests(requests, self.outputs, self.model.program.output.width as usize)?;
        check_drawn(requests, next, drawn)?;
        if !self.model.sampler.fits(requests) {
            return sample_then_submit(self, requests, next, drawn);
        }
        self.gate.check(next)?;
        self.outputs = self.gate.outputs(next);
        self.state = State::Running;
        let outcomes = self.round_and_step(requests, next, drawn);
        self.note(outcomes)
    }

    fn read_output(&mut self) -> Result<Vec<f32>, DeviceError> {
        self.idle()?;
        let view = self.model.view(self.model.program.output);
        let mut rows = vec![0.0f32; self.outputs * view.stride as usize];
        // The last row may end with the buffer, before its stride does.
        let elements = rows.len().saturating_sub((view.stride - view.width) as usize);
        // SAFETY: the view's rows are in the program's memory.
        let read = unsafe {
            self.driver
                .read(view.at, bytemuck::cast_slice_mut(&mut rows[..elements]))
        };
        self.note(read)?;
        let row = |row: &[f32]| row[..view.width as usize].to_vec();
        Ok(rows.chunks_exact(view.stride as usize).flat_map(row).collect())
    }

    fn copy_blocks(&mut self, pairs: &[(BlockId, BlockId)]) -> Result<(), DeviceError> {
        self.idle()?;
        self.gate.check_copies(pairs)?;
        for &(from, to) in pairs {
            let (from, to, bytes) = (
                self.model.block(from),
                self.model.block(to),
                self.model.addresses.block_bytes,
            );
            // SAFETY: blocks of the pool, which the gate has checked.
            let copied = unsafe { self.driver.enqueue_copy(from, to, bytes) };
            self.note(copied)?;
        }
        self.state = State::Running;
        Ok(())
    }

    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.idle()?;
        self.gate.check_blocks("zeroed blocks", blocks)?;
        for &block in blocks {
            let (at, bytes) = (self.model.block(block), self.model.addresses.block_bytes);
            // SAFETY: blocks of the pool, which the gate has checked.
            let zeroed = unsafe { self.driver.enqueue_zero(at, bytes) };
            self.note(zeroed)?;
        }
        self.state = State::Running;
        Ok(())
    }

    fn memory(&self) -> MemoryUse {
        self.memory_use
    }
}
