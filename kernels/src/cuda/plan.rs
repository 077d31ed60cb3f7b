//! Where everything of a program will lie in device memory, and putting it there. Knows no kernel.

use std::collections::{BTreeMap, BTreeSet};

use galerne_core::weights::WeightSource;

use super::attention_plan::PlanShape;
use super::driver::{DevicePtr, Driver, Products, Properties};
use super::experts;
use super::failed;
use super::gates::gates;
use super::kv::{KvElement, KvLayer};
use super::launch::attention::with_warpgroups;
use super::launch::linear::Means;
use super::launch::rope::{self, Rotation};
use super::launch::{mixture, sample};
use super::load::WeightPlan;
use super::memory::{DeviceMemory, Planner, Purpose, Region};
use super::sampler::SamplerRoom;
use super::step::{Addresses, AttentionShapes, Model};
use super::tables::TableLayout;
use crate::device::{DeviceError, LoadOptions, Quantization};
use crate::layout::{Layout, RowsMax, place};
use crate::program::{AttentionLayer, Instr, MixtureSpec, Program};

/// What of a device decides how its attention is shaped.
#[derive(Debug, Clone, Copy)]
struct Shaping {
    multiprocessors: u32,
    /// Whether `attention_prefill_sm90` is used.
    with_warpgroups: bool,
}

impl Shaping {
    fn new(properties: &Properties, with_unchecked: bool) -> Self {
        Self {
            multiprocessors: properties.multiprocessors,
            with_warpgroups: with_unchecked && properties.arch == "sm_90a",
        }
    }

    fn shape(self, layer: &AttentionLayer, block_tokens: u32, element: KvElement) -> PlanShape {
        let shape = PlanShape::new(layer, self.multiprocessors).with_shared_blocks(block_tokens);
        if !self.with_warpgroups {
            return shape;
        }
        let kv = KvLayer::new(DevicePtr::NULL, 0, layer, block_tokens, element);
        with_warpgroups(shape, &kv, self.multiprocessors)
    }
}

/// A program's memory, planned.
pub(super) struct ModelPlan<'a> {
    program: &'a Program,
    options: LoadOptions,
    weights: WeightPlan,
    layout: Layout,
    gates: BTreeSet<usize>,
    tables: TableLayout,
    sampler: SamplerRoom,
    shapes: AttentionShapes,
    kv: KvPlan,
    /// Most tokens of a sequence.
    positions: usize,
    means: Means,
    regions: Regions,
}

/// Regions of a program's memory other than weights.
#[derive(Debug, Clone)]
struct Regions {
    kv: Region,
    buffers: Region,
    tables: Region,
    /// By shape of attention.
    plans: Vec<Region>,
    partial: Region,
    linear: Region,
    sampler: [Region; 3],
    /// Tables of experts, by instruction.
    mixtures: Vec<(usize, Region)>,
    /// By rotation table.
    ropes: Vec<Region>,
}

/// How a block of the KV pool is shared out between layers: all layers' parts of a block lie together.
#[derive(Debug, Clone)]
struct KvPlan {
    element: KvElement,
    block_bytes: usize,
    /// By layer, where its part of a block begins.
    starts: Vec<usize>,
}

impl KvPlan {
    fn new(program: &Program, options: LoadOptions) -> Self {
        let element = KvElement::from(options.kv_dtype());
        let block_tokens = options.kv.block_tokens as u32;
        let mut block_bytes = 0;
        let starts = program
            .layers
            .iter()
            .map(|layer| {
                let start = block_bytes;
                let bytes = KvLayer::bytes_per_block(layer, block_tokens, element);
                block_bytes += bytes.next_multiple_of(16);
                start
            })
            .collect();
        Self {
            element,
            block_bytes,
            starts,
        }
    }
}

impl<'a> ModelPlan<'a> {
    /// Plans a program that has passed its gate, for sequences of at most `positions` tokens.
    pub(super) fn new(
        program: &'a Program,
        source: &dyn WeightSource,
        options: LoadOptions,
        positions: usize,
        (properties, with_unchecked): (&Properties, bool),
        planner: &mut Planner,
    ) -> Result<Self, DeviceError> {
        let weights = WeightPlan::new(program, source, options.quantization, planner)?;
        let kv = KvPlan::new(program, options);
        let rows_max = RowsMax {
            tokens: options.step_tokens_max,
            sequences: options.sequences_max,
        };
        let gates = gates(program);
        let pairs: Vec<_> = gates.iter().map(|&map| (map, map + 1)).collect();
        let layout = place(program, &pairs, rows_max, |width| width);
        let pooled = options.kv.blocks.saturating_mul(options.kv.block_tokens);
        // No sequence is longer than the pool, and tables of rotations are long.
        let positions = if program.layers.is_empty() {
            positions
        } else {
            positions.min(pooled)
        };
        let tables = TableLayout::new(options, positions);
        let shaping = Shaping::new(properties, with_unchecked);
        let block_tokens = options.kv.block_tokens as u32;
        let shapes = AttentionShapes::new(program, |layer| shaping.shape(layer, block_tokens, kv.element));
        let pool = kv.block_bytes.saturating_mul(options.kv.blocks);
        let sampler = SamplerRoom::new(program.output.width, options.sequences_max);
        let mut linear_bytes = weights.linear_workspace_bytes(rows_max.tokens as u32);
        // As if all matrices lay nowhere: only their shapes matter here.
        let unplaced = weights.matrices(|_| DevicePtr::NULL);
        let mut mixtures = vec![];
        for (at, spec) in specs(program) {
            let (mixture, _) = experts::mixture(spec, &unplaced, DevicePtr::NULL)?;
            linear_bytes = linear_bytes.max(mixture::workspace_bytes(&mixture, rows_max.tokens as u32));
            mixtures.push((at, planner.take(Purpose::Weights, experts::table_bytes(spec))?));
        }
        let mut workspace = |bytes| planner.take(Purpose::Workspace, bytes);
        let capacities: Vec<_> = shapes
            .shapes
            .iter()
            .map(|shape| shape.capacity(options.step_tokens_max, options.sequences_max))
            .collect();
        let partial = capacities.iter().map(|capacity| capacity.partial_floats).max();
        let regions = Regions {
            buffers: workspace(layout.elements * 4)?,
            tables: workspace(tables.bytes)?,
            plans: capacities
                .iter()
                .map(|capacity| workspace(capacity.words * 4))
                .collect::<Result<_, _>>()?,
            partial: workspace(partial.unwrap_or(0) * 4)?,
            linear: workspace(linear_bytes)?,
            sampler: [
                workspace(sampler.upload_bytes)?,
                workspace(sampler.scratch_bytes)?,
                workspace(sampler.result_bytes)?,
            ],
            mixtures,
            ropes: program
                .ropes
                .iter()
                .map(|rope| planner.take(Purpose::Weights, positions * 2 * rope.inv_freq.len() * 4))
                .collect::<Result<_, _>>()?,
            kv: planner.take(Purpose::Kv, pool)?,
        };
        Ok(Self {
            program,
            options,
            weights,
            layout,
            gates,
            tables,
            sampler,
            shapes,
            kv,
            positions,
            means: Means {
                precision: options.precision,
                products: match options.quantization {
                    Some(Quantization::Fp8W8A8) => properties.products,
                    _ => properties.products.min(Products::Floats16),
                },
                has_tensor_memory: with_unchecked && properties.arch == "sm_100a",
            },
            regions,
        })
    }

