//! From a program and a weight file to everything a step needs, in memory. Knows nothing of threads' work.

use std::collections::HashMap;
use std::sync::Arc;

use galerne_core::dtype::DType;
use galerne_core::weights::WeightSource;

use super::attention::AttentionScratch;
use super::fuse::{Planned, join_gates, plan, prologues};
use super::isa::Isa;
use super::kv::KvPool;
use super::linear::{BLOCK, TileRoom, is_tiled};
use super::memory::{Arena, LINE_BYTES, Memory, Rect};
use super::mixture::{MixtureScratch, Part};
use super::pool::Ticket;
use super::quantize_rows::QuantBuffer;
use super::rope::RopeTable;
use super::split_rows::{Halves, SplitBuffer};
use super::weights::{Matrix, load_matrix};
use crate::device::{DeviceError, KvSpec, LoadOptions, MemoryUse, Precision};
use crate::layout::{Layout, RowsMax, place};
use crate::program::{Instr, Program, View};
use crate::stored::{Uses, load_vector};

/// A program ready to run.
#[derive(Debug)]
pub(crate) struct Loaded {
    pub(crate) isa: Isa,
    pub(crate) options: LoadOptions,
    pub(crate) program: Program,
    /// By weight: its parts, if it is used as a matrix.
    pub(crate) matrices: Vec<Vec<Part>>,
    /// By weight: its elements, if it is used as a vector.
    pub(crate) vectors: Vec<Vec<f32>>,
    pub(crate) ropes: Vec<RopeTable>,
    pub(crate) kv: KvPool,
    /// What runs together.
    pub(crate) planned: Vec<Planned>,
    /// Two per instruction, after one per rotation table. Two sets that steps use in turn: a straggler of the last
    /// step may still look at its own.
    pub(crate) tickets: [Vec<Ticket>; 2],
    /// For steps whose rows all workers quantize together.
    pub(crate) quant: QuantBuffer,
    /// The same, split.
    pub(crate) split: SplitBuffer,
    /// The same for prompts' rows, rounded to bf16.
    pub(crate) rounded: SplitBuffer,
    /// Gated activations of prompts' rows, as the map after them wants them.
    pub(crate) activated: SplitBuffer,
    pub(crate) workers: Vec<WorkerRoom>,
    /// Rows up to which each worker prepares a linear map's input for itself.
    pub(crate) own_rows: usize,
    buffers: Memory,
    layout: Layout,
    weight_bytes: usize,
}

/// One worker's own memory.
#[derive(Debug)]
pub(crate) struct WorkerRoom {
    pub(crate) attention: AttentionScratch,
    pub(crate) mixture: MixtureScratch,
    /// For a step of few rows, which each worker prepares for itself.
    rows: Memory,
    /// The same, quantized.
    pub(crate) quant: QuantBuffer,
    /// The same, split.
    pub(crate) split: SplitBuffer,
    /// The same, rounded to bf16.
    pub(crate) rounded: SplitBuffer,
    /// Panels made for tiles.
    tiles: Memory,
}

impl WorkerRoom {
    /// Room for rows like those of `x`, at most [`Loaded::own_rows`] of them.
    pub(crate) fn own_rows(&self, x: Rect) -> Rect {
        assert!(x.rows * x.width * 4 <= self.rows.size_bytes());
        Rect {
            base: self.rows.f32s(),
            stride: x.width,
            ..x
        }
    }

    /// Room for the tiles of any linear map of the program; `None` if tiles are not used.
    pub(crate) fn tiles(&self) -> Option<TileRoom> {
        (self.tiles.size_bytes() > 0).then(|| TileRoom(self.tiles.ptr()))
    }
}

/// Widest inputs that are made ready for integers and for tiles; 0 where none is.
#[derive(Clone, Copy)]
struct Widths {
    quant: usize,
    split: usize,
    tiles: usize,
}

