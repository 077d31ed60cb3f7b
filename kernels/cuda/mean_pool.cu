// Mean of each sequence's rows.
//
//   out[s][c] = 1 / row_counts[s] * sum of x[first_rows[s] + i][c] over i < row_counts[s];  0 if row_counts[s] is 0
//
// x [rows, width] f32, out [sequences, width] f32, apart; first_rows, row_counts [sequences] u32. Grid (columns / (N threads), sequences):
// a thread adds up N columns, one or four (is_vector), in four sums, so that four loads are in flight and rounding stays small.
#include "vector.cuh"

struct MeanPoolParams {
    View x;
    View out;
    const uint32_t* first_rows;
    const uint32_t* row_counts;
    uint32_t is_vector;
    uint32_t reserved;
};

constexpr uint32_t SUMS = 4;

template <uint32_t N>
DEVICE void mean_pool_columns(const MeanPoolParams& p) {
    const uint32_t sequence = block_y(), column = (block_x() * block_threads() + thread_index()) * N;
    if (column >= p.out.width) return;
    const uint32_t count = p.row_counts[sequence];
    const float* x = p.x.at + static_cast<size_t>(p.first_rows[sequence]) * p.x.stride + column;
    Floats<N> sums[SUMS];
#pragma unroll
    for (uint32_t s = 0; s < SUMS; s++) sums[s] = all_floats<N>(0.0f);
    for (uint32_t first = 0; first < count; first += SUMS)
#pragma unroll
        for (uint32_t s = 0; s < SUMS; s++) {
            if (first + s >= count) break;
            const Floats<N> row = load_floats<N>(x + static_cast<size_t>(first + s) * p.x.stride);
            for (uint32_t i = 0; i < N; i++) sums[s].at[i] += row.at[i];
        }
    Floats<N> mean;
    const float rows = static_cast<float>(count > 0 ? count : 1);
    for (uint32_t i = 0; i < N; i++)
        mean.at[i] = ((sums[0].at[i] + sums[1].at[i]) + (sums[2].at[i] + sums[3].at[i])) / rows;
    store_floats<N>(p.out.at + static_cast<size_t>(sequence) * p.out.stride + column, mean);
}

GALERNE_KERNEL(mean_pool, MeanPoolParams, 128, 4) {
    dependency_wait();
    if (p.is_vector) mean_pool_columns<4>(p);
    else mean_pool_columns<1>(p);
    dependency_release();
}
