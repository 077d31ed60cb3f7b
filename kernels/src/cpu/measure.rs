//! What this machine can do at most: bytes read from memory per second, and arithmetic per second of each kind the
//! kernels use. Knows no kernels; they are compared with these figures.

use std::hint::black_box;
use std::num::NonZeroUsize;
use std::sync::Barrier;
use std::time::{Duration, Instant};

use super::isa::Isa;
use super::measure_loops as loops;
use super::memory::Memory;
use crate::device::DeviceError;

/// Numbers of streams a thread may read at once.
pub const STREAMS: [usize; 4] = [1, 2, 4, 8];
/// Streams begin at cache lines.
const LINE_BYTES: usize = 64;
/// Loops between two looks at the clock: a few microseconds.
const LOOPS: usize = 4_096;

/// A kind of arithmetic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// Fused multiply-add of f32 (a product and a sum where the machine has none).
    F32,
    /// Dot products of unsigned and signed bytes, summed in i32.
    Int8,
    /// Dot products of bf16, summed in f32.
    Bf16,
    /// Products of tiles of bytes, in registers.
    TileInt8,
    /// Products of tiles of bf16, in registers.
    TileBf16,
}

impl Arithmetic {
    /// All kinds.
    pub const ALL: [Self; 5] = [Self::F32, Self::Int8, Self::Bf16, Self::TileInt8, Self::TileBf16];

    /// The name shown to operators.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32 multiply-add",
            Self::Int8 => "int8 dot product",
            Self::Bf16 => "bf16 dot product",
            Self::TileInt8 => "int8 tile product",
            Self::TileBf16 => "bf16 tile product",
        }
    }
}

/// Memory that is read to measure how fast that goes, on the same kind of pages as weights.
#[derive(Debug)]
pub struct ReadBuffer {
    memory: Memory,
}

impl ReadBuffer {
    /// A buffer of `size_bytes`, all of it touched.
    ///
    /// # Errors
    /// The system does not give the memory.
    pub fn new(size_bytes: usize) -> Result<Self, DeviceError> {
        let memory = Memory::zeroed("buffer to read", size_bytes)?;
        // SAFETY: the memory is that long and nobody else has it yet. Written, because pages that were never
        // written are all the same page of zeros, which is in the cache.
        unsafe { memory.ptr().write_bytes(1, size_bytes) };
        Ok(Self { memory })
    }

    /// Bytes per second, in units of 1e9, of reading the whole buffer once by so many threads, each reading its own
    /// part in `streams` (one of [`STREAMS`]) places at once. The best of several passes within about `time`.
    #[must_use]
    pub fn gb_per_s(&self, isa: Isa, threads: NonZeroUsize, streams: usize, time: Duration) -> f64 {
        let part = self.memory.size_bytes() / threads / (streams * LINE_BYTES) * (streams * LINE_BYTES);
        let pass = |thread: usize| {
            // SAFETY: the parts of all threads lie inside the buffer, which nobody writes any more.
            let bytes = unsafe { std::slice::from_raw_parts(self.memory.ptr().add(thread * part), part) };
            black_box(loops::read(isa.min(Isa::detect()), streams, bytes));
        };
        let best = best_time(threads, time, &pass);
        (part * threads.get()) as f64 / best.as_secs_f64() / 1e9
    }
}

/// Operations per second (a product and its sum count as two), in units of 1e9, of so many threads that work in
/// registers only. The best of several passes within about `time`. `None` if the instruction set, or this machine,
/// has no instruction for it.
#[must_use]
pub fn gop_per_s(arithmetic: Arithmetic, isa: Isa, threads: NonZeroUsize, time: Duration) -> Option<f64> {
    let kernel = loops::arithmetic(arithmetic, isa.min(Isa::detect()))?;
    // Long enough that starting together does not matter.
    let calls = 64;
    let pass = |_: usize| {
        for _ in 0..calls {
            black_box((kernel.run)(LOOPS));
        }
    };
    let best = best_time(threads, time, &pass);
    let operations = kernel.operations_per_loop * LOOPS * calls * threads.get();
    Some(operations as f64 / best.as_secs_f64() / 1e9)
}

/// The shortest time in which all threads did one pass, of the passes that fit into `time` and at least three.
fn best_time(threads: NonZeroUsize, time: Duration, pass: &(impl Fn(usize) + Sync)) -> Duration {
    let barrier = Barrier::new(threads.get());
    let mut best = Duration::MAX;
    let end = Instant::now() + time;
    for round in 0.. {
        if round >= 3 && Instant::now() >= end {
            break;
        }
        let timed = |thread: usize| {
            barrier.wait();
            let begin = Instant::now();
            pass(thread);
            (begin, Instant::now())
        };
        let times = std::thread::scope(|scope| {
            let others: Vec<_> = (1..threads.get())
                .map(|thread| scope.spawn(move || timed(thread)))
                .collect();
            let mine = timed(0);
            let others = others
                .into_iter()
                .map(|other| other.join().expect("passes do not panic"));
            std::iter::once(mine).chain(others).collect::<Vec<_>>()
        });
        let first = times.iter().map(|(begin, _)| *begin).min();
        let last = times.iter().map(|(_, end)| *end).max();
        if let (Some(first), Some(last)) = (first, last) {
            best = best.min(last - first);
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHORT: Duration = Duration::from_millis(5);

    #[test]
    fn every_instruction_set_of_this_machine_reads_the_whole_buffer() {
        // All bytes are 1, so the sum of all 64-bit words tells whether each was read exactly once.
        let bytes = vec![1_u8; 8 * LINE_BYTES * 3];
        let words = bytes.len() as u64 / 8;
        for isa in Isa::ALL.into_iter().filter(|isa| *isa <= Isa::detect()) {
            for streams in STREAMS {
                let sum = loops::read(isa, streams, &bytes);
                assert_eq!(
                    sum,
                    words.wrapping_mul(0x0101_0101_0101_0101),
                    "{isa}, {streams} streams"
                );
            }
        }
    }

    #[test]
    fn figures_are_of_a_machine_that_exists() {
        let one = NonZeroUsize::MIN;
        let buffer = ReadBuffer::new(4 << 20).expect("memory");
        let read = buffer.gb_per_s(Isa::detect(), one, 4, SHORT);
        assert!((0.1..10_000.0).contains(&read), "{read} GB/s");
        for isa in Isa::ALL {
            // No core does more than 32 kB of operands per cycle at 10 GHz; nothing measured may be optimised away.
            for arithmetic in Arithmetic::ALL {
                let rate = gop_per_s(arithmetic, isa, one, SHORT);
                assert!(
                    rate.is_none_or(|rate| (0.1..30_000.0).contains(&rate)),
                    "{arithmetic:?} on {isa}: {rate:?} GOP/s"
                );
            }
            assert!(gop_per_s(Arithmetic::F32, isa, one, SHORT).is_some());
        }
    }
}
