//! AMX kernels, on hardware that has it or with every instruction trapped and computed: the instructions themselves
//! against the trap's arithmetic, linear maps against f64 and, where they are integers, the vector kernels.
#![cfg(target_arch = "x86_64")]
#![expect(unsafe_code, reason = "instructions are executed one by one")]

mod support;

use std::arch::asm;

use galerne_amx_trap::{ROW_BYTES, ROWS, Sign, Tiles};
use galerne_core::dtype::DType;
use galerne_core::graph::{Activation, Rows};
use galerne_core::ids::{BlockId, TokenId};
use galerne_kernels::conformance::{Build, Numbers, Reference};
use galerne_kernels::cpu::Isa;
use galerne_kernels::device::{Device, KvDtype, KvSpec, LoadOptions, Precision, SequenceSlice, StepBatch};
use galerne_kernels::program::{Instr, View, WeightId};
use support::{device, has_amx};

type Tile = [[u8; ROW_BYTES]; ROWS];

/// Tiles 0 of 11 rows of 36 bytes, 1 of 11 of 52, 2 of 13 of 36.
fn config() -> [u8; 64] {
    let mut config = [0; 64];
    config[0] = 1;
    for (tile, (rows, bytes)) in [(11, 36), (11, 52), (13, 36)].into_iter().enumerate() {
        config[16 + 2 * tile] = bytes;
        config[48 + tile] = rows;
    }
    config
}

/// What an instruction makes of tiles 0, 1 and 2.
macro_rules! executed {
    ($instruction:literal, $tiles:expr) => {{
        let (tiles, config, mut out): ([Tile; 3], _, Tile) = ($tiles, config(), [[0xee; ROW_BYTES]; ROWS]);
        // SAFETY: AMX can be executed; rows are 64 bytes apart; nobody else uses this thread's tiles.
        unsafe {
            asm!(
                "ldtilecfg [{config}]",
                "tileloadd tmm0, [{c} + {line}]",
                "tileloaddt1 tmm1, [{a} + 2 * {half_line}]",
                "tileloadd tmm2, [{b} + {line}]",
                concat!($instruction, " tmm0, tmm1, tmm2"),
                "tilestored [{out} + {line}], tmm0",
                "tilerelease",
                config = in(reg) &raw const config,
                c = in(reg) &raw const tiles[0],
                a = in(reg) &raw const tiles[1],
                b = in(reg) &raw const tiles[2],
                out = in(reg) &raw mut out,
                line = in(reg) ROW_BYTES,
                half_line = in(reg) ROW_BYTES / 2,
                out("tmm0") _, out("tmm1") _, out("tmm2") _,
                options(nostack)
            );
        }
        out
    }};
}

/// What the trap's arithmetic makes of the same.
fn expected(from: &[Tile; 3], product: impl Fn(&mut Tiles)) -> Tile {
    let (mut tiles, mut out) = (Tiles::new(), [[0xee; ROW_BYTES]; ROWS]);
    tiles.configure(&config()).expect("a valid configuration");
    for (tile, rows) in from.iter().enumerate() {
        // SAFETY: 16 rows of 64 bytes.
        unsafe { tiles.load(tile, |r| rows[r].as_ptr()).expect("a configured tile") };
    }
    product(&mut tiles);
    let to = out.as_mut_ptr();
    // SAFETY: as above.
    unsafe { tiles.store(0, |r| to.add(r).cast()).expect("a configured tile") };
    out
}

