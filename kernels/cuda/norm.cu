// Normalisation of groups of `group` columns (a row, or one head of it), after adding `delta` to `x` if there is one.
//
//   rms:   out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
//   layer: out = (x - mean) / sqrt(var + eps) * weight + bias
//
// x [rows, width] f32, read; also written if delta is not null (x += delta). out [rows, width] f32, may be x.
// weight [group] f32; bias [group] f32 or null. width is a multiple of group. One block per group: grid (width / group, rows).
// Mean and variance are taken in two passes over values kept in shared memory (group floats, then 32).
#include "galerne.cuh"

struct NormParams {
    View x;
    View delta;  // at null: none
    View out;
    const float* weight;
    const float* bias;
    uint32_t rows;
    uint32_t group;
    float eps;
    float weight_offset;
};

template <bool LAYER>
DEVICE void normalise(const NormParams& p) {
    dependency_wait();
    float* values = reinterpret_cast<float*>(shared_memory());
    float* room = values + p.group;
    const size_t first = static_cast<size_t>(block_x()) * p.group, row = block_y();
    float* x = p.x.at + row * p.x.stride + first;
    float sum = 0.0f;
    for (uint32_t c = thread_index(); c < p.group; c += block_threads()) {
        float value = x[c];
        if (p.delta.at) {
            value += p.delta.at[row * p.delta.stride + first + c];
            x[c] = value;
        }
        values[c] = value;  // read back by this thread alone
        sum += LAYER ? value : value * value;
    }
    const float n = static_cast<float>(p.group);
    float mean = 0.0f, square = block_sum(sum, room) / n;
    if (LAYER) {
        mean = square;
        float squares = 0.0f;
        for (uint32_t c = thread_index(); c < p.group; c += block_threads())
            squares += (values[c] - mean) * (values[c] - mean);
        square = block_sum(squares, room) / n;
    }
    const float factor = 1.0f / sqrtf(square + p.eps);
    float* out = p.out.at + row * p.out.stride + first;
    for (uint32_t c = thread_index(); c < p.group; c += block_threads()) {
        const float scaled = (values[c] - mean) * factor * (p.weight[c] + p.weight_offset);
        out[c] = p.bias ? scaled + p.bias[c] : scaled;
    }
    dependency_release();
}

GALERNE_KERNEL(norm_rms, NormParams, 1024, 1) { normalise<false>(p); }
GALERNE_KERNEL(norm_layer, NormParams, 1024, 1) { normalise<true>(p); }
