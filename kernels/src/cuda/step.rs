//! A loaded program, and what a step uploads and launches: which kernels run each instruction. Knows no driver.

use std::collections::{BTreeMap, BTreeSet};

use galerne_core::graph::Rows;
use galerne_core::ids::BlockId;

use super::attention_plan::{Plan, PlanShape};
use super::driver::{DevicePtr, DeviceView, Launch};
use super::kv::KvLayer;
use super::launch::attention::{Step, Tables, attention};
use super::launch::copy::{Groups, copy_columns, gather_rows};
use super::launch::elementwise::{Elementwise, elementwise};
use super::launch::embedding::embedding;
use super::launch::linear::{Linear, Means, gated, linear};
use super::launch::mean_pool::mean_pool;
use super::launch::mixture::{Mixture, mixture};
use super::launch::norm::{self, l2_normalise, norm};
use super::launch::rope::{Rotation, rope as rotate, rope_append};
use super::launch::sample::{self, JobResult};
use super::load::Weights;
use super::sampler::SamplerRoom;
use super::tables::{StepRows, TableAddresses, TableLayout};
use crate::device::{LoadOptions, StepBatch};
use crate::layout::Layout;
use crate::program::{AttentionLayer, Instr, NormKind, NormSpec, Program, RopeId, View, WeightId};

/// A program with the addresses of all it uses.
#[derive(Debug)]
pub(super) struct Model {
    pub(super) program: Program,
    pub(super) options: LoadOptions,
    pub(super) weights: Weights,
    /// By rotation table.
    pub(super) ropes: Vec<Rotation>,
    /// By instruction.
    pub(super) mixtures: BTreeMap<usize, Mixture>,
    /// By layer.
    pub(super) kv: Vec<KvLayer>,
    /// Where buffers begin, in f32 numbers.
    pub(super) layout: Layout,
    /// Linear maps that may end in the activation behind them.
    pub(super) gates: BTreeSet<usize>,
    pub(super) tables: TableLayout,
    pub(super) shapes: AttentionShapes,
    pub(super) sampler: SamplerRoom,
    pub(super) means: Means,
    pub(super) addresses: Addresses,
}

/// Regions of a program's memory.
#[derive(Debug)]
pub(super) struct Addresses {
    pub(super) pool: DevicePtr,
    /// Of one block, all layers.
    pub(super) block_bytes: usize,
    pub(super) buffers: DevicePtr,
    pub(super) table_region: DevicePtr,
    pub(super) tables: TableAddresses,
    /// By shape of attention.
    pub(super) plans: Vec<DevicePtr>,
    /// Partial results of attention.
    pub(super) partial: DevicePtr,
    /// Workspace of linear maps and mixtures.
    pub(super) linear: DevicePtr,
    pub(super) sampler: sample::Addresses,
}

/// The shapes of attention that a program's layers have. Layers of one shape share a plan.
#[derive(Debug)]
pub(super) struct AttentionShapes {
    pub(super) shapes: Vec<PlanShape>,
    /// By layer.
    of_layer: Vec<usize>,
}

impl AttentionShapes {
    /// Of a program whose layers have these.
    pub(super) fn new(program: &Program, shape: impl Fn(&AttentionLayer) -> PlanShape) -> Self {
        let mut shapes: Vec<PlanShape> = vec![];
        let of_layer = program.layers.iter().map(|layer| {
            let shape = shape(layer);
            shapes
                .iter()
                .position(|known| *known == shape)
                .unwrap_or_else(|| {
                    shapes.push(shape);
                    shapes.len() - 1
                })
        });
        let of_layer = of_layer.collect();
        Self { shapes, of_layer }
    }
}

/// Room for the plans of a step, kept between steps.
#[derive(Debug, Default)]
pub(super) struct AttentionPlans {
    plan: Plan,
    words: Vec<u32>,
}

