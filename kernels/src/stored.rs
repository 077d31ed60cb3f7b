//! Weights as they are stored, and how a program uses them: what every device's loading begins with. Knows no layout of a
//! device.

use galerne_core::graph::Rows;
use galerne_core::weights::{WeightSource, WeightView};

use crate::device::DeviceError;
use crate::program::{Instr, MixtureSpec, NormKind, Program, WeightId, WeightSpec};
use crate::quant;

/// Finds a stored tensor and checks that its bytes, shape and dtype belong together. Returns rows and width.
pub(crate) fn fetch<'a>(
    source: &'a dyn WeightSource,
    name: &str,
    width: usize,
) -> Result<(WeightView<'a>, usize, usize), DeviceError> {
    let fail = |expected: String, got: String| {
        Err(DeviceError::Weight {
            name: name.to_owned(),
            expected,
            got,
        })
    };
    let expected = || format!("a tensor of inner width {width}");
    let view = match source.weight(name) {
        Ok(Some(view)) => view,
        Ok(None) => return fail(expected(), "no tensor of this name".into()),
        Err(error) => return fail(expected(), error.to_string()),
    };
    let (rows, inner) = match *view.shape {
        [inner] => (1, inner as usize),
        [rows, inner] => (rows as usize, inner as usize),
        _ => return fail("a vector or a matrix".into(), format!("shape {:?}", view.shape)),
    };
    if rows == 0 || inner == 0 {
        return fail("at least one element".into(), format!("shape {:?}", view.shape));
    }
    let needed = view
        .dtype
        .row_bytes(inner)
        .and_then(|bytes| bytes.checked_mul(rows));
    if needed != Some(view.bytes.len()) {
        let expected = needed.map_or_else(
            || format!("rows of whole {} blocks", view.dtype),
            |bytes| format!("{bytes} bytes"),
        );
        return fail(
            expected,
            format!("{} bytes, shape {:?}", view.bytes.len(), view.shape),
        );
    }
    Ok((view, rows, inner))
}

/// Loads a vector in f32: all parts of a spec joined.
pub(crate) fn load_vector(source: &dyn WeightSource, spec: &WeightSpec) -> Result<Vec<f32>, DeviceError> {
    let elements = spec.rows as usize * spec.width as usize;
    let mut joined = Vec::new();
    for name in &spec.parts {
        let (view, rows, inner) = fetch(source, name, elements)?;
        let start = joined.len();
        joined.resize(start + rows * inner, 0.0);
        quant::dequantize(view.dtype, &view.bytes, &mut joined[start..]);
    }
    if joined.len() != elements {
        return Err(DeviceError::Weight {
            name: spec.parts.join(" + "),
            expected: format!("{elements} elements"),
            got: format!("{} elements", joined.len()),
        });
    }
    Ok(joined)
}

#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct WeightUse {
    /// In a linear map, a table or a mixture.
    pub(crate) as_matrix: bool,
    /// In a norm or as a bias.
    pub(crate) as_vector: bool,
    /// In a linear map of tokens' rows, or an expert's.
    is_within: bool,
    /// In any other matrix: a table, a router, or a map of what comes out.
    is_without: bool,
}

impl WeightUse {
    /// Whether a [`Quantization`](crate::device::Quantization) is for it.
    pub(crate) const fn is_quantizable(self) -> bool {
        self.is_within && !self.is_without
    }
}

/// How weights are used, and the sizes of workspaces.
#[derive(Debug, Default)]
pub(crate) struct Uses {
    /// By weight.
    pub(crate) weights: Vec<WeightUse>,
    /// Widest input of a linear map.
    pub(crate) quant_width: usize,
    /// Widest input of an expert's linear maps.
    pub(crate) mixture_quant_width: usize,
    /// Most experts of a mixture.
    pub(crate) experts: usize,
    /// Widest gate and up of an expert.
    pub(crate) inner: usize,
    /// Widest input of a mixture.
    pub(crate) width: usize,
}

impl Uses {
    /// Of a program that has passed its gate.
    pub(crate) fn of(program: &Program) -> Self {
        let mut uses = Self {
            weights: vec![WeightUse::default(); program.weights.len()],
            ..Self::default()
        };
        for instr in &program.instrs {
            match instr {
                Instr::Embedding { table, .. } => uses.matrix(*table, false),
                Instr::Linear { x, weight, bias, .. } => {
                    uses.matrix(*weight, program.buffers[x.buffer.index()].rows == Rows::Tokens);
                    bias.iter().for_each(|bias| uses.vector(*bias));
                    uses.quant_width = uses.quant_width.max(x.width as usize);
                }
                Instr::Norm { norm, .. } | Instr::AddNorm { norm, .. } => {
                    uses.vector(norm.weight);
                    if let NormKind::Layer { bias: Some(bias) } = norm.kind {
                        uses.vector(bias);
                    }
                }
                Instr::Mixture { x, mixture, .. } => uses.mixture(program, x.width as usize, mixture),
                _ => {}
            }
        }
        uses
    }

    fn matrix(&mut self, id: WeightId, is_within: bool) {
        let used = &mut self.weights[id.index()];
        used.as_matrix = true;
        used.is_within |= is_within;
        used.is_without |= !is_within;
    }

    fn vector(&mut self, id: WeightId) {
        self.weights[id.index()].as_vector = true;
    }

    fn mixture(&mut self, program: &Program, width: usize, mixture: &MixtureSpec) {
        self.matrix(mixture.router, false);
        mixture
            .shared_gate
            .iter()
            .for_each(|gate| self.matrix(*gate, false));
        for expert in mixture.experts.iter().chain(&mixture.shared) {
            self.matrix(expert.gate_up, true);
            self.matrix(expert.down, true);
            let inner = program.weights[expert.gate_up.index()].rows as usize;
            self.inner = self.inner.max(inner);
            self.mixture_quant_width = self.mixture_quant_width.max(width).max(inner / 2);
        }
        self.experts = self.experts.max(mixture.experts.len());
        self.width = self.width.max(width);
    }
}
