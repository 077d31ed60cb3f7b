//! Which buffers of a program share memory: two whose lives do not overlap lie in the same place, so that a
//! step's working set stays in cache however many values the model has.

use galerne_core::graph::Rows;

use crate::program::{BufferId, Instr, Program, View};

/// Where buffers lie.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Layout {
    /// First element of each buffer.
    pub(crate) starts: Vec<usize>,
    /// Elements of all together.
    pub(crate) elements: usize,
}

/// Elements from one row of a buffer to the next, of the elements in a row.
pub(crate) type Stride = fn(usize) -> usize;

/// Most rows a buffer can have.
#[derive(Debug, Clone, Copy)]
pub(crate) struct RowsMax {
    pub(crate) tokens: usize,
    pub(crate) sequences: usize,
}

impl RowsMax {
    pub(crate) fn of(self, rows: Rows) -> usize {
        match rows {
            Rows::Tokens | Rows::Outputs => self.tokens,
            Rows::Sequences => self.sequences,
        }
    }
}

/// Places buffers: each takes the best-fitting place whose last user is done, or a new one. `later` are pairs of an instruction
/// and a later one with which it runs: what the first reads lives until the second is done.
pub(crate) fn place(program: &Program, later: &[(usize, usize)], rows: RowsMax, stride: Stride) -> Layout {
    let lives = lives(program, later);
    let sizes: Vec<usize> = program
        .buffers
        .iter()
        .map(|b| (rows.of(b.rows) * stride(b.width as usize)).next_multiple_of(LINE_ELEMENTS))
        .collect();
    let mut order: Vec<usize> = (0..sizes.len()).filter(|&b| lives[b].is_some()).collect();
    order.sort_by_key(|&b| lives[b].map(|(first, _)| first));
    // (elements, last instruction that uses it)
    let mut places: Vec<(usize, usize)> = Vec::new();
    let mut placed: Vec<Option<usize>> = vec![None; sizes.len()];
    for b in order {
        let Some((first, last)) = lives[b] else { continue };
        let fits = |&(_, &(size, until)): &(usize, &(usize, usize))| until < first && size >= sizes[b];
        let best = places
            .iter()
            .enumerate()
            .filter(fits)
            .min_by_key(|(_, (size, _))| *size);
        let place = if let Some((place, _)) = best {
            places[place].1 = last;
            place
        } else {
            places.push((sizes[b], last));
            places.len() - 1
        };
        placed[b] = Some(place);
    }
    let mut elements = 0;
    let starts: Vec<usize> = places
        .iter()
        .map(|(size, _)| {
            elements += size;
            elements - size
        })
        .collect();
    let starts = placed
        .iter()
        .map(|place| place.map_or(0, |place| starts[place]))
        .collect();
    Layout { starts, elements }
}

const LINE_ELEMENTS: usize = 16;

/// First and last instruction that names each buffer; the output lives to the end.
fn lives(program: &Program, later: &[(usize, usize)]) -> Vec<Option<(usize, usize)>> {
    let mut lives = vec![None; program.buffers.len()];
    let mut touch = |buffer: BufferId, at: usize| {
        let life = lives[buffer.index()].get_or_insert((at, at));
        life.1 = at;
    };
    for (at, instr) in program.instrs.iter().enumerate() {
        let (reads, writes) = views(instr);
        for view in reads.into_iter().chain(writes) {
            touch(view.buffer, at);
        }
    }
    touch(program.output.buffer, program.instrs.len());
    for &(early, late) in later {
        for read in views(&program.instrs[early]).0 {
            let life = lives[read.buffer.index()].get_or_insert((early, late));
            life.1 = life.1.max(late);
        }
    }
    lives
}

/// The views an instruction reads, and those it writes (in place ones are in both).
pub(crate) fn views(instr: &Instr) -> (Vec<View>, Vec<View>) {
    match *instr {
        Instr::Embedding { out, .. } => (vec![], vec![out]),
        Instr::AddNorm {
            residual, delta, out, ..
        } => (vec![residual, delta], vec![residual, out]),
        Instr::Rope { x, .. } => (vec![x], vec![x]),
        Instr::RopeAppend { q, k, v, .. } => (vec![q, k, v], vec![q]),
        Instr::Attention { q, out, .. } => (vec![q], vec![out]),
        Instr::ActivateMul { gate, up, out, .. } => (vec![gate, up], vec![out]),
        Instr::Add { a, b, out } | Instr::Mul { a, b, out } => (vec![a, b], vec![out]),
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
        | Instr::OutputRows { x, out } => (vec![x], vec![out]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::BufferSpec;

    #[test]
    fn buffers_share_memory_only_when_their_lives_do_not_meet() {
        let view = |b| View {
            buffer: BufferId(b),
            start: 0,
            width: 32,
        };
        let scale = |x, out| Instr::Scale {
            x: view(x),
            factor: 1.0,
            out: view(out),
        };
        let program = Program {
            instrs: vec![scale(0, 1), scale(1, 2), scale(2, 3)],
            buffers: vec![
                BufferSpec {
                    rows: Rows::Tokens,
                    width: 32
                };
                4
            ],
            weights: vec![],
            ropes: vec![],
            layers: vec![],
            output: view(3),
            context_tokens_max: 8,
        };
        let layout = place(
            &program,
            &[],
            RowsMax {
                tokens: 4,
                sequences: 1,
            },
            |width| width + 16,
        );
        assert_eq!(layout.elements, 2 * 4 * 48);
        for pair in layout.starts.windows(2) {
            assert_ne!(pair[0], pair[1], "input and output of one instruction");
        }
        assert_eq!(layout.starts[0], layout.starts[2]);
    }
}
