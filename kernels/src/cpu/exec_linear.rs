//! Runs a linear map with its prologue. Few rows are prepared (normed, activated, quantized) by each worker for itself,
//! many are shared out first.

use std::ops::Range;

use galerne_core::dtype::DType;
use galerne_core::graph::Rows;

use super::elementwise::{Elementwise, elementwise};
use super::exec::StepJob;
use super::fuse::Gate;
use super::isa::Isa;
use super::linear::{
    BLOCK, Gated, LinearIn, LinearOut, STREAMS, is_tiled, linear, linear_gated, reads_in_streams,
};
use super::memory::Rect;
use super::mixture::Part;
use super::pool::{Poisoned, Worker};
use super::quantize_rows::{EIGHT, QuantRows, QuantTile, TILE_ROWS, quantize_row};
use super::split_rows::{SplitBuffer, SplitRows, split_row};
use crate::device::Precision;
use crate::program::{Instr, View, WeightId};

/// The fields of [`Instr::Linear`].
#[derive(Clone, Copy)]
pub(super) struct LinearOp {
    pub(super) x: View,
    pub(super) weight: WeightId,
    pub(super) bias: Option<WeightId>,
    pub(super) accumulate: bool,
    pub(super) out: View,
    pub(super) gate: Gate,
}

/// The forms in which a map's weights want its input, beside f32.
#[derive(Clone, Copy)]
struct Forms {
    quantized: bool,
    split: bool,
    rounded: bool,
    /// The first row that is rounded, a prompt's or, if many are generated, any; the other forms are for those before.
    prompts: usize,
    /// Whether the map before has made the rounded rows: see [`Gate::Read`].
    made: bool,
}

impl Forms {
    fn any(self) -> bool {
        self.quantized || self.split || self.rounded
    }

    /// How many of `rows` rows are to be prepared.
    fn rows(self, rows: usize) -> usize {
        if self.made { self.prompts } else { rows }
    }
}

/// Where rows are put in these forms.
#[derive(Clone, Copy)]
struct Prepared {
    quant: Option<QuantRows>,
    split: Option<SplitRows>,
    rounded: Option<SplitRows>,
    prompts: usize,
}

/// Generated rows from which on they are rounded as prompts' are: unpacking weights then costs less than scaling every
/// block's integers (1.2 x at 16 rows and more at 32, but 0.9 x at 8, on a Sapphire Rapids).
const BUSY_ROWS: usize = 12;

/// Rows whose inputs stay in a core's second cache while all panels pass. Tiles want more rows to a panel, which is unpacked
/// for them, and processors that have them have larger caches.
fn chunk_rows(isa: Isa, width: usize, forms: Forms) -> usize {
    let bytes = if isa == Isa::Amx { 1 << 20 } else { 256 << 10 };
    let row_bytes = if forms.rounded {
        width * size_of::<u16>()
    } else if forms.quantized {
        width / BLOCK * size_of::<QuantTile>() / TILE_ROWS
    } else {
        width * size_of::<f32>()
    };
    (bytes / row_bytes.max(1)).next_multiple_of(TILE_ROWS)
}

