//! Walks the graph in order and writes instructions. Fuses where [`Selection`] allows it and the values' places
//! permit; otherwise one generic instruction per node.

use std::collections::HashMap;

use galerne_core::graph::{Activation, AttentionSpec, FeedForward, Op, ValueShape};
use galerne_core::ids::NodeId;
use galerne_core::validate::ValidGraph;
use galerne_kernels::program::{Instr, MixtureSpec, NormKind, NormSpec, Program, RopeId, View, WeightId};

use super::places::{Places, elementwise_safe, overlap};
use super::select::Selection;
use super::tables::Tables;
use super::{LowerError, empty_program, op};

/// The program so far.
pub(super) struct Emitter<'a> {
    graph: &'a ValidGraph,
    program: Program,
    places: Places,
    tables: Tables,
    deferred: Vec<bool>,
    groups: HashMap<NodeId, Vec<NodeId>>,
    norms: HashMap<NodeId, NodeId>,
}

impl<'a> Emitter<'a> {
    pub(super) fn new(graph: &'a ValidGraph, selection: Selection) -> Self {
        Self {
            graph,
            program: empty_program(graph),
            places: Places::new(selection.reads),
            tables: Tables::default(),
            deferred: selection.deferred,
            groups: selection.groups,
            norms: selection.norms,
        }
    }

    /// Emits every node the output depends on.
    pub(super) fn run(mut self) -> Result<Program, LowerError> {
        let graph = self.graph;
        for (index, op) in graph.graph().nodes.iter().enumerate() {
            let node = NodeId(u32::try_from(index).unwrap_or(u32::MAX));
            let dead = !self.places.is_read(node);
            if dead || self.deferred[index] || self.places.is_placed(node) {
                continue;
            }
            self.emit(node, op)?;
        }
        self.program.output = self.places.view(graph.graph().output);
        self.program.buffers = std::mem::take(&mut self.places.buffers);
        Ok(self.program)
    }

    fn emit(&mut self, node: NodeId, op: &Op) -> Result<(), LowerError> {
        match op {
            Op::Embedding { weight, index } => {
                let table = self.tables.known(&mut self.program, self.graph, weight)?;
                let index = *index;
                let out = self.fresh(node)?;
                self.push(node, out, Instr::Embedding { table, index, out });
                Ok(())
            }
            Op::Linear { .. } if self.groups.contains_key(&node) => self.linear_group(node),
            Op::Linear { x, weight, bias } => self.linear(node, *x, weight, bias.as_deref()),
            Op::Logits { x, weight } => self.linear(node, *x, weight, None),
            Op::Rope {
                x,
                inv_freq,
                pairing,
                attention_factor,
            } => {
                let rope = self
                    .tables
                    .rope(&mut self.program, inv_freq, *pairing, *attention_factor);
                let x = self.read_to_overwrite(*x);
                let head_width = self.graph.shape(node).width;
                self.push(node, x, Instr::Rope { x, rope, head_width });
                Ok(())
            }
            Op::Attention { q, k, v, spec } => self.attention(node, [*q, *k, *v], spec),
            Op::Add { a, b } => self.add(node, *a, *b),
            Op::Mul { a, b } => self.mul(node, *a, *b),
            Op::Slice { x, start, length } => self.slice(node, *x, *start, *length),
            Op::Concat { parts } => self.concat(node, parts),
            Op::ReshapeHeads { x, .. } => {
                // `[h, w]` lies in memory like `[1, h * w]`.
                let view = self.places.read(*x);
                self.places.place(node, view);
                Ok(())
            }
            Op::MixtureOfExperts { x, .. } => {
                let mixture = Box::new(self.mixture(op)?);
                self.elsewhere(node, *x, |x, out| Instr::Mixture { x, mixture, out })
            }
            Op::MeanPool { x } => self.elsewhere(node, *x, |x, out| Instr::MeanPool { x, out }),
            Op::ClsPool { x } => self.elsewhere(node, *x, |x, out| Instr::ClsPool { x, out }),
            Op::OutputRows { x } => self.elsewhere(node, *x, |x, out| Instr::OutputRows { x, out }),
            Op::RmsNorm { .. }
            | Op::LayerNorm { .. }
            | Op::Scale { .. }
            | Op::Activate { .. }
            | Op::SoftCap { .. }
            | Op::L2Normalise { .. } => self.unary(node, op),
        }
    }

