//! Who reads what an instruction has made. Knows no device.

use crate::layout::views;
use crate::program::{Instr, Program, View};

/// Whether a map makes the gate and, beside it, the up of a gated activation, and nothing else.
pub(crate) fn is_gate_of(map: &Instr, activation: &Instr) -> bool {
    let (
        Instr::Linear {
            out,
            accumulate: false,
            ..
        },
        Instr::ActivateMul { gate, up, .. },
    ) = (map, activation)
    else {
        return false;
    };
    let half = |start| View {
        start,
        width: out.width / 2,
        ..*out
    };
    out.width % 2 == 0 && *gate == half(out.start) && *up == half(out.start + out.width / 2)
}

/// Whether what `view` holds at `at` is read by a later instruction, or is the result.
pub(crate) fn is_read_after(program: &Program, at: usize, view: View) -> bool {
    for instr in &program.instrs[at + 1..] {
        let (reads, writes) = views(instr);
        // A map that adds to its output reads it too.
        let adds_to = match instr {
            Instr::Linear {
                accumulate: true,
                out,
                ..
            } => Some(out),
            _ => None,
        };
        if reads.iter().chain(adds_to).any(|read| overlap(*read, view)) {
            return true;
        }
        if writes.iter().any(|write| covers(*write, view)) {
            return false;
        }
    }
    overlap(program.output, view)
}

pub(crate) fn overlap(a: View, b: View) -> bool {
    a.buffer == b.buffer && a.start < b.start + b.width && b.start < a.start + a.width
}

pub(crate) fn covers(a: View, b: View) -> bool {
    a.buffer == b.buffer && a.start <= b.start && a.start + a.width >= b.start + b.width
}