impl StepJob {
    /// Runs the map planned at `at`; `prologue` makes its input.
    pub(super) fn linear(
        &self,
        worker: &Worker<'_>,
        at: usize,
        op: LinearOp,
        prologue: Option<&Instr>,
    ) -> Result<(), Poisoned> {
        let x = self.rect(op.x);
        let parts = &self.loaded.matrices[op.weight.index()];
        let forms = self.forms(op, parts);
        let mut input = None;
        if x.rows > self.loaded.own_rows {
            input = Some(self.prepare_together(worker, at, x, forms, prologue)?);
        }
        let panels: usize = parts.iter().map(|part| part.matrix.panels()).sum();
        // Tiles take two panels at once: neighbours, or one of the gate and one of the up.
        let together = if forms.rounded { 2 } else { 1 };
        let gated = matches!(op.gate, Gate::Made(_)) && forms.rounded;
        let pieces = panels.div_ceil(together);
        let chunks = x.rows.div_ceil(chunk_rows(self.loaded.isa, x.width, forms));
        // As many in each: else who has the smallest waits, or takes over rows that are in another core's cache.
        let chunk = x.rows.div_ceil(chunks.max(1)).next_multiple_of(2 * TILE_ROWS);
        // Else what is over after each claim would be read in fewer streams.
        let multiple = if reads_in_streams(self.loaded.isa, x.rows) {
            STREAMS
        } else {
            1
        };
        worker.run_by(multiple, self.ticket(at, 0), chunks * pieces, |mut units| {
            // Only with a piece in hand: nobody else can then go on and overwrite what is read.
            let input = *input.get_or_insert_with(|| self.prepare_own(worker, x, forms, prologue));
            while !units.is_empty() {
                let index = units.start / pieces;
                let end = units.end.min((index + 1) * pieces);
                let rows = index * chunk..((index + 1) * chunk).min(x.rows);
                if gated {
                    self.gated(
                        op,
                        input,
                        units.start - index * pieces..end - index * pieces,
                        rows,
                    );
                    units.start = end;
                    continue;
                }
                let first = (units.start - index * pieces) * together;
                let last = ((end - index * pieces) * together).min(panels);
                self.panels(op, input, first..last, rows);
                units.start = end;
            }
        })
    }

    /// As [`Self::panels`], of the gate's panels in `range` and of the same of the up. Rounded rows are activated.
    fn gated(&self, op: LinearOp, input: LinearIn, range: Range<usize>, rows: Range<usize>) {
        let parts = &self.loaded.matrices[op.weight.index()];
        let generated = rows.start..rows.end.min(input.prompts);
        if !generated.is_empty() {
            for part in parts {
                self.part(op, part, input, range.clone(), generated.clone());
            }
        }
        let prompts = rows.start.max(input.prompts)..rows.end;
        if prompts.is_empty() {
            return;
        }
        if let ([gate, up], Gate::Made(at)) = (&parts[..], op.gate)
            && let Instr::ActivateMul { function, out, .. } = self.loaded.program.instrs[at]
        {
            let gated = Gated {
                gate: &gate.matrix,
                up: &up.matrix,
                function,
                bias: self.bias(op),
                out: self.loaded.activated.rows(out.width as usize),
            };
            // SAFETY: see `part`; the activated rows of these panels are this worker's.
            unsafe { linear_gated(&gated, range, prompts, input) };
        }
    }

    fn bias(&self, op: LinearOp) -> Option<*const f32> {
        op.bias.map(|bias| self.loaded.vectors[bias.index()].as_ptr())
    }

    fn forms(&self, LinearOp { x, gate, .. }: LinearOp, parts: &[Part]) -> Forms {
        let auto = self.loaded.options.precision == Precision::Auto;
        let tiles = auto && self.loaded.isa == Isa::Amx;
        let any = |wanted: fn(DType) -> bool| parts.iter().any(|part| wanted(part.matrix.dtype));
        let rows = self.rect(x).rows;
        let of = self.loaded.program.buffers[x.buffer.index()].rows;
        let prompts = match self.step.prompts {
            _ if !tiles => rows,
            BUSY_ROWS.. => 0,
            generated if of == Rows::Tokens => generated,
            _ => rows,
        };
        Forms {
            quantized: auto && prompts > 0 && any(|dtype| dtype.block_elements() > 1),
            split: tiles && prompts > 0 && any(|dtype| dtype == DType::Bf16),
            rounded: prompts < rows && any(is_tiled),
            prompts,
            made: gate == Gate::Read,
        }
    }

    /// Every row once, whichever worker computes it.
    fn prepare_together(
        &self,
        worker: &Worker<'_>,
        at: usize,
        x: Rect,
        forms: Forms,
        prologue: Option<&Instr>,
    ) -> Result<LinearIn, Poisoned> {
        let to = Prepared {
            quant: forms.quantized.then(|| self.loaded.quant.rows(x.width)),
            split: forms.split.then(|| self.loaded.split.rows(x.width)),
            rounded: forms
                .rounded
                .then(|| self.rounded(&self.loaded.rounded, x.width, forms)),
            prompts: forms.prompts,
        };
        let rows = forms.rows(x.rows);
        if rows > 0 && (prologue.is_some() || forms.any()) {
            worker.run(self.ticket(at, 1), rows.div_ceil(EIGHT), |pieces| {
                for row in pieces.start * EIGHT..(pieces.end * EIGHT).min(rows) {
                    // SAFETY: each row is handed to one worker.
                    unsafe { self.prepare(row, x, to, prologue) };
                }
            })?;
        }
        Ok(self.input(worker, x, to))
    }