    /// An elementwise or group-wise op: over its input if nobody needs that any more.
    fn unary(&mut self, node: NodeId, op: &Op) -> Result<(), LowerError> {
        let width = self.graph.shape(node).width;
        let norm = matches!(op, Op::RmsNorm { .. } | Op::LayerNorm { .. }).then(|| self.norm_spec(node));
        let x = self.places.read(op.inputs()[0]);
        let out = if self.places.is_dead(x) {
            x
        } else {
            self.fresh(node)?
        };
        let instr = match (op, norm) {
            (_, Some(norm)) => Instr::Norm { x, norm, out },
            (Op::Scale { factor, .. }, _) => Instr::Scale {
                x,
                factor: *factor,
                out,
            },
            (Op::Activate { function, .. }, _) => Instr::Activate {
                x,
                function: *function,
                out,
            },
            (Op::SoftCap { cap, .. }, _) => Instr::SoftCap { x, cap: *cap, out },
            (Op::L2Normalise { .. }, _) => Instr::L2Normalise { x, width, out },
            (other, _) => unreachable!(
                "{} is not elementwise: the caller matches on the op first",
                other.name()
            ),
        };
        self.push(node, out, instr);
        Ok(())
    }

    /// An op that may not write over its input.
    fn elsewhere(
        &mut self,
        node: NodeId,
        x: NodeId,
        instr: impl FnOnce(View, View) -> Instr,
    ) -> Result<(), LowerError> {
        let (x, out) = (self.places.read(x), self.fresh(node)?);
        self.push(node, out, instr(x, out));
        Ok(())
    }

    fn linear(
        &mut self,
        node: NodeId,
        x: NodeId,
        weight: &str,
        bias: Option<&str>,
    ) -> Result<(), LowerError> {
        let (weight, bias) = self.linear_weights(x, node, weight, bias);
        self.elsewhere(node, x, |x, out| Instr::Linear {
            x,
            weight,
            bias,
            accumulate: false,
            out,
        })
    }

    /// Appends an instruction whose result is the value of `node`.
    fn push(&mut self, node: NodeId, out: View, instr: Instr) {
        self.program.instrs.push(instr);
        self.places.place(node, out);
    }

    /// A buffer for the value of `node`.
    fn fresh(&mut self, node: NodeId) -> Result<View, LowerError> {
        let shape = self.graph.shape(node);
        let width = self.narrow(node, shape.row_elements())?;
        Ok(self.places.fresh(shape.rows, width))
    }

    fn narrow(&self, node: NodeId, got: u64) -> Result<u32, LowerError> {
        let op = op(self.graph, node).name();
        u32::try_from(got).map_err(|_| LowerError::TooWide { op, node, got })
    }

    /// Counts a read of `x`; a view of its value that may be overwritten: its own, or a copy.
    fn read_to_overwrite(&mut self, x: NodeId) -> View {
        let view = self.places.read(x);
        if self.places.is_dead(view) {
            return view;
        }
        let out = self.places.fresh(self.graph.shape(x).rows, view.width);
        let (group, groups) = (view.width, 1);
        let copy = Instr::Copy {
            x: view,
            out,
            group,
            x_stride: group,
            out_stride: group,
            groups,
        };
        self.program.instrs.push(copy);
        out
    }

    fn linear_weights(
        &mut self,
        x: NodeId,
        node: NodeId,
        weight: &str,
        bias: Option<&str>,
    ) -> (WeightId, Option<WeightId>) {
        let (rows, width) = (self.graph.shape(node).width, self.graph.shape(x).width);
        let matrix = self
            .tables
            .matrix(&mut self.program, vec![weight.to_owned()], rows, width);
        let bias = bias.map(|name| self.tables.vector(&mut self.program, name, rows));
        (matrix, bias)
    }

    /// All linears of the group in one, where the first of them stands; each value is a view of the result.
    fn linear_group(&mut self, node: NodeId) -> Result<(), LowerError> {
        let members = self.groups[&node].clone();
        let (mut weights, mut biases, mut input, mut rows) = (Vec::new(), Vec::new(), None, 0_u64);
        for member in &members {
            if let Op::Linear { x, weight, bias } = op(self.graph, *member) {
                weights.push(weight.clone());
                biases.extend(bias.clone());
                input = Some((*x, self.places.read(*x)));
                rows += u64::from(self.graph.shape(*member).width);
            }
        }
        let Some((x_node, x)) = input else { return Ok(()) };
        let rows = self.narrow(node, rows)?;
        let out = self.places.fresh(self.graph.shape(node).rows, rows);
        let width = self.graph.shape(x_node).width;
        let weight = self.tables.matrix(&mut self.program, weights, rows, width);
        let bias = (!biases.is_empty()).then(|| self.tables.matrix(&mut self.program, biases, 1, rows));
        self.program.instrs.push(Instr::Linear {
            x,
            weight,
            bias,
            accumulate: false,
            out,
        });
        let mut start = 0;
        for member in members {
            let width = self.graph.shape(member).width;
            self.places.place(member, View { start, width, ..out });
            start += width;
        }
        Ok(())
    }

