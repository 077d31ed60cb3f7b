//! Launcher of `elementwise.cu`: functions of the elements of one or two matrices.

use bytemuck::{Pod, Zeroable};
use galerne_core::graph::Activation;

use super::{SPREAD_THREADS, spread};
use crate::cuda::driver::{DeviceView, Launch};

/// The parameter struct, `ElementwiseParams` in `elementwise.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct ElementwiseParams {
    a: DeviceView,
    b: DeviceView,
    out: DeviceView,
    rows: u32,
    is_vector: u32,
    constant: f32,
    reserved: u32,
}

/// What to compute.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Elementwise {
    /// `a + b`
    Add,
    /// `a * b`
    Mul,
    /// `a * factor`
    Scale(f32),
    /// `cap * tanh(a / cap)`
    SoftCap(f32),
    /// `function(a)`
    Activate(Activation),
    /// `function(a) * b`
    ActivateMul(Activation),
}

impl Elementwise {
    const fn kernel(self) -> &'static str {
        match self {
            Self::Add => "elementwise_add",
            Self::Mul => "elementwise_mul",
            Self::Scale(_) => "elementwise_scale",
            Self::SoftCap(_) => "elementwise_soft_cap",
            Self::Activate(function) | Self::ActivateMul(function) => match function {
                Activation::Silu => "elementwise_silu",
                Activation::Gelu => "elementwise_gelu",
                Activation::GeluTanh => "elementwise_gelu_tanh",
                Activation::Relu => "elementwise_relu",
                Activation::Tanh => "elementwise_tanh",
                Activation::Sigmoid => "elementwise_sigmoid",
            },
        }
    }
}

/// What kernels that end in an activation call it: `Activation` in `activations.cuh`.
pub(super) const fn activation_number(activation: Option<Activation>) -> u32 {
    match activation {
        None => 0,
        Some(Activation::Silu) => 1,
        Some(Activation::Gelu) => 2,
        Some(Activation::GeluTanh) => 3,
        Some(Activation::Relu) => 4,
        Some(Activation::Tanh) => 5,
        Some(Activation::Sigmoid) => 6,
    }
}

/// `out = op(a, b)`, all `[rows, width]`; `out` may be `a` or `b`. Ops of one operand ignore `b`.
#[must_use]
pub fn elementwise(op: Elementwise, a: DeviceView, b: DeviceView, out: DeviceView, rows: u32) -> Launch {
    let (b, constant) = match op {
        Elementwise::Add | Elementwise::Mul | Elementwise::ActivateMul(_) => (b, 0.0),
        Elementwise::Activate(_) => (DeviceView::NONE, 0.0),
        Elementwise::Scale(constant) | Elementwise::SoftCap(constant) => (DeviceView::NONE, constant),
    };
    let is_vector = [a, b, out].into_iter().all(DeviceView::is_vector_aligned);
    let params = ElementwiseParams {
        a,
        b,
        out,
        rows,
        is_vector: u32::from(is_vector),
        constant,
        reserved: 0,
    };
    let vectors = if is_vector { out.width / 4 } else { out.width } * rows;
    Launch::new(op.kernel(), [spread(vectors), 1, 1], SPREAD_THREADS, 0, &params)
}
