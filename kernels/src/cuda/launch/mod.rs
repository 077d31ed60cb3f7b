//! Launchers, one file per kernel file and named as it: from shapes and addresses to a [`super::driver::Launch`]. They check nothing that
//! the program's gate has checked, and touch no memory.

pub mod attention;
pub mod copy;
pub mod dequantize;
pub mod elementwise;
pub mod embedding;
pub mod fp8_round;
pub mod fp8_rows;
pub mod linear;
pub mod linear_exact;
pub mod linear_small;
pub mod linear_tile;
pub mod mean_pool;
pub mod mixture;
pub mod moe_combine;
pub mod moe_exact;
pub mod moe_linear;
pub mod moe_plan;
pub mod moe_route;
pub mod norm;
pub mod product;
pub mod rope;
pub mod sample;

/// Threads per block of kernels that spread vectors over the grid.
const SPREAD_THREADS: u32 = 256;

/// Blocks for so many vectors: each thread takes one while there are few, so that many multiprocessors take part, and four, which are
/// in flight together, when there are many.
fn spread(vectors: u32) -> u32 {
    let blocks = vectors.div_ceil(SPREAD_THREADS);
    if blocks > 1_024 {
        blocks.div_ceil(4)
    } else {
        blocks
    }
}
