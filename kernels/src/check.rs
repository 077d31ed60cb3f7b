//! The gate every program passes before it is loaded: ids, views, widths and rows are consistent, so that no
//! kernel can leave its buffers. Knows nothing of weights' bytes.

use galerne_core::graph::{EmbeddingIndex, Rows};

use crate::device::DeviceError;
use crate::layout::views;
use crate::program::{
    AttentionLayer, Instr, MixtureSpec, NormKind, NormSpec, Program, RopeId, View, WeightId,
};

/// Checks a whole program.
pub(crate) fn check(program: &Program) -> Result<(), DeviceError> {
    for (instr, layer) in program.layers.iter().enumerate() {
        let at = At { program, instr };
        at.at_least_one("kv heads", layer.kv_heads)?;
        at.at_least_one("head width", layer.head_width)?;
        at.at_least_one("heads", layer.heads)?;
        at.need(
            "heads",
            layer.heads.is_multiple_of(layer.kv_heads),
            "a multiple of kv heads",
            layer.heads,
        )?;
        if let Some(window) = layer.sliding_window {
            at.at_least_one("sliding window", window)?;
        }
    }
    for (instr, op) in program.instrs.iter().enumerate() {
        let at = At { program, instr };
        at.views(op)?;
        at.op(op)?;
    }
    At {
        program,
        instr: program.instrs.len(),
    }
    .view("output", program.output)
}

struct At<'a> {
    program: &'a Program,
    instr: usize,
}

type Checked = Result<(), DeviceError>;

