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
use super::sampler::Sampler;
use super::sampler_mask::fits;
use crate::device::{
    Device, DeviceError, DeviceInfo, LoadOptions, LoadedProgram, MemoryUse, SampleOutcome, SampleRequest,
    SequenceSlice, StepBatch,
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
        }
    }

    fn load(
        &self,
        program: &Program,
        weights: &dyn WeightSource,
        options: LoadOptions,
    ) -> Result<Box<dyn LoadedProgram>, DeviceError> {
        let loaded = Loaded::load(program, weights, options, self.isa, self.pool.workers())?;
        Ok(Box::new(CpuProgram {
            writers: vec![0; options.kv.blocks],
            loaded: Arc::new(loaded),
            pool: Arc::clone(&self.pool),
            sampler: Sampler::new(self.isa),
            state: State::Idle,
            last: [None, None],
            outputs: 0,
            steps: 0,
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
    sampler: Sampler,
    state: State,
    /// The last two steps, by their turn with the tickets.
    last: [Option<Arc<Task>>; 2],
    /// Rows of the last step's output.
    outputs: usize,
    /// By block, the last step that writes it.
    writers: Vec<u64>,
    steps: u64,
}

impl Drop for CpuProgram {
    fn drop(&mut self) {
        // Workers hold the program's memory themselves; waiting only keeps the order of events simple.
        let _ = self.idle();
    }
}

fn batch_error<T>(
    what: &'static str,
    expected: impl std::fmt::Display,
    got: impl std::fmt::Display,
) -> Result<T, DeviceError> {
    Err(DeviceError::Batch {
        what,
        expected: expected.to_string(),
        got: got.to_string(),
    })
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

    fn check(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        let options = self.loaded.options;
        let tokens = batch.tokens.len();
        if tokens == 0 || tokens > options.step_tokens_max {
            return batch_error("tokens", format!("1 to {}", options.step_tokens_max), tokens);
        }
        if batch.sequences.len() > options.sequences_max {
            return batch_error(
                "sequences",
                format!("at most {}", options.sequences_max),
                batch.sequences.len(),
            );
        }
        if let Some(entries) = self.loaded.vocabulary
            && let Some(token) = batch.tokens.iter().find(|token| token.index() >= entries)
        {
            return batch_error("token", format!("below {entries}"), token);
        }
        let mut next = 0;
        self.steps += 1;
        for slice in &batch.sequences {
            if slice.first_token != next || slice.tokens == 0 {
                let got = format!("{} from {}", slice.tokens, slice.first_token);
                return batch_error("slice", format!("at least one token from {next}"), got);
            }
            next = next.saturating_add(slice.tokens);
            self.check_slice(slice)?;
        }
        if next != tokens {
            return batch_error("slices", format!("{tokens} tokens in all"), next);
        }
        let ascending = batch.output_rows.windows(2).all(|pair| pair[0] < pair[1]);
        if !ascending || batch.output_rows.last().is_some_and(|&row| row >= tokens) {
            let expected = format!("ascending rows below {tokens}");
            return batch_error("output_rows", expected, format!("{:?}", batch.output_rows));
        }
        Ok(())
    }

    fn check_slice(&mut self, slice: &SequenceSlice) -> Result<(), DeviceError> {
        let kv = self.loaded.options.kv;
        let first = slice.position as usize;
        let Some(end) = first.checked_add(slice.tokens) else {
            return batch_error("position", "a sequence that ends", slice.position);
        };
        let context = self.loaded.program.context_tokens_max as usize;
        let limit = self
            .loaded
            .positions
            .map_or(context, |positions| positions.min(context));
        if end > limit {
            return batch_error("position", format!("sequences of at most {limit} tokens"), end);
        }
        if self.loaded.program.layers.is_empty() {
            return Ok(());
        }
        let blocks = end.div_ceil(kv.block_tokens);
        if slice.blocks.len() < blocks {
            return batch_error(
                "blocks",
                format!("at least {blocks} for {end} tokens"),
                slice.blocks.len(),
            );
        }
        self.check_blocks("blocks", &slice.blocks)?;
        for block in &slice.blocks[first / kv.block_tokens..blocks] {
            // Two writers of one block would race, and one would read the other's tokens.
            if self.writers[block.index()] == self.steps {
                return batch_error("blocks", "one writer per block", format!("two of block {block}"));
            }
            self.writers[block.index()] = self.steps;
        }
        Ok(())
    }

    fn check_blocks<'a>(
        &self,
        what: &'static str,
        blocks: impl IntoIterator<Item = &'a BlockId>,
    ) -> Result<(), DeviceError> {
        let limit = self.loaded.options.kv.blocks;
        match blocks.into_iter().find(|block| block.index() >= limit) {
            Some(block) => batch_error(what, format!("blocks below {limit}"), block),
            None => Ok(()),
        }
    }
}

impl LoadedProgram for CpuProgram {
    fn submit(&mut self, batch: &StepBatch) -> Result<(), DeviceError> {
        self.idle()?;
        self.check(batch)?;
        let turn = self.steps as usize % 2;
        if let Some(task) = self.last[turn].take() {
            task.wait_empty();
        }
        self.loaded.tickets[turn].iter().for_each(Ticket::reset);
        let output = self.loaded.program.output.buffer;
        self.outputs = match self.loaded.program.buffers[output.index()].rows {
            galerne_core::graph::Rows::Tokens => batch.tokens.len(),
            galerne_core::graph::Rows::Outputs => batch.output_rows.len(),
            galerne_core::graph::Rows::Sequences => batch.sequences.len(),
        };
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
        if let Some(request) = requests.iter().find(|request| request.row >= output.rows) {
            return batch_error("sample row", format!("below {}", output.rows), request.row);
        }
        let mut masks = requests.iter().filter_map(|request| request.mask);
        if let Some(mask) = masks.find(|mask| !fits(mask, output.width)) {
            let expected = format!("{} words that allow a token", output.width.div_ceil(32));
            return batch_error("sample mask", expected, format!("{} words", mask.len()));
        }
        let sampler = &mut self.sampler;
        let outcome = |request: &SampleRequest<'_>| {
            // SAFETY: no step is running, and `&mut self` keeps one from starting.
            let row = unsafe { output.row(request.row) };
            sampler.sample(row, request)
        };
        Ok(requests.iter().map(outcome).collect())
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
        self.check_blocks("copied blocks", pairs.iter().flat_map(|(from, to)| [from, to]))?;
        if let Some((block, _)) = pairs.iter().find(|(from, to)| from == to) {
            return batch_error("copied blocks", "two different blocks", format!("{block} twice"));
        }
        for &(from, to) in pairs {
            // SAFETY: no step is running, and `&mut self` keeps one from starting.
            unsafe { self.loaded.kv.copy_block(from, to) };
        }
        Ok(())
    }

    fn zero_blocks(&mut self, blocks: &[BlockId]) -> Result<(), DeviceError> {
        self.idle()?;
        self.check_blocks("zeroed blocks", blocks)?;
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