/// A copy from the staging memory.
#[derive(Debug, Clone, Copy)]
pub(super) struct Upload {
    /// Where in the staging memory it begins.
    pub(super) from: usize,
    pub(super) to: DevicePtr,
    pub(super) bytes: usize,
}

impl Model {
    /// If a step only decodes: the rows its graph computes, some of which may be padding.
    pub(super) fn bucket(&self, batch: &StepBatch) -> Option<StepRows> {
        let tokens = batch.tokens.len();
        if batch.sequences.len() != tokens || batch.output_rows.len() != tokens {
            return None;
        }
        let rows = match tokens {
            0..=8 => tokens.next_power_of_two(),
            9..=64 => tokens.next_multiple_of(8),
            _ => tokens.next_multiple_of(32),
        };
        let rows_max = self.options.sequences_max.min(self.options.step_tokens_max);
        let rows = rows.min(rows_max);
        (rows >= tokens).then_some(StepRows {
            tokens: rows,
            sequences: rows,
            outputs: rows,
        })
    }

    /// Writes what a step uploads to the staging memory; says what goes where.
    pub(super) fn stage(
        &self,
        (batch, drawn): (&StepBatch, &[usize]),
        rows: StepRows,
        plans: &mut AttentionPlans,
        staging: &mut [u8],
    ) -> Vec<Upload> {
        let mut uploads = Vec::with_capacity(1 + self.shapes.shapes.len());
        let bytes = self
            .tables
            .fill(batch, drawn, rows, &mut staging[..self.tables.bytes]);
        uploads.push(Upload {
            from: 0,
            to: self.addresses.table_region,
            bytes,
        });
        let mut from = self.tables.bytes;
        for (shape, &to) in self.shapes.shapes.iter().zip(&self.addresses.plans) {
            shape.plan(&batch.sequences, rows.tokens, &mut plans.plan);
            plans.words.clear();
            plans.plan.encode(&mut plans.words);
            let bytes: &[u8] = bytemuck::cast_slice(&plans.words);
            staging[from..][..bytes.len()].copy_from_slice(bytes);
            uploads.push(Upload {
                from,
                to,
                bytes: bytes.len(),
            });
            from += bytes.len();
        }
        uploads
    }

    /// Puts the tokens that the last round of sampling drew where the step that was staged last has its own.
    pub(super) fn place_drawn(&self, tokens: usize) -> Launch {
        let tables = &self.addresses.tables;
        let number = |at, stride| DeviceView { at, stride, width: 1 };
        let results = number(
            self.addresses.sampler.results.offset(JobResult::TOKEN),
            JobResult::WORDS,
        );
        gather_rows(results, number(tables.tokens, 1), tables.sources, tokens as u32)
    }

    /// All launches of a step of so many rows.
    pub(super) fn launches(&self, rows: StepRows, step: Step) -> Vec<Launch> {
        let mut launches = Vec::with_capacity(self.program.instrs.len() * 2);
        let mut at = 0;
        while let Some(instr) = self.program.instrs.get(at) {
            if let Some(launch) = self.gated(at, rows) {
                launches.push(launch);
                at += 2;
            } else {
                self.lower((at, instr), (rows, step), &mut launches);
                at += 1;
            }
        }
        launches
    }

    /// One launch for the map at `at` and the activation behind it, where there can be one.
    fn gated(&self, at: usize, rows: StepRows) -> Option<Launch> {
        if !self.gates.contains(&at) {
            return None;
        }
        let [
            Instr::Linear { x, weight, bias, .. },
            Instr::ActivateMul { function, out, .. },
        ] = &self.program.instrs[at..at + 2]
        else {
            return None;
        };
        let [part] = &self.weights.matrices[weight.index()][..] else {
            return None;
        };
        let map = Linear {
            x: self.view(*x),
            matrix: part.matrix,
            bias: bias.map_or(DevicePtr::NULL, |bias| self.vector(bias)),
            accumulate: false,
            out: self.view(*out),
            rows: self.rows(*x, rows),
        };
        gated(&map, *function, self.means, self.addresses.linear)
    }