impl At<'_> {
    fn need(
        &self,
        what: &'static str,
        holds: bool,
        expected: impl std::fmt::Display,
        got: impl std::fmt::Display,
    ) -> Checked {
        if holds {
            return Ok(());
        }
        let (expected, got) = (expected.to_string(), got.to_string());
        Err(DeviceError::Program {
            instr: self.instr,
            what,
            expected,
            got,
        })
    }

    #[expect(clippy::needless_pass_by_value, reason = "only numbers")]
    fn equal<T: PartialEq + std::fmt::Display>(&self, what: &'static str, expected: T, got: T) -> Checked {
        self.need(what, expected == got, &expected, &got)
    }

    fn at_least_one(&self, what: &'static str, got: u32) -> Checked {
        self.need(what, got > 0, "at least 1", got)
    }

    fn view(&self, what: &'static str, view: View) -> Checked {
        let buffers = self.program.buffers.len();
        self.need(
            what,
            view.buffer.index() < buffers,
            format!("one of {buffers} buffers"),
            view.buffer.0,
        )?;
        let width = self.program.buffers[view.buffer.index()].width;
        let end = u64::from(view.start) + u64::from(view.width);
        self.need(
            what,
            end <= u64::from(width),
            format!("columns up to {width}"),
            end,
        )?;
        self.at_least_one(what, view.width)
    }

    /// Every view lies in its buffer, and outputs overlap inputs only where they are the same.
    fn views(&self, op: &Instr) -> Checked {
        let (reads, writes) = views(op);
        for view in reads.iter().chain(&writes) {
            self.view("view", *view)?;
        }
        let in_place = matches!(
            op,
            Instr::Norm { .. }
                | Instr::AddNorm { .. }
                | Instr::Rope { .. }
                | Instr::RopeAppend { .. }
                | Instr::ActivateMul { .. }
                | Instr::Add { .. }
                | Instr::Mul { .. }
                | Instr::Scale { .. }
                | Instr::Activate { .. }
                | Instr::SoftCap { .. }
                | Instr::L2Normalise { .. }
        );
        for write in &writes {
            for read in &reads {
                let apart = write.buffer != read.buffer
                    || write.start + write.width <= read.start
                    || read.start + read.width <= write.start;
                let same = in_place && write == read;
                self.need(
                    "output",
                    apart || same,
                    "no overlap with an input",
                    format!("{write:?}"),
                )?;
            }
        }
        if let [a, b] = writes[..] {
            self.need(
                "outputs",
                a.buffer != b.buffer || a == b || disjoint(a, b),
                "no overlap",
                "overlap",
            )?;
        }
        Ok(())
    }

    fn rows(&self, view: View) -> Rows {
        self.program.buffers[view.buffer.index()].rows
    }

    fn need_rows(&self, view: View, rows: Rows) -> Checked {
        let got = self.rows(view);
        self.need("rows", got == rows, format!("{rows:?}"), format!("{got:?}"))
    }

    fn same_shape(&self, a: View, b: View) -> Checked {
        self.equal("width", a.width, b.width)?;
        self.need_rows(b, self.rows(a))
    }

    /// Elements of a weight used as a vector.
    fn vector(&self, id: WeightId, elements: u32) -> Checked {
        self.matrix(id, None, None)?;
        let spec = &self.program.weights[id.index()];
        let got = u64::from(spec.rows) * u64::from(spec.width);
        self.equal("vector elements", u64::from(elements), got)
    }

    fn matrix(&self, id: WeightId, rows: Option<u32>, width: Option<u32>) -> Checked {
        let weights = self.program.weights.len();
        self.need(
            "weight",
            id.index() < weights,
            format!("one of {weights} weights"),
            id.0,
        )?;
        let spec = &self.program.weights[id.index()];
        self.equal("weight rows", rows.unwrap_or(spec.rows), spec.rows)?;
        self.equal("weight width", width.unwrap_or(spec.width), spec.width)?;
        self.need("weight", spec.rows > 0 && spec.width > 0, "elements", "none")
    }

    fn norm(&self, x: View, norm: &NormSpec, out: View) -> Checked {
        self.same_shape(x, out)?;
        self.at_least_one("norm width", norm.width)?;
        self.need(
            "norm width",
            x.width.is_multiple_of(norm.width),
            "a divisor of the width",
            norm.width,
        )?;
        self.vector(norm.weight, norm.width)?;
        match norm.kind {
            NormKind::Layer { bias: Some(bias) } => self.vector(bias, norm.width),
            NormKind::Layer { bias: None } | NormKind::Rms { .. } => Ok(()),
        }
    }

    fn rope(&self, x: View, rope: RopeId, head_width: u32) -> Checked {
        let ropes = self.program.ropes.len();
        self.need(
            "rope",
            rope.index() < ropes,
            format!("one of {ropes} tables"),
            rope.0,
        )?;
        let rotated = 2 * self.program.ropes[rope.index()].inv_freq.len() as u64;
        self.at_least_one("head width", head_width)?;
        let got = u64::from(head_width);
        self.need(
            "head width",
            got >= rotated,
            format!("at least {rotated}"),
            head_width,
        )?;
        self.need(
            "head width",
            x.width.is_multiple_of(head_width),
            "a divisor of the width",
            head_width,
        )?;
        self.need_rows(x, Rows::Tokens)
    }

    fn layer(&self, layer: usize) -> Result<&AttentionLayer, DeviceError> {
        let layers = self.program.layers.len();
        self.need("layer", layer < layers, format!("one of {layers} layers"), layer)?;
        Ok(&self.program.layers[layer])
    }

    fn mixture(&self, x: View, mixture: &MixtureSpec, out: View) -> Checked {
        self.same_shape(x, out)?;
        let experts = mixture.experts.len() as u32;
        let chosen = mixture.top_k;
        self.need(
            "top_k",
            (1..=experts).contains(&chosen),
            format!("1 to {experts}"),
            chosen,
        )?;
        self.matrix(mixture.router, Some(experts), Some(x.width))?;
        for expert in mixture.experts.iter().chain(&mixture.shared) {
            self.matrix(expert.gate_up, None, Some(x.width))?;
            let both = self.program.weights[expert.gate_up.index()].rows;
            self.need(
                "gate and up",
                both.is_multiple_of(2),
                "an even number of rows",
                both,
            )?;
            self.matrix(expert.down, Some(x.width), Some(both / 2))?;
        }
        mixture
            .shared_gate
            .map_or(Ok(()), |gate| self.matrix(gate, Some(1), Some(x.width)))
    }

    fn copy(&self, x: View, out: View, group: u32, strides: [u32; 2], groups: u32) -> Checked {
        self.need_rows(out, self.rows(x))?;
        for (view, stride) in [(x, strides[0]), (out, strides[1])] {
            let last = u64::from(groups.saturating_sub(1)) * u64::from(stride) + u64::from(group);
            self.need(
                "copied columns",
                last <= u64::from(view.width),
                format!("up to {}", view.width),
                last,
            )?;
        }
        Ok(())
    }

    fn op(&self, op: &Instr) -> Checked {
        match op {
            Instr::Embedding { table, index, out } => {
                self.need_rows(*out, Rows::Tokens)?;
                self.matrix(*table, None, Some(out.width))?;
                let entries = self.program.weights[table.index()].rows;
                match *index {
                    EmbeddingIndex::Constant(row) => {
                        self.need("row", row < entries, format!("below {entries}"), row)
                    }
                    EmbeddingIndex::Tokens | EmbeddingIndex::Positions(_) => Ok(()),
                }
            }
            Instr::Linear {
                x, weight, bias, out, ..
            } => {
                self.need_rows(*out, self.rows(*x))?;
                self.matrix(*weight, Some(out.width), Some(x.width))?;
                bias.map_or(Ok(()), |bias| self.vector(bias, out.width))
            }
            Instr::Norm { x, norm, out } => self.norm(*x, norm, *out),
            Instr::AddNorm {
                residual,
                delta,
                norm,
                out,
            } => {
                self.same_shape(*residual, *delta)?;
                self.norm(*residual, norm, *out)
            }
            Instr::Rope { x, rope, head_width } => self.rope(*x, *rope, *head_width),
            Instr::RopeAppend {
                layer,
                q,
                k,
                v,
                q_rope,
                k_rope,
            } => {
                let layer = *self.layer(layer.index())?;
                self.equal("q width", layer.heads * layer.head_width, q.width)?;
                for (view, rope) in [(*k, k_rope), (*v, &None), (*q, q_rope)] {
                    self.need_rows(view, Rows::Tokens)?;
                    rope.map_or(Ok(()), |rope| self.rope(view, rope, layer.head_width))?;
                }
                self.equal("k width", layer.kv_heads * layer.head_width, k.width)?;
                self.equal("v width", layer.kv_heads * layer.head_width, v.width)
            }
            Instr::Attention { layer, q, out } => {
                let layer = *self.layer(layer.index())?;
                self.need_rows(*q, Rows::Tokens)?;
                self.equal("q width", layer.heads * layer.head_width, q.width)?;
                self.same_shape(*q, *out)
            }
            Instr::ActivateMul {
                gate: a, up: b, out, ..
            }
            | Instr::Add { a, b, out }
            | Instr::Mul { a, b, out } => {
                self.same_shape(*a, *b)?;
                self.same_shape(*a, *out)
            }
            Instr::Scale { x, out, .. } | Instr::Activate { x, out, .. } | Instr::SoftCap { x, out, .. } => {
                self.same_shape(*x, *out)
            }
            Instr::Copy {
                x,
                out,
                group,
                x_stride,
                out_stride,
                groups,
            } => self.copy(*x, *out, *group, [*x_stride, *out_stride], *groups),
            Instr::Mixture { x, mixture, out } => self.mixture(*x, mixture, *out),
            Instr::MeanPool { x, out } | Instr::ClsPool { x, out } => {
                self.need_rows(*x, Rows::Tokens)?;
                self.need_rows(*out, Rows::Sequences)?;
                self.equal("width", x.width, out.width)
            }
            Instr::L2Normalise { x, width, out } => {
                self.same_shape(*x, *out)?;
                self.at_least_one("width", *width)?;
                self.need(
                    "width",
                    x.width.is_multiple_of(*width),
                    "a divisor of the width",
                    *width,
                )
            }
            Instr::OutputRows { x, out } => {
                self.need_rows(*x, Rows::Tokens)?;
                self.need_rows(*out, Rows::Outputs)?;
                self.equal("width", x.width, out.width)
            }
        }
    }
}

fn disjoint(a: View, b: View) -> bool {
    a.start + a.width <= b.start || b.start + b.width <= a.start
}
