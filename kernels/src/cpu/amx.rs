//! AMX: whether this process may use tiles, how they are configured, and the products of tiles that kernels are made of.
//! Knows no weights. Written as assembly, since Rust's intrinsics for it are not stable.
//!
//! A tile is up to 16 rows of up to 64 bytes. Tiles belong to a thread and keep their contents between instructions, so
//! each function here loads what it multiplies and stores what comes out; only their shapes, the configuration, last.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::marker::PhantomData;

/// Rows of a tile of activations and of results.
pub(crate) const TILE_ROWS: usize = 16;
/// Results of a product: 16 rows of 16.
pub(crate) const TILE_RESULTS: usize = TILE_ROWS * 16;
/// Bytes from one row of weights or results to the next.
const LINE: usize = 64;

/// Whether this process may use int8 and bf16 tiles. Asks the system for it: tile registers are state that a process is
/// given only on request, for all its threads.
pub(crate) fn available() -> bool {
    // Register XCR0: tile configurations and contents are saved.
    const STATE: u64 = 1 << 17 | 1 << 18;
    // SAFETY: the machine has the instruction.
    in_processor()
        && is_x86_feature_detected!("xsave")
        && unsafe { _xgetbv(0) } & STATE == STATE
        && is_permitted()
}

/// Whether the processor has int8 and bf16 tiles, whatever the system says.
pub(crate) fn in_processor() -> bool {
    // Leaf 7: bf16 tiles, tiles, int8 tiles.
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;
    is_x86_feature_detected!("avx512f") && __cpuid_count(7, 0).edx & FEATURES == FEATURES
}

#[cfg(target_os = "linux")]
fn is_permitted() -> bool {
    const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
    const XFEATURE_XTILEDATA: libc::c_long = 18;
    // SAFETY: changes only what this process may use; asking again does no harm.
    unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn is_permitted() -> bool {
    false
}

/// What `ldtilecfg` reads.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

/// This thread's tiles have shapes; dropping it releases them, so that switches between threads do not save them.
pub(crate) struct Configured(PhantomData<*const ()>);

impl Configured {
    /// Tiles 0 to 3 for results, 4 and 5 for activations, 6 and 7 for weights.
    ///
    /// # Safety
    /// This process can execute AMX instructions, and nobody else configures this thread's tiles while this lives.
    pub(crate) unsafe fn new() -> Self {
        // SAFETY: by contract.
        unsafe { Self::with_rows(TILE_ROWS) }
    }

    /// With tiles of so many rows of results and activations, from 1 to 16: products take as long as they have rows.
    ///
    /// # Safety
    /// See [`Self::new`].
    pub(crate) unsafe fn with_rows(rows: usize) -> Self {
        let mut config = Config {
            palette: 1,
            start_row: 0,
            reserved: [0; 14],
            row_bytes: [0; 16],
            rows: [0; 16],
        };
        for tile in 0..8 {
            config.row_bytes[tile] = LINE as u16;
            config.rows[tile] = if tile < 6 { rows } else { TILE_ROWS } as u8;
        }
        // SAFETY: by contract. The assembly may read memory, so the configuration is written before.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) &raw const config, options(nostack, readonly, preserves_flags));
        };
        Self(PhantomData)
    }
}

impl Drop for Configured {
    fn drop(&mut self) {
        // SAFETY: this thread's tiles were configured, so it can execute this too.
        unsafe { asm!("tilerelease", options(nostack, nomem, preserves_flags)) };
    }
}

/// Operands of [`add_bf16`].
#[derive(Clone, Copy)]
pub(crate) struct Bf16Operands {
    /// Steps of 32 columns.
    pub(crate) steps: usize,
    /// Two times 16 rows of activations: for each step a tile of their upper and, if they are split, one of their lower halves.
    pub(crate) x: [*const u16; 2],
    /// Two panels: for each step 16 lines of two columns of 16 outputs.
    pub(crate) w: [*const u8; 2],
}