    fn norm_spec(&mut self, node: NodeId) -> NormSpec {
        let width = self.graph.shape(node).width;
        let (program, tables) = (&mut self.program, &mut self.tables);
        match op(self.graph, node) {
            Op::LayerNorm {
                weight, bias, eps, ..
            } => {
                let weight = tables.vector(program, weight, width);
                let bias = bias.as_deref().map(|name| tables.vector(program, name, width));
                NormSpec {
                    kind: NormKind::Layer { bias },
                    weight,
                    width,
                    eps: *eps,
                }
            }
            Op::RmsNorm {
                weight,
                eps,
                weight_offset,
                ..
            } => {
                let weight = tables.vector(program, weight, width);
                let kind = NormKind::Rms {
                    weight_offset: *weight_offset,
                };
                NormSpec {
                    kind,
                    weight,
                    width,
                    eps: *eps,
                }
            }
            other => unreachable!("{} is not a norm: callers match on the op first", other.name()),
        }
    }

    /// A residual add: taken in by the linear before it or the norm after it, if the residual is dead.
    fn add(&mut self, node: NodeId, a: NodeId, b: NodeId) -> Result<(), LowerError> {
        for (linear, residual) in [(b, a), (a, b)] {
            if self.deferred[linear.index()] {
                return self.add_linear(node, linear, residual);
            }
        }
        let (a, b) = (self.places.read(a), self.places.read(b));
        if let Some(norm) = self.norms.get(&node).copied()
            && !overlap(a, b)
        {
            for (residual, delta) in [(a, b), (b, a)] {
                if self.places.is_dead(residual) {
                    self.places.place(node, residual);
                    self.places.forget_read(node);
                    let spec = self.norm_spec(norm);
                    let out = self.fresh(norm)?;
                    self.push(
                        norm,
                        out,
                        Instr::AddNorm {
                            residual,
                            delta,
                            norm: spec,
                            out,
                        },
                    );
                    return Ok(());
                }
            }
        }
        let out = self.binary_out(node, a, b)?;
        self.push(node, out, Instr::Add { a, b, out });
        Ok(())
    }

    fn add_linear(&mut self, node: NodeId, linear: NodeId, residual: NodeId) -> Result<(), LowerError> {
        let Op::Linear { x, weight, bias } = op(self.graph, linear) else {
            unreachable!("only linears are deferred to an add")
        };
        let (weight, bias) = self.linear_weights(*x, linear, weight, bias.as_deref());
        self.places.forget_read(linear);
        let (x, residual) = (self.places.read(*x), self.places.read(residual));
        if self.places.is_dead(residual) && !overlap(x, residual) {
            let out = residual;
            self.push(
                node,
                out,
                Instr::Linear {
                    x,
                    weight,
                    bias,
                    accumulate: true,
                    out,
                },
            );
            return Ok(());
        }
        let out = self.fresh(node)?;
        self.program.instrs.push(Instr::Linear {
            x,
            weight,
            bias,
            accumulate: false,
            out,
        });
        self.push(
            node,
            out,
            Instr::Add {
                a: residual,
                b: out,
                out,
            },
        );
        Ok(())
    }

    fn mul(&mut self, node: NodeId, a: NodeId, b: NodeId) -> Result<(), LowerError> {
        for (gate, up) in [(a, b), (b, a)] {
            if self.deferred[gate.index()]
                && let Op::Activate { x, function } = op(self.graph, gate)
            {
                return self.activate_mul(node, gate, *x, up, *function);
            }
        }
        let (a, b) = (self.places.read(a), self.places.read(b));
        let out = self.binary_out(node, a, b)?;
        self.push(node, out, Instr::Mul { a, b, out });
        Ok(())
    }

    fn activate_mul(
        &mut self,
        node: NodeId,
        activation: NodeId,
        gate: NodeId,
        up: NodeId,
        function: Activation,
    ) -> Result<(), LowerError> {
        self.places.forget_read(activation);
        let (gate, up) = (self.places.read(gate), self.places.read(up));
        let in_place = !overlap(gate, up) && self.places.is_dead(gate);
        let out = if in_place { gate } else { self.fresh(node)? };
        self.push(
            node,
            out,
            Instr::ActivateMul {
                gate,
                up,
                function,
                out,
            },
        );
        Ok(())
    }

