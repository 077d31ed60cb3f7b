// Rows of x as 8-bit floats with a factor each: codes[r, k] = e4m3(x[r, k] / factors[r]), factors[r] = max_k |x[r, k]| / 448, or next to
// nothing for a row of zeros.
//
// x [rows, width] f32; codes [rows, depth] 8-bit floats, 16-byte aligned, depth a multiple of 16; columns from width to depth are zero;
// factors [rows] f32. One block per row: grid (rows). Shared memory: 32 f32.
#include "galerne.cuh"

struct Fp8RoundParams {
    View x;
    uint4* codes;
    float* factors;
    uint32_t depth;
    uint32_t unused;
};

// No row's largest number counts for less: the factor's inverse is finite.
constexpr float LARGEST_CODE = 448.0f, SMALLEST_ROW = 1e-30f;

GALERNE_KERNEL(fp8_round, Fp8RoundParams, 256, 1) {
    dependency_wait();
    const float* x = p.x.at + static_cast<size_t>(block_x()) * p.x.stride;
    float largest = SMALLEST_ROW;
    for (uint32_t k = thread_index(); k < p.x.width; k += block_threads()) largest = fmaxf(largest, fabsf(x[k]));
    largest = block_max(largest, reinterpret_cast<float*>(shared_memory()));
    const float inverse = LARGEST_CODE / largest;
    if (thread_index() == 0) p.factors[block_x()] = largest / LARGEST_CODE;
    uint4* codes = p.codes + static_cast<size_t>(block_x()) * (p.depth / 16);
    for (uint32_t piece = thread_index(); piece < p.depth / 16; piece += block_threads()) {
        uint32_t words[4] = {};
#pragma unroll
        for (uint32_t i = 0; i < 16; i++) {
            const uint32_t k = piece * 16 + i;
            const float number = k < p.x.width ? x[k] * inverse : 0.0f;
            words[i / 4] |= static_cast<uint32_t>(f32_to_fp8(number)) << (i % 4 * 8);
        }
        codes[piece] = make_uint4(words[0], words[1], words[2], words[3]);
    }
    dependency_release();
}
