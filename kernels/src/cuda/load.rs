//! Weights of a program on their way to the device: planned first, then packed and copied. Knows no kernel.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use galerne_core::weights::WeightSource;

use super::driver::{DevicePtr, Driver};
use super::failed;
use super::launch::linear;
use super::memory::{DeviceMemory, Planner, Purpose, Region};
use super::weights::{DeviceMatrix, Packing, WeightFormat};
use crate::device::{DeviceError, Quantization};
use crate::program::{Program, WeightSpec};
use crate::stored::{Uses, fetch, load_vector};

/// Threads that load: each holds a weight as stored and as packed.
const THREADS_MAX: usize = 8;

/// Some rows of a weight, which all have one format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Part {
    /// The output column, or table entry, of its first row.
    pub(super) first: u32,
    /// The rows.
    pub(super) matrix: DeviceMatrix,
}

/// All weights of a program, by [`crate::program::WeightId`].
#[derive(Debug, Default)]
pub(super) struct Weights {
    /// If it is used as a matrix: its parts in order.
    pub(super) matrices: Vec<Vec<Part>>,
    /// If it is used as a vector: its elements in f32, else null.
    pub(super) vectors: Vec<DevicePtr>,
}

/// Joined tensors of one format.
#[derive(Debug)]
struct Run {
    names: Vec<String>,
    width: u32,
    packing: Packing,
    region: Region,
}

/// Where each weight will lie. Tensors that several weights name the same way are held once.
#[derive(Debug, Default)]
pub(super) struct WeightPlan {
    runs: Vec<Run>,
    /// By weight: first row and run of each part.
    parts: Vec<Vec<(u32, usize)>>,
    /// By weight.
    vectors: Vec<Option<Region>>,
}

impl WeightPlan {
    /// Plans the weights of a program that has passed its gate, by the file's index alone.
    pub(super) fn new(
        program: &Program,
        source: &dyn WeightSource,
        quantization: Option<Quantization>,
        planner: &mut Planner,
    ) -> Result<Self, DeviceError> {
        let mut plan = Self::default();
        let mut known = HashMap::new();
        for (spec, used) in program.weights.iter().zip(Uses::of(program).weights) {
            let mut parts = vec![];
            if used.as_matrix {
                let quantization = quantization.filter(|_| used.is_quantizable());
                for (first, names, packing) in runs(spec, source, quantization)? {
                    let run = match known.get(&(names.clone(), packing.format())) {
                        Some(&run) => run,
                        None => {
                            let region = planner.take(Purpose::Weights, packing.bytes())?;
                            known.insert((names.clone(), packing.format()), plan.runs.len());
                            plan.runs.push(Run {
                                names,
                                width: spec.width,
                                packing,
                                region,
                            });
                            plan.runs.len() - 1
                        }
                    };
                    parts.push((first, run));
                }
            }
            plan.parts.push(parts);
            let bytes = spec.rows as usize * spec.width as usize * 4;
            let vector = used
                .as_vector
                .then(|| planner.take(Purpose::Weights, bytes))
                .transpose()?;
            plan.vectors.push(vector);
        }
        Ok(plan)
    }

    /// All matrices, by weight, if a region begins where `address` says.
    pub(super) fn matrices(&self, address: impl Fn(Region) -> DevicePtr) -> Vec<Vec<Part>> {
        let part = |&(first, run): &(u32, usize)| {
            let Run { packing, region, .. } = &self.runs[run];
            Part {
                first,
                matrix: packing.matrix(address(*region)),
            }
        };
        let parts = |parts: &Vec<(u32, usize)>| parts.iter().map(part).collect();
        self.parts.iter().map(parts).collect()
    }

    /// Workspace that linear maps of at most so many rows share.
    pub(super) fn linear_workspace_bytes(&self, rows_max: u32) -> usize {
        let bytes = |run: &Run| linear::workspace_bytes(&run.packing.matrix(DevicePtr::NULL), rows_max);
        self.runs.iter().map(bytes).max().unwrap_or(0)
    }

