//! Arithmetic on one row, f64. Knows neither graphs nor programs.

use galerne_core::graph::{Activation, RopePairing, RouterNormalisation};

/// `W x + b`; `weight` row-major, `x.len()` columns.
pub fn linear(x: &[f64], weight: &[f64], bias: Option<&[f64]>) -> Vec<f64> {
    let row = |(i, w): (usize, &[f64])| {
        w.iter().zip(x).map(|(w, x)| w * x).sum::<f64>() + bias.map_or(0.0, |b| b[i])
    };
    weight.chunks_exact(x.len()).enumerate().map(row).collect()
}

pub fn rms_norm(x: &[f64], weight: &[f64], eps: f64, offset: f64) -> Vec<f64> {
    let mean = x.iter().map(|x| x * x).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (mean + eps).sqrt();
    x.iter()
        .zip(weight)
        .map(|(x, w)| x * scale * (w + offset))
        .collect()
}

pub fn layer_norm(x: &[f64], weight: &[f64], bias: Option<&[f64]>, eps: f64) -> Vec<f64> {
    let mean = x.iter().sum::<f64>() / x.len() as f64;
    let variance = x.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / x.len() as f64;
    let scale = 1.0 / (variance + eps).sqrt();
    let one = |i: usize| (x[i] - mean) * scale * weight[i] + bias.map_or(0.0, |b| b[i]);
    (0..x.len()).map(one).collect()
}

pub fn rope(head: &mut [f64], position: usize, inv_freq: &[f32], pairing: RopePairing, factor: f32) {
    let half = inv_freq.len();
    for (i, freq) in inv_freq.iter().enumerate() {
        let (a, b) = match pairing {
            RopePairing::Half => (i, i + half),
            RopePairing::Interleaved => (2 * i, 2 * i + 1),
        };
        let (sin, cos) = (position as f64 * f64::from(*freq)).sin_cos();
        let (sin, cos) = (sin * f64::from(factor), cos * f64::from(factor));
        (head[a], head[b]) = (head[a] * cos - head[b] * sin, head[b] * cos + head[a] * sin);
    }
}

pub fn activate(x: f64, function: Activation) -> f64 {
    match function {
        Activation::Silu => x / (1.0 + (-x).exp()),
        // Abramowitz & Stegun 7.1.26 would do too, but both interpreters only need one function: by series.
        Activation::Gelu => x * 0.5 * (1.0 + erf(x / 2_f64.sqrt())),
        Activation::GeluTanh => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
        Activation::Tanh => x.tanh(),
        Activation::Sigmoid => 1.0 / (1.0 + (-x).exp()),
    }
}

/// Maclaurin series; for |x| beyond 5 the error function is 1 to f64 precision here.
fn erf(x: f64) -> f64 {
    if x.abs() > 5.0 {
        return x.signum();
    }
    let (mut term, mut sum) = (x, x);
    for n in 1..120 {
        term *= -x * x / f64::from(n);
        sum += term / f64::from(2 * n + 1);
    }
    sum * 2.0 / std::f64::consts::PI.sqrt()
}

pub fn soft_cap(x: f64, cap: f32) -> f64 {
    f64::from(cap) * (x / f64::from(cap)).tanh()
}

pub fn l2_normalise(x: &[f64]) -> Vec<f64> {
    let norm = x.iter().map(|x| x * x).sum::<f64>().sqrt().max(1e-12);
    x.iter().map(|x| x / norm).collect()
}

/// What attention needs to know of itself.
#[derive(Debug, Clone, Copy)]
pub struct Heads {
    pub heads: u32,
    pub kv_heads: u32,
    pub head_width: u32,
    pub scale: f32,
    pub causal: bool,
    pub window: Option<u32>,
    pub cap: Option<f32>,
}

/// One row of attention: `q` at `position` over all `keys` and `values`.
pub fn attend(q: &[f64], position: usize, keys: &[Vec<f64>], values: &[Vec<f64>], heads: Heads) -> Vec<f64> {
    let width = heads.head_width as usize;
    let mut out = Vec::new();
    for head in 0..heads.heads as usize {
        let kv = head / (heads.heads / heads.kv_heads) as usize * width;
        let q = &q[head * width..(head + 1) * width];
        let seen = |p: usize| {
            let near = heads.window.is_none_or(|w| p + w as usize > position);
            near && (!heads.causal || p <= position)
        };
        let score = |p: usize| {
            let dot: f64 = q.iter().zip(&keys[p][kv..kv + width]).map(|(q, k)| q * k).sum();
            let score = dot * f64::from(heads.scale);
            heads.cap.map_or(score, |cap| soft_cap(score, cap))
        };
        let scores: Vec<(usize, f64)> = (0..keys.len())
            .filter(|p| seen(*p))
            .map(|p| (p, score(p)))
            .collect();
        let max = scores.iter().map(|(_, s)| *s).fold(f64::MIN, f64::max);
        let total: f64 = scores.iter().map(|(_, s)| (s - max).exp()).sum();
        let part = |i: usize| {
            scores
                .iter()
                .map(|(p, s)| (s - max).exp() / total * values[*p][kv + i])
                .sum::<f64>()
        };
        out.extend((0..width).map(part));
    }
    out
}

/// Indices and weights of the chosen experts.
pub fn route(scores: &[f64], top_k: usize, normalisation: RouterNormalisation) -> Vec<(usize, f64)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let chosen = &order[..top_k];
    let total: f64 = scores.iter().map(|s| s.exp()).sum();
    let raw = |i: &usize| match normalisation {
        RouterNormalisation::SoftmaxAll | RouterNormalisation::SoftmaxChosen => scores[*i].exp() / total,
        RouterNormalisation::SigmoidChosen => activate(scores[*i], Activation::Sigmoid),
    };
    let sum: f64 = match normalisation {
        RouterNormalisation::SoftmaxAll => 1.0,
        _ => chosen.iter().map(raw).sum(),
    };
    chosen.iter().map(|i| (*i, raw(i) / sum)).collect()
}
