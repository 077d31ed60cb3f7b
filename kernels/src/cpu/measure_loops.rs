//! The loops that are timed to know a machine's limits: reading memory in several streams, and multiply-adds in
//! registers, for each instruction set.

use std::hint::black_box;

use super::isa::Isa;
use super::measure::Arithmetic;

/// Independent chains of multiply-adds: latency times throughput of any core, and few enough for 16 registers.
const CHAINS: usize = 12;
/// One cache line.
type Line = [u64; 8];

/// A loop over one kind of arithmetic.
#[derive(Clone, Copy)]
pub(crate) struct ArithmeticLoop {
    /// Runs so many rounds; the result depends on all of them.
    pub(crate) run: fn(usize) -> f32,
    /// Operations of a round, a product and its sum counted as two.
    pub(crate) operations_per_loop: usize,
}

/// The sum of all 64-bit words of `bytes`, whose length is a multiple of `streams` cache lines. Reads in `streams`
/// (1, 2, 4 or 8) places at once.
///
/// # Panics
/// If the machine lacks the instruction set.
pub(crate) fn read(isa: Isa, streams: usize, bytes: &[u8]) -> u64 {
    assert!(
        isa <= Isa::detect(),
        "read with {isa}: this machine has no more than {}",
        Isa::detect()
    );
    match streams {
        1 => read_streams::<1>(isa, bytes),
        2 => read_streams::<2>(isa, bytes),
        4 => read_streams::<4>(isa, bytes),
        _ => read_streams::<8>(isa, bytes),
    }
}