impl Widths {
    fn new(isa: Isa, precision: Precision, widest: usize, matrices: &[Vec<Part>]) -> Self {
        let any = |wanted: fn(DType) -> bool| matrices.iter().flatten().any(|part| wanted(part.matrix.dtype));
        let where_some = |some: bool| if some { widest } else { 0 };
        let (auto, amx) = (precision == Precision::Auto, isa == Isa::Amx);
        Self {
            quant: where_some(auto),
            split: where_some(auto && amx && any(|dtype| dtype == DType::Bf16)),
            tiles: where_some(auto && amx && any(is_tiled)),
        }
    }
}

/// Rows times workers up to which each worker prepares a map's input for itself: cheaper than to wait for each other, and
/// than to write cache lines that another core has read. Rows are quantized by eights: so few cannot be shared out well.
const OWN_ROWS_TIMES_WORKERS: usize = 16;

fn tickets(program: &Program, workers: usize) -> Vec<Ticket> {
    (0..program.ropes.len() + 2 * program.instrs.len())
        .map(|_| Ticket::new(workers))
        .collect()
}

impl Loaded {
    /// Loads everything of a program that has passed its gate.
    pub(crate) fn load(
        program: &Program,
        source: &dyn WeightSource,
        options: LoadOptions,
        isa: Isa,
        threads: usize,
    ) -> Result<Self, DeviceError> {
        let uses = Uses::of(program);
        let mut loader = Loader {
            source,
            arena: Arena::default(),
            matrices: HashMap::new(),
        };
        let mut matrices = Vec::with_capacity(program.weights.len());
        let mut vectors = Vec::with_capacity(program.weights.len());
        for (spec, used) in program.weights.iter().zip(&uses.weights) {
            matrices.push(if used.as_matrix {
                loader.parts(spec)?
            } else {
                vec![]
            });
            vectors.push(if used.as_vector {
                load_vector(source, spec)?
            } else {
                vec![]
            });
        }
        let rows_max = RowsMax {
            tokens: options.step_tokens_max,
            sequences: options.sequences_max,
        };
        let mut planned = plan(program);
        let layout = place(program, &prologues(&planned), rows_max, row_stride);
        let buffers = Memory::zeroed("buffers", layout.elements * 4)?;
        let kv_spec = KvSpec {
            dtype: options.kv_dtype(),
            ..options.kv
        };
        let kv = KvPool::new(&program.layers, kv_spec)?;
        let widths = Widths::new(isa, options.precision, uses.quant_width, &matrices);
        let mut activated_width = 0;
        if widths.tiles > 0 {
            join_gates(program, &mut planned, |first, second| {
                let width = gated_width(first, second, &matrices);
                activated_width = activated_width.max(width.unwrap_or(0));
                width.is_some()
            });
        }
        let own_rows = OWN_ROWS_TIMES_WORKERS / threads;
        let rows = options.step_tokens_max.max(options.sequences_max);
        let workers = (0..threads).map(|_| {
            Ok(WorkerRoom {
                attention: AttentionScratch::new(&program.layers)?,
                mixture: MixtureScratch::new(uses.experts.max(1), uses.inner, uses.width)?,
                rows: Memory::zeroed("linear inputs", own_rows * uses.quant_width * 4)?,
                quant: QuantBuffer::new(own_rows.max(1), widths.quant.max(uses.mixture_quant_width))?,
                split: SplitBuffer::new(own_rows, widths.split, Halves::Both)?,
                rounded: SplitBuffer::new(own_rows, widths.tiles, Halves::Upper)?,
                tiles: Memory::zeroed("unpacked weights", TileRoom::size_bytes(widths.tiles))?,
            })
        });
        let vector_bytes: usize = vectors.iter().map(|v| v.len() * 4).sum();
        Ok(Self {
            isa,
            options,
            program: program.clone(),
            weight_bytes: loader.matrices.values().map(|m| m.size_bytes()).sum::<usize>() + vector_bytes,
            ropes: program
                .ropes
                .iter()
                .map(|spec| RopeTable::new(spec, options.step_tokens_max))
                .collect::<Result<_, _>>()?,
            tickets: [tickets(program, threads), tickets(program, threads)],
            planned,
            quant: QuantBuffer::new(rows, widths.quant)?,
            split: SplitBuffer::new(rows, widths.split, Halves::Both)?,
            rounded: SplitBuffer::new(rows, widths.tiles, Halves::Upper)?,
            activated: SplitBuffer::new(rows, activated_width, Halves::Upper)?,
            workers: workers.collect::<Result<_, DeviceError>>()?,
            own_rows,
            matrices,
            vectors,
            kv,
            buffers,
            layout,
        })
    }

