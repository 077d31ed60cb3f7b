// Joins the partial results of attention tiles whose keys were split:
//
//   out[row] = sum over parts (2^(log_sum[part] - largest) * partial[part]) / sum over parts 2^(log_sum[part] - largest)
//
// and zeroes the rows of merges without parts (padding). A tile's parts are its own, of `rows` rows each, and those of a tile that
// several sequences share for their common beginning, of `shared_rows` rows each. partial and out as in attention.cuh. Grid (any,
// kv_heads), 4 warps: a block takes every grid_x()-th merge of the plan, a warp a packed row of it.
#include "attention.cuh"

struct AttentionMerge {
    uint32_t first_row, packed, rows, partial, parts, shared, shared_rows, shared_parts;
};

constexpr uint32_t MERGE_WORDS = 8;

// A row's result of one part, over all KV heads.
DEVICE const float* merge_part(const AttentionParams& p, const AttentionMerge& merge, uint32_t index, uint32_t part) {
    const bool is_own = part < merge.parts;
    const uint32_t row = is_own ? merge.partial + part * merge.rows : merge.shared + (part - merge.parts) * merge.shared_rows;
    return p.partial + (static_cast<size_t>(row + index) * p.kv.kv_heads + block_y()) * partial_stride(p);
}

// Columns `column` .. + COLUMNS of a row's result.
template <uint32_t COLUMNS>
DEVICE void merge_columns(const AttentionParams& p, const AttentionMerge& merge, uint32_t index, uint32_t column, float largest,
                          float* out) {
    float sum[COLUMNS] = {}, weights = 0.0f;
#pragma unroll 4
    for (uint32_t part = 0; part < merge.parts + merge.shared_parts; part++) {
        const float* numbers = merge_part(p, merge, index, part);
        const float weight = fast_exp2(numbers[p.kv.head_width] - largest);
        weights += weight;
        if (COLUMNS == 4) {
            const float4 four = *reinterpret_cast<const float4*>(numbers + column);
            sum[0] += weight * four.x;
            sum[1 % COLUMNS] += weight * four.y;
            sum[2 % COLUMNS] += weight * four.z;
            sum[3 % COLUMNS] += weight * four.w;
        } else {
            sum[0] += weight * numbers[column];
        }
    }
    const float factor = weights > 0.0f ? 1.0f / weights : 0.0f;
#pragma unroll
    for (uint32_t c = 0; c < COLUMNS; c++) out[column + c] = sum[c] * factor;
}

template <uint32_t COLUMNS>
DEVICE void merge_row(const AttentionParams& p, const AttentionMerge& merge, uint32_t index) {
    const uint32_t packed = merge.packed + index, token = packed / p.group, width = p.kv.head_width;
    const size_t column = static_cast<size_t>(block_y() * p.group + packed - token * p.group) * width;
    const size_t row = merge.first_row + token;
    float largest = -INFINITY;
    for (uint32_t part = 0; part < merge.parts + merge.shared_parts; part++)
        largest = fmaxf(largest, merge_part(p, merge, index, part)[width]);
    for (uint32_t c = thread_index() % WARP * COLUMNS; c < width; c += WARP * COLUMNS)
        merge_columns<COLUMNS>(p, merge, index, c, largest, p.out.at + row * p.out.stride + column);
}

GALERNE_KERNEL(attention_merge, AttentionParams, 128, 8) {
    dependency_wait();
    const uint32_t warp = thread_index() / WARP, warps = block_threads() / WARP;
    const uint32_t merges = p.plan[0];
    for (uint32_t at = block_x(); at < merges; at += grid_x()) {
        const uint32_t* words = p.plan + p.plan[1] + at * MERGE_WORDS;
        const AttentionMerge merge = {words[0], words[1], words[2], words[3], words[4], words[5], words[6], words[7]};
        for (uint32_t index = warp; index < merge.rows; index += warps) {
            if (p.kv.head_width % 4 == 0)
                merge_row<4>(p, merge, index);
            else
                merge_row<1>(p, merge, index);
        }
    }
    dependency_release();
}
