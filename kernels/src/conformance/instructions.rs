//! One case per instruction that is neither a linear map nor attention.

use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, RopePairing, RouterNormalisation, Rows};

use super::{BLOCK_TOKENS, Bench, Build, Case, ConformanceError, batch};
use crate::program::{ExpertSpec, Instr, MixtureSpec, NormKind, NormSpec, View};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "add, mul, scale, soft-cap",
        run: arithmetic,
    },
    Case {
        name: "activations",
        run: activations,
    },
    Case {
        name: "norms",
        run: norms,
    },
    Case {
        name: "add and norm",
        run: add_norm,
    },
    Case {
        name: "rope",
        run: rope,
    },
    Case {
        name: "copy",
        run: copy,
    },
    Case {
        name: "pooling and l2-normalise",
        run: pooling,
    },
    Case {
        name: "output rows",
        run: output_rows,
    },
    Case {
        name: "mixture of experts",
        run: mixtures,
    },
];

const TOLERANCE: (f64, f64) = (2e-6, 2e-6);
const WIDTHS: [u32; 4] = [1, 15, 16, 83];
const FUNCTIONS: [Activation; 6] = [
    Activation::Silu,
    Activation::Gelu,
    Activation::GeluTanh,
    Activation::Relu,
    Activation::Tanh,
    Activation::Sigmoid,
];

fn check(bench: &Bench<'_>, what: &str, mut b: Build, out: View) -> Result<(), ConformanceError> {
    b.program.output = out;
    let steps = [
        batch(&[(0, 1)], BLOCK_TOKENS, 1),
        batch(&[(4, 3), (0, 9), (30, 1)], BLOCK_TOKENS, 2),
    ];
    bench.compare(what, &b, &steps, TOLERANCE, BLOCK_TOKENS)
}

fn arithmetic(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    type Op = fn(View, View, View) -> Instr;
    let ops: [(&str, Op); 4] = [
        ("add", |a, b, out| Instr::Add { a, b, out }),
        ("mul", |a, b, out| Instr::Mul { a, b, out }),
        ("scale", |x, _, out| Instr::Scale { x, factor: -1.7, out }),
        ("soft-cap", |x, _, out| Instr::SoftCap { x, cap: 1.5, out }),
    ];
    for (name, op) in ops {
        for width in WIDTHS {
            let mut build = Build::new(3);
            let (a, b) = (build.input(width), build.input(width));
            let out = build.buffer(Rows::Tokens, width);
            build.push(op(a, b, out));
            check(bench, &format!("{name} of {width}"), build.clone(), out)?;
            build.push(op(out, a, out));
            check(bench, &format!("{name} of {width} in place"), build, out)?;
        }
    }
    Ok(())
}

fn activations(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for function in FUNCTIONS {
        for width in WIDTHS {
            let mut b = Build::new(4);
            let (gate, up) = (b.input(width), b.input(width));
            // A few large ones, where exponentials end.
            b.push(Instr::Scale {
                x: gate,
                factor: 9.0,
                out: gate,
            });
            let out = b.buffer(Rows::Tokens, width);
            let mut alone = b.clone();
            alone.push(Instr::Activate {
                x: gate,
                function,
                out,
            });
            check(bench, &format!("{function:?} of {width}"), alone, out)?;
            b.push(Instr::ActivateMul {
                gate,
                up,
                function,
                out: gate,
            });
            check(
                bench,
                &format!("{function:?} times, of {width}, in place"),
                b,
                gate,
            )?;
        }
    }
    Ok(())
}

fn kinds(b: &mut Build, width: u32) -> [NormKind; 4] {
    let bias = Some(b.vector(width));
    [
        NormKind::Rms { weight_offset: 0.0 },
        NormKind::Rms { weight_offset: 1.0 },
        NormKind::Layer { bias },
        NormKind::Layer { bias: None },
    ]
}

fn norms(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for (width, groups) in [(1, 3), (15, 1), (16, 4), (64, 2), (83, 1), (576, 1)] {
        for kind in 0..4 {
            let mut b = Build::new(5);
            let x = b.input(width * groups);
            let kind = kinds(&mut b, width)[kind];
            let norm = NormSpec {
                kind,
                weight: b.vector(width),
                width,
                eps: 1e-3,
            };
            let out = b.buffer(Rows::Tokens, width * groups);
            b.push(Instr::Norm { x, norm, out });
            b.push(Instr::Norm { x: out, norm, out });
            check(bench, &format!("{kind:?} over {width}"), b, out)?;
        }
    }
    Ok(())
}