/// Instructions that do nothing. For minutes at a time a processor may hold tiles back (seen on a Sapphire Rapids): then products and loads take
/// 17 and 13 ns each, one after the other, and 10 and 8 ns with eight other instructions after each. In quiet it is 7.3 and 3.5 ns
/// with them and without.
macro_rules! gap {
    (4) => {
        "nop\nnop\nnop\nnop\n"
    };
    (8) => {
        concat!(gap!(4), gap!(4))
    };
}

/// Instructions with a [`gap`] after each.
macro_rules! spaced {
    ($($code:expr),* $(,)?) => {
        concat!($($code, "\n", gap!(8)),*)
    };
}

/// Fetches a quarter of the tile that lies 2 KiB on in `x`, four lines, while products are made: without it tiles wait for the second
/// cache (1.3 x longer, on Sapphire Rapids). With them it is a [`gap`].
macro_rules! ahead {
    ($x:literal, [$($offset:literal)*]) => {
        concat!($("prefetcht0 [{", $x, "} + ", $offset, "]\n",)* gap!(4))
    };
    ($x:literal, 0) => {
        ahead!($x, ["2048" "2112" "2176" "2240"])
    };
    ($x:literal, 1) => {
        ahead!($x, ["2304" "2368" "2432" "2496"])
    };
    ($x:literal, 2) => {
        ahead!($x, ["2560" "2624" "2688" "2752"])
    };
    ($x:literal, 3) => {
        ahead!($x, ["2816" "2880" "2944" "3008"])
    };
}

/// Code of one step of activations rounded to bf16.
macro_rules! step_rounded {
    (first) => {
        concat!(
            "tileloadd tmm6, [{w0} + {line}]\n",
            ahead!("x0", 0),
            "tileloadd tmm7, [{w1} + {line}]\n",
            ahead!("x0", 1),
            "tileloadd tmm4, [{x0} + {line}]\n",
            ahead!("x0", 2),
            "tdpbf16ps tmm0, tmm4, tmm6\n",
            ahead!("x0", 3),
            "tdpbf16ps tmm1, tmm4, tmm7\n",
            "add {x0}, 1024\n",
        )
    };
    (1) => {
        concat!(step_rounded!(first), gap!(4), "/* {x1} */\n")
    };
    (2) => {
        concat!(
            step_rounded!(first),
            ahead!("x1", 0),
            "tileloadd tmm5, [{x1} + {line}]\n",
            ahead!("x1", 1),
            "tdpbf16ps tmm2, tmm5, tmm6\n",
            ahead!("x1", 2),
            "tdpbf16ps tmm3, tmm5, tmm7\n",
            ahead!("x1", 3),
            "add {x1}, 1024\n",
        )
    };
}

/// Code of one step of a tile of split activations.
macro_rules! step_split {
    () => {
        concat!(
            spaced!(
                "tileloadd tmm6, [{w0} + {line}]",
                "tileloadd tmm7, [{w1} + {line}]",
                "tileloadd tmm4, [{x0} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm4, [{x0} + {line} + 1024]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tdpbf16ps tmm1, tmm4, tmm7",
            ),
            "add {x0}, 2048\n",
            "/* {x1} */\n",
        )
    };
}

/// Rows in memory, so many bytes apart.
#[derive(Clone, Copy)]
pub(crate) struct Strided {
    base: *mut u8,
    stride: usize,
}

impl Strided {
    pub(crate) fn new(base: *mut u8, stride: usize) -> Self {
        Self { base, stride }
    }

    /// Where row `row` is.
    #[inline(always)]
    pub(crate) fn row(self, row: usize) -> *mut u8 {
        self.base.wrapping_add(row * self.stride)
    }
}

/// Fetches the line of `to` to be written.
///
/// # Safety
/// The processor knows the instruction, as those with AVX-512 do.
#[inline(always)]
pub(crate) unsafe fn fetch_to_write(to: *mut u8) {
    // SAFETY: changes nothing, wherever `to` points.
    unsafe { asm!("prefetchw [{}]", in(reg) to, options(nostack, preserves_flags)) };
}

