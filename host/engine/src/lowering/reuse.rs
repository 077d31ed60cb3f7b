//! Lets virtual buffers whose lives do not meet share one. Knows nothing of the graph.

use std::collections::HashMap;

use galerne_core::graph::Rows;
use galerne_kernels::program::{BufferId, BufferSpec, Instr, Program, View};

/// Renumbers buffers so that one of equal rows and width is taken again once it is dead. Its old content may
/// not be read in the instruction that first writes the new one: inputs and outputs may not overlap.
pub(super) fn reuse_buffers(program: &mut Program) {
    let mut last_touch = vec![0; program.buffers.len()];
    for (at, instr) in program.instrs.iter_mut().enumerate() {
        for view in views(instr) {
            last_touch[view.buffer.index()] = at;
        }
    }
    let output = program.output.buffer.index();
    last_touch[output] = usize::MAX;
    let mut ends: Vec<Vec<usize>> = vec![Vec::new(); program.instrs.len()];
    for (buffer, at) in last_touch.iter().enumerate() {
        if let Some(list) = ends.get_mut(*at) {
            list.push(buffer);
        }
    }

    let mut new_ids: Vec<Option<BufferId>> = vec![None; program.buffers.len()];
    let mut free: HashMap<(Rows, u32), Vec<BufferId>> = HashMap::new();
    let mut buffers: Vec<BufferSpec> = Vec::new();
    for (at, instr) in program.instrs.iter_mut().enumerate() {
        for view in views(instr) {
            let spec = program.buffers[view.buffer.index()];
            let id = new_ids[view.buffer.index()].get_or_insert_with(|| {
                free.get_mut(&(spec.rows, spec.width))
                    .and_then(Vec::pop)
                    .unwrap_or_else(|| {
                        buffers.push(spec);
                        BufferId(u32::try_from(buffers.len() - 1).unwrap_or(u32::MAX))
                    })
            });
            view.buffer = *id;
        }
        for buffer in &ends[at] {
            // A buffer nothing touches has no new number and frees none.
            if let Some(id) = new_ids[*buffer] {
                let spec = program.buffers[*buffer];
                free.entry((spec.rows, spec.width)).or_default().push(id);
            }
        }
    }
    if let Some(id) = new_ids[output] {
        program.output.buffer = id;
    }
    program.buffers = buffers;
}

/// All views of an instruction.
fn views(instr: &mut Instr) -> Vec<&mut View> {
    match instr {
        Instr::Embedding { out, .. } => vec![out],
        Instr::Linear { x, out, .. }
        | Instr::Norm { x, out, .. }
        | Instr::Scale { x, out, .. }
        | Instr::Activate { x, out, .. }
        | Instr::SoftCap { x, out, .. }
        | Instr::Copy { x, out, .. }
        | Instr::Mixture { x, out, .. }
        | Instr::MeanPool { x, out }
        | Instr::ClsPool { x, out }
        | Instr::L2Normalise { x, out, .. }
        | Instr::OutputRows { x, out } => vec![x, out],
        Instr::AddNorm {
            residual, delta, out, ..
        } => vec![residual, delta, out],
        Instr::Rope { x, .. } => vec![x],
        Instr::RopeAppend { q, k, v, .. } => vec![q, k, v],
        Instr::Attention { q, out, .. } => vec![q, out],
        Instr::ActivateMul { gate, up, out, .. } => vec![gate, up, out],
        Instr::Add { a, b, out } | Instr::Mul { a, b, out } => vec![a, b, out],
    }
}
