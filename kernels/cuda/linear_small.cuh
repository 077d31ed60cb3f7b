// A linear map of few rows of x: the body of linear_small.cu and moe_linear.cu.
#pragma once

#include "activations.cuh"
#include "fragments.cuh"

// out[r, c] = (accumulate ? out[r, c] : 0) + y[r, c] for r < rows, where y[r, c] = bias[c] + sum_k x[r, k] w[c, k]. Of kernels that are
// gated out[r, c] = f(y[r, c]) y[r, half + c] for c < half, half of the matrix's rows, a multiple of 16, and f the activation.
struct SmallLinear {
    View x;
    View out;
    Matrix matrix;
    const float* bias;           // null: none
    const uint32_t* x_rows;      // x_divisor times the row of x of each r, or more by less than that; null: r
    uint32_t x_divisor;
    const uint32_t* out_rows;    // row of out of each r; null: r
    float* partial;              // this block column's [splits][rows padded][128]
    uint32_t* counter;           // 0 before and after; of this block column
    uint32_t rows;
    uint32_t accumulate;
    uint32_t splits;             // blocks that share the columns of x
    uint32_t split_chunks;       // chunks of each; a multiple of BATCH
    uint32_t stage_chunks;       // chunks of x in shared memory at once; a multiple of BATCH
    uint32_t activation;         // Activation, where it is gated
};

// For more rows the compiler for sm_100a lacks registers.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr uint32_t UNROLLED_TILES = 1;
#else
constexpr uint32_t UNROLLED_TILES = 2;
#endif
constexpr uint32_t SMALL_WARPS = 8, SMALL_COLUMNS = SMALL_WARPS * PANEL_ROWS;

// Eight elements of x as bf16 or f16; those from `width` on are 0.
template <bool IS_F16>
DEVICE uint4 narrow_eight(const float* x, uint32_t k, uint32_t width, bool is_aligned) {
    float v[8] = {};
    if (is_aligned && k + 8 <= width) {
        const float4 low = *reinterpret_cast<const float4*>(x + k), high = *reinterpret_cast<const float4*>(x + k + 4);
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w, v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            if (k + i < width) v[i] = x[k + i];
    }
    uint32_t pairs[4];
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        if (IS_F16) {
            pairs[i] = f32_to_f16(v[2 * i]) | static_cast<uint32_t>(f32_to_f16(v[2 * i + 1])) << 16;
        } else {
            pairs[i] = pack_bf16(v[2 * i], v[2 * i + 1]);
        }
    }
    return make_uint4(pairs[0], pairs[1], pairs[2], pairs[3]);
}

template <bool IS_F16>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (IS_F16) {
        mma_f16(c, a, b);
    } else {
        mma_bf16(c, a, b);
    }
}

// TILES: rows of x in eights. A block of 8 warps makes 128 outputs; a warp walks along its 16 rows of the matrix.
template <uint32_t F, uint32_t TILES, bool IS_GATED>
struct SmallKernel {
    using W = Fragments<F>;
    using Raw = typename W::Raw;
    // Chunks whose weights are in flight at once: 128 bytes per lane, or what registers allow beside many sums and scales.
    static constexpr bool IS_PLAIN = W::S.plain_bytes != 0, HAS_BOTH_SCALES = W::S.slice_bytes && W::S.row_bytes;
    static constexpr uint32_t BATCH_LOADS = IS_PLAIN ? (TILES == 8 ? 2 : 4)
                                                     : (TILES == 8 ? 1 : TILES == 4 || (TILES == 2 && HAS_BOTH_SCALES) ? 2 : 4);
    static constexpr uint32_t BATCH = BATCH_LOADS < W::VECTORS ? 1 : BATCH_LOADS / W::VECTORS;
    // Batches per turn of the loop: with two, what was loaded is used where it lies. Where registers do not allow it, one.
    static constexpr uint32_t UNROLL = TILES <= UNROLLED_TILES && !(TILES == 1 && HAS_BOTH_SCALES) ? 2 : 1;
    // 16-byte pieces of x in a chunk, for each tile of rows and lane.
    static constexpr uint32_t PIECES = W::SLICE / 8;

