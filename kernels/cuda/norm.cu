// Normalisation of groups of `group` columns (a row, or one head of it), after adding `delta` to `x` if there is one.
//
//   rms:   out = x / sqrt(mean(x^2) + eps) * (weight + weight_offset)
//   layer: out = (x - mean) / sqrt(var + eps) * weight + bias
//   l2:    out = x / max(sqrt(sum(x^2)), eps)
//
// x [rows, width] f32, read; also written if delta is not null (x += delta). out [rows, width] f32, may be x.
// weight [group] f32 (none for l2); bias [group] f32 or null. width is a multiple of group.
//
// Mean and variance are taken in two passes over values that a thread keeps: norm_*, for any shape, in shared memory, one block of
// threads per group; norm_*_vector, for aligned views and group a multiple of 4, in registers, `team` threads per group: a warp, of
// which a block has several, or the whole block. Grid x: groups of all rows, by as many as a block takes.
// Shared memory: 128 bytes of sums, then for norm_* group floats.
#include "vector.cuh"

struct NormParams {
    View x;
    View delta;  // at null: none
    View out;
    const float* weight;
    const float* bias;
    uint32_t rows;
    uint32_t group;
    uint32_t team;
    float eps;
    float weight_offset;
    uint32_t reserved;
};

enum Kind { RMS, LAYER, L2 };

// Where a group begins: `unit` counts groups row by row.
struct NormPlace {
    float* x;
    const float* delta;
    float* out;
};

DEVICE NormPlace norm_place(const NormParams& p, uint32_t unit) {
    const uint32_t groups = p.x.width / p.group;
    const size_t row = unit / groups, column = static_cast<size_t>(unit % groups) * p.group;
    return {p.x.at + row * p.x.stride + column, p.delta.at ? p.delta.at + row * p.delta.stride + column : nullptr,
            p.out.at + row * p.out.stride + column};
}

// What values are multiplied by, from the sum of their squares (for layer: of their distances from the mean).
template <Kind KIND>
DEVICE float norm_factor(const NormParams& p, float squares) {
    if (KIND == L2) return 1.0f / fmaxf(sqrtf(squares), p.eps);
    return reciprocal_sqrt(squares / static_cast<float>(p.group) + p.eps);
}

template <Kind KIND, uint32_t N>
DEVICE Floats<N> norm_end(const NormParams& p, Floats<N> x, const Floats<N>& weight, const Floats<N>& bias, float mean, float factor) {
    for (uint32_t i = 0; i < N; i++) {
        if (KIND == RMS) x.at[i] *= factor * (weight.at[i] + p.weight_offset);
        if (KIND == LAYER) x.at[i] = (x.at[i] - mean) * factor * weight.at[i] + bias.at[i];
        if (KIND == L2) x.at[i] *= factor;
    }
    return x;
}

// Columns `column` and following of the weight and of the bias; what a kind does not have is not looked at.
template <Kind KIND, uint32_t N>
DEVICE Floats<N> norm_weight(const NormParams& p, uint32_t column) {
    return KIND == L2 ? all_floats<N>(0.0f) : load_floats<N>(p.weight + column);
}
template <Kind KIND, uint32_t N>
DEVICE Floats<N> norm_bias(const NormParams& p, uint32_t column) {
    return KIND == LAYER && p.bias ? load_floats<N>(p.bias + column) : all_floats<N>(0.0f);
}

template <Kind KIND>
DEVICE void normalise(const NormParams& p) {
    dependency_wait();
    float* room = reinterpret_cast<float*>(shared_memory());
    float* values = room + WARP;
    const NormPlace at = norm_place(p, block_x());
    float sum = 0.0f;
    for (uint32_t c = thread_index(); c < p.group; c += block_threads()) {
        float value = at.x[c];
        if (at.delta) at.x[c] = value += at.delta[c];
        values[c] = value;  // read back by this thread alone
        sum += KIND == LAYER ? value : value * value;
    }
    float mean = 0.0f, squares = block_sum(sum, room);
    if (KIND == LAYER) {
        mean = squares / static_cast<float>(p.group);
        squares = 0.0f;
        for (uint32_t c = thread_index(); c < p.group; c += block_threads())
            squares += (values[c] - mean) * (values[c] - mean);
        squares = block_sum(squares, room);
    }
    const float factor = norm_factor<KIND>(p, squares);
    for (uint32_t c = thread_index(); c < p.group; c += block_threads()) {
        const Floats<1> weight = norm_weight<KIND, 1>(p, c), bias = norm_bias<KIND, 1>(p, c);
        at.out[c] = norm_end<KIND, 1>(p, {{values[c]}}, weight, bias, mean, factor).at[0];
    }
    dependency_release();
}

