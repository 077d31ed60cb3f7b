// Copies and zeroes blocks of the KV pool, all layers at once: a block is block_bytes in one piece.
//
//   kv_copy_blocks: block list[2 i + 1] = block list[2 i]        kv_zero_blocks: block list[i] = 0
//
// bytes, the pool, and block_bytes are multiples of 16; list u32. Pairs do not overlap. Grid x: count times as many blocks of threads
// as a KV block has pieces of 16 bytes * UNROLL * threads.
#include "galerne.cuh"

struct KvBlocksParams {
    unsigned char* bytes;
    uint64_t block_bytes;
    const uint32_t* list;
    uint32_t pieces;  // blocks of threads per KV block
    uint32_t reserved;
};

constexpr uint32_t UNROLL = 4;

DEVICE uint4* kv_block(const KvBlocksParams& p, uint32_t number) {
    return reinterpret_cast<uint4*>(p.bytes + number * p.block_bytes);
}

GALERNE_KERNEL(kv_copy_blocks, KvBlocksParams, 256, 4) {
    dependency_wait();
    const uint32_t pair = block_x() / p.pieces;
    const uint64_t words = p.block_bytes / 16;
    const uint64_t first = static_cast<uint64_t>(block_x() % p.pieces) * UNROLL * block_threads() + thread_index();
    const uint4* from = kv_block(p, p.list[2 * pair]);
    uint4* to = kv_block(p, p.list[2 * pair + 1]);
    uint4 values[UNROLL];
#pragma unroll
    for (uint32_t k = 0; k < UNROLL; k++)
        if (first + k * block_threads() < words) values[k] = from[first + k * block_threads()];
#pragma unroll
    for (uint32_t k = 0; k < UNROLL; k++)
        if (first + k * block_threads() < words) to[first + k * block_threads()] = values[k];
    dependency_release();
}

GALERNE_KERNEL(kv_zero_blocks, KvBlocksParams, 256, 4) {
    dependency_wait();
    const uint64_t words = p.block_bytes / 16;
    const uint64_t first = static_cast<uint64_t>(block_x() % p.pieces) * UNROLL * block_threads() + thread_index();
    uint4* block = kv_block(p, p.list[block_x() / p.pieces]);
#pragma unroll
    for (uint32_t k = 0; k < UNROLL; k++)
        if (first + k * block_threads() < words) block[first + k * block_threads()] = make_uint4(0, 0, 0, 0);
    dependency_release();
}
