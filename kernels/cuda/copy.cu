// Copies groups of columns, of the same or of listed rows.
//
//   out[r][g * out_stride + i] = x[row(r)][g * x_stride + i]     for i < group, g < groups
//
// x [any, ..] and out [rows, ..] f32, apart; row(r) = indices[r], or r if there is no list. Columns of out between groups stay.
// Threads take one number, or four if everything is aligned (is_vector), in row-major order, `UNROLL` of them a grid apart. Fewer than
// 2^31 threads' worth.
#include "vector.cuh"

struct CopyParams {
    View x;
    View out;
    const uint32_t* indices;  // [rows], or null
    uint32_t rows;
    uint32_t group;
    uint32_t groups;
    uint32_t x_stride;
    uint32_t out_stride;
    uint32_t is_vector;
};

constexpr uint32_t UNROLL = 4;

template <uint32_t N>
DEVICE void copy_groups(const CopyParams& p) {
    const uint32_t per_group = p.group / N, per_row = per_group * p.groups, total = per_row * p.rows;
    const uint32_t step = grid_x() * block_threads();
    for (uint32_t first = block_x() * block_threads() + thread_index(); first < total; first += UNROLL * step) {
        Floats<N> values[UNROLL];
        float* to[UNROLL];
#pragma unroll
        for (uint32_t k = 0; k < UNROLL; k++) {
            const uint32_t index = first + k * step;
            if (index >= total) break;
            const uint32_t row = index / per_row, in_row = index % per_row;
            const uint32_t group = in_row / per_group, column = in_row % per_group * N;
            const size_t from = p.indices ? p.indices[row] : row;
            values[k] = load_floats<N>(p.x.at + from * p.x.stride + group * p.x_stride + column);
            to[k] = p.out.at + static_cast<size_t>(row) * p.out.stride + group * p.out_stride + column;
        }
#pragma unroll
        for (uint32_t k = 0; k < UNROLL; k++) {
            if (first + k * step >= total) break;
            store_floats<N>(to[k], values[k]);
        }
    }
}

GALERNE_KERNEL(copy_columns, CopyParams, 256, 4) {
    dependency_wait();
    if (p.is_vector) copy_groups<4>(p);
    else copy_groups<1>(p);
    dependency_release();
}
