// Linear maps of up to 64 rows of x, which stream the weights once: out[r, c] = (accumulate ? out[r, c] : 0) + bias[c] + sum_k x[r, k] w[c, k].
// Kernels whose names end in "gated" make, of these sums y, out[r, c] = f(y[r, c]) y[r, columns / 2 + c], f the activation, of half as
// many columns, a multiple of 16.
//
// x [rows, width] f32; w [columns, width] in the format of the kernel's name; bias [columns] f32 or null; out [rows, columns] f32.
// x and w are rounded to bf16 (f16 for f16 weights, where larger numbers than 65,504 become that), sums are f32. The weights are mma's
// first operand and go from device memory to registers, where they are dequantized; x lies in shared memory in the order of mma's
// second operand (see fragments.cuh). The order of a sum follows from the matrix's shape alone, so a row's result does not depend on
// other rows.
//
// A block of 8 warps makes 128 columns of all rows: grid (ceil(columns / 128), splits); splits share the columns of x, and the last
// of them to finish adds what all have found, in order. Kernels' names have the most rows they take. Shared memory: stage_chunks * chunk *
// rows bf16 or [rows][128] f32, what is larger; rows as in the name. partial: [grid x][splits][rows][128] f32, of any content; counters:
// [grid x], zero, and left so.
#include "linear_small.cuh"

struct LinearSmallParams {
    View x;
    View out;
    Matrix matrix;
    const float* bias;
    float* partial;
    uint32_t* counters;
    uint32_t rows;
    uint32_t accumulate;
    uint32_t splits;
    uint32_t split_chunks;
    uint32_t stage_chunks;
    uint32_t activation;
};

template <uint32_t F, uint32_t TILES, bool IS_GATED>
DEVICE void linear_small(const LinearSmallParams& p) {
    const size_t partials = static_cast<size_t>(p.splits) * TILES * 8 * SMALL_COLUMNS;
    const SmallLinear job = {p.x, p.out, p.matrix, p.bias, nullptr, 1, nullptr, p.partial + block_x() * partials,
                             p.counters + block_x(), p.rows, p.accumulate, p.splits, p.split_chunks, p.stage_chunks,
                             p.activation};
    SmallKernel<F, TILES, IS_GATED>::run(job, block_x(), block_y());
}

#define LINEAR_SMALL_ROWS(NAME, ROWS, F, BLOCKS, GATED_BLOCKS)                                                      \
    GALERNE_KERNEL(NAME##_##ROWS, LinearSmallParams, 256, BLOCKS) { linear_small<F, ROWS / 8, false>(p); }          \
    GALERNE_KERNEL(NAME##_##ROWS##_gated, LinearSmallParams, 256, GATED_BLOCKS) { linear_small<F, ROWS / 8, true>(p); }

// Some formats need more registers for 64 rows than two blocks leave.
#define LINEAR_SMALL(FORMAT, F, BLOCKS, GATED_BLOCKS)           \
    LINEAR_SMALL_ROWS(linear_small_##FORMAT, 8, F, 2, 2)        \
    LINEAR_SMALL_ROWS(linear_small_##FORMAT, 16, F, 2, 2)       \
    LINEAR_SMALL_ROWS(linear_small_##FORMAT, 32, F, 2, 2)       \
    LINEAR_SMALL_ROWS(linear_small_##FORMAT, 64, F, BLOCKS, GATED_BLOCKS)

LINEAR_SMALL(f32, W_F32, 1, 1)
LINEAR_SMALL(f16, W_F16, 2, 2)
LINEAR_SMALL(bf16, W_BF16, 2, 2)
LINEAR_SMALL(codes4, W_CODES4, 2, 2)
LINEAR_SMALL(codes4_min, W_CODES4_MIN, 2, 2)
LINEAR_SMALL(codes4_super, W_CODES4_SUPER, 2, 2)
LINEAR_SMALL(codes8, W_CODES8, 2, 1)
LINEAR_SMALL(codes8_min, W_CODES8_MIN, 2, 2)
LINEAR_SMALL(codes8_super, W_CODES8_SUPER, 1, 1)
LINEAR_SMALL(codes8_pair, W_CODES8_PAIR, 1, 1)
LINEAR_SMALL(fp8, W_FP8, 2, 2)
LINEAR_SMALL(nvfp4, W_NVFP4, 2, 2)
LINEAR_SMALL(int4, W_INT4, 2, 2)