#[test]
fn instructions_do_what_the_trap_computes() {
    if !has_amx() {
        return;
    }
    let mut numbers = Numbers::new(3);
    for _ in 0..20 {
        let tiles = [(); 3].map(|()| [(); ROWS].map(|()| [(); ROW_BYTES].map(|()| numbers.below(256) as u8)));
        for (out, signs) in [
            (executed!("tdpbssd", tiles), [Sign::Signed, Sign::Signed]),
            (executed!("tdpbsud", tiles), [Sign::Signed, Sign::Unsigned]),
            (executed!("tdpbusd", tiles), [Sign::Unsigned, Sign::Signed]),
            (executed!("tdpbuud", tiles), [Sign::Unsigned, Sign::Unsigned]),
        ] {
            let expected = expected(&tiles, |t| t.dot_bytes(0, [1, 2], signs).expect("shapes fit"));
            assert_eq!(out, expected, "{signs:?}");
        }
        // Exponents from 2^-20 to 2^20, and every mantissa: sums round, and nothing is infinite.
        let mut bf16 = || {
            let exponent = 107 + numbers.below(41) as u16;
            let bits = (numbers.below(2) as u16) << 15 | exponent << 7 | numbers.below(128) as u16;
            bits.to_le_bytes()
        };
        let mut pairs = || {
            let mut tile = [[0; ROW_BYTES]; ROWS];
            for pair in tile.as_flattened_mut().chunks_exact_mut(2) {
                pair.copy_from_slice(&bf16());
            }
            tile
        };
        let tiles = [pairs(), pairs(), pairs()];
        let expected = expected(&tiles, |t| t.dot_bf16(0, [1, 2]).expect("shapes fit"));
        assert_eq!(executed!("tdpbf16ps", tiles), expected);
    }
}

/// A linear map of tokens' or of output rows, with bias, that adds to what is there. Some rows of its input have outliers in some
/// blocks of columns.
fn linear(dtype: DType, [outer, inner]: [u32; 2], seed: u64, rows: Rows) -> Build {
    let mut b = Build::new(seed);
    let mut out = b.buffer(Rows::Tokens, outer);
    b.input_into(out);
    let mut x = b.input(inner);
    let table = b.program.weights.last().expect("the input's table").parts[0].clone();
    let mut values = b.weights.dequantized(&table);
    for (token, row) in values.chunks_mut(inner as usize).enumerate() {
        for block in row
            .chunks_mut(32)
            .skip(token % 3)
            .step_by(3)
            .filter(|_| token % 4 > 0)
        {
            block[token % block.len()] *= 30.0;
        }
    }
    b.weights.insert(&table, DType::F32, &[50, inner.into()], &values);
    if rows == Rows::Outputs {
        for of_tokens in [&mut out, &mut x] {
            let to = b.buffer(Rows::Outputs, of_tokens.width);
            b.push(Instr::OutputRows {
                x: *of_tokens,
                out: to,
            });
            *of_tokens = to;
        }
    }
    let weight = b.matrix(dtype, outer, inner);
    let bias = Some(b.vector(outer));
    b.push(Instr::Linear {
        x,
        weight,
        bias,
        accumulate: true,
        out,
    });
    b.program.output = out;
    b
}

/// A sequence that has generated so many tokens, and one with a prompt.
fn batch(generated: usize, prompt: usize) -> StepBatch {
    let rows = generated + prompt;
    let slice = |first_token, tokens, block| SequenceSlice {
        first_token,
        tokens,
        position: 0,
        blocks: (block..block + 8).map(BlockId).collect(),
    };
    let sequences = [slice(0, generated, 0), slice(generated, prompt, 8)];
    StepBatch {
        tokens: (0..rows).map(|i| TokenId((i * 7 % 50) as u32)).collect(),
        sequences: sequences.into_iter().filter(|slice| slice.tokens > 0).collect(),
        generating: usize::from(generated > 0),
        output_rows: (0..rows).collect(),
    }
}

fn output(device: &dyn Device, build: &Build, batch: &StepBatch) -> Vec<f32> {
    let options = LoadOptions {
        precision: Precision::Auto,
        quantization: None,
        kv: KvSpec {
            blocks: 16,
            block_tokens: 16,
            dtype: KvDtype::default(),
        },
        step_tokens_max: 128,
        sequences_max: 8,
    };
    let mut program = device
        .load(&build.program, &build.weights, options)
        .expect("load");
    program.submit(batch).expect("submit");
    program.read_output().expect("output")
}

