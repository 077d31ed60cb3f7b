// Linear maps of many rows of x: out[r, c] = (accumulate ? out[r, c] : 0) + bias[c] + sum_k x[r, k] w[c, k].
//
// linear_cast_bf16, linear_cast_f16: x [rows, width] f32 to [rows, depth] 16-bit floats, depth = width padded to 64, padding 0. One
// block per row: grid (rows).
//
// linear_tile_FORMAT: x [rows, depth] as cast (f16 for f16 weights), w [columns, width] in the format of the name, bias [columns] f32 or
// null, out [rows, columns] f32. A block makes 128 rows by 128 columns, in steps of 64 of k: x is copied to shared memory two steps deep;
// weights go through registers, a step ahead, where they are dequantized to bf16 as in linear_small.cu. Sums are f32, in the order
// of k, whatever else is in the batch. Grid (ceil(rows / 128), ceil(columns / 128)), so that blocks that run together share weights.
// Shared memory: 2 x (128 + 128) x 64 16-bit floats.
#include "linear_tile.cuh"

struct LinearCastParams {
    View x;
    uint16_t* out;
    uint32_t rows;
    uint32_t depth;
};

template <bool IS_F16>
DEVICE void cast(const LinearCastParams& p) {
    dependency_wait();
    const float* x = p.x.at + static_cast<size_t>(block_x()) * p.x.stride;
    uint4* out = reinterpret_cast<uint4*>(p.out + static_cast<size_t>(block_x()) * p.depth);
    const bool is_aligned = reinterpret_cast<uintptr_t>(x) % 16 == 0;
    for (uint32_t eighth = thread_index(); eighth < p.depth / 8; eighth += block_threads())
        out[eighth] = narrow_eight<IS_F16>(x, eighth * 8, p.x.width, is_aligned);
    dependency_release();
}

GALERNE_KERNEL(linear_cast_bf16, LinearCastParams, 256, 1) { cast<false>(p); }
GALERNE_KERNEL(linear_cast_f16, LinearCastParams, 256, 1) { cast<true>(p); }

template <uint32_t F>
struct TileKernel : Tiles<F> {
    using W = Fragments<F>;
    using Tiles<F>::copy_x;
    using Tiles<F>::load;
    using Tiles<F>::store;

    // The warp's 64 rows by 32 columns.
    DEVICE_MEMBER void multiply(float (&sums)[4][4][4], uint4* x, uint4* w, uint32_t first_row, uint32_t first_column) {
        const uint32_t lane = thread_index() % WARP, matrix = lane / 8, r = lane % 8;
#pragma unroll
        for (uint32_t step = 0; step < TILE_DEPTH / 16; step++) {
            uint32_t a[4][4], b[2][4];
#pragma unroll
            for (uint32_t m = 0; m < 4; m++)
                load_matrices(a[m], tile_piece(x, first_row + m * 16 + matrix % 2 * 8 + r, step * 2 + matrix / 2));
#pragma unroll
            for (uint32_t n = 0; n < 2; n++)
                load_matrices(b[n], tile_piece(w, first_column + n * 16 + matrix / 2 * 8 + r, step * 2 + matrix % 2));
#pragma unroll
            for (uint32_t m = 0; m < 4; m++)
#pragma unroll
                for (uint32_t n = 0; n < 4; n++) {
                    const uint32_t pair[2] = {b[n / 2][n % 2 * 2], b[n / 2][n % 2 * 2 + 1]};
                    mma<W::IS_F16>(sums[m][n], a[m], pair);
                }
        }
    }

    DEVICE_MEMBER void finish(const LinearTileParams& p, const float (&sums)[4][4][4], uint32_t first_row,
                              uint32_t first_column) {
        const uint32_t lane = thread_index() % WARP;
#pragma unroll
        for (uint32_t n = 0; n < 4; n++) {
#pragma unroll
            for (uint32_t i = 0; i < 2; i++) {
                const uint32_t column = first_column + n * 8 + lane % 4 * 2 + i;
                if (column >= p.matrix.rows) continue;
                const float factor = W::row_factor_left(p.matrix, column), bias = p.bias ? p.bias[column] : 0.0f;
#pragma unroll
                for (uint32_t m = 0; m < 8; m++) {
                    const uint32_t row = first_row + m * 8 + lane / 4;
                    if (row >= p.rows) continue;
                    float* out = p.out.at + static_cast<size_t>(row) * p.out.stride + column;
                    const float value = sums[m / 2][n][m % 2 * 2 + i] * factor + bias;
                    *out = p.accumulate ? *out + value : value;
                }
            }
        }
    }

    DEVICE_MEMBER void run(const LinearTileParams& p) {
        constexpr uint32_t PIECES = TILE_ROWS * PIECES_PER_ROW;
        uint4* x = reinterpret_cast<uint4*>(shared_memory());
        uint4* w = x + 2 * PIECES;
        const uint32_t first_row = block_x() * TILE_ROWS, first_column = block_y() * TILE_OUTPUTS;
        const uint32_t thread = thread_index(), warp = thread / WARP, row = thread / 2, part = thread % 2;
        const uint32_t own_row = warp / 4 * 64, own_column = warp % 4 * 32;
        float sums[4][4][4] = {};
        typename Tiles<F>::Weights next;
        load(p, first_column + row, part * 32, next);
        dependency_wait();
        copy_x(p, x, first_row, 0);
        store(next, w, row, part);
        load(p, first_column + row, TILE_DEPTH + part * 32, next);
        for (uint32_t k = 0; k < p.depth; k += TILE_DEPTH) {
            const uint32_t now = k / TILE_DEPTH % 2, then = 1 - now;
            copy_wait<0>();
            block_barrier();
            const bool is_last = k + TILE_DEPTH >= p.depth;
            if (!is_last) copy_x(p, x + then * PIECES, first_row, k + TILE_DEPTH);
            multiply(sums, x + now * PIECES, w + now * PIECES, own_row, own_column);
            if (!is_last) store(next, w + then * PIECES, row, part);
            load(p, first_column + row, k + 2 * TILE_DEPTH + part * 32, next);
        }
        dependency_release();
        finish(p, sums, first_row + own_row, first_column + own_column);
    }
};

#define LINEAR_TILE(FORMAT, F) \
    GALERNE_KERNEL(linear_tile_##FORMAT, LinearTileParams, 256, 1) { TileKernel<F>::run(p); }

FOR_EACH_FORMAT(LINEAR_TILE)