fn read_streams<const STREAMS: usize>(isa: Isa, bytes: &[u8]) -> u64 {
    let lines: &[Line] = bytemuck::cast_slice(bytes);
    match isa {
        Isa::Portable => sum_lines::<STREAMS>(lines),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: `read` has checked that the machine has the instructions.
        Isa::Avx2 => unsafe { x86::sum_lines_avx2::<STREAMS>(lines) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => unsafe { x86::sum_lines_avx512::<STREAMS>(lines) },
        #[cfg(not(target_arch = "x86_64"))]
        _ => sum_lines::<STREAMS>(lines),
    }
}

fn sum_lines<const STREAMS: usize>(lines: &[Line]) -> u64 {
    let each = lines.len() / STREAMS;
    let streams: [&[Line]; STREAMS] = std::array::from_fn(|stream| &lines[stream * each..][..each]);
    let mut sums = [[0_u64; 8]; STREAMS];
    for at in 0..each {
        for (sum, stream) in sums.iter_mut().zip(streams) {
            for (sum, word) in sum.iter_mut().zip(stream[at]) {
                *sum = sum.wrapping_add(word);
            }
        }
    }
    sums.iter().flatten().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// The loop for one kind of arithmetic, or `None` if the instruction set or this machine has no instruction for it.
pub(crate) fn arithmetic(arithmetic: Arithmetic, isa: Isa) -> Option<ArithmeticLoop> {
    match isa {
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 | Isa::Avx512 | Isa::Avx512Bf16 | Isa::Amx => x86::arithmetic(arithmetic, isa),
        _ => (arithmetic == Arithmetic::F32).then_some(ArithmeticLoop {
            run: multiply_add,
            operations_per_loop: 2 * 4 * CHAINS,
        }),
    }
}

fn multiply_add(rounds: usize) -> f32 {
    let (a, b) = (black_box([0.5_f32; 4]), black_box([0.25_f32; 4]));
    let mut sums: [[f32; 4]; CHAINS] = std::array::from_fn(|chain| black_box([chain as f32; 4]));
    for _ in 0..rounds {
        for sum in &mut sums {
            for lane in 0..4 {
                sum[lane] = sum[lane] * a[lane] + b[lane];
            }
        }
    }
    sums.iter().flatten().sum()
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use super::super::amx::{self, Configured};
    use super::{Arithmetic, ArithmeticLoop, CHAINS, Isa, Line};

    /// In intrinsics, as below: what a compiler makes of a plain loop depends on the profile it is built with.
    #[target_feature(enable = "avx2")]
    pub(super) fn sum_lines_avx2<const STREAMS: usize>(lines: &[Line]) -> u64 {
        let each = lines.len() / STREAMS;
        let mut sums = [[_mm256_setzero_si256(); 2]; STREAMS];
        for at in 0..each {
            for (stream, sum) in sums.iter_mut().enumerate() {
                // SAFETY: at most `STREAMS * each` lines are read.
                let [low, high] = unsafe {
                    let line = lines.as_ptr().add(stream * each + at).cast::<__m256i>();
                    [_mm256_loadu_si256(line), _mm256_loadu_si256(line.add(1))]
                };
                sum[0] = _mm256_add_epi64(sum[0], low);
                sum[1] = _mm256_add_epi64(sum[1], high);
            }
        }
        let mut words = [0_u64; 4];
        for sum in sums.as_flattened() {
            let mut lanes = [0_u64; 4];
            // SAFETY: the array is as long as the vector.
            unsafe { _mm256_storeu_si256(lanes.as_mut_ptr().cast(), *sum) };
            words = std::array::from_fn(|lane| words[lane].wrapping_add(lanes[lane]));
        }
        words.into_iter().fold(0, u64::wrapping_add)
    }

    #[target_feature(enable = "avx512f")]
    pub(super) fn sum_lines_avx512<const STREAMS: usize>(lines: &[Line]) -> u64 {
        let each = lines.len() / STREAMS;
        let mut sums = [_mm512_setzero_si512(); STREAMS];
        for at in 0..each {
            for (stream, sum) in sums.iter_mut().enumerate() {
                // SAFETY: at most `STREAMS * each` lines are read.
                let line = unsafe { _mm512_loadu_si512(lines.as_ptr().add(stream * each + at).cast()) };
                *sum = _mm512_add_epi64(*sum, line);
            }
        }
        let mut all = _mm512_setzero_si512();
        for sum in sums {
            all = _mm512_add_epi64(all, sum);
        }
        _mm512_reduce_add_epi64(all).cast_unsigned()
    }

    /// Rounds of products of whole tiles in registers, or `None` if this is no arithmetic of tiles.
    fn tiles(arithmetic: Arithmetic) -> Option<ArithmeticLoop> {
        let (run, columns): (fn(usize) -> f32, usize) = match arithmetic {
            // SAFETY: only called where the machine has AMX.
            Arithmetic::TileInt8 => (|rounds| unsafe { tile_rounds(rounds, amx::rounds_int8) }, 64),
            // SAFETY: as above.
            Arithmetic::TileBf16 => (|rounds| unsafe { tile_rounds(rounds, amx::rounds_bf16) }, 32),
            _ => return None,
        };
        Some(ArithmeticLoop {
            run,
            operations_per_loop: 2 * columns * amx::TILE_RESULTS * amx::ROUND_PRODUCTS,
        })
    }

    /// # Safety
    /// This process can execute AMX.
    unsafe fn tile_rounds(rounds: usize, run: unsafe fn(usize)) -> f32 {
        // SAFETY: by contract; nobody else uses this thread's tiles.
        unsafe {
            let _tiles = Configured::new();
            run(rounds.max(1));
        }
        0.0
    }

    pub(super) fn arithmetic(arithmetic: Arithmetic, isa: Isa) -> Option<ArithmeticLoop> {
        // Whatever the caller says: the loops below rely on this.
        let isa = isa.min(Isa::detect());
        if isa == Isa::Amx
            && let Some(tiles) = tiles(arithmetic)
        {
            return Some(tiles);
        }
        // Whatever has tiles has vectors too.
        let isa = isa.min(Isa::Avx512Bf16);
        let (run, lanes): (fn(usize) -> f32, usize) = match (isa, arithmetic) {
            // SAFETY: the machine has at least AVX-512 F and VNNI.
            (Isa::Avx512 | Isa::Avx512Bf16, Arithmetic::F32) => (|rounds| unsafe { f32_avx512(rounds) }, 16),
            // SAFETY: as above.
            (Isa::Avx512 | Isa::Avx512Bf16, Arithmetic::Int8) => {
                // SAFETY: as above.
                (|rounds| unsafe { int8_avx512(rounds) }, 64)
            }
            (Isa::Avx512 | Isa::Avx512Bf16, Arithmetic::Bf16) if is_x86_feature_detected!("avx512bf16") => {
                // SAFETY: just checked.
                (|rounds| unsafe { bf16_avx512(rounds) }, 32)
            }
            // SAFETY: the machine has at least AVX2 and FMA.
            (Isa::Avx2, Arithmetic::F32) => (|rounds| unsafe { f32_avx2(rounds) }, 8),
            // SAFETY: as above.
            (Isa::Avx2, Arithmetic::Int8) => (|rounds| unsafe { int8_avx2(rounds) }, 32),
            _ => return None,
        };
        Some(ArithmeticLoop {
            run,
            operations_per_loop: 2 * lanes * CHAINS,
        })
    }

    #[target_feature(enable = "avx512f")]
    fn f32_avx512(rounds: usize) -> f32 {
        let (a, b) = (_mm512_set1_ps(black_box(0.5)), _mm512_set1_ps(black_box(0.25)));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = _mm512_set1_ps(black_box(chain as f32));
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_fmadd_ps(*sum, a, b);
            }
        }
        sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
    }

    #[target_feature(enable = "avx512f,avx512vnni")]
    fn int8_avx512(rounds: usize) -> f32 {
        let (a, b) = (_mm512_set1_epi8(black_box(3)), _mm512_set1_epi8(black_box(-2)));
        let mut sums = [_mm512_setzero_si512(); CHAINS];
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = _mm512_set1_epi32(black_box(chain as i32));
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbusd_epi32(*sum, a, b);
            }
        }
        sums.iter().map(|sum| _mm512_reduce_add_epi32(*sum) as f32).sum()
    }

    #[target_feature(enable = "avx512f,avx512bf16")]
    fn bf16_avx512(rounds: usize) -> f32 {
        let ones = _mm512_set1_ps(black_box(1.0));
        let (a, b) = (_mm512_cvtne2ps_pbh(ones, ones), _mm512_cvtne2ps_pbh(ones, ones));
        let mut sums = [_mm512_setzero_ps(); CHAINS];
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = _mm512_set1_ps(black_box(chain as f32));
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm512_dpbf16_ps(*sum, a, b);
            }
        }
        sums.iter().map(|sum| _mm512_reduce_add_ps(*sum)).sum()
    }

    #[target_feature(enable = "avx2,fma")]
    fn f32_avx2(rounds: usize) -> f32 {
        let (a, b) = (_mm256_set1_ps(black_box(0.5)), _mm256_set1_ps(black_box(0.25)));
        let mut sums = [_mm256_setzero_ps(); CHAINS];
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = _mm256_set1_ps(black_box(chain as f32));
        }
        for _ in 0..rounds {
            for sum in &mut sums {
                *sum = _mm256_fmadd_ps(*sum, a, b);
            }
        }
        sums.iter().map(|sum| _mm256_cvtss_f32(*sum)).sum()
    }

    /// Without VNNI a dot product is three instructions.
    #[target_feature(enable = "avx2")]
    fn int8_avx2(rounds: usize) -> f32 {
        let mut a = _mm256_set1_epi8(black_box(3));
        let mut b = [_mm256_setzero_si256(); CHAINS];
        for b in &mut b {
            *b = _mm256_set1_epi8(black_box(-2));
        }
        let ones = _mm256_set1_epi16(black_box(1));
        let mut sums = [_mm256_setzero_si256(); CHAINS];
        for (chain, sum) in sums.iter_mut().enumerate() {
            *sum = _mm256_set1_epi32(black_box(chain as i32));
        }
        for _ in 0..rounds {
            // The product does not depend on the sum: unless an operand changes it would be made only once.
            a = black_box(a);
            for (sum, b) in sums.iter_mut().zip(b) {
                let pairs = _mm256_maddubs_epi16(a, b);
                *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(pairs, ones));
            }
        }
        sums.iter()
            .map(|sum| _mm256_extract_epi32::<0>(*sum) as f32)
            .sum()
    }
}
