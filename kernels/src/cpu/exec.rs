//! Runs a step: every worker walks the instructions, takes its share of each, and meets the others in between.
//! Knows nothing of who waits for the result.

use std::marker::PhantomData;
use std::sync::Arc;

use galerne_core::graph::{EmbeddingIndex, Rows};
use galerne_core::ids::LayerId;
use half::{bf16, f16};

use super::attention::{Attend, attend, tile_tokens};
use super::elementwise::{Elementwise, elementwise};
use super::exec_linear::LinearOp;
use super::fuse::Planned;
use super::kv::{Append, append};
use super::kv_element::{E4m3, KvElement};
use super::load::Loaded;
use super::memory::Rect;
use super::mixture::Mixture;
use super::norm::{L2Normalise, LayerNorm, RmsNorm};
use super::pool::{Job, Poisoned, Ticket, Worker};
use super::simd::dispatch;
use crate::device::{KvDtype, Precision, SequenceSlice, StepBatch};
use crate::program::{BufferId, Instr, MixtureSpec, NormKind, NormSpec, RopeId, View, WeightId};

/// A checked batch with what follows from it.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) batch: StepBatch,
    /// By token.
    positions: Vec<u32>,
    /// By token, index of its sequence.
    owners: Vec<u32>,
    /// The first token that is a prompt's.
    pub(super) prompts: usize,
}

impl Step {
    /// Of a batch that keeps its contract.
    pub(crate) fn new(batch: StepBatch) -> Self {
        let mut positions = Vec::with_capacity(batch.tokens.len());
        let mut owners = Vec::with_capacity(batch.tokens.len());
        for (owner, slice) in batch.sequences.iter().enumerate() {
            for i in 0..slice.tokens {
                positions.push(slice.position + i as u32);
                owners.push(owner as u32);
            }
        }
        let generating = &batch.sequences[..batch.generating];
        Self {
            prompts: generating.iter().map(|slice| slice.tokens).sum(),
            batch,
            positions,
            owners,
        }
    }
}

/// One step of one program.
pub(crate) struct StepJob {
    pub(crate) loaded: Arc<Loaded>,
    /// Which of the two sets of tickets.
    pub(crate) turn: usize,
    pub(crate) step: Step,
}

impl Job for StepJob {
    fn run(&self, worker: &Worker<'_>) -> Result<(), Poisoned> {
        for (rope, table) in self.loaded.ropes.iter().enumerate() {
            share(
                worker,
                &self.tickets()[rope],
                self.step.positions.len(),
                |token| {
                    // SAFETY: each token is handed to one worker.
                    unsafe { table.fill(token, self.step.positions[token]) };
                },
            )?;
        }
        let instrs = &self.loaded.program.instrs;
        for planned in &self.loaded.planned {
            match *planned {
                Planned::One(at) => self.row_wise(worker, at, &instrs[at])?,
                Planned::Linear { at, prologue, gate } => {
                    let prologue = prologue.map(|at| &instrs[at]);
                    if let Instr::Linear {
                        x,
                        weight,
                        bias,
                        accumulate,
                        out,
                    } = instrs[at]
                    {
                        let op = LinearOp {
                            x,
                            weight,
                            bias,
                            accumulate,
                            out,
                            gate,
                        };
                        self.linear(worker, at, op, prologue)?;
                    }
                }
            }
        }
        Ok(())
    }
}

/// Runs `part` for this worker's share of `0 .. units`, and waits for the others' shares.
fn share(worker: &Worker<'_>, ticket: &Ticket, units: usize, part: impl Fn(usize)) -> Result<(), Poisoned> {
    worker.run(ticket, units, |range| range.for_each(&part))
}

impl StepJob {
    pub(super) fn ticket(&self, at: usize, part: usize) -> &Ticket {
        &self.tickets()[self.loaded.ropes.len() + 2 * at + part]
    }

    fn tickets(&self) -> &[Ticket] {
        &self.loaded.tickets[self.turn]
    }