fn add_norm(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut b = Build::new(6);
    let both = b.input(160);
    let (residual, delta) = (
        View { width: 80, ..both },
        View {
            start: 80,
            width: 80,
            ..both
        },
    );
    let norm = NormSpec {
        kind: NormKind::Rms { weight_offset: 0.0 },
        weight: b.vector(80),
        width: 80,
        eps: 1e-5,
    };
    let out = b.buffer(Rows::Tokens, 80);
    b.push(Instr::AddNorm {
        residual,
        delta,
        norm,
        out,
    });
    check(bench, "norm", b.clone(), out)?;
    check(bench, "residual", b, residual)
}

fn rope(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for pairing in [RopePairing::Half, RopePairing::Interleaved] {
        for (head_width, pairs, heads) in [(64, 32, 3), (16, 4, 2), (6, 3, 1), (2, 1, 5)] {
            let mut b = Build::new(8);
            let wide = b.input(head_width * heads + 10);
            let x = View {
                start: 10,
                width: head_width * heads,
                ..wide
            };
            let rope = b.rope(pairs, pairing, 1.25);
            b.push(Instr::Rope { x, rope, head_width });
            check(bench, &format!("{pairing:?} {pairs} of {head_width}"), b, wide)?;
        }
    }
    Ok(())
}

fn copy(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut b = Build::new(9);
    let (x, out) = (b.input(60), b.input(90));
    let (part, into) = (
        View {
            start: 4,
            width: 50,
            ..x
        },
        View {
            start: 10,
            width: 70,
            ..out
        },
    );
    b.push(Instr::Copy {
        x: part,
        out: into,
        group: 6,
        x_stride: 10,
        out_stride: 16,
        groups: 5,
    });
    check(bench, "five groups", b, out)
}

fn pooling(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for mean in [true, false] {
        let mut b = Build::new(10);
        let x = b.input(40);
        let out = b.buffer(Rows::Sequences, 40);
        b.push(if mean {
            Instr::MeanPool { x, out }
        } else {
            Instr::ClsPool { x, out }
        });
        check(bench, "pool", b.clone(), out)?;
        b.push(Instr::L2Normalise {
            x: out,
            width: 20,
            out,
        });
        check(bench, "l2-normalise", b, out)?;
    }
    let mut b = Build::new(11);
    let x = b.input(8);
    b.push(Instr::Scale {
        x,
        factor: 0.0,
        out: x,
    });
    b.push(Instr::L2Normalise { x, width: 8, out: x });
    check(bench, "l2-normalise of zeros", b, x)
}

fn output_rows(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut b = Build::new(12);
    let x = b.input(24);
    let out = b.buffer(Rows::Outputs, 24);
    b.push(Instr::OutputRows { x, out });
    b.program.output = out;
    for rows in [vec![], vec![4], vec![0, 3, 9]] {
        let mut step = batch(&[(0, 4), (7, 6)], BLOCK_TOKENS, 3);
        step.output_rows = rows;
        bench.compare("rows", &b, &[step], (0.0, 0.0), BLOCK_TOKENS)?;
    }
    Ok(())
}

fn mixtures(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let normalisations = [
        RouterNormalisation::SoftmaxAll,
        RouterNormalisation::SoftmaxChosen,
        RouterNormalisation::SigmoidChosen,
    ];
    for (seed, normalisation) in normalisations.into_iter().enumerate() {
        for (shared, gated) in [(false, false), (true, false), (true, true)] {
            for dtype in [DType::F32, DType::Q4_1] {
                let mut b = Build::new(20 + seed as u64);
                let x = b.input(64);
                let expert = |b: &mut Build| ExpertSpec {
                    gate_up: b.parts(&[(dtype, 32), (dtype, 32)], 64),
                    down: b.matrix(dtype, 64, 32),
                };
                let mixture = MixtureSpec {
                    router: b.matrix(DType::F32, 6, 64),
                    experts: (0..6).map(|_| expert(&mut b)).collect(),
                    top_k: 2,
                    normalisation,
                    function: Activation::Silu,
                    shared: shared.then(|| expert(&mut b)),
                    shared_gate: gated.then(|| b.matrix(DType::F32, 1, 64)),
                };
                let out = b.buffer(Rows::Tokens, 64);
                b.push(Instr::Mixture {
                    x,
                    mixture: Box::new(mixture),
                    out,
                });
                b.program.output = out;
                let what = format!("{normalisation:?}, shared {shared}, gated {gated}, {dtype}");
                let steps = [
                    batch(&[(0, 1)], BLOCK_TOKENS, 1),
                    batch(&[(0, 21)], BLOCK_TOKENS, 2),
                ];
                // Three linear maps of one or two blocks each: the rounding of 8-bit activations adds up.
                bench.compare(&what, &b, &steps, (1e-5, 3e-2), BLOCK_TOKENS)?;
            }
        }
    }
    Ok(())
}