    /// Packs and copies all.
    pub(super) fn load(
        &self,
        program: &Program,
        source: &dyn WeightSource,
        driver: &dyn Driver,
        memory: &DeviceMemory,
    ) -> Result<Weights, DeviceError> {
        self.load_runs(source, driver, memory)?;
        let mut vectors = Vec::with_capacity(self.vectors.len());
        for (spec, region) in program.weights.iter().zip(&self.vectors) {
            let Some(region) = *region else {
                vectors.push(DevicePtr::NULL);
                continue;
            };
            let at = memory.address(region);
            let elements = load_vector(source, spec)?;
            // SAFETY: as above; `load_vector` gives as many elements as the spec has.
            unsafe { driver.write(at, bytemuck::cast_slice(&elements)) }.map_err(|error| failed(&error))?;
            vectors.push(at);
        }
        Ok(Weights {
            matrices: self.matrices(|region| memory.address(region)),
            vectors,
        })
    }

    /// Some threads, since rounding a weight takes longer than copying it.
    fn load_runs(
        &self,
        source: &dyn WeightSource,
        driver: &dyn Driver,
        memory: &DeviceMemory,
    ) -> Result<(), DeviceError> {
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), DeviceError> {
            while let Some(run) = self.runs.get(next.fetch_add(1, Ordering::Relaxed)) {
                let packed = pack(run, source)?;
                // SAFETY: the region was planned with the packing's size, and nothing runs yet.
                unsafe { driver.write(memory.address(run.region), &packed) }
                    .map_err(|error| failed(&error))?;
            }
            Ok(())
        };
        let threads = thread::available_parallelism().map_or(1, usize::from);
        let helpers = threads.min(THREADS_MAX).min(self.runs.len()).saturating_sub(1);
        thread::scope(|scope| {
            let helpers: Vec<_> = (0..helpers)
                // One that does not start leaves its work to the others.
                .filter_map(|_| thread::Builder::new().spawn_scoped(scope, work).ok())
                .collect();
            let own = work();
            let joined = helpers.into_iter().map(|helper| {
                helper
                    .join()
                    .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            joined.fold(own, Result::and)
        })
    }
}

/// The parts of a matrix: neighbouring tensors of one format are joined. First row, names and packing of each.
fn runs(
    spec: &WeightSpec,
    source: &dyn WeightSource,
    quantization: Option<Quantization>,
) -> Result<Vec<(u32, Vec<String>, Packing)>, DeviceError> {
    let mut runs: Vec<(u32, u32, WeightFormat, Vec<String>)> = vec![];
    let mut first = 0;
    for name in &spec.parts {
        let fail = |got: String| DeviceError::Weight {
            name: name.clone(),
            expected: format!("a matrix of inner width {}", spec.width),
            got,
        };
        let info = source.index().tensors.get(name);
        let info = info.ok_or_else(|| fail("no tensor of this name".to_owned()))?;
        let rows = match info.shape[..] {
            [inner] if inner == u64::from(spec.width) => 1,
            [rows, inner] if inner == u64::from(spec.width) && rows > 0 => {
                u32::try_from(rows).map_err(|_| fail(format!("{rows} rows")))?
            }
            _ => return Err(fail(format!("shape {:?}", info.shape))),
        };
        let format = WeightFormat::loaded(info.dtype, quantization);
        match runs.last_mut() {
            Some((_, joined, last, names)) if *last == format => {
                *joined += rows;
                names.push(name.clone());
            }
            _ => runs.push((first, rows, format, vec![name.clone()])),
        }
        first = first
            .checked_add(rows)
            .ok_or_else(|| fail(format!("{rows} rows")))?;
    }
    if first != spec.rows {
        return Err(DeviceError::Weight {
            name: spec.parts.join(" + "),
            expected: format!("{} rows", spec.rows),
            got: format!("{first} rows"),
        });
    }
    let run = |(first, rows, format, names)| (first, names, Packing::with_format(format, rows, spec.width));
    Ok(runs.into_iter().map(run).collect())
}

fn pack(run: &Run, source: &dyn WeightSource) -> Result<Vec<u8>, DeviceError> {
    let mut packed = vec![0; run.packing.bytes()];
    let mut row = 0;
    for name in &run.names {
        let (view, rows, _) = fetch(source, name, run.width as usize)?;
        for stored in view.bytes.chunks_exact(view.bytes.len() / rows) {
            run.packing.load_row(row, view.dtype, stored, &mut packed);
            row += 1;
        }
    }
    Ok(packed)
}