/// Code for the results of one or two tiles of rows, which lie next to each other by twos.
macro_rules! results {
    (zero) => {
        "tilezero tmm0\ntilezero tmm1\ntilezero tmm2\ntilezero tmm3\n"
    };
    (load, 1) => {
        "tileloadd tmm0, [{to0} + {stride}]\ntileloadd tmm1, [{to0} + {stride} + 64]\n/* {to1} */\n"
    };
    (load, 2) => {
        concat!(
            results!(load, 1),
            "tileloadd tmm2, [{to1} + {stride}]\ntileloadd tmm3, [{to1} + {stride} + 64]\n"
        )
    };
    (store, 1) => {
        "tilestored [{to0} + {stride}], tmm0\ntilestored [{to0} + {stride} + 64], tmm1\n/* {to1} */\n"
    };
    (store, 2) => {
        concat!(
            results!(store, 1),
            "tilestored [{to1} + {stride}], tmm2\ntilestored [{to1} + {stride} + 64], tmm3\n"
        )
    };
}

macro_rules! sums_bf16 {
    ($kind:tt, $row_tiles:tt, $at:expr) => {
        asm!(
            results!($kind, $row_tiles),
            to0 = in(reg) $at.base,
            to1 = in(reg) $at.base.wrapping_add(TILE_ROWS * $at.stride),
            stride = in(reg) $at.stride,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            options(nostack)
        )
    };
}

/// Begins sums for 16 or, if `row_tiles` is 2, 32 rows of 32 outputs, 16 of one panel and 16 of another, in tiles 0 to 3: with
/// what is at `from`, or with zeros.
///
/// # Safety
/// Tiles are configured, and used for nothing else until the sums are stored; `from` has the rows.
#[inline(always)]
pub(crate) unsafe fn begin_bf16(row_tiles: usize, from: Option<Strided>) {
    // SAFETY: by contract.
    unsafe {
        match (row_tiles, from) {
            (1, Some(from)) => sums_bf16!(load, 1, from),
            (_, Some(from)) => sums_bf16!(load, 2, from),
            (_, None) => asm!(
                results!(zero),
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                options(nostack, nomem)
            ),
        }
    }
}

/// Stores the sums that [`begin_bf16`] began.
///
/// # Safety
/// As for that function, of `to`.
#[inline(always)]
pub(crate) unsafe fn store_bf16(row_tiles: usize, to: Strided) {
    // SAFETY: by contract.
    unsafe {
        match row_tiles {
            1 => sums_bf16!(store, 1, to),
            _ => sums_bf16!(store, 2, to),
        }
    }
}

macro_rules! add_bf16 {
    ($step:expr, $operands:expr) => {{
        let operands = $operands;
        asm!(
            "2:",
            $step,
            "add {w0}, 1024",
            "add {w1}, 1024",
            "dec {steps}",
            "jnz 2b",
            w0 = inout(reg) operands.w[0] => _,
            w1 = inout(reg) operands.w[1] => _,
            x0 = inout(reg) operands.x[0] => _,
            x1 = inout(reg) operands.x[1] => _,
            steps = inout(reg) operands.steps => _,
            line = in(reg) LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack, readonly)
        )
    }};
}

/// Adds `x w` over some steps to the sums that [`begin_bf16`] began, of `row_tiles` tiles of rows. `split`: whether `x` has lower
/// halves, for one tile of rows.
///
/// # Safety
/// Sums were begun, and not stored, of as many tiles; there is at least one step, and the operands have as many.
#[inline(always)]
pub(crate) unsafe fn add_bf16(row_tiles: usize, split: bool, operands: Bf16Operands) {
    // SAFETY: by contract.
    unsafe {
        debug_assert!(row_tiles == 1 || !split);
        match (row_tiles, split) {
            (1, false) => add_bf16!(step_rounded!(1), operands),
            (_, false) => add_bf16!(step_rounded!(2), operands),
            (_, true) => add_bf16!(step_split!(), operands),
        }
    }
}

