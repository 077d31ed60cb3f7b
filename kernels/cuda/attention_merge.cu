// Joins the partial results of attention tiles whose keys were split:
//
//   out[row] = sum over parts (2^(log_sum[part] - largest) * partial[part]) / sum over parts 2^(log_sum[part] - largest)
//
// and zeroes the rows of merges without parts (padding). partial [partial rows][kv_heads][head_width] f32, log_sums [partial rows]
// [kv_heads] f32, out [rows, heads * head_width] f32. Grid (any, kv_heads), 4 warps: a block takes every grid_x()-th merge of the
// plan, a warp a packed row of it.
#include "attention.cuh"

struct AttentionMerge {
    uint32_t first_row, packed, rows, partial, parts;
};

constexpr uint32_t MERGE_WORDS = 8;

// Columns c .. c + COLUMNS of a row's result; `partial` and `log_sums` are those of its first part.
template <uint32_t COLUMNS>
DEVICE void merge_columns(const AttentionParams& p, const AttentionMerge& merge, const float* partial, const float* log_sums,
                          float largest, float* out) {
    const size_t next = static_cast<size_t>(merge.rows) * p.kv.kv_heads;
    float sum[COLUMNS] = {}, weights = 0.0f;
#pragma unroll 4
    for (uint32_t part = 0; part < merge.parts; part++) {
        const float weight = fast_exp2(log_sums[part * next] - largest);
        weights += weight;
        const float* numbers = partial + part * next * p.kv.head_width;
        if (COLUMNS == 4) {
            const float4 four = *reinterpret_cast<const float4*>(numbers);
            sum[0] += weight * four.x;
            sum[1 % COLUMNS] += weight * four.y;
            sum[2 % COLUMNS] += weight * four.z;
            sum[3 % COLUMNS] += weight * four.w;
        } else {
            sum[0] += weight * numbers[0];
        }
    }
    const float factor = weights > 0.0f ? 1.0f / weights : 0.0f;
#pragma unroll
    for (uint32_t c = 0; c < COLUMNS; c++) out[c] = sum[c] * factor;
}

template <uint32_t COLUMNS>
DEVICE void merge_row(const AttentionParams& p, const AttentionMerge& merge, uint32_t index) {
    const uint32_t packed = merge.packed + index, token = packed / p.group, width = p.kv.head_width;
    const size_t column = static_cast<size_t>(block_y() * p.group + packed - token * p.group) * width;
    const size_t row = merge.first_row + token;
    float* out = p.out.at + row * p.out.stride + column;
    const size_t first = static_cast<size_t>(merge.partial + index) * p.kv.kv_heads + block_y();
    const float* log_sums = p.log_sums + first;
    float largest = -INFINITY;
    for (uint32_t part = 0; part < merge.parts; part++)
        largest = fmaxf(largest, log_sums[static_cast<size_t>(part) * merge.rows * p.kv.kv_heads]);
    for (uint32_t c = thread_index() % WARP * COLUMNS; c < width; c += WARP * COLUMNS)
        merge_columns<COLUMNS>(p, merge, p.partial + first * width + c, log_sums, largest, out + c);
}

GALERNE_KERNEL(attention_merge, AttentionParams, 128, 8) {
    dependency_wait();
    const uint32_t warp = thread_index() / WARP, warps = block_threads() / WARP;
    const uint32_t merges = p.plan[0];
    for (uint32_t at = block_x(); at < merges; at += grid_x()) {
        const uint32_t* words = p.plan + p.plan[1] + at * MERGE_WORDS;
        const AttentionMerge merge = {words[0], words[1], words[2], words[3], words[4]};
        for (uint32_t index = warp; index < merge.rows; index += warps) {
            if (p.kv.head_width % 4 == 0)
                merge_row<4>(p, merge, index);
            else
                merge_row<1>(p, merge, index);
        }
    }
    dependency_release();
}
