// A matrix of any format of weights.cuh as bf16, for libraries that know no other: out[r, k] = bf16(w[r, k]), rounded once.
//
// w [rows, width], of which the rows from first_row on are taken; out [taken, stride] bf16 row-major, 16-byte aligned, stride a
// multiple of 8; columns from width to stride are zero. One block per row: grid (taken).
#include "weights.cuh"

struct DequantizeParams {
    Matrix matrix;
    uint16_t* out;
    uint32_t stride;
    uint32_t first_row;
};

GALERNE_KERNEL(dequantize, DequantizeParams, 256, 1) {
    const uint32_t format = p.matrix.format, row = p.first_row + block_x();
    const float factor = row_factor(p.matrix, format_spec(format), row);
    uint4* out = reinterpret_cast<uint4*>(p.out + static_cast<size_t>(block_x()) * p.stride);
    dependency_wait();
    for (uint32_t eighth = thread_index(); eighth < p.stride / 8; eighth += block_threads()) {
        float values[8] = {};
        if (eighth * 8 < p.matrix.width)
            decode_eight(load_eight(p.matrix, format, row, eighth), format, eighth, values);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) values[i] = eighth * 8 + i < p.matrix.width ? values[i] * factor : 0.0f;
        out[eighth] = make_uint4(pack_bf16(values[0], values[1]), pack_bf16(values[2], values[3]),
                                 pack_bf16(values[4], values[5]), pack_bf16(values[6], values[7]));
    }
    dependency_release();
}
