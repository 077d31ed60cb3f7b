// Rows of a table: out[r] = table[index[r] + offset - first], or table[offset - first] without an index.
//
// table [entries, width] in any format of weights.cuh, dequantized exactly; index [rows] u32 or null; out [rows, width] f32. Rows
// whose entry is not among this table's (parts of a table in several formats, each with its `first`) are left alone. One block
// per row: grid (rows).
#include "weights.cuh"

struct EmbeddingParams {
    View out;
    Matrix table;
    const uint32_t* index;
    uint32_t offset;
    uint32_t first;
};

GALERNE_KERNEL(embedding, EmbeddingParams, 256, 1) {
    dependency_wait();
    const uint32_t format = p.table.format;
    const uint32_t entry = (p.index ? p.index[block_x()] : 0) + p.offset - p.first;
    if (entry >= p.table.rows) return;
    float* out = p.out.at + static_cast<size_t>(block_x()) * p.out.stride;
    const float factor = row_factor(p.table, format_spec(format), entry);
    for (uint32_t eighth = thread_index(); eighth * 8 < p.table.width; eighth += block_threads()) {
        float values[8];
        decode_eight(load_eight(p.table, format, entry, eighth), format, eighth, values);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            if (eighth * 8 + i < p.table.width) out[eighth * 8 + i] = values[i] * factor;
    }
    dependency_release();
}
