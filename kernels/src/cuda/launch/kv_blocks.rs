//! Launchers of `kv_blocks.cu`: copying and zeroing blocks of the KV pool, all layers at once.

use bytemuck::{Pod, Zeroable};

use crate::cuda::driver::{DevicePtr, Launch};

const THREADS: u32 = 256;
/// Words of 16 bytes a thread moves: `UNROLL` in `kv_blocks.cu`.
const WORDS: u64 = 4;

/// The parameter struct, `KvBlocksParams` in `kv_blocks.cu`.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
pub struct KvBlocksParams {
    bytes: DevicePtr,
    block_bytes: u64,
    list: DevicePtr,
    pieces: u32,
    reserved: u32,
}

/// Copies block `list[2 i]` of the pool to block `list[2 i + 1]` for `i < pairs`. The pool's address and `block_bytes` are multiples
/// of 16; `list` is u32 on the device. No block is in two pairs.
#[must_use]
pub fn copy_blocks(pool: DevicePtr, block_bytes: u64, list: DevicePtr, pairs: u32) -> Launch {
    launch("kv_copy_blocks", pool, block_bytes, (list, pairs))
}

/// Zeroes blocks `list[i]` of the pool for `i < count`; otherwise as [`copy_blocks`].
#[must_use]
pub fn zero_blocks(pool: DevicePtr, block_bytes: u64, list: DevicePtr, count: u32) -> Launch {
    launch("kv_zero_blocks", pool, block_bytes, (list, count))
}

fn launch(
    kernel: &'static str,
    bytes: DevicePtr,
    block_bytes: u64,
    (list, count): (DevicePtr, u32),
) -> Launch {
    let pieces = block_bytes.div_ceil(16 * WORDS * u64::from(THREADS));
    let pieces = u32::try_from(pieces).expect("a block of KV is far smaller than 32 TiB");
    let params = KvBlocksParams {
        bytes,
        block_bytes,
        list,
        pieces,
        reserved: 0,
    };
    Launch::new(kernel, [pieces * count, 1, 1], THREADS, 0, &params)
}
