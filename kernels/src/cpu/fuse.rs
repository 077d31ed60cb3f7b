//! What of a program is run together: a norm or a gated activation whose only reader is the linear map after it
//! becomes that map's prologue, and saves a meeting of all workers. Knows nothing of kernels.

use crate::dataflow::{is_gate_of, is_read_after, overlap};
use crate::layout::views;
use crate::program::{Instr, Program};

/// One thing that workers share out and finish together.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Planned {
    /// An instruction by itself.
    One(usize),
    /// A linear map, and the instruction before it if only the map reads its result.
    Linear {
        /// The map.
        at: usize,
        /// A norm or gated activation.
        prologue: Option<usize>,
        /// Its part in a gated activation between two maps.
        gate: Gate,
    },
}

/// A map's part in a gated activation that rows in tiles pass between two maps without their results in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Gate {
    /// None.
    Apart,
    /// Its results are gate and up of this instruction, the next map's prologue.
    Made(usize),
    /// Its prologue is done for them by the map before.
    Read,
}

/// The program's instructions in order, each in exactly one place.
pub(crate) fn plan(program: &Program) -> Vec<Planned> {
    let mut planned = Vec::with_capacity(program.instrs.len());
    for (at, instr) in program.instrs.iter().enumerate() {
        if !matches!(instr, Instr::Linear { .. }) {
            planned.push(Planned::One(at));
            continue;
        }
        let before = planned.last().copied();
        let prologue = match before {
            Some(Planned::One(before)) if is_prologue(program, before, at) => {
                planned.pop();
                Some(before)
            }
            _ => None,
        };
        planned.push(Planned::Linear {
            at,
            prologue,
            gate: Gate::Apart,
        });
    }
    planned
}

/// Marks pairs of maps with a gated activation between them, where `fits(first, second)` says that they can be computed so.
pub(crate) fn join_gates(
    program: &Program,
    planned: &mut [Planned],
    mut fits: impl FnMut(&Instr, &Instr) -> bool,
) {
    for second in 1..planned.len() {
        let (before, after) = planned.split_at_mut(second);
        let (
            Planned::Linear {
                at: first,
                gate: made,
                ..
            },
            Planned::Linear {
                at: second,
                prologue: Some(between),
                gate: read,
            },
        ) = (&mut before[before.len() - 1], &mut after[0])
        else {
            continue;
        };
        let (first, second) = (&program.instrs[*first], &program.instrs[*second]);
        if is_gate_of(first, &program.instrs[*between]) && fits(first, second) {
            (*made, *read) = (Gate::Made(*between), Gate::Read);
        }
    }
}

/// Each prologue with its map.
pub(crate) fn prologues(planned: &[Planned]) -> Vec<(usize, usize)> {
    let pair = |planned: &Planned| match *planned {
        Planned::Linear { at, prologue, .. } => prologue.map(|prologue| (prologue, at)),
        Planned::One(_) => None,
    };
    planned.iter().filter_map(pair).collect()
}

/// Whether `before` may be computed by every reader for itself while the map at `at` runs.
fn is_prologue(program: &Program, before: usize, at: usize) -> bool {
    let (Instr::Norm { out: made, .. } | Instr::ActivateMul { out: made, .. }) = program.instrs[before]
    else {
        return false;
    };
    let Instr::Linear { x, out, .. } = program.instrs[at] else {
        return false;
    };
    let written_meanwhile = views(&program.instrs[before])
        .0
        .iter()
        .any(|read| overlap(*read, out));
    x == made && !written_meanwhile && !is_read_after(program, at, made)
}

#[cfg(test)]
mod tests {
    use galerne_core::graph::{Activation, Rows};

    use super::*;
    use crate::program::{BufferId, BufferSpec, View, WeightId};

    fn view(buffer: u32) -> View {
        View {
            buffer: BufferId(buffer),
            start: 0,
            width: 32,
        }
    }

    fn gated(gate: u32, out: u32) -> Instr {
        Instr::ActivateMul {
            gate: view(gate),
            up: view(1),
            function: Activation::Silu,
            out: view(out),
        }
    }

