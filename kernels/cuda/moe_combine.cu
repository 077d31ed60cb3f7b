// A mixture's output: out[r] = sum_i weights[r, i] y[r top_k + i] + sigmoid(gate[r]) shared[r], in this order; without a gate the
// shared expert counts fully, without a shared expert not at all.
//
// y [rows top_k, width] f32; weights [rows][top_k] f32, chosen [rows][top_k] u32: choices that are no expert are left out, whatever y
// has there; shared [rows, width] f32 or null; gate [rows] f32 or null; out [rows, width] f32. Grid (ceil(width / 256), rows).
#include "galerne.cuh"

struct MoeCombineParams {
    View y;
    View shared;
    View out;
    const uint32_t* chosen;
    const float* weights;
    const float* gate;
    uint32_t top_k;
    uint32_t unused;
};

GALERNE_KERNEL(moe_combine, MoeCombineParams, 256, 1) {
    dependency_wait();
    const uint32_t column = block_x() * block_threads() + thread_index();
    if (column >= p.out.width) return;
    const size_t row = block_y();
    float sum = 0.0f;
    for (size_t a = row * p.top_k; a < (row + 1) * p.top_k; a++)
        if (p.chosen[a] != 0xffffffffu) sum += p.weights[a] * p.y.at[a * p.y.stride + column];
    if (p.shared.at) {
        const float factor = p.gate ? 1.0f / (1.0f + expf(-p.gate[row])) : 1.0f;
        sum += factor * p.shared.at[row * p.shared.stride + column];
    }
    p.out.at[row * p.out.stride + column] = sum;
    dependency_release();
}