    /// Pinned host memory for a step's tables and plans.
    pub(super) fn tables_bytes(&self) -> usize {
        let plans = self.regions.plans.iter().map(|region| region.bytes);
        self.tables.bytes + plans.sum::<usize>()
    }

    /// Pinned host memory for requests to sample and their results.
    pub(super) fn sampler_bytes(&self) -> usize {
        self.sampler.upload_bytes + self.sampler.result_bytes
    }

    /// Fills the memory: weights, and zeros where a step may read before anything was written.
    pub(super) fn load(
        self,
        source: &dyn WeightSource,
        driver: &dyn Driver,
        memory: &DeviceMemory,
    ) -> Result<Model, DeviceError> {
        let weights = self.weights.load(self.program, source, driver, memory)?;
        let regions = &self.regions;
        for region in [regions.kv, regions.buffers, regions.linear] {
            // SAFETY: planned regions of the program's memory.
            unsafe { driver.enqueue_zero(memory.address(region), region.bytes) }
                .map_err(|error| failed(&error))?;
        }
        let ropes = self
            .program
            .ropes
            .iter()
            .zip(&regions.ropes)
            .map(|(spec, region)| {
                let at = memory.address(*region);
                let table = rope::table(spec, self.positions as u32);
                // SAFETY: the region was planned for as many positions, and nothing that runs uses it.
                unsafe { driver.write(at, bytemuck::cast_slice(&table)) }.map_err(|error| failed(&error))?;
                Ok(Rotation {
                    table: at,
                    pairs: spec.inv_freq.len() as u32,
                    pairing: spec.pairing,
                })
            });
        let ropes = ropes.collect::<Result<_, DeviceError>>()?;
        let mut mixtures = BTreeMap::new();
        for ((at, spec), &(_, region)) in specs(self.program).zip(&regions.mixtures) {
            let table = memory.address(region);
            let (mixture, addresses) = experts::mixture(spec, &weights.matrices, table)?;
            // SAFETY: the region was planned for these addresses, and nothing that runs uses it.
            unsafe { driver.write(table, bytemuck::cast_slice(&addresses)) }
                .map_err(|error| failed(&error))?;
            mixtures.insert(at, mixture);
        }
        let pool = memory.address(regions.kv);
        let layers = self.program.layers.iter().zip(&self.kv.starts);
        let kv = layers.map(|(layer, &start)| {
            let block_tokens = self.options.kv.block_tokens as u32;
            KvLayer::new(
                pool.offset(start),
                self.kv.block_bytes as u64,
                layer,
                block_tokens,
                self.kv.element,
            )
        });
        Ok(Model {
            ropes,
            mixtures,
            kv: kv.collect(),
            addresses: Addresses {
                pool,
                block_bytes: self.kv.block_bytes,
                buffers: memory.address(regions.buffers),
                tables: self.tables.at(memory.address(regions.tables)),
                table_region: memory.address(regions.tables),
                plans: regions
                    .plans
                    .iter()
                    .map(|region| memory.address(*region))
                    .collect(),
                partial: memory.address(regions.partial),
                linear: memory.address(regions.linear),
                sampler: sample::Addresses {
                    upload: memory.address(regions.sampler[0]),
                    scratch: memory.address(regions.sampler[1]),
                    results: memory.address(regions.sampler[2]),
                },
            },
            program: self.program.clone(),
            options: self.options,
            weights,
            layout: self.layout,
            gates: self.gates,
            tables: self.tables,
            sampler: self.sampler,
            means: self.means,
            shapes: self.shapes,
        })
    }
}

/// The mixtures of a program, with the instruction of each.
fn specs(program: &Program) -> impl Iterator<Item = (usize, &MixtureSpec)> {
    let instrs = program.instrs.iter().enumerate();
    instrs.filter_map(|(at, instr)| match instr {
        Instr::Mixture { mixture, .. } => Some((at, mixture.as_ref())),
        _ => None,
    })
}
