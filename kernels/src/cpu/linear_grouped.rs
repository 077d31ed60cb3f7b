//! Panels of `Q4_K`, `Q5_K`, `Q6_K`, `Q5_0` and `Q5_1`: nibbles, the bits above them in lines of their own, and the
//! numbers that scale them as they are stored.
//!
//! A group is 32 columns of 16 rows, a super-block 8 groups (one group in `Q5_0` and `Q5_1`). A super-block begins with
//! 16 f16 `d`, 16 f16 `m` and, in K-quants, two times 16 signed bytes for each group: scale and minimum, or the scales of
//! the first and of the last 16 columns (`Q6_K`). Then follow the groups: four lines of nibbles as in `Q4_0`, and a line
//! with a fifth bit, or two with a fifth and sixth. Bit `k` of a lane's byte `j` belongs to columns `4 k + j`; of two
//! lines the first has the first 16 columns, in pairs of bits. A super-block so takes
//! what it takes in a file and at most a tenth more.
#![expect(
    unsafe_op_in_unsafe_fn,
    reason = "kernel bodies are covered by the contracts of Simd and PanelDot"
)]

use std::marker::PhantomData;

use galerne_core::dtype::DType;
use half::f16;

use super::linear::{BLOCK, FloatRows, PanelDot, broadcast, nibbles};
use super::linear_integer::{Codes, Numbers, Quantized};
use super::memory::LINE_BYTES;
use super::simd::Simd;
use super::weights::LANES;
use crate::quant::groups::Group;

/// Against f32 activations.
pub(crate) struct GroupedExact<F>(PhantomData<F>);

/// A format, for kernels compiled for it.
pub(crate) trait Format {
    const LAYOUT: GroupLayout;
}

/// How panels of a format hold `w = d scale (q + offset) + m minimum`.
#[derive(Clone, Copy)]
pub(crate) struct GroupLayout {
    /// In a super-block.
    groups: usize,
    /// Lines of bits above the nibbles: one or two bits for each element.
    upper: usize,
    /// Whether each 16 columns have a scale.
    halves: bool,
    /// What is added to a stored code.
    offset: i8,
    /// Whether there is an `m`.
    minimum: bool,
}

pub(crate) struct Q4K;
pub(crate) struct Q5K;
pub(crate) struct Q6K;
pub(crate) struct Q5_0;
pub(crate) struct Q5_1;

impl Format for Q4K {
    const LAYOUT: GroupLayout = GroupLayout {
        groups: 8,
        upper: 0,
        halves: false,
        offset: 0,
        minimum: true,
    };
}

impl Format for Q5K {
    const LAYOUT: GroupLayout = GroupLayout {
        upper: 1,
        ..Q4K::LAYOUT
    };
}

impl Format for Q6K {
    const LAYOUT: GroupLayout = GroupLayout {
        groups: 8,
        upper: 2,
        halves: true,
        offset: -32,
        minimum: false,
    };
}

impl Format for Q5_0 {
    const LAYOUT: GroupLayout = GroupLayout {
        offset: -16,
        minimum: false,
        ..Q5_1::LAYOUT
    };
}

impl Format for Q5_1 {
    const LAYOUT: GroupLayout = GroupLayout {
        groups: 1,
        ..Q5K::LAYOUT
    };
}

impl GroupLayout {
    /// The layout of a dtype; `None` if it has panels of another kind.
    pub(crate) const fn of(dtype: DType) -> Option<Self> {
        match dtype {
            DType::Q4K => Some(Q4K::LAYOUT),
            DType::Q5K => Some(Q5K::LAYOUT),
            DType::Q6K => Some(Q6K::LAYOUT),
            DType::Q5_0 => Some(Q5_0::LAYOUT),
            DType::Q5_1 => Some(Q5_1::LAYOUT),
            _ => None,
        }
    }

    /// Bytes of a panel of `width` columns.
    pub(crate) const fn panel_bytes(self, width: usize) -> usize {
        width / BLOCK / self.groups * self.super_bytes()
    }