// Vectors of four that a thread keeps.
constexpr uint32_t KEPT = 4;

// Sum over the team.
DEVICE float team_sum(const NormParams& p, float value) {
    return p.team == WARP ? warp_sum(value) : block_sum(value, reinterpret_cast<float*>(shared_memory()));
}

template <Kind KIND>
DEVICE void normalise_vectors(const NormParams& p) {
    dependency_wait();
    const uint32_t unit = block_x() * (block_threads() / p.team) + thread_index() / p.team;
    if (unit >= p.rows * (p.x.width / p.group)) return;  // a whole warp of the last block: larger teams have a block each
    const NormPlace at = norm_place(p, unit);
    const uint32_t first = thread_index() % p.team * 4, step = p.team * 4;
    // Loads come together, before stores: the compiler cannot know that they do not overlap, and would wait for each.
    Floats<4> values[KEPT], weight[KEPT], bias[KEPT];
#pragma unroll
    for (uint32_t k = 0; k < KEPT; k++) {
        const uint32_t c = first + k * step;
        values[k] = c < p.group ? load_floats<4>(at.x + c) : all_floats<4>(0.0f);
    }
    if (at.delta) {
        Floats<4> delta[KEPT];
#pragma unroll
        for (uint32_t k = 0; k < KEPT; k++) {
            const uint32_t c = first + k * step;
            delta[k] = c < p.group ? load_floats<4>(at.delta + c) : all_floats<4>(0.0f);
        }
#pragma unroll
        for (uint32_t k = 0; k < KEPT; k++) {
            const uint32_t c = first + k * step;
            for (uint32_t i = 0; i < 4; i++) values[k].at[i] += delta[k].at[i];
            if (c < p.group) store_floats<4>(at.x + c, values[k]);
        }
    }
    // On their way while the block adds up.
#pragma unroll
    for (uint32_t k = 0; k < KEPT; k++) {
        const uint32_t c = first + k * step;
        weight[k] = c < p.group ? norm_weight<KIND, 4>(p, c) : all_floats<4>(0.0f);
    }
    float sum = 0.0f;
#pragma unroll
    for (uint32_t k = 0; k < KEPT; k++)
        for (uint32_t i = 0; i < 4; i++) sum += KIND == LAYER ? values[k].at[i] : values[k].at[i] * values[k].at[i];
    float mean = 0.0f, squares = team_sum(p, sum);
    if (KIND == LAYER) {
        mean = squares / static_cast<float>(p.group);
        squares = 0.0f;
#pragma unroll
        for (uint32_t k = 0; k < KEPT; k++) {
            if (first + k * step >= p.group) break;
            for (uint32_t i = 0; i < 4; i++) squares += (values[k].at[i] - mean) * (values[k].at[i] - mean);
        }
        squares = team_sum(p, squares);
    }
    const float factor = norm_factor<KIND>(p, squares);
#pragma unroll
    for (uint32_t k = 0; k < KEPT; k++) {
        const uint32_t c = first + k * step;
        bias[k] = c < p.group ? norm_bias<KIND, 4>(p, c) : all_floats<4>(0.0f);
    }
#pragma unroll
    for (uint32_t k = 0; k < KEPT; k++) {
        const uint32_t c = first + k * step;
        if (c < p.group) store_floats<4>(at.out + c, norm_end<KIND, 4>(p, values[k], weight[k], bias[k], mean, factor));
    }
    dependency_release();
}

GALERNE_KERNEL(norm_rms, NormParams, 1024, 1) { normalise<RMS>(p); }
GALERNE_KERNEL(norm_layer, NormParams, 1024, 1) { normalise<LAYER>(p); }
GALERNE_KERNEL(norm_l2, NormParams, 1024, 1) { normalise<L2>(p); }
GALERNE_KERNEL(norm_rms_vector, NormParams, 1024, 1) { normalise_vectors<RMS>(p); }
GALERNE_KERNEL(norm_layer_vector, NormParams, 1024, 1) { normalise_vectors<LAYER>(p); }
GALERNE_KERNEL(norm_l2_vector, NormParams, 1024, 1) { normalise_vectors<L2>(p); }
