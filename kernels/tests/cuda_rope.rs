//! `rope.cu` on the CPU shim (or a GPU): rotations against f64, and what lies in the KV blocks after, byte by byte.
#![expect(unsafe_code, reason = "launches name raw memory")]

use galerne_core::graph::RopePairing;
use galerne_cuda_shim::{Memory, Rig, numbers};
use galerne_kernels::cuda::driver::DevicePtr;
use galerne_kernels::cuda::kv::{KvElement, KvLayer};
use galerne_kernels::cuda::launch::rope::{Rotation, rope, rope_append, table};
use galerne_kernels::cuda::tables::{NO_SEQUENCE, TableAddresses};
use galerne_kernels::program::{AttentionLayer, RopeSpec};
use half::{bf16, f16};

const BLOCK_TOKENS: usize = 4;
const BLOCKS: usize = 7;
const POSITIONS: u32 = 12;
/// Rows: two of the second sequence, padding, three of the first.
const OWNERS: [u32; 6] = [1, 1, NO_SEQUENCE, 0, 0, 0];
const AT: [u32; 6] = [6, 7, 0, 0, 3, 10];
/// Blocks of the sequences by position.
const TABLE: [u32; 6] = [5, 0, 2, 6, 3, 1];

#[derive(Debug, Clone, Copy)]
struct Shape {
    heads: usize,
    kv_heads: usize,
    width: usize,
    /// Rotated pairs of q and of k, if they are rotated.
    pairs: [Option<usize>; 2],
    pairing: RopePairing,
    /// Columns before the views in their buffers.
    margin: usize,
}

fn spec(pairs: usize, pairing: RopePairing) -> RopeSpec {
    RopeSpec {
        inv_freq: (0..pairs).map(|i| 0.7_f32.powi(i as i32)).collect(),
        pairing,
        attention_factor: 1.25,
    }
}

fn rotated(x: &[f32], spec: Option<&RopeSpec>, position: u32) -> Vec<f64> {
    let mut out: Vec<f64> = x.iter().copied().map(f64::from).collect();
    let Some(spec) = spec else { return out };
    let pairs = spec.inv_freq.len();
    for (i, frequency) in spec.inv_freq.iter().enumerate() {
        let (a, b) = match spec.pairing {
            RopePairing::Half => (i, i + pairs),
            RopePairing::Interleaved => (2 * i, 2 * i + 1),
        };
        let (sine, cosine) = (f64::from(position) * f64::from(*frequency)).sin_cos();
        let (x, y) = (out[a] * 1.25, out[b] * 1.25);
        (out[a], out[b]) = (x * cosine - y * sine, y * cosine + x * sine);
    }
    out
}

fn fp8(bits: u8) -> f64 {
    let (exponent, fraction) = (i32::from(bits >> 3 & 15), f64::from(bits & 7));
    let magnitude = match exponent {
        0 => fraction * 2_f64.powi(-9),
        _ => (8.0 + fraction) * 2_f64.powi(exponent - 10),
    };
    if bits & 128 == 0 { magnitude } else { -magnitude }
}

/// A number as stored, and how far it may be off.
fn stored(pool: &[u8], at: usize, element: KvElement, scale: f64, expected: f64) -> (f64, f64) {
    let bytes = &pool[at..at + element.bytes()];
    // Half a unit in the last place, and the rotation's own roundings in f32.
    let exact = 2e-6;
    match element {
        KvElement::F32 => (
            f64::from(f32::from_le_bytes(bytes.try_into().expect("four"))),
            exact,
        ),
        KvElement::Bf16 => {
            let bits = u16::from_le_bytes(bytes.try_into().expect("two"));
            (
                f64::from(bf16::from_bits(bits)),
                exact + expected.abs() / 256.0 * 1.001,
            )
        }
        KvElement::F16 => {
            let bits = u16::from_le_bytes(bytes.try_into().expect("two"));
            (
                f64::from(f16::from_bits(bits)),
                exact + expected.abs() / 2_048.0 * 1.001,
            )
        }
        KvElement::Int8 => (f64::from(bytes[0] as i8) * scale, exact + scale * 0.501),
        KvElement::Fp8 => (
            fp8(bytes[0]),
            exact + (expected.abs() / 16.0).max(2_f64.powi(-10)) * 1.001,
        ),
    }
}

struct Tables<'s> {
    memory: [Memory<'s, u32>; 3],
}

impl<'s> Tables<'s> {
    fn new(rig: &'s Rig) -> Self {
        Self {
            memory: [rig.memory(&AT), rig.memory(&OWNERS), rig.memory(&TABLE)],
        }
    }

    fn addresses(&self) -> TableAddresses {
        let [positions, owners, blocks] = self.memory.each_ref().map(Memory::at);
        let none = DevicePtr::NULL;
        TableAddresses {
            tokens: none,
            positions,
            owners,
            output_rows: none,
            first_rows: none,
            row_counts: none,
            sources: none,
            blocks,
            blocks_stride: 3,
        }
    }
}