    /// Over an input nobody needs any more, else a new buffer.
    fn binary_out(&mut self, node: NodeId, a: View, b: View) -> Result<View, LowerError> {
        for (out, other) in [(a, b), (b, a)] {
            if elementwise_safe(out, other) && self.places.is_dead(out) {
                return Ok(out);
            }
        }
        self.fresh(node)
    }

    /// KV append and attention, ropes taken in.
    fn attention(
        &mut self,
        node: NodeId,
        [q, k, v]: [NodeId; 3],
        spec: &AttentionSpec,
    ) -> Result<(), LowerError> {
        // Ropes first, while the reads of values that are not rotated still count: none of them may be overwritten.
        let rotated_q = self.deferred_rope(q);
        let rotated_k = self.deferred_rope(k);
        let (q, q_rope) = match rotated_q {
            Some((view, rope)) => (view, Some(rope)),
            None => (self.places.read(q), None),
        };
        let (k, k_rope) = match rotated_k {
            Some((view, rope)) => (view, Some(rope)),
            None => (self.places.read(k), None),
        };
        let v = self.places.read(v);
        let layer = spec.layer;
        self.program.instrs.push(Instr::RopeAppend {
            layer,
            q,
            k,
            v,
            q_rope,
            k_rope,
        });
        let out = self.fresh(node)?;
        self.push(node, out, Instr::Attention { layer, q, out });
        Ok(())
    }

    /// If `node` is a rope left to its attention: its input, free to be overwritten, and its table.
    fn deferred_rope(&mut self, node: NodeId) -> Option<(View, RopeId)> {
        let Op::Rope {
            x,
            inv_freq,
            pairing,
            attention_factor,
        } = op(self.graph, node)
        else {
            return None;
        };
        if !self.deferred[node.index()] {
            return None;
        }
        self.places.forget_read(node);
        let rope = self
            .tables
            .rope(&mut self.program, inv_freq, *pairing, *attention_factor);
        Some((self.read_to_overwrite(*x), rope))
    }

    fn slice(&mut self, node: NodeId, x: NodeId, start: u32, length: u32) -> Result<(), LowerError> {
        let ValueShape { heads, width, .. } = self.graph.shape(x);
        let view = self.places.read(x);
        if heads == 1 || length == width {
            let place = View {
                start: view.start + start,
                width: heads * length,
                ..view
            };
            self.places.place(node, place);
            return Ok(());
        }
        let out = self.fresh(node)?;
        let x = View {
            start: view.start + start,
            width: (heads - 1) * width + length,
            ..view
        };
        let copy = Instr::Copy {
            x,
            out,
            group: length,
            x_stride: width,
            out_stride: length,
            groups: heads,
        };
        self.push(node, out, copy);
        Ok(())
    }

    fn concat(&mut self, node: NodeId, parts: &[NodeId]) -> Result<(), LowerError> {
        let out = self.fresh(node)?;
        let ValueShape {
            heads,
            width: out_stride,
            ..
        } = self.graph.shape(node);
        let mut offset = 0;
        for part in parts {
            let group = self.graph.shape(*part).width;
            let x = self.places.read(*part);
            let place = View {
                start: offset,
                width: (heads - 1) * out_stride + group,
                ..out
            };
            let copy = Instr::Copy {
                x,
                out: place,
                group,
                x_stride: group,
                out_stride,
                groups: heads,
            };
            self.program.instrs.push(copy);
            offset += group;
        }
        self.places.place(node, out);
        Ok(())
    }

    fn mixture(&mut self, op: &Op) -> Result<MixtureSpec, LowerError> {
        let Op::MixtureOfExperts {
            router,
            experts,
            top_k,
            normalisation,
            function,
            shared,
            shared_gate,
            ..
        } = op
        else {
            unreachable!(
                "{} is not a mixture: the caller matches on the op first",
                op.name()
            )
        };
        let (graph, program, tables) = (self.graph, &mut self.program, &mut self.tables);
        let mut expert = |expert: &FeedForward| tables.expert(program, graph, expert);
        let experts = experts.iter().map(&mut expert).collect::<Result<_, _>>()?;
        let shared = shared.as_ref().map(&mut expert).transpose()?;
        let shared_gate = match shared_gate {
            Some(name) => Some(tables.known(program, graph, name)?),
            None => None,
        };

        Ok(MixtureSpec {
            router: tables.known(program, graph, router)?,
            experts,
            top_k: *top_k,
            normalisation: *normalisation,
            function: *function,
            shared,
            shared_gate,
        })
    }
}