    fn rows(&self, buffer: BufferId) -> usize {
        match self.loaded.program.buffers[buffer.index()].rows {
            Rows::Tokens => self.step.batch.tokens.len(),
            Rows::Outputs => self.step.batch.output_rows.len(),
            Rows::Sequences => self.step.batch.sequences.len(),
        }
    }

    pub(super) fn rect(&self, view: View) -> Rect {
        self.loaded.rect(view, self.rows(view.buffer))
    }

    /// Instructions whose shares need not wait for each other.
    fn row_wise(&self, worker: &Worker<'_>, at: usize, instr: &Instr) -> Result<(), Poisoned> {
        match *instr {
            Instr::Embedding { table, index, out } => self.embedding(worker, at, table, index, out),
            Instr::Norm { x, norm, out } => self.norm(worker, at, None, x, &norm, out),
            Instr::AddNorm {
                residual,
                delta,
                norm,
                out,
            } => self.norm(worker, at, Some(delta), residual, &norm, out),
            Instr::Rope { x, rope, head_width } => self.rope(worker, at, x, rope, head_width as usize),
            Instr::RopeAppend {
                layer,
                q,
                k,
                v,
                q_rope,
                k_rope,
            } => {
                let ropes = (q_rope, k_rope);
                match self.loaded.kv.spec.dtype {
                    KvDtype::Bf16 => self.append::<bf16>(worker, at, layer, [q, k, v], ropes),
                    KvDtype::F16 => self.append::<f16>(worker, at, layer, [q, k, v], ropes),
                    KvDtype::F32 => self.append::<f32>(worker, at, layer, [q, k, v], ropes),
                    KvDtype::Int8 => self.append::<i8>(worker, at, layer, [q, k, v], ropes),
                    KvDtype::Fp8 => self.append::<E4m3>(worker, at, layer, [q, k, v], ropes),
                }
            }
            Instr::Attention { layer, q, out } => match self.loaded.kv.spec.dtype {
                KvDtype::Bf16 => self.attention::<bf16>(worker, at, layer, q, out),
                KvDtype::F16 => self.attention::<f16>(worker, at, layer, q, out),
                KvDtype::F32 => self.attention::<f32>(worker, at, layer, q, out),
                KvDtype::Int8 => self.attention::<i8>(worker, at, layer, q, out),
                KvDtype::Fp8 => self.attention::<E4m3>(worker, at, layer, q, out),
            },
            Instr::ActivateMul {
                gate,
                up,
                function,
                out,
            } => self.elementwise(worker, at, Elementwise::ActivateMul(function), gate, up, out),
            Instr::Add { a, b, out } => self.elementwise(worker, at, Elementwise::Add, a, b, out),
            Instr::Mul { a, b, out } => self.elementwise(worker, at, Elementwise::Mul, a, b, out),
            Instr::Scale { x, factor, out } => {
                self.elementwise(worker, at, Elementwise::Scale(factor), x, x, out)
            }
            Instr::Activate { x, function, out } => {
                self.elementwise(worker, at, Elementwise::Activate(function), x, x, out)
            }
            Instr::SoftCap { x, cap, out } => {
                self.elementwise(worker, at, Elementwise::SoftCap(cap), x, x, out)
            }
            Instr::Copy {
                x,
                out,
                group,
                x_stride,
                out_stride,
                groups,
            } => {
                let strides = (x_stride as usize, out_stride as usize);
                self.copy(worker, at, x, out, group as usize, strides, groups as usize)
            }
            Instr::Mixture { x, ref mixture, out } => self.mixture(worker, at, x, mixture, out),
            Instr::MeanPool { x, out } => self.pool(worker, at, x, out, mean_row),
            Instr::ClsPool { x, out } => self.pool(worker, at, x, out, first_row),
            Instr::L2Normalise { x, width, out } => self.l2_normalise(worker, at, x, width as usize, out),
            Instr::OutputRows { x, out } => self.output_rows(worker, at, x, out),
            Instr::Linear { .. } => unreachable!("linear maps are planned with their prologues"),
        }
    }