/// Compares q, of which only rotated columns of rows that are no padding may have changed.
fn check_q(before: &[f32], after: &[f32], shape: &Shape, spec: Option<&RopeSpec>) {
    let stride = shape.margin + shape.heads * shape.width;
    for row in 0..OWNERS.len() {
        let columns = row * stride..(row + 1) * stride;
        let (before, after) = (&before[columns.clone()], &after[columns]);
        assert_eq!(before[..shape.margin], after[..shape.margin]);
        let heads = before[shape.margin..].chunks(shape.width);
        for (head, (before, after)) in heads.zip(after[shape.margin..].chunks(shape.width)).enumerate() {
            let spec = spec.filter(|_| OWNERS[row] != NO_SEQUENCE);
            for (c, expected) in rotated(before, spec, AT[row]).into_iter().enumerate() {
                assert!(
                    (f64::from(after[c]) - expected).abs() < 2e-6,
                    "q: row {row} head {head} column {c}: expected {expected}, got {} ({shape:?})",
                    after[c]
                );
            }
        }
    }
}

/// Compares the layer's part of the pool with the keys and values of all rows; nothing else was written.
fn check_pool(
    pool: &[u8],
    (k, v): (&[f32], &[f32]),
    shape: &Shape,
    element: KvElement,
    spec: Option<&RopeSpec>,
) {
    let (heads, width) = (shape.kv_heads, shape.width);
    let block_bytes = pool.len() / BLOCKS;
    let half_bytes = heads * BLOCK_TOKENS * width * element.bytes();
    let scales_at = (2 * half_bytes).next_multiple_of(16);
    let stride = shape.margin + heads * width;
    let mut written = vec![false; pool.len()];
    for row in (0..OWNERS.len()).filter(|&row| OWNERS[row] != NO_SEQUENCE) {
        let position = AT[row] as usize;
        let block = TABLE[OWNERS[row] as usize * 3 + position / BLOCK_TOKENS] as usize * block_bytes;
        for (is_value, head) in [false, true]
            .into_iter()
            .flat_map(|kind| (0..heads).map(move |head| (kind, head)))
        {
            let source =
                &(if is_value { v } else { k })[row * stride + shape.margin + head * width..][..width];
            let expected = rotated(source, spec.filter(|_| !is_value), AT[row]);
            let place = head * BLOCK_TOKENS + position % BLOCK_TOKENS;
            let mut scale = 1.0;
            if element == KvElement::Int8 {
                let at = block + scales_at + (usize::from(is_value) * heads * BLOCK_TOKENS + place) * 4;
                written[at..at + 4].fill(true);
                scale = f64::from(f32::from_le_bytes(
                    pool[at..at + 4].try_into().expect("four bytes"),
                ));
                let largest = expected.iter().fold(0.0_f64, |largest, x| largest.max(x.abs()));
                assert!(
                    (scale - largest / 127.0).abs() <= 1e-6 * scale,
                    "scale {scale}, largest {largest}"
                );
            }
            for (c, expected) in expected.into_iter().enumerate() {
                let at = block + usize::from(is_value) * half_bytes + (place * width + c) * element.bytes();
                written[at..at + element.bytes()].fill(true);
                let (got, tolerance) = stored(pool, at, element, scale, expected);
                assert!(
                    (got - expected).abs() <= tolerance,
                    "{element:?} value {is_value} row {row} head {head} column {c}: expected {expected}, got {got} ({shape:?})"
                );
            }
        }
    }
    let untouched = pool
        .iter()
        .zip(&written)
        .all(|(byte, written)| *written || *byte == 0xff);
    assert!(untouched, "{element:?}: wrote elsewhere in the pool ({shape:?})");
}

fn check(shape: Shape, element: KvElement, seed: u64) {
    let rig = Rig::new(seed);
    let layer = AttentionLayer {
        heads: shape.heads as u32,
        kv_heads: shape.kv_heads as u32,
        head_width: shape.width as u32,
        scale: 1.0,
        causal: true,
        sliding_window: None,
        soft_cap: None,
    };
    // Another layer's part lies between, which nobody touches.
    let layer_bytes = KvLayer::bytes_per_block(&layer, BLOCK_TOKENS as u32, element);
    let block_bytes = layer_bytes + 48;
    let pool = rig.poisoned::<u8>(BLOCKS * block_bytes);
    let kv = KvLayer::new(
        pool.at(),
        block_bytes as u64,
        &layer,
        BLOCK_TOKENS as u32,
        element,
    );
    let widths = [shape.heads, shape.kv_heads, shape.kv_heads].map(|heads| heads * shape.width);
    let buffers: Vec<Vec<f32>> = (1..)
        .zip(widths)
        .map(|(seed, width)| numbers(OWNERS.len() * (shape.margin + width), seed, 0.2))
        .collect();
    let memory: Vec<_> = buffers.iter().map(|buffer| rig.memory(buffer)).collect();
    let view = |i: usize| {
        let stride = (shape.margin + widths[i]) as u32;
        memory[i].view(stride, shape.margin as u32, widths[i] as u32)
    };
    let specs = shape
        .pairs
        .map(|pairs| pairs.map(|pairs| spec(pairs, shape.pairing)));
    let angles = specs
        .each_ref()
        .map(|spec| spec.as_ref().map(|spec| rig.memory(&table(spec, POSITIONS))));
    let rotation = |i: usize| {
        angles[i].as_ref().map(|angles| Rotation {
            table: angles.at(),
            pairs: shape.pairs[i].expect("a table has pairs") as u32,
            pairing: shape.pairing,
        })
    };
    let tables = Tables::new(&rig);
    let launch = rope_append(
        (view(0), view(1), view(2)),
        (rotation(0), rotation(1)),
        kv,
        OWNERS.len() as u32,
        &tables.addresses(),
    );
    // SAFETY: buffers have a row per owner, tables and pool are as large as their shapes say.
    unsafe { rig.enqueue(&[launch]) }.expect("it runs");
    check_q(&buffers[0], &memory[0].read(), &shape, specs[0].as_ref());
    assert!(memory[1].read() == buffers[1] && memory[2].read() == buffers[2]);
    check_pool(
        &pool.read(),
        (&buffers[1], &buffers[2]),
        &shape,
        element,
        specs[1].as_ref(),
    );
}