    // Chunks first .. first + count of x to shared memory as mma takes them: [chunk][piece][tile][lane], 16 bytes each.
    DEVICE_MEMBER void stage(const SmallLinear& p, uint32_t first, uint32_t count) {
        uint4* to = reinterpret_cast<uint4*>(shared_memory());
        const bool is_aligned = (reinterpret_cast<uintptr_t>(p.x.at) | p.x.stride * 4) % 16 == 0;
        for (uint32_t at = thread_index(); at < count * PIECES * TILES * WARP; at += SMALL_WARPS * WARP) {
            const uint32_t lane = at % WARP, row = at / WARP % TILES * 8 + lane / 4;
            const uint32_t piece = at / (WARP * TILES) % PIECES, chunk = first + at / (WARP * TILES * PIECES);
            const uint32_t k = chunk * W::CHUNK + lane % 4 * W::SLICE + piece * 8;
            uint4 x = make_uint4(0, 0, 0, 0);
            if (row < p.rows) {
                const size_t from = p.x_rows ? p.x_rows[row] / p.x_divisor : row;
                x = narrow_eight<W::IS_F16>(p.x.at + from * p.x.stride, k, p.matrix.width, is_aligned);
            }
            to[at] = x;
        }
    }

    DEVICE_MEMBER void multiply(float (&sums)[TILES][4], const Raw (&raw)[2], const uint4* x) {
        const typename W::Factors low = W::factors(raw[0]), high = W::factors(raw[1]);
#pragma unroll
        for (uint32_t piece = 0; piece < PIECES; piece++) {
            uint32_t a[2][4];
#pragma unroll
            for (uint32_t step = 0; step < 2; step++) {
                const uint2 l = W::pairs(raw[0], low, 2 * piece + step), h = W::pairs(raw[1], high, 2 * piece + step);
                a[step][0] = l.x, a[step][1] = h.x, a[step][2] = l.y, a[step][3] = h.y;
            }
#pragma unroll
            for (uint32_t tile = 0; tile < TILES; tile++) {
                const uint4 b = x[(piece * TILES + tile) * WARP];
                const uint32_t first[2] = {b.x, b.y}, second[2] = {b.z, b.w};
                mma<W::IS_F16>(sums[tile], a[0], first);
                mma<W::IS_F16>(sums[tile], a[1], second);
            }
        }
    }

    // y[r, c] of its sum.
    DEVICE_MEMBER float biased(const SmallLinear& p, uint32_t column, float sum) {
        return sum * W::row_factor_left(p.matrix, column) + (p.bias ? p.bias[column] : 0.0f);
    }

    DEVICE_MEMBER void put(const SmallLinear& p, uint32_t row, uint32_t column, float value) {
        const size_t to = p.out_rows ? p.out_rows[row] : row;
        float* out = p.out.at + to * p.out.stride + column;
        *out = p.accumulate ? *out + value : value;
    }

    // All outputs of a block, of which sum_of(row, column in the block) is known to all threads.
    template <class Sums>
    DEVICE_MEMBER void finish(const SmallLinear& p, uint32_t block, const Sums& sum_of) {
        constexpr uint32_t COLUMNS = IS_GATED ? SMALL_COLUMNS / 2 : SMALL_COLUMNS;
        const uint32_t outputs = IS_GATED ? p.matrix.rows / 2 : p.matrix.rows;
        for (uint32_t at = thread_index(); at < p.rows * COLUMNS; at += SMALL_WARPS * WARP) {
            const uint32_t row = at / COLUMNS, in_block = at % COLUMNS, column = block * COLUMNS + in_block;
            if (column >= outputs) continue;
            float value = biased(p, column, sum_of(row, in_block));
            if (IS_GATED) {
                const float up = biased(p, outputs + column, sum_of(row, COLUMNS + in_block));
                value = activate(p.activation, value) * up;
            }
            put(p, row, column, value);
        }
    }

    // Sums of all splits, in order, by the last block to arrive.
    DEVICE_MEMBER void join(const SmallLinear& p, uint32_t block) {
        uint32_t* order = reinterpret_cast<uint32_t*>(shared_memory());
        memory_fence();
        block_barrier();
        if (thread_index() == 0) *order = atomic_add(p.counter, 1u);
        block_barrier();
        if (*order + 1 < p.splits) return;
        memory_fence();
        finish(p, block, [&](uint32_t row, uint32_t in_block) {
            float sum = 0.0f;
            for (uint32_t split = 0; split < p.splits; split++)
                sum += load_fresh(p.partial + (static_cast<size_t>(split) * TILES * 8 + row) * SMALL_COLUMNS + in_block);
            return sum;
        });
        if (thread_index() == 0) *p.counter = 0;
    }

