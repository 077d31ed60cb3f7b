// Linear maps of a mixture's experts in f32 throughout: out[a, c] = sum_k x[a / x_divisor, k] w_e[c, k], e = chosen[a].
//
// x [.., width] f32; experts [experts] addresses of matrices [columns, width], all of one format; chosen [assignments] u32, of which
// those that are no expert are left out; out [assignments, columns] f32. A thread makes one number: grid (assignments,
// ceil(columns / 128)). For correctness, not for speed.
#include "weights.cuh"

struct MoeExactParams {
    View x;
    View out;
    Matrix matrix;  // `at` is not used
    const unsigned char* const* experts;
    const uint32_t* chosen;
    uint32_t x_divisor;
    uint32_t experts_count;
};

GALERNE_KERNEL(moe_exact, MoeExactParams, 128, 1) {
    dependency_wait();
    const uint32_t assignment = block_x(), column = block_y() * block_threads() + thread_index();
    const uint32_t expert = p.chosen[assignment], format = p.matrix.format;
    if (expert >= p.experts_count || column >= p.matrix.rows) return;
    Matrix matrix = p.matrix;
    matrix.at = p.experts[expert];
    const float* x = p.x.at + static_cast<size_t>(assignment / p.x_divisor) * p.x.stride;
    float sum = 0.0f;
    for (uint32_t eighth = 0; eighth * 8 < matrix.width; eighth++) {
        float w[8];
        decode_eight(load_eight(matrix, format, column, eighth), format, eighth, w);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            if (eighth * 8 + i < matrix.width) sum += x[eighth * 8 + i] * w[i];
    }
    sum *= row_factor(matrix, format_spec(format), column);
    p.out.at[static_cast<size_t>(assignment) * p.out.stride + column] = sum;
    dependency_release();
}