    /// The columns of a buffer.
    pub(super) fn view(&self, view: View) -> DeviceView {
        let buffer = view.buffer.index();
        let at = self.addresses.buffers.offset(self.layout.starts[buffer] * 4);
        DeviceView::new(at, self.program.buffers[buffer].width, view)
    }

    /// A block of the KV pool, all layers.
    pub(super) fn block(&self, block: BlockId) -> DevicePtr {
        self.addresses
            .pool
            .offset(block.index() * self.addresses.block_bytes)
    }

    fn rows(&self, view: View, rows: StepRows) -> u32 {
        let rows = match self.program.buffers[view.buffer.index()].rows {
            Rows::Tokens => rows.tokens,
            Rows::Sequences => rows.sequences,
            Rows::Outputs => rows.outputs,
        };
        rows as u32
    }

    /// By row, its sequence, or nothing if the rows are no tokens.
    fn row_owners(&self, view: View) -> DevicePtr {
        match self.program.buffers[view.buffer.index()].rows {
            Rows::Tokens => self.addresses.tables.owners,
            Rows::Sequences | Rows::Outputs => DevicePtr::NULL,
        }
    }

    fn vector(&self, weight: WeightId) -> DevicePtr {
        self.weights.vectors[weight.index()]
    }

    fn norm(&self, (x, delta, out): (View, Option<View>, View), spec: &NormSpec, rows: StepRows) -> Launch {
        let kind = match spec.kind {
            NormKind::Rms { weight_offset } => norm::Kind::Rms { weight_offset },
            NormKind::Layer { bias } => norm::Kind::Layer {
                bias: bias.map_or(DevicePtr::NULL, |bias| self.vector(bias)),
            },
        };
        let delta = delta.map_or(DeviceView::NONE, |delta| self.view(delta));
        norm(
            kind,
            (self.view(x), delta, self.view(out)),
            self.vector(spec.weight),
            (self.rows(x, rows), spec.width),
            spec.eps,
        )
    }

    fn elementwise(
        &self,
        op: Elementwise,
        (a, b, out): (View, Option<View>, View),
        rows: StepRows,
    ) -> Launch {
        let b = b.map_or(DeviceView::NONE, |b| self.view(b));
        elementwise(op, self.view(a), b, self.view(out), self.rows(out, rows))
    }

    /// One launch or more per part of the weight: each part is of one format.
    fn linear(
        &self,
        (x, weight, out): (View, WeightId, View),
        bias: Option<WeightId>,
        accumulate: bool,
        rows: StepRows,
        launches: &mut Vec<Launch>,
    ) {
        for part in &self.weights.matrices[weight.index()] {
            let columns = View {
                start: out.start + part.first,
                width: part.matrix.rows,
                ..out
            };
            let map = Linear {
                x: self.view(x),
                matrix: part.matrix,
                bias: bias.map_or(DevicePtr::NULL, |bias| {
                    self.vector(bias).offset(part.first as usize * 4)
                }),
                accumulate,
                out: self.view(columns),
                rows: self.rows(x, rows),
            };
            launches.extend(linear(&map, self.means, self.addresses.linear));
        }
    }