    const fn lines_at(self, group: usize) -> usize {
        let bytes = if self.groups == 1 {
            0
        } else {
            self.groups * 2 * LANES
        };
        LINE_BYTES + bytes + group * (4 + self.upper) * LINE_BYTES
    }

    const fn bytes_at(self, group: usize) -> usize {
        LINE_BYTES + group * 2 * LANES
    }

    const fn super_bytes(self) -> usize {
        self.lines_at(self.groups)
    }

    /// The line and the first bit of the upper bits of the columns `4 quad .. 4 quad + 4`.
    const fn upper_at(self, quad: usize) -> (usize, usize) {
        if self.upper == 1 {
            (0, quad)
        } else {
            (quad / 4, quad % 4 * 2)
        }
    }

    /// Writes groups of a row as lane `lane` of a panel of zeros.
    pub(crate) fn pack(self, groups: impl Iterator<Item = Group>, panel: &mut [u8], lane: usize) {
        for (at, group) in groups.enumerate() {
            let g = at % self.groups;
            let panel = &mut panel[at / self.groups * self.super_bytes()..][..self.super_bytes()];
            for (n, number) in [group.d, group.m].into_iter().enumerate() {
                panel[2 * LANES * n + 2 * lane..][..2].copy_from_slice(&number.to_le_bytes());
            }
            if self.groups > 1 {
                let second = if self.halves {
                    group.scales[1]
                } else {
                    group.minimum
                };
                for (n, number) in [group.scales[0], second].into_iter().enumerate() {
                    panel[self.bytes_at(g) + LANES * n + lane] = number.cast_unsigned();
                }
            }
            self.pack_codes(&group, &mut panel[self.lines_at(g)..], lane);
        }
    }

    fn pack_codes(self, group: &Group, lines: &mut [u8], lane: usize) {
        for (k, codes) in group.codes.chunks_exact(4).enumerate() {
            let code = |j: usize| codes[j].wrapping_sub(self.offset).cast_unsigned();
            let quad = u32::from_le_bytes([code(0), code(1), code(2), code(3)]);
            join(lines, k % 4, lane, (quad & 0x0f0f_0f0f) << (k / 4 * 4));
            if self.upper > 0 {
                let (line, bit) = self.upper_at(k);
                join(lines, 4 + line, lane, (quad >> 4 & 0x0f0f_0f0f) << bit);
            }
        }
    }

    /// Group `at` of lane `lane`: the inverse of [`Self::pack`].
    pub(crate) fn unpack(self, panel: &[u8], at: usize, lane: usize) -> Group {
        let g = at % self.groups;
        let panel = &panel[at / self.groups * self.super_bytes()..];
        let number = |n: usize| {
            let from = 2 * LANES * n + 2 * lane;
            f16::from_le_bytes([panel[from], panel[from + 1]])
        };
        let byte = |n: usize| match self.groups {
            1 => 1,
            _ => panel[self.bytes_at(g) + LANES * n + lane].cast_signed(),
        };
        let lines = &panel[self.lines_at(g)..];
        let code = |i: usize| {
            let byte = |line: usize| lines[line * LINE_BYTES + 4 * lane + i % 4];
            let low = byte(i % 16 / 4) >> (i / 16 * 4) & 15;
            let (line, bit) = self.upper_at(i / 4);
            let upper = match self.upper {
                0 => 0,
                bits => byte(4 + line) >> bit & ((1 << bits) - 1),
            };
            (low | upper << 4).cast_signed().wrapping_add(self.offset)
        };
        Group {
            codes: std::array::from_fn(code),
            d: number(0),
            scales: [byte(0), byte(usize::from(self.halves))],
            m: number(1),
            minimum: byte(1),
        }
    }
}

fn join(lines: &mut [u8], line: usize, lane: usize, bits: u32) {
    let to = &mut lines[line * LINE_BYTES + 4 * lane..][..4];
    for (to, byte) in to.iter_mut().zip(bits.to_le_bytes()) {
        *to |= byte;
    }
}

