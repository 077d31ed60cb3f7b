//! Attention over paged keys and values: shapes, windows, caps, chunks, batches, copied and zeroed blocks.

use galerne_core::dtype::DType;
use galerne_core::ids::{BlockId, TokenId};

use super::{BLOCK_TOKENS, Bench, Build, Case, ConformanceError, Reference, batch};
use crate::device::{KvDtype, SequenceSlice, StepBatch};
use crate::program::AttentionLayer;

pub(super) const CASES: &[Case] = &[
    Case {
        name: "attention shapes",
        run: shapes,
    },
    Case {
        name: "attention masks",
        run: masks,
    },
    Case {
        name: "attention block sizes",
        run: block_sizes,
    },
    Case {
        name: "attention over many tiles",
        run: long,
    },
    Case {
        name: "attention KV dtypes",
        run: dtypes,
    },
    Case {
        name: "chunked prefill equals whole",
        run: chunks,
    },
    Case {
        name: "a batched sequence equals a single one",
        run: batched,
    },
    Case {
        name: "copied and zeroed blocks",
        run: blocks,
    },
];

/// Keys, values and perhaps queries and weights in bf16 on the fast path; angles of rotations rounded to f32 in both.
const TOLERANCE: (f64, f64) = (2e-5, 1e-2);
/// For whole models, whose layers add up what linear maps and attention are off by.
const MODEL_TOLERANCE: (f64, f64) = (2e-5, 5e-2);

fn spec(heads: u32, kv_heads: u32, head_width: u32) -> AttentionLayer {
    let scale = 1.0 / (head_width as f32).sqrt();
    AttentionLayer {
        heads,
        kv_heads,
        head_width,
        scale,
        causal: true,
        sliding_window: None,
        soft_cap: None,
    }
}

/// A prefill of three sequences, then a step that decodes one, continues one and begins one.
fn steps(block_tokens: usize) -> [StepBatch; 3] {
    [
        batch(&[(0, 37), (0, 1), (0, 50)], block_tokens, 1),
        continued(&[(37, 1), (1, 40), (50, 3)], block_tokens, 2),
        continued(&[(38, 1), (41, 1), (53, 1)], block_tokens, 3),
    ]
}

/// Like [`batch`], with blocks that stay where they are as sequences grow.
fn continued(sequences: &[(usize, usize)], block_tokens: usize, seed: u64) -> StepBatch {
    let mut step = batch(sequences, block_tokens, seed);
    for (lane, slice) in step.sequences.iter_mut().enumerate() {
        for (index, block) in slice.blocks.iter_mut().enumerate() {
            *block = BlockId(((index * 5 + 3) % 21 * sequences.len() + lane) as u32);
        }
    }
    step
}

fn paged_steps(block_tokens: usize) -> [StepBatch; 3] {
    let mut steps = steps(block_tokens);
    steps[0] = continued(&[(0, 37), (0, 1), (0, 50)], block_tokens, 1);
    steps
}

fn shapes(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for (heads, kv_heads, width) in [
        (1, 1, 64),
        (9, 3, 64),
        (4, 4, 16),
        (8, 1, 32),
        (6, 2, 24),
        (2, 1, 5),
        (40, 1, 16),
    ] {
        let mut b = Build::new(1);
        b.attention(spec(heads, kv_heads, width));
        let what = format!("{heads} heads, {kv_heads} kv heads of {width}");
        bench.compare(&what, &b, &paged_steps(BLOCK_TOKENS), TOLERANCE, BLOCK_TOKENS)?;
    }
    Ok(())
}

fn masks(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for causal in [true, false] {
        for sliding_window in [None, Some(1), Some(7), Some(16), Some(33)] {
            for soft_cap in [None, Some(0.8)] {
                let mut b = Build::new(2);
                b.attention(AttentionLayer {
                    causal,
                    sliding_window,
                    soft_cap,
                    ..spec(4, 2, 16)
                });
                let what = format!("causal {causal}, window {sliding_window:?}, cap {soft_cap:?}");
                bench.compare(&what, &b, &paged_steps(BLOCK_TOKENS), TOLERANCE, BLOCK_TOKENS)?;
            }
        }
    }
    Ok(())
}