fn shapes() -> Vec<Shape> {
    let mut shapes = Vec::new();
    for pairing in [RopePairing::Half, RopePairing::Interleaved] {
        for (heads, kv_heads, width, pairs, margin) in [
            (9, 3, 64, [Some(32), Some(32)], 0),
            (4, 2, 256, [Some(32), Some(64)], 4),
            (3, 1, 64, [None, Some(32)], 0),
            (3, 1, 20, [Some(8), None], 4),
            (2, 2, 64, [None, None], 0),
            (3, 2, 13, [Some(5), Some(6)], 1),
            (2, 1, 12, [Some(6), Some(6)], 0),
        ] {
            shapes.push(Shape {
                heads,
                kv_heads,
                width,
                pairs,
                pairing,
                margin,
            });
        }
    }
    shapes
}

#[test]
fn queries_are_rotated_and_keys_and_values_are_where_the_block_table_says() {
    for (seed, shape) in (0..).zip(shapes()) {
        for element in KvElement::ALL {
            check(shape, element, seed);
        }
    }
}

#[test]
fn rope_alone_rotates_in_place() {
    for (seed, shape) in (0..).zip(shapes()) {
        let Some(pairs) = shape.pairs[0] else { continue };
        let rig = Rig::new(seed);
        let spec = spec(pairs, shape.pairing);
        let angles = rig.memory(&table(&spec, POSITIONS));
        let columns = shape.heads * shape.width;
        let before = numbers(OWNERS.len() * (shape.margin + columns), 1, 0.2);
        let memory = rig.memory(&before);
        let x = memory.view(
            (shape.margin + columns) as u32,
            shape.margin as u32,
            columns as u32,
        );
        let rotation = Rotation {
            table: angles.at(),
            pairs: pairs as u32,
            pairing: shape.pairing,
        };
        let tables = Tables::new(&rig);
        let rows = OWNERS.len() as u32;
        let launch = rope(x, rotation, shape.width as u32, rows, &tables.addresses());
        // SAFETY: as above.
        unsafe { rig.enqueue(&[launch]) }.expect("it runs");
        check_q(&before, &memory.read(), &shape, Some(&spec));
    }
}

#[test]
fn what_is_stored_is_finite() {
    for element in KvElement::ALL {
        let rig = Rig::new(1);
        let layer = AttentionLayer {
            heads: 1,
            kv_heads: 1,
            head_width: 8,
            scale: 1.0,
            causal: true,
            sliding_window: None,
            soft_cap: None,
        };
        let block_bytes = KvLayer::bytes_per_block(&layer, 4, element);
        let pool = rig.poisoned::<u8>(BLOCKS * block_bytes);
        let kv = KvLayer::new(pool.at(), block_bytes as u64, &layer, 4, element);
        let x = [
            f32::NAN,
            f32::INFINITY,
            f32::NEG_INFINITY,
            1e30,
            -1e-30,
            0.0,
            70_000.0,
            -500.0,
        ];
        let memory = rig.memory(&x.repeat(OWNERS.len()));
        let view = memory.view(8, 0, 8);
        let tables = Tables::new(&rig);
        let launch = rope_append(
            (view, view, view),
            (None, None),
            kv,
            OWNERS.len() as u32,
            &tables.addresses(),
        );
        // SAFETY: as above.
        unsafe { rig.enqueue(&[launch]) }.expect("it runs");
        let pool = pool.read();
        // The first token of the first sequence: block 5, place 0.
        let first = 5 * block_bytes;
        let scale = match element {
            KvElement::Int8 => f64::from(f32::from_le_bytes(
                pool[first + 64..first + 68].try_into().expect("four bytes"),
            )),
            _ => 1.0,
        };
        for (c, x) in x.iter().enumerate() {
            let (got, _) = stored(&pool, first + c * element.bytes(), element, scale, 0.0);
            assert!(got.is_finite(), "{element:?}: {x} became {got}");
        }
    }
}