/// The numbers of block `block` of a panel, and its lines.
#[inline(always)]
unsafe fn numbers<S: Simd, F: Format>(w: *const u8, block: usize) -> (Numbers<S>, *const u8) {
    let layout = F::LAYOUT;
    let w = w.add(block / layout.groups * layout.super_bytes());
    let g = block % layout.groups;
    let d = S::load_f16(w.cast());
    let mut numbers = Numbers::new(d, S::splat(0.0));
    if F::LAYOUT.minimum {
        numbers.m = S::load_f16(w.add(2 * LANES).cast());
    }
    if layout.groups > 1 {
        let bytes = w.add(layout.bytes_at(g)).cast::<i8>();
        let second = S::load_i8(bytes.add(LANES));
        numbers.d = [S::mul(d, S::load_i8(bytes)); 2];
        if layout.halves {
            numbers.d[1] = S::mul(d, second);
        } else {
            numbers.m = S::mul(numbers.m, second);
        }
    }
    (numbers, w.add(layout.lines_at(g)))
}

/// The codes of a group, 4 columns in each vector, in order.
#[inline(always)]
unsafe fn codes<S: Simd, F: Format>(lines: *const u8) -> [S::B; 8] {
    let mut codes = nibbles::<S>(lines);
    if F::LAYOUT.upper == 1 {
        let bits = S::load_bytes(lines.add(4 * LINE_BYTES));
        for (k, code) in codes.iter_mut().enumerate() {
            *code = S::join_bits(*code, bits, 4 - k as i32, 1 << 4);
        }
    }
    if F::LAYOUT.upper == 2 {
        let bits = [
            S::load_bytes(lines.add(4 * LINE_BYTES)),
            S::load_bytes(lines.add(5 * LINE_BYTES)),
        ];
        for (k, code) in codes.iter_mut().enumerate() {
            *code = S::join_bits(*code, bits[k / 4], 4 - 2 * (k as i32 % 4), 3 << 4);
        }
    }
    codes
}

impl<F: Format> Quantized for F {
    const CODES: Codes = if F::LAYOUT.upper == 0 {
        Codes::Nibbles
    } else {
        Codes::Small
    };
    const OFFSET: i8 = F::LAYOUT.offset;
    const HALVES: bool = F::LAYOUT.halves;
    const MINIMUM: bool = F::LAYOUT.minimum;

    #[inline(always)]
    unsafe fn numbers<S: Simd>(w: *const u8, block: usize) -> Numbers<S> {
        numbers::<S, F>(w, block).0
    }

    #[inline(always)]
    unsafe fn codes<S: Simd>(w: *const u8, block: usize) -> [S::B; 8] {
        codes::<S, F>(numbers::<S, F>(w, block).1)
    }
}

impl<F: Format> PanelDot for GroupedExact<F> {
    type X = FloatRows;
    #[inline(always)]
    unsafe fn block<S: Simd, const M: usize>(
        w: *const u8,
        x: &FloatRows,
        row: usize,
        block: usize,
        _columns: usize,
        sums: &mut [S::F; M],
    ) {
        let (numbers, lines) = numbers::<S, F>(w, block);
        let offset = S::splat(f32::from(F::LAYOUT.offset));
        let mut part = [S::splat(0.0); M];
        for (c, code) in codes::<S, F>(lines).into_iter().enumerate() {
            for j in 0..4 {
                let code = S::add(S::byte(code, j as i32), offset);
                let mut a = S::mul(code, numbers.d[c / 4]);
                if F::LAYOUT.minimum {
                    a = S::add(a, numbers.m);
                }
                for (r, part) in part.iter_mut().enumerate() {
                    *part = S::fma(a, broadcast::<S>(x, row + r, 32 * block + 4 * c + j), *part);
                }
            }
        }
        for (sum, part) in sums.iter_mut().zip(part) {
            *sum = S::add(*sum, part);
        }
    }
}