    fn linear(x: u32, out: u32, accumulate: bool) -> Instr {
        Instr::Linear {
            x: view(x),
            weight: WeightId(0),
            bias: None,
            accumulate,
            out: view(out),
        }
    }

    fn planned(instrs: Vec<Instr>, output: u32) -> Vec<Planned> {
        let spec = BufferSpec {
            rows: Rows::Tokens,
            width: 32,
        };
        plan(&Program {
            instrs,
            buffers: vec![spec; 8],
            weights: vec![],
            ropes: vec![],
            layers: vec![],
            output: view(output),
            context_tokens_max: 8,
        })
    }

    fn alone(instrs: Vec<Instr>, output: u32) {
        let at = instrs.len() - 1;
        let last = planned(instrs, output)
            .into_iter()
            .find(|planned| matches!(planned, Planned::Linear { at: 1, .. }));
        assert_eq!(
            last,
            Some(Planned::Linear {
                at: 1,
                prologue: None,
                gate: Gate::Apart
            }),
            "of {at}"
        );
    }

    #[test]
    fn a_gated_activation_that_only_the_map_reads_becomes_its_prologue() {
        let plan = planned(vec![gated(0, 0), linear(0, 2, false)], 2);
        assert_eq!(
            plan,
            [Planned::Linear {
                at: 1,
                prologue: Some(0),
                gate: Gate::Apart
            }]
        );
    }

    #[test]
    fn what_is_read_again_or_is_the_result_is_computed_once_for_all() {
        alone(vec![gated(0, 3), linear(3, 2, false), linear(3, 4, false)], 4);
        alone(vec![gated(0, 3), linear(3, 2, false)], 3);
        // A map that adds to what is there reads it, as a residual after a norm does.
        alone(vec![gated(0, 3), linear(3, 2, false), linear(2, 3, true)], 3);
    }

    #[test]
    fn a_map_that_writes_what_the_prologue_reads_has_none() {
        alone(vec![gated(0, 3), linear(3, 1, true)], 1);
    }

    #[test]
    fn what_is_overwritten_before_it_is_read_again_may_be_private() {
        let plan = planned(
            vec![gated(0, 3), linear(3, 2, false), gated(2, 3), linear(3, 4, false)],
            4,
        );
        assert_eq!(plan.len(), 2);
    }

    #[test]
    fn a_map_whose_halves_are_gate_and_up_is_joined_with_the_next() {
        let wide = |start, width| View {
            buffer: BufferId(0),
            start,
            width,
        };
        let gated = |up| Instr::ActivateMul {
            gate: wide(0, 16),
            up,
            function: Activation::Silu,
            out: view(3),
        };
        let gates = |instrs: Vec<Instr>, fits: bool| {
            let spec = BufferSpec {
                rows: Rows::Tokens,
                width: 32,
            };
            let program = Program {
                instrs,
                buffers: vec![spec; 8],
                weights: vec![],
                ropes: vec![],
                layers: vec![],
                output: view(2),
                context_tokens_max: 8,
            };
            let mut planned = plan(&program);
            join_gates(&program, &mut planned, |_, _| fits);
            planned
                .into_iter()
                .filter_map(|planned| match planned {
                    Planned::Linear { gate, .. } => Some(gate),
                    Planned::One(_) => None,
                })
                .collect::<Vec<_>>()
        };
        let first = || linear(1, 0, false);
        let joined = vec![first(), gated(wide(16, 16)), linear(3, 2, false)];
        assert_eq!(gates(joined.clone(), true), [Gate::Made(1), Gate::Read]);
        assert_eq!(gates(joined, false), [Gate::Apart; 2]);
        // The up is not what the map makes.
        let other = vec![first(), gated(wide(0, 16)), linear(3, 2, false)];
        assert_eq!(gates(other, true), [Gate::Apart; 2]);
        // The map adds to what is there, which its sums alone are not.
        let added = vec![linear(1, 0, true), gated(wide(16, 16)), linear(3, 2, false)];
        assert_eq!(gates(added, true), [Gate::Apart; 2]);
    }
}