    fn embedding(
        &self,
        worker: &Worker<'_>,
        at: usize,
        table: WeightId,
        index: EmbeddingIndex,
        out: View,
    ) -> Result<(), Poisoned> {
        let (parts, out) = (&self.loaded.matrices[table.index()], self.rect(out));
        share(worker, self.ticket(at, 0), out.rows, |token| {
            let entry = match index {
                EmbeddingIndex::Tokens => self.step.batch.tokens[token].index(),
                EmbeddingIndex::Positions(offset) => (self.step.positions[token] + offset) as usize,
                EmbeddingIndex::Constant(row) => row as usize,
            };
            if let Some(part) = parts.iter().rfind(|part| part.column <= entry) {
                // SAFETY: each row is handed to one worker.
                let row = unsafe { out.row_mut(token) };
                part.matrix.dequantize_row(entry - part.column, row);
            }
        })
    }

    fn norm(
        &self,
        worker: &Worker<'_>,
        at: usize,
        delta: Option<View>,
        x: View,
        norm: &NormSpec,
        out: View,
    ) -> Result<(), Poisoned> {
        let (x, out) = (self.rect(x), self.rect(out));
        let delta = delta.map(|delta| self.rect(delta));
        share(worker, self.ticket(at, 0), x.rows, |row| {
            // SAFETY: each row is handed to one worker.
            unsafe {
                if let Some(delta) = delta {
                    elementwise(self.loaded.isa, Elementwise::Add, x, delta, x, row);
                }
                self.norm_row(x, norm, out, row);
            }
        })
    }

    /// Row `row` of `x`, normed into `out`.
    ///
    /// # Safety
    /// Nobody writes the row of `x`, nobody else touches that of `out`.
    pub(super) unsafe fn norm_row(&self, x: Rect, norm: &NormSpec, out: Rect, row: usize) {
        let (isa, n, eps) = (self.loaded.isa, norm.width as usize, norm.eps);
        let weight = self.loaded.vectors[norm.weight.index()].as_ptr();
        for group in (0..x.width).step_by(n) {
            // SAFETY: by contract; groups lie within the row; the weight has n elements, checked at load.
            unsafe {
                let x = x.base.add(row * x.stride + group).cast_const();
                let out = out.base.add(row * out.stride + group);
                match norm.kind {
                    NormKind::Rms {
                        weight_offset: offset,
                    } => dispatch(
                        isa,
                        RmsNorm {
                            x,
                            weight,
                            out,
                            n,
                            eps,
                            offset,
                        },
                    ),
                    NormKind::Layer { bias } => {
                        let bias = bias.map(|bias| self.loaded.vectors[bias.index()].as_ptr());
                        dispatch(
                            isa,
                            LayerNorm {
                                x,
                                weight,
                                bias,
                                out,
                                n,
                                eps,
                            },
                        );
                    }
                }
            }
        }
    }

    fn rope(
        &self,
        worker: &Worker<'_>,
        at: usize,
        x: View,
        rope: RopeId,
        head_width: usize,
    ) -> Result<(), Poisoned> {
        let (x, table) = (self.rect(x), &self.loaded.ropes[rope.index()]);
        share(worker, self.ticket(at, 0), x.rows, |token| {
            // SAFETY: each row is handed to one worker; the tables were filled before the first meeting.
            unsafe { table.rotate(self.loaded.isa, token, x.row_mut(token), head_width) };
        })
    }