/// Output rows are integers, and the same vector kernels make them, unless twelve rows or more are generated: then they are
/// rounded, as the weights are, each to 2^-9 of its size, and tiles do. Outer widths are ragged, and inner ones those of several
/// super-blocks.
#[test]
fn output_rows_are_integers_unless_many_are_generated() {
    let (Some(vectors), Some(tiles)) = (device(Isa::Avx512, 1), device(Isa::Amx, 2)) else {
        return;
    };
    for dtype in DType::ALL.into_iter().filter(|dtype| dtype.block_elements() > 1) {
        let widths: &[u32] = if dtype.block_elements() == 32 {
            &[32, 96, 160]
        } else {
            &[256, 512]
        };
        for &inner in widths {
            let build = linear(dtype, [50, inner], u64::from(inner), Rows::Outputs);
            for (generated, prompt) in [(1, 0), (11, 0), (11, 5), (0, 33)] {
                let batch = batch(generated, prompt);
                let (expected, got) = (output(&vectors, &build, &batch), output(&tiles, &build, &batch));
                assert_eq!(expected, got, "{dtype} [{generated} and {prompt}, {inner}]");
            }
            for rows in [12, 16, 27, 33] {
                let batch = batch(rows, rows % 5);
                let expected = Reference::new(&build.program, &build.weights, 16).step(&batch);
                let before = galerne_amx_trap::executed();
                let distance = distance(&expected, &output(&tiles, &build, &batch));
                assert!(distance < 8e-3, "{dtype} [{rows}, {inner}]: {distance}");
                assert!(galerne_amx_trap::executed() > before || Isa::detect() == Isa::Amx);
            }
        }
    }
}

/// Activations are split in two bf16, which keeps 17 bits: far closer to f64 than one would be, whose error is 2^-9.
#[test]
fn bf16_maps_are_as_close_as_split_activations_allow() {
    let Some(tiles) = device(Isa::Amx, 2) else { return };
    for (inner, outer) in [(1, 1), (7, 17), (33, 50), (64, 33), (320, 48)] {
        let build = linear(DType::Bf16, [outer, inner], u64::from(inner), Rows::Outputs);
        for rows in [1, 5, 16, 17, 32, 33, 70] {
            // Rows of a prompt, or few generated ones: those whose outputs are not rounded.
            let batch = if rows < 12 { batch(rows, 0) } else { batch(0, rows) };
            let expected = Reference::new(&build.program, &build.weights, 16).step(&batch);
            let distance = distance(&expected, &output(&tiles, &build, &batch));
            assert!(
                distance <= 2e-5,
                "[{rows}, {inner}] x [{outer}, {inner}]: {distance}"
            );
        }
    }
}

/// The largest difference of two outputs, as a part of the largest number of the first; no number if a difference is none.
fn distance(expected: &[Vec<f64>], got: &[f32]) -> f64 {
    let expected = expected.iter().flatten();
    assert_eq!(expected.clone().count(), got.len());
    let size = expected.clone().fold(1.0, |size: f64, v| size.max(v.abs()));
    expected
        .zip(got)
        .map(|(expected, got)| (expected - f64::from(*got)).abs() / size)
        .fold(0.0, |worst, distance| {
            if distance > worst || distance.is_nan() {
                distance
            } else {
                worst
            }
        })
}

/// Both factors are rounded to 2^-9 of their size, and errors of many products cancel.
#[test]
fn prompts_are_as_close_as_bf16_allows() {
    let Some(tiles) = device(Isa::Amx, 2) else { return };
    for dtype in DType::ALL
        .into_iter()
        .filter(|dtype| !matches!(dtype, DType::F16 | DType::F32))
    {
        let build = linear(dtype, [50, 256], 7, Rows::Tokens);
        for rows in [1, 17, 70] {
            let batch = batch(0, rows);
            let expected = Reference::new(&build.program, &build.weights, 16).step(&batch);
            let before = galerne_amx_trap::executed();
            let distance = distance(&expected, &output(&tiles, &build, &batch));
            assert!(distance < 4e-3, "{dtype} [{rows}]: {distance}");
            assert!(galerne_amx_trap::executed() > before || Isa::detect() == Isa::Amx);
        }
    }
}

