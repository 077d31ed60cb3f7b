// What linear_tile.cu and linear_tile_sm100.cu share: the parameters, and how 128 rows of x and 128 of weights come into shared memory, 64
// columns at a time, as 16-bit floats. 16-byte piece i of row r lies at i ^ (r % 8), as matrix products want it.
#pragma once

#include "linear_small.cuh"

struct LinearTileParams {
    const uint16_t* x;
    View out;
    Matrix matrix;
    const float* bias;
    uint32_t rows;
    uint32_t depth;
    uint32_t accumulate;
    uint32_t unused;
};

constexpr uint32_t TILE_ROWS = 128, TILE_OUTPUTS = 128, TILE_DEPTH = 64, TILE_THREADS = 256;
constexpr uint32_t PIECES_PER_ROW = TILE_DEPTH / 8;

// Piece `piece` of row `row` in a tile in shared memory.
DEVICE uint4* tile_piece(uint4* tile, uint32_t row, uint32_t piece) {
    return tile + row * PIECES_PER_ROW + (piece ^ row % 8);
}

template <uint32_t F>
struct Tiles {
    using W = Fragments<F>;
    // A thread takes 32 columns of one row of weights in a step: so many slices.
    static constexpr uint32_t SLICES = 32 / W::SLICE;

    struct Weights {
        typename W::Raw raw[SLICES];
    };

    // Slices of row `row` from column `k` on, a multiple of 32. Nothing where there is no matrix.
    DEVICE_MEMBER void load(const LinearTileParams& p, uint32_t row, uint32_t k, Weights& weights) {
        const uint32_t panel = row / PANEL_ROWS, chunk = k / W::CHUNK, first = k % W::CHUNK / W::SLICE;
        const bool is_there = panel * PANEL_ROWS < p.matrix.rows && chunk < divide_up(p.matrix.width, W::CHUNK);
#pragma unroll
        for (uint32_t i = 0; i < SLICES; i++) {
            weights.raw[i] = {};
            if (!is_there) continue;
            const uint32_t lane = row % 8 * 4 + first + i;
            weights.raw[i] = W::load(W::cursor(p.matrix, panel, chunk, lane), p.matrix, 0, row / 8 % 2);
        }
    }

    // As bf16 (f16) to pieces 4 * part .. of row `row`.
    DEVICE_MEMBER void store(const Weights& weights, uint4* tile, uint32_t row, uint32_t part) {
#pragma unroll
        for (uint32_t i = 0; i < SLICES; i++) {
            const typename W::Factors factors = W::factors(weights.raw[i]);
#pragma unroll
            for (uint32_t j = 0; j < W::SLICE / 8; j++) {
                const uint2 low = W::pairs(weights.raw[i], factors, 2 * j);
                const uint2 high = W::pairs(weights.raw[i], factors, 2 * j + 1);
                *tile_piece(tile, row, part * 4 + i * (W::SLICE / 8) + j) = make_uint4(low.x, low.y, high.x, high.y);
            }
        }
    }

    DEVICE_MEMBER void copy_x(const LinearTileParams& p, uint4* tile, uint32_t first_row, uint32_t k) {
#pragma unroll
        for (uint32_t i = 0; i < TILE_ROWS * PIECES_PER_ROW / TILE_THREADS; i++) {
            const uint32_t at = i * TILE_THREADS + thread_index();
            const uint32_t row = at / PIECES_PER_ROW, piece = at % PIECES_PER_ROW;
            const bool is_there = first_row + row < p.rows;
            const size_t from = is_there ? static_cast<size_t>(first_row + row) * p.depth + k + piece * 8 : 0;
            copy_start(tile_piece(tile, row, piece), p.x + from, is_there);
        }
        copy_commit();
    }
};

// KERNEL(name, format) for each format of weights.
#define FOR_EACH_FORMAT(KERNEL) \
    KERNEL(f32, W_F32) \
    KERNEL(f16, W_F16) \
    KERNEL(bf16, W_BF16) \
    KERNEL(codes4, W_CODES4) \
    KERNEL(codes4_min, W_CODES4_MIN) \
    KERNEL(codes4_super, W_CODES4_SUPER) \
    KERNEL(codes8, W_CODES8) \
    KERNEL(codes8_min, W_CODES8_MIN) \
    KERNEL(codes8_super, W_CODES8_SUPER) \
    KERNEL(codes8_pair, W_CODES8_PAIR) \
    KERNEL(fp8, W_FP8) \
    KERNEL(nvfp4, W_NVFP4) \
    KERNEL(int4, W_INT4)