macro_rules! scores {
    ($result:literal, $q:expr, $keys:expr, $steps:expr, $to:expr) => {
        asm!(
            concat!("tilezero tmm", $result),
            "2:",
            spaced!(
                "tileloadd tmm4, [{q} + {q_stride}]",
                "tileloadd tmm6, [{keys} + {line}]",
                concat!("tdpbf16ps tmm", $result, ", tmm4, tmm6"),
            ),
            "add {q}, 64",
            "add {keys}, 1024",
            "dec {steps}",
            "jnz 2b",
            concat!("tilestored [{to} + {to_stride}], tmm", $result),
            q = inout(reg) $q.base => _,
            q_stride = in(reg) $q.stride,
            keys = inout(reg) $keys => _,
            steps = inout(reg) $steps => _,
            to = in(reg) $to.base,
            to_stride = in(reg) $to.stride,
            line = in(reg) LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// `to[row][key] = sum over elements of q[row][element] keys[key][element]` in f32, for 16 rows and 16 keys of bf16 and `steps`
/// times 32 elements. Each line of `keys` has two elements of each key. `slot`, from 0 to 3, should differ from that of the call
/// before: it chooses the registers.
///
/// # Safety
/// Tiles are configured; there is at least one step; what is named can be read and written.
#[inline(always)]
pub(crate) unsafe fn scores(slot: usize, q: Strided, keys: *const u8, steps: usize, to: Strided) {
    // SAFETY: by contract.
    unsafe {
        match slot {
            0 => scores!("0", q, keys, steps, to),
            1 => scores!("1", q, keys, steps, to),
            2 => scores!("2", q, keys, steps, to),
            _ => scores!("3", q, keys, steps, to),
        }
    }
}

/// Code that loads, adds to or stores two or four tiles of results next to each other.
macro_rules! weighted {
    (load, 2) => {
        "tileloadd tmm0, [{to} + {to_stride}]\ntileloadd tmm1, [{to} + {to_stride} + 64]\n"
    };
    (load, 4) => {
        concat!(
            weighted!(load, 2),
            "tileloadd tmm2, [{to} + {to_stride} + 128]\ntileloadd tmm3, [{to} + {to_stride} + 192]\n"
        )
    };
    (add, 2) => {
        spaced!(
            "tileloadd tmm6, [{values} + {line}]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{values} + {line} + 2048]",
            "tdpbf16ps tmm1, tmm4, tmm7",
        )
    };
    (add, 4) => {
        concat!(
            weighted!(add, 2),
            spaced!(
                "tileloadd tmm6, [{values} + {line} + 4096]",
                "tdpbf16ps tmm2, tmm4, tmm6",
                "tileloadd tmm7, [{values} + {line} + 6144]",
                "tdpbf16ps tmm3, tmm4, tmm7",
            )
        )
    };
    (store, 2) => {
        "tilestored [{to} + {to_stride}], tmm0\ntilestored [{to} + {to_stride} + 64], tmm1\n"
    };
    (store, 4) => {
        concat!(
            weighted!(store, 2),
            "tilestored [{to} + {to_stride} + 128], tmm2\ntilestored [{to} + {to_stride} + 192], tmm3\n"
        )
    };
    ($vectors:tt, $weights:expr, $values:expr, $steps:expr, $to:expr) => {
        asm!(
            weighted!(load, $vectors),
            "2:",
            spaced!("tileloadd tmm4, [{weights} + {weights_stride}]"),
            weighted!(add, $vectors),
            "add {values}, 1024",
            "add {weights}, 64",
            "dec {steps}",
            "jnz 2b",
            weighted!(store, $vectors),
            to = in(reg) $to.base,
            to_stride = in(reg) $to.stride,
            weights = inout(reg) $weights.base => _,
            weights_stride = in(reg) $weights.stride,
            values = inout(reg) $values => _,
            steps = inout(reg) $steps => _,
            line = in(reg) LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        )
    };
}

/// Adds `weights[row][place] values[place][element]` to `to[row][element]` in f32, for 16 rows, `steps` times 32 places and 64
/// elements, or 32 unless `wide`. `values` is `[elements / 16, 2, 16, 16, 2]`: for each 16 elements room for two steps of
/// 16 pairs of places.
///
/// # Safety
/// See [`scores`].
#[inline(always)]
pub(crate) unsafe fn add_weighted(
    wide: bool,
    weights: Strided,
    values: *const u8,
    steps: usize,
    to: Strided,
) {
    // SAFETY: by contract.
    unsafe {
        if wide {
            weighted!(4, weights, values, steps, to);
        } else {
            weighted!(2, weights, values, steps, to);
        }
    }
}

/// [`scores`] of four times 16 keys, one after the other in `to`.
///
/// # Safety
/// See [`scores`].
#[inline(always)]
pub(crate) unsafe fn scores_of_four(q: Strided, keys: [*const u8; 4], steps: usize, to: Strided) {
    // SAFETY: by contract.
    unsafe {
        asm!(
            results!(zero),
            "2:",
            spaced!(
                "tileloadd tmm4, [{q} + {q_stride}]",
                "tileloadd tmm6, [{keys0} + {line}]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{keys1} + {line}]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm6, [{keys2} + {line}]",
                "tdpbf16ps tmm2, tmm4, tmm6",
                "tileloadd tmm7, [{keys3} + {line}]",
                "tdpbf16ps tmm3, tmm4, tmm7",
            ),
            "add {q}, 64",
            "add {keys0}, 1024",
            "add {keys1}, 1024",
            "add {keys2}, 1024",
            "add {keys3}, 1024",
            "dec {steps}",
            "jnz 2b",
            weighted!(store, 4),
            q = inout(reg) q.base => _,
            q_stride = in(reg) q.stride,
            keys0 = inout(reg) keys[0] => _,
            keys1 = inout(reg) keys[1] => _,
            keys2 = inout(reg) keys[2] => _,
            keys3 = inout(reg) keys[3] => _,
            steps = inout(reg) steps => _,
            to = in(reg) to.base,
            to_stride = in(reg) to.stride,
            line = in(reg) LINE,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack)
        );
    }
}

/// Products of each round of [`rounds_int8`] and [`rounds_bf16`].
pub(crate) const ROUND_PRODUCTS: usize = 6;

/// Two tiles of numbers that bf16 and bytes have: where a [`gap`] matters, tiles that nothing was loaded to are multiplied faster.
static FACTORS: [u8; 2 * TILE_ROWS * LINE] = [0x3f; 2 * TILE_ROWS * LINE];

macro_rules! rounds {
    ($name:ident, $product:literal, $what:literal) => {
        #[doc = concat!("Multiplies tiles of ", $what, " that stay in registers, for so many rounds, at least one: six ")]
        /// results that do not wait for each other.
        ///
        /// # Safety
        /// Tiles are configured.
        pub(crate) unsafe fn $name(rounds: usize) {
            // SAFETY: by contract; nothing but tiles and the counter changes.
            unsafe {
                asm!(
                    "tileloadd tmm6, [{factors} + {line}]",
                    "tileloadd tmm7, [{factors} + {line} + 1024]",
                    "2:",
                    spaced!(
                        concat!($product, " tmm0, tmm6, tmm7"),
                        concat!($product, " tmm1, tmm6, tmm7"),
                        concat!($product, " tmm2, tmm6, tmm7"),
                        concat!($product, " tmm3, tmm6, tmm7"),
                        concat!($product, " tmm4, tmm6, tmm7"),
                        concat!($product, " tmm5, tmm6, tmm7"),
                    ),
                    "dec {rounds}",
                    "jnz 2b",
                    rounds = inout(reg) rounds => _,
                    factors = in(reg) FACTORS.as_ptr(),
                    line = in(reg) LINE,
                    out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                    out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    options(nostack, readonly)
                );
            }
        }
    };
}

rounds!(rounds_int8, "tdpbssd", "bytes");
rounds!(rounds_bf16, "tdpbf16ps", "bf16");

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::isa::Isa;

    #[test]
    fn every_product_of_a_round_counts() {
        if Isa::detect() != Isa::Amx && !galerne_amx_trap::install() {
            return;
        }
        for run in [rounds_int8, rounds_bf16] {
            let before = galerne_amx_trap::executed();
            // SAFETY: AMX can be executed.
            unsafe {
                let _tiles = Configured::new();
                run(3);
            }
            // Other tests may be at it too, but not fewer than this one.
            let executed = galerne_amx_trap::executed() - before;
            assert!(
                executed > 3 * ROUND_PRODUCTS as u64 || Isa::detect() == Isa::Amx,
                "{executed}"
            );
        }
    }
}