/// A few generated rows have the bits of the vector kernels beside a prompt too, many those of a prompt, and a prompt's
/// rows the same whatever is beside them.
#[test]
fn rows_do_not_depend_on_what_is_beside_them() {
    let (Some(vectors), Some(tiles)) = (device(Isa::Avx512, 1), device(Isa::Amx, 2)) else {
        return;
    };
    for dtype in [DType::Q4_1, DType::Q8_0, DType::Q6K] {
        let build = linear(dtype, [50, 256], 8, Rows::Tokens);
        for (generated, prompt) in [(3, 1), (11, 21), (12, 3), (21, 30), (16, 0)] {
            let both = output(&tiles, &build, &batch(generated, prompt));
            let (first, last) = both.split_at(generated * 50);
            // The same rows as all of a prompt.
            let alone = output(&tiles, &build, &batch(0, generated + prompt));
            let expected = if generated < 12 {
                output(&vectors, &build, &batch(generated, 0))
            } else {
                alone[..generated * 50].to_vec()
            };
            assert_eq!(first, expected, "{dtype} {generated} {prompt}");
            assert_eq!(last, &alone[generated * 50..], "{dtype} {generated} {prompt}");
        }
    }
}

/// A gated activation between two maps without bias, the second of which adds to what is there.
fn gated(dtype: DType, function: Activation) -> Build {
    let mut b = Build::new(9);
    let out = b.buffer(Rows::Tokens, 64);
    b.input_into(out);
    let x = b.input(64);
    let (inner, made) = (b.buffer(Rows::Tokens, 512), b.buffer(Rows::Tokens, 256));
    let both = {
        let [gate, up] = [b.matrix(dtype, 256, 64), b.matrix(dtype, 256, 64)];
        let part = |weight: WeightId| b.program.weights[weight.index()].parts[0].clone();
        let parts = vec![part(gate), part(up)];
        b.program.weights[gate.index()].parts = parts;
        b.program.weights[gate.index()].rows = 512;
        gate
    };
    let down = b.matrix(dtype, 64, 256);
    let half = |start| View {
        start,
        width: 256,
        ..inner
    };
    for instr in [
        Instr::Linear {
            x,
            weight: both,
            bias: None,
            accumulate: false,
            out: inner,
        },
        Instr::ActivateMul {
            gate: half(0),
            up: half(256),
            function,
            out: made,
        },
        Instr::Linear {
            x: made,
            weight: down,
            bias: None,
            accumulate: true,
            out,
        },
    ] {
        b.push(instr);
    }
    b.program.output = out;
    b
}

/// Whole tiles and ragged ones, prompts beside generated rows: as close as bf16 allows, and the same bits for the same row.
#[test]
fn gated_activations_pass_between_maps() {
    let Some(tiles) = device(Isa::Amx, 2) else { return };
    for (dtype, function) in [
        (DType::Q4_1, Activation::Silu),
        (DType::Q8_0, Activation::GeluTanh),
        (DType::Bf16, Activation::Gelu),
    ] {
        let build = gated(dtype, function);
        let all = output(&tiles, &build, &batch(0, 70));
        for (generated, prompt) in [(0, 1), (0, 32), (0, 70), (5, 40), (20, 17)] {
            let batch = batch(generated, prompt);
            let got = output(&tiles, &build, &batch);
            let expected = Reference::new(&build.program, &build.weights, 16).step(&batch);
            let distance = distance(&expected, &got);
            assert!(distance < 1e-2, "{dtype} {generated} {prompt}: {distance}");
            let rounded = if generated < 12 { generated * 64 } else { 0 };
            assert_eq!(
                got[rounded..],
                all[rounded..got.len()],
                "{dtype} {generated} {prompt}"
            );
        }
    }
}
