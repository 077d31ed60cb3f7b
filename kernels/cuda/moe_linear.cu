// Linear maps of a mixture's experts, the rows of each expert together: out[a, c] = sum_k x[a / x_divisor, k] w_e[c, k] for the
// assignments a of moe_plan's tiles, e the tile's expert; gated as in linear_small.cu.
//
// x [.., width] f32; experts [experts] addresses of matrices [columns, width], all of the format of the kernel's name; out
// [assignments, columns] f32; order and tiles as in moe_plan.cu, with at most as many rows as the kernel's name has. Numbers
// are rounded as in linear_small.cu, of which this is the body. Grid (ceil(columns / 128), tiles). Shared memory as there.
#include "linear_small.cuh"

struct MoeLinearParams {
    View x;
    View out;
    Matrix matrix;  // `at` is not used
    const unsigned char* const* experts;
    const uint32_t* order;
    const uint32_t* tiles;
    uint32_t x_divisor;
    uint32_t stage_chunks;
    uint32_t activation;
    uint32_t unused;
};

template <uint32_t F, uint32_t TILES, bool IS_GATED>
DEVICE void moe_linear(const MoeLinearParams& p) {
    dependency_wait();
    const uint32_t* tile = p.tiles + 3 * block_y();
    const uint32_t rows = tile[2];
    if (rows == 0) return;
    const uint32_t* order = p.order + tile[1];
    Matrix matrix = p.matrix;
    matrix.at = p.experts[tile[0]];
    const SmallLinear job = {p.x,     p.out, matrix, nullptr, order, p.x_divisor, order,
                             nullptr, nullptr, rows, 0,       1,     0xfffffffcu, p.stage_chunks,
                             p.activation};
    SmallKernel<F, TILES, IS_GATED>::run(job, block_x(), 0);
}

#define MOE_LINEAR_ROWS(NAME, ROWS, F)                                                                          \
    GALERNE_KERNEL(NAME##_##ROWS, MoeLinearParams, 256, 2) { moe_linear<F, ROWS / 8, false>(p); }               \
    GALERNE_KERNEL(NAME##_##ROWS##_gated, MoeLinearParams, 256, 2) { moe_linear<F, ROWS / 8, true>(p); }

#define MOE_LINEAR(FORMAT, F)                      \
    MOE_LINEAR_ROWS(moe_linear_##FORMAT, 8, F)     \
    MOE_LINEAR_ROWS(moe_linear_##FORMAT, 32, F)

MOE_LINEAR(f32, W_F32)
MOE_LINEAR(f16, W_F16)
MOE_LINEAR(bf16, W_BF16)
MOE_LINEAR(codes4, W_CODES4)
MOE_LINEAR(codes4_min, W_CODES4_MIN)
MOE_LINEAR(codes4_super, W_CODES4_SUPER)
MOE_LINEAR(codes8, W_CODES8)
MOE_LINEAR(codes8_min, W_CODES8_MIN)
MOE_LINEAR(codes8_super, W_CODES8_SUPER)
MOE_LINEAR(codes8_pair, W_CODES8_PAIR)
MOE_LINEAR(fp8, W_FP8)
MOE_LINEAR(nvfp4, W_NVFP4)
MOE_LINEAR(int4, W_INT4)