fn block_sizes(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for block_tokens in [5, 8, 24, 32] {
        let mut b = Build::new(3);
        b.attention(AttentionLayer {
            sliding_window: Some(30),
            ..spec(4, 2, 16)
        });
        bench.compare(
            &format!("{block_tokens}"),
            &b,
            &paged_steps(block_tokens),
            TOLERANCE,
            block_tokens,
        )?;
    }
    Ok(())
}

/// Contexts of several hundred tokens in ragged company: a window and a cap over the borders of whatever tiles a
/// device uses, in steps that begin and end anywhere.
fn long_steps() -> Vec<StepBatch> {
    const LENGTHS: [usize; 3] = [211, 64, 129];
    let (mut done, mut steps) = ([0; 3], vec![]);
    for (seed, sizes) in [[70, 17, 9], [61, 16, 19], [1, 30, 65], [63, 1, 1], [16, 0, 35]]
        .into_iter()
        .enumerate()
    {
        let lanes: Vec<usize> = (0..3).filter(|&lane| sizes[lane] > 0).collect();
        let slices: Vec<_> = lanes.iter().map(|&lane| (done[lane], sizes[lane])).collect();
        let mut step = batch(&slices, BLOCK_TOKENS, seed as u64 + 10);
        for (slice, &lane) in step.sequences.iter_mut().zip(&lanes) {
            for (index, block) in slice.blocks.iter_mut().enumerate() {
                *block = BlockId(((index * 5 + 3) % 21 * 3 + lane) as u32);
            }
        }
        lanes.iter().for_each(|&lane| done[lane] += sizes[lane]);
        steps.push(step);
    }
    assert_eq!(done, LENGTHS, "the steps cover the sequences");
    steps
}

fn long(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for (sliding_window, soft_cap) in [
        (None, None),
        (Some(70), None),
        (None, Some(0.8)),
        (Some(64), Some(2.0)),
    ] {
        let mut b = Build::new(7);
        b.attention(AttentionLayer {
            sliding_window,
            soft_cap,
            ..spec(6, 2, 64)
        });
        let what = format!("window {sliding_window:?}, cap {soft_cap:?}");
        bench.compare(&what, &b, &long_steps(), TOLERANCE, BLOCK_TOKENS)?;
    }
    Ok(())
}

fn dtypes(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    // Rounding errors of single keys and values, of sizes up to about 4: 2^-9, 2^-12 of each, none, 1/254 of the
    // largest number of a head, 2^-4 of each.
    for (dtype, fast) in [
        (KvDtype::Bf16, 1.5e-2),
        (KvDtype::F16, 2e-3),
        (KvDtype::F32, 2e-5),
        (KvDtype::Int8, 2e-2),
        (KvDtype::Fp8, 0.15),
    ] {
        let bench = Bench { kv: dtype, ..*bench };
        for (heads, kv_heads, width) in [(9, 3, 64), (6, 2, 24), (2, 1, 5)] {
            let mut b = Build::new(8);
            b.attention(spec(heads, kv_heads, width));
            let what = format!("{dtype:?} {heads} heads, {kv_heads} kv heads of {width}");
            let tolerance = (TOLERANCE.0, fast);
            bench.compare(&what, &b, &paged_steps(BLOCK_TOKENS), tolerance, BLOCK_TOKENS)?;
            bench.compare(
                &format!("{what}, long"),
                &b,
                &long_steps(),
                tolerance,
                BLOCK_TOKENS,
            )?;
        }
        let mut b = Build::new(9);
        b.attention(AttentionLayer {
            sliding_window: Some(9),
            ..spec(4, 2, 16)
        });
        let what = format!("{dtype:?} in blocks of 24");
        bench.compare(&what, &b, &paged_steps(24), (TOLERANCE.0, fast), 24)?;
    }
    Ok(())
}

