//! Activations in f64.

use galerne_core::graph::Activation;

/// All of them.
pub(crate) const ACTIVATIONS: [Activation; 6] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
    Activation::Sigmoid,
];

/// `function(x)`
pub(crate) fn activation(function: Activation, x: f64) -> f64 {
    match function {
        Activation::Silu => x / (1.0 + (-x).exp()),
        Activation::Gelu => x * normal_below(x),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
    }
}

/// How much of the normal distribution lies below `x`, by Simpson's rule; from -12 on there is nothing left in f32.
fn normal_below(x: f64) -> f64 {
    const STEPS: u32 = 4_000;
    let density = |t: f64| (-t * t / 2.0).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let h = (x + 12.0) / f64::from(STEPS);
    let inner: f64 = (1..STEPS)
        .map(|i| f64::from(2 + i % 2 * 2) * density(f64::from(i) * h - 12.0))
        .sum();
    h / 3.0 * (density(-12.0) + inner + density(x))
}