    fn append<T: KvElement>(
        &self,
        worker: &Worker<'_>,
        at: usize,
        layer: LayerId,
        [q, k, v]: [View; 3],
        (q_rope, k_rope): (Option<RopeId>, Option<RopeId>),
    ) -> Result<(), Poisoned> {
        let (q, k, v) = (self.rect(q), self.rect(k), self.rect(v));
        let head_width = self.loaded.program.layers[layer.index()].head_width as usize;
        let (isa, block_tokens) = (self.loaded.isa, self.loaded.options.kv.block_tokens);
        share(worker, self.ticket(at, 0), q.rows, |token| {
            let position = self.step.positions[token] as usize;
            let slice = &self.step.batch.sequences[self.step.owners[token] as usize];
            let block = slice.blocks[position / block_tokens];
            let table = |rope: RopeId| &self.loaded.ropes[rope.index()];
            // SAFETY: each row is handed to one worker; the tables were filled before the first meeting; no
            // two tokens of a step share a place in the pool (checked at submit); T is the pool's element type.
            unsafe {
                if let Some(rope) = q_rope {
                    table(rope).rotate(isa, token, q.row_mut(token), head_width);
                }
                if let Some(rope) = k_rope {
                    table(rope).rotate(isa, token, k.row_mut(token), head_width);
                }
                let unit = Append::<T> {
                    pool: &self.loaded.kv,
                    layer: self.loaded.kv.layer(layer.index()),
                    block,
                    slot: position % block_tokens,
                    k: k.row(token),
                    v: v.row(token),
                    element: PhantomData,
                };
                append(isa, unit);
            }
        })
    }

    fn attention<T: KvElement>(
        &self,
        worker: &Worker<'_>,
        at: usize,
        layer: LayerId,
        q: View,
        out: View,
    ) -> Result<(), Poisoned> {
        let spec = &self.loaded.program.layers[layer.index()];
        let (q, out) = (self.rect(q), self.rect(out));
        let (kv_heads, group) = (spec.kv_heads as usize, (spec.heads / spec.kv_heads) as usize);
        let tile = tile_tokens(group);
        let tiles = |slice: &SequenceSlice| slice.tokens.div_ceil(tile);
        let total: usize = self.step.batch.sequences.iter().map(tiles).sum();
        // With few units, query heads of one key head go to different workers.
        let split = if total * kv_heads < 2 * worker.count {
            group
        } else {
            1
        };
        let per_tile = kv_heads * split;
        share(worker, self.ticket(at, 0), total * per_tile, |unit| {
            // Later tiles see more keys: begin with them, so that the ends are even.
            let (mut index, part) = (total - 1 - unit / per_tile, unit % per_tile);
            for slice in &self.step.batch.sequences {
                if index >= tiles(slice) {
                    index -= tiles(slice);
                    continue;
                }
                let first = index * tile;
                let unit = Attend::<T> {
                    spec,
                    kv: &self.loaded.kv,
                    layer: self.loaded.kv.layer(layer.index()),
                    blocks: &slice.blocks,
                    row: slice.first_token + first,
                    tokens: tile.min(slice.tokens - first),
                    position: slice.position as usize + first,
                    length: slice.position as usize + slice.tokens,
                    head: part * (group / split),
                    heads: group / split,
                    q,
                    out,
                    scratch: &self.loaded.workers[worker.index].attention,
                    element: PhantomData,
                };
                // SAFETY: each unit is handed to one worker and writes its own rows and heads; keys and values
                // were written before the last meeting; blocks were checked at submit; T is the pool's element type.
                unsafe { attend(self.loaded.isa, unit) };
                break;
            }
        })
    }

    fn elementwise(
        &self,
        worker: &Worker<'_>,
        at: usize,
        op: Elementwise,
        a: View,
        b: View,
        out: View,
    ) -> Result<(), Poisoned> {
        let (a, b, out) = (self.rect(a), self.rect(b), self.rect(out));
        share(worker, self.ticket(at, 0), out.rows, |row| {
            // SAFETY: each row is handed to one worker; overlaps were checked at load.
            unsafe { elementwise(self.loaded.isa, op, a, b, out, row) };
        })
    }

