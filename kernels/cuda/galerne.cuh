// What every kernel file includes: the GPU's side (gpu.cuh) or the CPU's (shim/shim.hpp), which define the same names.
//
// How a kernel file is written:
// - One kernel (or one family of instantiations) per file; its header gives shapes, dtypes, layout and the formula. The Rust
//   launcher of the same name in src/cuda/launch/ fills the one parameter struct, which has the same fields in the same
//   order, 8-byte fields first and no hidden padding.
// - GALERNE_KERNEL(name, Params, threads, blocks_min) { ... p.field ... } declares an entry point of at most `threads` threads
//   per block, all in x.
// - Shared memory is dynamic only: shared_memory() is its first byte, 128-byte aligned; the launcher says how much. It
//   is not zeroed.
// - Nothing reads past a tensor's end. Every kernel is right for ragged and empty inputs.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef GALERNE_SHIM
#include "shim/shim.hpp"
#else
#include "gpu.cuh"
#endif

// Columns of a buffer: row r, column c is at[r * stride + c], for c < width.
struct View {
    float* at;
    uint32_t stride;
    uint32_t width;
};

// Where keys and values of one layer lie. Block b of the pool starts at bytes + b * block_bytes and holds, in order:
// keys [kv_heads][block_tokens][head_width], values likewise; for 8-bit integers then, from the next multiple of 16 bytes,
// f32 scales of the keys [kv_heads][block_tokens] and of the values, by which codes are multiplied.
struct KvLayer {
    unsigned char* bytes;
    uint64_t block_bytes;
    uint32_t block_tokens;
    uint32_t kv_heads;
    uint32_t head_width;
    uint32_t dtype;  // KvDtype
};

enum KvDtype : uint32_t { KV_F32 = 0, KV_BF16 = 1, KV_F16 = 2, KV_INT8 = 3, KV_FP8 = 4 };

// Bytes of one number.
DEVICE constexpr uint32_t kv_bytes(uint32_t dtype) { return dtype == KV_F32 ? 4 : dtype == KV_BF16 || dtype == KV_F16 ? 2 : 1; }

// Bytes from a block's keys to its values, and to its scales of keys and of values.
DEVICE size_t kv_values_at(const KvLayer& kv) {
    return static_cast<size_t>(kv.kv_heads) * kv.block_tokens * kv.head_width * kv_bytes(kv.dtype);
}
DEVICE size_t kv_scales_at(const KvLayer& kv, bool is_value) {
    const size_t scales = static_cast<size_t>(kv.kv_heads) * kv.block_tokens * 4;
    return (2 * kv_values_at(kv) + 15) / 16 * 16 + (is_value ? scales : 0);
}

constexpr uint32_t WARP = 32;
constexpr uint32_t ALL_LANES = 0xffffffffu;

DEVICE float warp_sum(float value) {
    for (uint32_t lane = WARP / 2; lane > 0; lane /= 2) value += shuffle_xor(value, lane);
    return value;
}

DEVICE float warp_max(float value) {
    for (uint32_t lane = WARP / 2; lane > 0; lane /= 2) value = fmaxf(value, shuffle_xor(value, lane));
    return value;
}

// Largest of the block, in every thread. `room` is 32 values of shared memory that nothing else uses until the next barrier after the
// return.
template <typename T>
DEVICE T block_max(T value, T* room) {
    for (uint32_t lane = WARP / 2; lane > 0; lane /= 2) {
        const T other = shuffle_xor(value, lane);
        value = other > value ? other : value;
    }
    if (thread_index() % WARP == 0) room[thread_index() / WARP] = value;
    block_barrier();
    for (uint32_t w = 0; w < block_threads() / WARP; w++) value = room[w] > value ? room[w] : value;
    block_barrier();
    return value;
}

// Sum over the block, in every thread. `room` is 32 floats of shared memory that nothing else uses until the next barrier
// after the return.
DEVICE float block_sum(float value, float* room) {
    value = warp_sum(value);
    const uint32_t warp = thread_index() / WARP, lane = thread_index() % WARP;
    const uint32_t warps = (block_threads() + WARP - 1) / WARP;
    if (lane == 0) room[warp] = value;
    block_barrier();
    value = lane < warps ? room[lane] : 0.0f;
    block_barrier();
    return warp_sum(value);
}