    // Where a warp's 16 rows of the matrix are. If it is gated, the first half of the warps has gates, the others the ups of the same
    // columns.
    struct Place {
        uint32_t panel;
        bool is_there;
    };

    DEVICE_MEMBER Place place(const SmallLinear& p, uint32_t block, uint32_t warp) {
        if (!IS_GATED) {
            const uint32_t panel = block * SMALL_WARPS + warp;
            return {panel, panel * PANEL_ROWS < p.matrix.rows};
        }
        constexpr uint32_t PAIRS = SMALL_WARPS / 2;
        const uint32_t panels = p.matrix.rows / 2 / PANEL_ROWS, panel = block * PAIRS + warp % PAIRS;
        return {panel + warp / PAIRS * panels, panel < panels};
    }

    // Block `block` of outputs, of split `split`.
    DEVICE_MEMBER void run(const SmallLinear& p, uint32_t block, uint32_t split) {
        const uint32_t lane = thread_index() % WARP, warp = thread_index() / WARP, g = lane / 4, t = lane % 4;
        const Place own = place(p, block, warp);
        const uint32_t chunks = divide_up(p.matrix.width, W::CHUNK);
        const uint32_t first = split * p.split_chunks, end = min(first + p.split_chunks, chunks);
        const uint32_t own_end = own.is_there ? end : 0;
        float sums[TILES][4] = {};
        typename W::Cursor cursor = W::cursor(p.matrix, own.panel, first, lane);
        Raw next[BATCH][2];
#pragma unroll
        for (uint32_t i = 0; i < BATCH; i++)
            for (uint32_t h = 0; h < 2; h++)
                if (first + i < own_end) next[i][h] = W::load(cursor, p.matrix, i, h);
        dependency_wait();
        for (uint32_t begin = first; begin < end; begin += p.stage_chunks) {
            const uint32_t count = min(p.stage_chunks, end - begin);
            if (begin != first) block_barrier();
            stage(p, begin, count);
            block_barrier();
            const uint4* x = reinterpret_cast<const uint4*>(shared_memory()) + lane;
#pragma unroll UNROLL
            for (uint32_t chunk = begin; chunk < begin + count && chunk < own_end; chunk += BATCH) {
                W::advance(cursor, BATCH);
                Raw now[BATCH][2];
#pragma unroll
                for (uint32_t i = 0; i < BATCH; i++)
                    for (uint32_t h = 0; h < 2; h++) {
                        now[i][h] = next[i][h];
                        if (chunk + BATCH + i < own_end)
                            next[i][h] = W::load(cursor, p.matrix, i, h);
                    }
#pragma unroll
                for (uint32_t i = 0; i < BATCH; i++)
                    if (chunk + i < own_end) multiply(sums, now[i], x + i * PIECES * TILES * WARP);
                x += BATCH * PIECES * TILES * WARP;
            }
        }
        dependency_release();
        // Where splits are joined, and gates and ups, other threads need what this one has.
        const bool is_passed_on = IS_GATED || p.splits > 1;
        float* to = p.splits > 1 ? p.partial + static_cast<size_t>(split) * TILES * 8 * SMALL_COLUMNS
                                 : reinterpret_cast<float*>(shared_memory());
        if (is_passed_on) block_barrier();
#pragma unroll
        for (uint32_t tile = 0; tile < TILES; tile++) {
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) {
                const uint32_t row = tile * 8 + 2 * t + i % 2, in_block = warp * PANEL_ROWS + g + i / 2 * 8;
                const uint32_t column = block * SMALL_COLUMNS + in_block;
                if (is_passed_on) {
                    to[row * SMALL_COLUMNS + in_block] = sums[tile][i];
                } else if (row < p.rows && column < p.matrix.rows) {
                    put(p, row, column, biased(p, column, sums[tile][i]));
                }
            }
        }
        if (p.splits > 1) {
            join(p, block);
        } else if (IS_GATED) {
            block_barrier();
            finish(p, block, [&](uint32_t row, uint32_t in_block) { return to[row * SMALL_COLUMNS + in_block]; });
        }
    }
};