    fn lower(
        &self,
        (at, instr): (usize, &Instr),
        (rows, step): (StepRows, Step),
        launches: &mut Vec<Launch>,
    ) {
        let tables = self.addresses.tables;
        match instr {
            Instr::Embedding { table, index, out } => {
                for part in &self.weights.matrices[table.index()] {
                    launches.push(embedding(
                        (part.matrix, part.first),
                        *index,
                        (tables.tokens, tables.positions),
                        self.view(*out),
                        self.rows(*out, rows),
                    ));
                }
            }
            Instr::Linear {
                x,
                weight,
                bias,
                accumulate,
                out,
            } => self.linear((*x, *weight, *out), *bias, *accumulate, rows, launches),
            Instr::Norm { x, norm, out } => launches.push(self.norm((*x, None, *out), norm, rows)),
            Instr::AddNorm {
                residual,
                delta,
                norm,
                out,
            } => launches.push(self.norm((*residual, Some(*delta), *out), norm, rows)),
            Instr::Attention { layer, q, out } => {
                let shape = self.shapes.of_layer[layer.index()];
                launches.extend(attention(
                    &self.program.layers[layer.index()],
                    &self.shapes.shapes[shape],
                    (self.view(*q), self.view(*out)),
                    self.kv[layer.index()],
                    Tables {
                        plan: self.addresses.plans[shape],
                        blocks: tables.blocks,
                        blocks_stride: tables.blocks_stride,
                        partial: self.addresses.partial,
                    },
                    step,
                ));
            }
            Instr::Rope { x, rope, head_width } => launches.push(rotate(
                self.view(*x),
                self.ropes[rope.index()],
                *head_width,
                self.rows(*x, rows),
                &tables,
            )),
            Instr::RopeAppend {
                layer,
                q,
                k,
                v,
                q_rope,
                k_rope,
            } => {
                let rotation = |rope: Option<RopeId>| rope.map(|rope| self.ropes[rope.index()]);
                launches.push(rope_append(
                    (self.view(*q), self.view(*k), self.view(*v)),
                    (rotation(*q_rope), rotation(*k_rope)),
                    self.kv[layer.index()],
                    self.rows(*q, rows),
                    &tables,
                ));
            }
            Instr::ActivateMul {
                gate,
                up,
                function,
                out,
            } => launches.push(self.elementwise(
                Elementwise::ActivateMul(*function),
                (*gate, Some(*up), *out),
                rows,
            )),
            Instr::Add { a, b, out } => {
                launches.push(self.elementwise(Elementwise::Add, (*a, Some(*b), *out), rows));
            }
            Instr::Mul { a, b, out } => {
                launches.push(self.elementwise(Elementwise::Mul, (*a, Some(*b), *out), rows));
            }
            Instr::Scale { x, factor, out } => {
                launches.push(self.elementwise(Elementwise::Scale(*factor), (*x, None, *out), rows));
            }
            Instr::SoftCap { x, cap, out } => {
                launches.push(self.elementwise(Elementwise::SoftCap(*cap), (*x, None, *out), rows));
            }
            Instr::Activate { x, function, out } => {
                launches.push(self.elementwise(Elementwise::Activate(*function), (*x, None, *out), rows));
            }
            Instr::Copy {
                x,
                out,
                group,
                x_stride,
                out_stride,
                groups,
            } => {
                let groups = Groups {
                    group: *group,
                    groups: *groups,
                    x_stride: *x_stride,
                    out_stride: *out_stride,
                };
                launches.push(copy_columns(
                    self.view(*x),
                    self.view(*out),
                    groups,
                    self.rows(*x, rows),
                ));
            }
            Instr::MeanPool { x, out } => launches.push(mean_pool(
                self.view(*x),
                self.view(*out),
                (tables.first_rows, tables.row_counts),
                self.rows(*out, rows),
            )),
            Instr::ClsPool { x, out } => launches.push(gather_rows(
                self.view(*x),
                self.view(*out),
                tables.first_rows,
                self.rows(*out, rows),
            )),
            Instr::OutputRows { x, out } => launches.push(gather_rows(
                self.view(*x),
                self.view(*out),
                tables.output_rows,
                self.rows(*out, rows),
            )),
            Instr::L2Normalise { x, width, out } => launches.push(l2_normalise(
                self.view(*x),
                self.view(*out),
                (self.rows(*x, rows), *width),
            )),
            Instr::Mixture { x, out, .. } => launches.extend(mixture(
                &self.mixtures[&at],
                (self.view(*x), self.view(*out)),
                (self.rows(*x, rows), self.row_owners(*x)),
                self.means,
                self.addresses.linear,
            )),
        }
    }
}
