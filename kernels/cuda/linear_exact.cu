// A linear map in f32 throughout, for every format: out[r, c] = (accumulate ? out[r, c] : 0) + bias[c] + sum_k x[r, k] w[c, k].
//
// x [rows, width] f32; w [columns, width] in any format of weights.cuh, dequantized exactly; bias [columns] f32 or null; out
// [rows, columns] f32. Sums run in the order of k, whatever else is in the batch. A block of 256 threads makes 64 columns of 32
// rows: grid (ceil(columns / 64), ceil(rows / 32)). Shared memory: 32 x (64 + 32) floats.
#include "weights.cuh"

struct LinearExactParams {
    View x;
    View out;
    Matrix matrix;
    const float* bias;
    uint32_t rows;
    uint32_t accumulate;
};

constexpr uint32_t EXACT_COLUMNS = 64, EXACT_ROWS = 32, EXACT_DEPTH = 32;

GALERNE_KERNEL(linear_exact, LinearExactParams, 256, 1) {
    float* w = reinterpret_cast<float*>(shared_memory());  // [depth][columns]
    float* x = w + EXACT_DEPTH * EXACT_COLUMNS;             // [depth][rows]
    const uint32_t thread = thread_index(), format = p.matrix.format;
    const uint32_t first_column = block_x() * EXACT_COLUMNS, first_row = block_y() * EXACT_ROWS;
    const uint32_t in_tile = thread % EXACT_COLUMNS, part = thread / EXACT_COLUMNS;
    const uint32_t column = first_column + in_tile;
    const uint32_t own_columns = thread % 16 * 4, own_rows = thread / 16 * 2;
    const bool is_column = column < p.matrix.rows;
    const float factor = is_column ? row_factor(p.matrix, format_spec(format), column) : 0.0f;
    float sums[2][4] = {};
    dependency_wait();
    for (uint32_t k = 0; k < p.matrix.width; k += EXACT_DEPTH) {
        float values[8] = {};
        const uint32_t eighth = k / 8 + part;
        if (is_column && eighth * 8 < p.matrix.width)
            decode_eight(load_eight(p.matrix, format, column, eighth), format, eighth, values);
        for (uint32_t i = 0; i < 8; i++) w[(part * 8 + i) * EXACT_COLUMNS + in_tile] = values[i] * factor;
        for (uint32_t at = thread; at < EXACT_DEPTH * EXACT_ROWS; at += 256) {
            const uint32_t row = first_row + at / EXACT_DEPTH, depth = at % EXACT_DEPTH;
            const bool is_there = row < p.rows && k + depth < p.matrix.width;
            x[depth * EXACT_ROWS + at / EXACT_DEPTH] =
                is_there ? p.x.at[static_cast<size_t>(row) * p.x.stride + k + depth] : 0.0f;
        }
        block_barrier();
        for (uint32_t depth = 0; depth < EXACT_DEPTH; depth++)
            for (uint32_t r = 0; r < 2; r++)
                for (uint32_t c = 0; c < 4; c++)
                    sums[r][c] += x[depth * EXACT_ROWS + own_rows + r] * w[depth * EXACT_COLUMNS + own_columns + c];
        block_barrier();
    }
    dependency_release();
    for (uint32_t r = 0; r < 2; r++) {
        for (uint32_t c = 0; c < 4; c++) {
            const uint32_t row = first_row + own_rows + r, to = first_column + own_columns + c;
            if (row >= p.rows || to >= p.matrix.rows) continue;
            float* out = p.out.at + static_cast<size_t>(row) * p.out.stride + to;
            const float sum = sums[r][c] + (p.bias ? p.bias[to] : 0.0f);
            *out = p.accumulate ? *out + sum : sum;
        }
    }
}