    #[expect(clippy::too_many_arguments, reason = "one per field of the instruction")]
    fn copy(
        &self,
        worker: &Worker<'_>,
        at: usize,
        x: View,
        out: View,
        group: usize,
        (x_stride, out_stride): (usize, usize),
        groups: usize,
    ) -> Result<(), Poisoned> {
        let (x, out) = (self.rect(x), self.rect(out));
        share(worker, self.ticket(at, 0), out.rows, |row| {
            // SAFETY: each row is handed to one worker; views do not overlap (checked at load).
            let (from, to) = unsafe { (x.row(row), out.row_mut(row)) };
            for g in 0..groups {
                to[g * out_stride..][..group].copy_from_slice(&from[g * x_stride..][..group]);
            }
        })
    }

    fn mixture(
        &self,
        worker: &Worker<'_>,
        at: usize,
        x: View,
        spec: &MixtureSpec,
        out: View,
    ) -> Result<(), Poisoned> {
        let (x, out, room) = (self.rect(x), self.rect(out), &self.loaded.workers[worker.index]);
        let mixture = Mixture {
            isa: self.loaded.isa,
            spec,
            matrices: &self.loaded.matrices,
            scratch: &room.mixture,
            quant: (self.loaded.options.precision == Precision::Auto).then_some(&room.quant),
        };
        let only = |rect: Rect, row: usize| {
            // SAFETY: a row of the view.
            let base = unsafe { rect.base.add(row * rect.stride) };
            Rect {
                base,
                rows: 1,
                ..rect
            }
        };
        share(worker, self.ticket(at, 0), out.rows, |row| {
            // SAFETY: each row is handed to one worker, whose own room is used.
            unsafe { mixture.row(only(x, row), only(out, row)) };
        })
    }

    fn pool(
        &self,
        worker: &Worker<'_>,
        at: usize,
        x: View,
        out: View,
        pool: fn(Rect, &SequenceSlice, &mut [f32]),
    ) -> Result<(), Poisoned> {
        let (x, out) = (self.rect(x), self.rect(out));
        share(worker, self.ticket(at, 0), out.rows, |sequence| {
            // SAFETY: each row is handed to one worker.
            let row = unsafe { out.row_mut(sequence) };
            pool(x, &self.step.batch.sequences[sequence], row);
        })
    }

    fn l2_normalise(
        &self,
        worker: &Worker<'_>,
        at: usize,
        x: View,
        n: usize,
        out: View,
    ) -> Result<(), Poisoned> {
        let (x, out) = (self.rect(x), self.rect(out));
        share(worker, self.ticket(at, 0), x.rows, |row| {
            for group in (0..x.width).step_by(n) {
                // SAFETY: each row is handed to one worker; groups lie within the row.
                unsafe {
                    let (x, out) = (
                        x.base.add(row * x.stride + group),
                        out.base.add(row * out.stride + group),
                    );
                    dispatch(self.loaded.isa, L2Normalise { x, out, n });
                }
            }
        })
    }

    fn output_rows(&self, worker: &Worker<'_>, at: usize, x: View, out: View) -> Result<(), Poisoned> {
        let (x, out) = (self.rect(x), self.rect(out));
        share(worker, self.ticket(at, 0), out.rows, |row| {
            let from = self.step.batch.output_rows[row];
            // SAFETY: each row is handed to one worker; views do not overlap (checked at load).
            unsafe { out.row_mut(row).copy_from_slice(x.row(from)) };
        })
    }
}

fn mean_row(x: Rect, slice: &SequenceSlice, out: &mut [f32]) {
    out.fill(0.0);
    for token in slice.first_token..slice.first_token + slice.tokens {
        // SAFETY: x is only read until the next meeting.
        let row = unsafe { x.row(token) };
        for (out, value) in out.iter_mut().zip(row) {
            *out += value;
        }
    }
    for out in out {
        *out /= slice.tokens as f32;
    }
}

fn first_row(x: Rect, slice: &SequenceSlice, out: &mut [f32]) {
    // SAFETY: x is only read until the next meeting.
    out.copy_from_slice(unsafe { x.row(slice.first_token) });
}