fn chunks(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    for dtype in [DType::F32, DType::Q4_1, DType::Q4K, DType::Q6K] {
        let b = Build::transformer(dtype, 2, 4);
        let whole = continued(&[(0, 61)], BLOCK_TOKENS, 9);
        let expected = Reference::new(&b.program, &b.weights, BLOCK_TOKENS).step(&whole);
        for sizes in [vec![61], vec![1, 60], vec![16, 16, 29], vec![5, 1, 1, 40, 14]] {
            let mut program = bench.load(&b, BLOCK_TOKENS)?;
            let (mut position, mut got) = (0, vec![]);
            for size in &sizes {
                let mut step = continued(&[(position, *size)], BLOCK_TOKENS, 9);
                step.tokens = whole.tokens[position..position + size].to_vec();
                got.extend(bench.step(program.as_mut(), &step)?);
                position += size;
            }
            bench.close(&format!("{dtype} in {sizes:?}"), &expected, &got, MODEL_TOLERANCE)?;
        }
    }
    Ok(())
}

fn batched(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let b = Build::transformer(DType::Q4_1, 2, 5);
    let together = continued(&[(0, 9), (0, 30), (0, 1), (0, 22)], BLOCK_TOKENS, 6);
    let mut program = bench.load(&b, BLOCK_TOKENS)?;
    let all = bench.step(program.as_mut(), &together)?;
    let width = b.program.output.width as usize;
    for slice in &together.sequences {
        let tokens = together.tokens[slice.first_token..][..slice.tokens].to_vec();
        let alone = StepBatch {
            output_rows: (0..tokens.len()).collect(),
            tokens,
            sequences: vec![SequenceSlice {
                first_token: 0,
                ..slice.clone()
            }],
            generating: 0,
        };
        let rows = bench.step(program.as_mut(), &alone)?;
        let expected: Vec<Vec<f64>> = rows
            .chunks(width)
            .map(|row| row.iter().map(|&v| f64::from(v)).collect())
            .collect();
        let got = &all[slice.first_token * width..][..slice.tokens * width];
        bench.close("rows of the batch", &expected, got, (1e-5, 1e-2))?;
    }
    Ok(())
}

fn blocks(bench: &Bench<'_>) -> Result<(), ConformanceError> {
    let b = Build::transformer(DType::F32, 2, 6);
    let mut program = bench.load(&b, BLOCK_TOKENS)?;
    let mut reference = Reference::new(&b.program, &b.weights, BLOCK_TOKENS);
    let prefill = continued(&[(0, 20)], BLOCK_TOKENS, 7);
    bench.step(program.as_mut(), &prefill)?;
    reference.step(&prefill);
    let device = |source| ConformanceError::Device {
        case: bench.case.to_owned(),
        source,
    };
    // A fork: the copy of the second, unfinished block is written by another sequence.
    let (shared, own) = (prefill.sequences[0].blocks[0], prefill.sequences[0].blocks[1]);
    program.copy_blocks(&[(own, BlockId(60))]).map_err(device)?;
    reference.copy_block(own, BlockId(60));
    let slice = |first_token, block| SequenceSlice {
        first_token,
        tokens: 1,
        position: 20,
        blocks: vec![shared, block],
    };
    let fork = StepBatch {
        tokens: vec![TokenId(3), TokenId(4)],
        sequences: vec![slice(0, own), slice(1, BlockId(60))],
        generating: 2,
        output_rows: vec![0, 1],
    };
    let got = bench.step(program.as_mut(), &fork)?;
    bench.close("fork", &reference.step(&fork), &got, MODEL_TOLERANCE)?;
    // Zeroed keys and values are seen as zeros: not the same as before.
    program.zero_blocks(&[shared]).map_err(device)?;
    let again = StepBatch {
        sequences: vec![slice(0, own)],
        tokens: vec![TokenId(3)],
        generating: 1,
        output_rows: vec![0],
    };
    let zeroed = bench.step(program.as_mut(), &again)?;
    let changed = zeroed.iter().zip(&got).any(|(a, b)| (a - b).abs() > 1e-3);
    bench.same("zeroed blocks change the result", true, changed)?;
    bench.same("and give numbers", true, zeroed.iter().all(|v| v.is_finite()))
}
