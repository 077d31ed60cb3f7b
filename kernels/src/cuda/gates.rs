//! Which linear maps of a program end in the gated activation behind them. Knows no kernel.

use std::collections::BTreeSet;

use crate::dataflow::{covers, is_gate_of, is_read_after, overlap};
use crate::program::{Instr, Program, View};

/// The maps whose columns are the gate and the up of the activation that follows, and are read by nothing else: both may become one
/// launch that writes the activation's result alone.
pub(super) fn gates(program: &Program) -> BTreeSet<usize> {
    let pairs = program.instrs.windows(2).enumerate();
    let are_one = |at: usize, map: &Instr, activation: &Instr| {
        let (Instr::Linear { x, out: both, .. }, Instr::ActivateMul { gate, up, out, .. }) =
            (map, activation)
        else {
            return false;
        };
        let is_lost = |half: &View| !covers(*out, *half) && is_read_after(program, at + 1, *half);
        is_gate_of(map, activation)
            && !overlap(*x, *out)
            && !overlap(*x, *both)
            && !is_lost(gate)
            && !is_lost(up)
    };
    let pairs = pairs.filter(|(at, pair)| are_one(*at, &pair[0], &pair[1]));
    pairs.map(|(at, _)| at).collect()
}

#[cfg(test)]
mod tests {
    use galerne_core::graph::{Activation, Rows};

    use super::*;
    use crate::program::{BufferId, BufferSpec, WeightId};

    const NONE: [usize; 0] = [];

    fn view(buffer: u32, start: u32, width: u32) -> View {
        View {
            buffer: BufferId(buffer),
            start,
            width,
        }
    }

    fn linear(x: View, accumulate: bool, out: View) -> Instr {
        Instr::Linear {
            x,
            weight: WeightId(0),
            bias: None,
            accumulate,
            out,
        }
    }

    fn activate(out: View) -> Instr {
        Instr::ActivateMul {
            gate: view(1, 0, 32),
            up: view(1, 32, 32),
            function: Activation::Silu,
            out,
        }
    }

    fn found(instrs: Vec<Instr>, output: View) -> Vec<usize> {
        let spec = BufferSpec {
            rows: Rows::Tokens,
            width: 64,
        };
        gates(&Program {
            instrs,
            buffers: vec![spec; 4],
            weights: vec![],
            ropes: vec![],
            layers: vec![],
            output,
            context_tokens_max: 8,
        })
        .into_iter()
        .collect()
    }

    #[test]
    fn a_map_ends_in_the_activation_that_alone_reads_it() {
        let (x, both, end) = (view(0, 0, 64), view(1, 0, 64), view(3, 0, 32));
        let map = || linear(x, false, both);
        let down = |from| linear(from, false, end);
        // In a place of its own, and in the gate's.
        for made in [view(2, 0, 32), view(1, 0, 32)] {
            assert_eq!(found(vec![map(), activate(made), down(made)], end), [0]);
        }
    }

    #[test]
    fn what_somebody_else_reads_is_written() {
        let (x, both, made, end) = (view(0, 0, 64), view(1, 0, 64), view(2, 0, 32), view(3, 0, 32));
        let down = || linear(made, false, end);
        let map = || linear(x, false, both);
        // The gate and the up are read once more, or are the result.
        for half in [view(1, 0, 32), view(1, 32, 32)] {
            let again = linear(half, true, end);
            assert_eq!(found(vec![map(), activate(made), down(), again], end), NONE);
            assert_eq!(found(vec![map(), activate(made), down()], half), NONE);
        }
        // The up where the activation takes the gate's place.
        let again = linear(view(1, 32, 32), true, end);
        assert_eq!(found(vec![map(), activate(view(1, 0, 32)), again], end), NONE);
    }

    #[test]
    fn a_map_that_adds_or_is_read_from_where_the_result_goes_stays_apart() {
        let (x, both, made, end) = (view(0, 0, 64), view(1, 0, 64), view(2, 0, 32), view(3, 0, 32));
        let down = |from| linear(from, false, end);
        let added = linear(x, true, both);
        assert_eq!(found(vec![added, activate(made), down(made)], end), NONE);
        let into_x = view(0, 0, 32);
        assert_eq!(
            found(vec![linear(x, false, both), activate(into_x), down(into_x)], end),
            NONE
        );
    }
}
