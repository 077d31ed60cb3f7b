//! Linear maps: every dtype, ragged shapes, few and many rows.

use galerne_core::dtype::DType;
use galerne_core::graph::Rows;

use super::{BLOCK_TOKENS, Bench, Build, Case, ConformanceError, batch};
use crate::program::{Instr, View};

pub(super) const CASES: &[Case] = &[
    Case {
        name: "linear f32",
        run: |bench| shapes(bench, DType::F32),
    },
    Case {
        name: "linear f16",
        run: |bench| shapes(bench, DType::F16),
    },
    Case {
        name: "linear bf16",
        run: |bench| shapes(bench, DType::Bf16),
    },
    Case {
        name: "linear q4_0",
        run: |bench| shapes(bench, DType::Q4_0),
    },
    Case {
        name: "linear q4_1",
        run: |bench| shapes(bench, DType::Q4_1),
    },
    Case {
        name: "linear q8_0",
        run: |bench| shapes(bench, DType::Q8_0),
    },
    Case {
        name: "linear q5_0",
        run: |bench| shapes(bench, DType::Q5_0),
    },
    Case {
        name: "linear q5_1",
        run: |bench| shapes(bench, DType::Q5_1),
    },
    Case {
        name: "linear iq4_nl",
        run: |bench| shapes(bench, DType::Iq4Nl),
    },
    Case {
        name: "linear q4_k",
        run: |bench| shapes(bench, DType::Q4K),
    },
    Case {
        name: "linear q5_k",
        run: |bench| shapes(bench, DType::Q5K),
    },
    Case {
        name: "linear q6_k",
        run: |bench| shapes(bench, DType::Q6K),
    },
    Case {
        name: "linear of parts of several dtypes, into part of a buffer",
        run: mixed_parts,
    },
    Case {
        name: "embedding from every dtype",
        run: embeddings,
    },
];

/// f32 sums of a few hundred products; 8-bit activations are off by at most 0.4% of a block's largest.
const TOLERANCE: (f64, f64) = (4e-6, 1.5e-2);

fn shapes(bench: &Bench<'_>, dtype: DType) -> Result<(), ConformanceError> {
    let plain: &[(u32, u32)] = &[(1, 1), (33, 50), (7, 17)];
    let blocks: &[(u32, u32)] = &[(32, 16), (64, 33), (96, 100), (576, 80), (32, 1)];
    let large: &[(u32, u32)] = &[(256, 16), (512, 33), (768, 80), (256, 1)];
    let shapes = match dtype.block_elements() {
        1 => [plain, blocks].concat(),
        32 => blocks.to_vec(),
        _ => large.to_vec(),
    };
    for (seed, (inner, outer)) in shapes.into_iter().enumerate() {
        for (bias, accumulate) in [(false, false), (true, false), (true, true)] {
            let mut b = Build::new(seed as u64 + 1);
            let out = b.buffer(Rows::Tokens, outer);
            b.input_into(out);
            let x = b.input(inner);
            let weight = b.matrix(dtype, outer, inner);
            let bias = bias.then(|| b.vector(outer));
            b.push(Instr::Linear {
                x,
                weight,
                bias,
                accumulate,
                out,
            });
            b.program.output = out;
            for rows in [1, 2, 3, 17, 70] {
                let steps = [batch(&[(0, rows)], BLOCK_TOKENS, rows as u64)];
                let what = format!("[{rows}, {inner}] x [{outer}, {inner}], accumulate {accumulate}");
                bench.compare(&what, &b, &steps, TOLERANCE, BLOCK_TOKENS)?;
            }
        }
    }
    Ok(())
}

fn mixed_parts(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let mut b = Build::new(7);
    let wide = b.input(200);
    let x = View {
        start: 40,
        width: 64,
        ..wide
    };
    let parts = [
        (DType::Q4_1, 20),
        (DType::F32, 3),
        (DType::Q8_0, 40),
        (DType::Bf16, 16),
        (DType::Q4_0, 21),
    ];
    let weight = b.parts(&parts, 64);
    let all = b.buffer(Rows::Tokens, 150);
    b.input_into(all);
    let bias = Some(b.vector(100));
    b.push(Instr::Linear {
        x,
        weight,
        bias,
        accumulate: false,
        out: View {
            start: 25,
            width: 100,
            ..all
        },
    });
    b.program.output = all;
    for rows in [1, 5, 30] {
        let steps = [batch(&[(0, rows)], BLOCK_TOKENS, 3)];
        bench.compare(&format!("{rows} rows"), &b, &steps, TOLERANCE, BLOCK_TOKENS)?;
    }
    Ok(())
}

fn embeddings(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    use galerne_core::graph::EmbeddingIndex::{Constant, Positions, Tokens};
    for dtype in DType::ALL {
        let width = dtype.block_elements().max(64) as u32;
        for index in [Tokens, Positions(2), Constant(5)] {
            let mut b = Build::new(11);
            let table = b.parts(&[(dtype, 37), (dtype, 13)], width);
            let out = b.buffer(Rows::Tokens, width);
            b.push(Instr::Embedding { table, index, out });
            b.program.output = out;
            let steps = [batch(&[(3, 4), (0, 1), (40, 3)], BLOCK_TOKENS, 5)];
            bench.compare(
                &format!("{dtype} {index:?}"),
                &b,
                &steps,
                (1e-6, 1e-6),
                BLOCK_TOKENS,
            )?;
        }
    }
    Ok(())
}