    /// A view of `rows` rows.
    pub(crate) fn rect(&self, view: View, rows: usize) -> Rect {
        let spec = self.program.buffers[view.buffer.index()];
        let first = self.layout.starts[view.buffer.index()] + view.start as usize;
        // SAFETY: the layout places every buffer inside the memory; views were checked against their buffers.
        let base = unsafe { self.buffers.f32s().add(first) };
        Rect {
            base,
            stride: row_stride(spec.width as usize),
            width: view.width as usize,
            rows,
        }
    }

    /// Bytes held.
    pub(crate) fn memory(&self) -> MemoryUse {
        let room = |w: &WorkerRoom| {
            w.attention.size_bytes()
                + w.mixture.size_bytes()
                + w.rows.size_bytes()
                + w.quant.size_bytes()
                + w.split.size_bytes()
                + w.rounded.size_bytes()
                + w.tiles.size_bytes()
        };
        MemoryUse {
            weight_bytes: self.weight_bytes,
            kv_bytes: self.kv.size_bytes(),
            workspace_bytes: self.buffers.size_bytes()
                + self.quant.size_bytes()
                + self.split.size_bytes()
                + self.rounded.size_bytes()
                + self.activated.size_bytes()
                + self.ropes.iter().map(RopeTable::size_bytes).sum::<usize>()
                + self.workers.iter().map(room).sum::<usize>(),
        }
    }
}

/// Elements from one row of `width` to the next: an odd number of cache lines, so that the same column of many rows (a
/// tile stores 16) lies in as many sets of a cache. Where rows are a multiple of 4 KiB apart it is one set.
fn row_stride(width: usize) -> usize {
    const LINE_ELEMENTS: usize = LINE_BYTES / size_of::<f32>();
    (width.div_ceil(LINE_ELEMENTS) | 1) * LINE_ELEMENTS
}

/// The width of the gated activation between two maps if rows in tiles can pass it without f32.
fn gated_width(first: &Instr, second: &Instr, matrices: &[Vec<Part>]) -> Option<usize> {
    let (Instr::Linear { weight: first, .. }, Instr::Linear { weight: second, .. }) = (first, second) else {
        return None;
    };
    let [gate, up] = &matrices[first.index()][..] else {
        return None;
    };
    let (gate, up, read) = (&gate.matrix, &up.matrix, &matrices[second.index()]);
    let alike = gate.dtype == up.dtype && gate.rows == up.rows && gate.rows % BLOCK == 0;
    let tiled = is_tiled(gate.dtype) && read.iter().all(|part| is_tiled(part.matrix.dtype));
    (alike && tiled).then_some(gate.rows)
}

/// Loads each stored tensor once, however many weights name it.
struct Loader<'a> {
    source: &'a dyn WeightSource,
    arena: Arena,
    matrices: HashMap<String, Arc<Matrix>>,
}

impl Loader<'_> {
    fn parts(&mut self, spec: &crate::program::WeightSpec) -> Result<Vec<Part>, DeviceError> {
        let mut column = 0;
        let mut parts = Vec::with_capacity(spec.parts.len());
        for name in &spec.parts {
            let width = spec.width as usize;
            let matrix = match self.matrices.get(name).filter(|matrix| matrix.width == width) {
                Some(matrix) => Arc::clone(matrix),
                None => {
                    let matrix = Arc::new(load_matrix(self.source, name, width, &mut self.arena)?);
                    self.matrices.insert(name.clone(), Arc::clone(&matrix));
                    matrix
                }
            };
            parts.push(Part {
                column,
                matrix: Arc::clone(&matrix),
            });
            column += matrix.rows;
        }
        if column != spec.rows as usize {
            return Err(DeviceError::Weight {
                name: spec.parts.join(" + "),
                expected: format!("{} rows", spec.rows),
                got: format!("{column} rows"),
            });
        }
        Ok(parts)
    }
}