    /// All rows, in this worker's own room.
    fn prepare_own(&self, worker: &Worker<'_>, x: Rect, forms: Forms, prologue: Option<&Instr>) -> LinearIn {
        let room = &self.loaded.workers[worker.index];
        let to = Prepared {
            quant: forms.quantized.then(|| room.quant.rows(x.width)),
            split: forms.split.then(|| room.split.rows(x.width)),
            rounded: forms.rounded.then(|| self.rounded(&room.rounded, x.width, forms)),
            prompts: forms.prompts,
        };
        let float = if prologue.is_some() { room.own_rows(x) } else { x };
        if prologue.is_some() || forms.any() {
            for row in 0..forms.rows(x.rows) {
                // SAFETY: this worker's own room; what is read stays as it is while the worker holds a piece.
                unsafe { self.prepare(row, float, to, prologue) };
            }
        }
        self.input(worker, float, to)
    }

    /// Where rounded rows are: in `own`, unless the map before made them.
    fn rounded(&self, own: &SplitBuffer, width: usize, forms: Forms) -> SplitRows {
        let made = &self.loaded.activated;
        if forms.made { made } else { own }.rows(width)
    }

    fn input(&self, worker: &Worker<'_>, float: Rect, prepared: Prepared) -> LinearIn {
        LinearIn {
            float,
            quant: prepared.quant,
            split: prepared.split,
            rounded: prepared.rounded,
            prompts: prepared.prompts,
            room: self.loaded.workers[worker.index].tiles(),
        }
    }

    /// Row `row` of the map's input: made by the prologue into `x`, then put in other forms.
    ///
    /// # Safety
    /// Nobody else touches the row of `x` (unless there is no prologue: then nobody writes it) or of `to`.
    unsafe fn prepare(&self, row: usize, x: Rect, to: Prepared, prologue: Option<&Instr>) {
        // SAFETY: by contract; views and widths were checked at load.
        unsafe {
            match prologue {
                Some(Instr::Norm { x: from, norm, .. }) => self.norm_row(self.rect(*from), norm, x, row),
                Some(Instr::ActivateMul {
                    gate, up, function, ..
                }) => {
                    let op = Elementwise::ActivateMul(*function);
                    elementwise(self.loaded.isa, op, self.rect(*gate), self.rect(*up), x, row);
                }
                _ => {}
            }
            if row >= to.prompts {
                if let Some(rounded) = to.rounded {
                    split_row(self.loaded.isa, x, rounded, row);
                }
                return;
            }
            if let Some(quant) = to.quant {
                quantize_row(self.loaded.isa, x, quant, row);
            }
            if let Some(split) = to.split {
                split_row(self.loaded.isa, x, split, row);
            }
        }
    }

    /// The outputs of some panels, counted through all parts of the weight, for some rows.
    fn panels(&self, op: LinearOp, input: LinearIn, range: Range<usize>, rows: Range<usize>) {
        let mut first = 0;
        for part in &self.loaded.matrices[op.weight.index()] {
            let count = part.matrix.panels();
            let mine = range.start.max(first)..range.end.min(first + count);
            if !mine.is_empty() {
                let panels = mine.start - first..mine.end - first;
                self.part(op, part, input, panels, rows.clone());
            }
            first += count;
        }
    }

    /// The outputs of some panels of one part of the weight.
    fn part(&self, op: LinearOp, part: &Part, input: LinearIn, panels: Range<usize>, rows: Range<usize>) {
        let out = LinearOut {
            rect: self.rect(op.out),
            column: part.column,
            // SAFETY: a bias has one element per output column, checked at load.
            bias: self.bias(op).map(|bias| unsafe { bias.add(part.column) }),
            accumulate: op.accumulate,
        };
        // SAFETY: each panel is handed to one worker; x is only read; widths were checked at load.
        unsafe { linear(self.loaded.isa, &part.matrix, panels, rows, input, out) };
    }
}
