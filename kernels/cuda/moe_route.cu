// Which experts a row of a mixture goes to: scores = x router^T in f32, the top_k largest of them (of equal ones the lower index), and
// their weights:
//
//   0 softmax over all experts: exp(s) / sum of all exp
//   1 softmax of the chosen:    exp(s) / sum of the chosen exp
//   2 sigmoid of the chosen:    sigmoid(s) / sum of the chosen sigmoid
//
// x [rows, width] f32; router [experts, width] in any format of weights.cuh, dequantized exactly; chosen [rows][top_k] u32 and weights
// [rows][top_k] f32, largest score first. sequence_of [rows] u32 or null: rows of sequence 0xffffffff choose expert 0xffffffff with
// weight 0. One block of 8 warps per row: grid (rows). Shared memory: experts floats.
#include "weights.cuh"

struct MoeRouteParams {
    View x;
    Matrix router;
    const uint32_t* sequence_of;
    uint32_t* chosen;
    float* weights;
    uint32_t top_k;
    uint32_t normalisation;
};

constexpr uint32_t NO_EXPERT = 0xffffffffu;

struct Best {
    float score;
    uint32_t expert;
};

DEVICE bool is_better(Best a, Best b) {
    if (a.expert == NO_EXPERT || b.expert == NO_EXPERT) return b.expert == NO_EXPERT && a.expert != NO_EXPERT;
    return a.score > b.score || (a.score == b.score && a.expert < b.expert);
}

// The largest score of an expert after the one chosen last, in the order of choice; the same in all lanes.
DEVICE Best next_best(const float* scores, uint32_t experts, Best last) {
    Best best = {0.0f, NO_EXPERT};
    for (uint32_t expert = thread_index() % WARP; expert < experts; expert += WARP) {
        const Best here = {scores[expert], expert};
        if ((last.expert == NO_EXPERT || is_better(last, here)) && is_better(here, best)) best = here;
    }
    for (uint32_t lanes = WARP / 2; lanes > 0; lanes /= 2) {
        const Best other = {shuffle_xor(best.score, lanes), shuffle_xor(best.expert, lanes)};
        if (is_better(other, best)) best = other;
    }
    return best;
}

DEVICE float score_of(const MoeRouteParams& p, const float* x, uint32_t expert) {
    const uint32_t format = p.router.format;
    float sum = 0.0f;
    for (uint32_t eighth = thread_index() % WARP; eighth * 8 < p.router.width; eighth += WARP) {
        float w[8];
        decode_eight(load_eight(p.router, format, expert, eighth), format, eighth, w);
#pragma unroll
        for (uint32_t i = 0; i < 8; i++)
            if (eighth * 8 + i < p.router.width) sum += x[eighth * 8 + i] * w[i];
    }
    return warp_sum(sum) * row_factor(p.router, format_spec(format), expert);
}

GALERNE_KERNEL(moe_route, MoeRouteParams, 256, 1) {
    float* scores = reinterpret_cast<float*>(shared_memory());
    const uint32_t experts = p.router.rows, warp = thread_index() / WARP, lane = thread_index() % WARP;
    const size_t first = static_cast<size_t>(block_x()) * p.top_k;
    dependency_wait();
    if (p.sequence_of && p.sequence_of[block_x()] == 0xffffffffu) {
        for (uint32_t i = thread_index(); i < p.top_k; i += block_threads()) {
            p.chosen[first + i] = NO_EXPERT;
            p.weights[first + i] = 0.0f;
        }
        return;
    }
    const float* x = p.x.at + static_cast<size_t>(block_x()) * p.x.stride;
    for (uint32_t expert = warp; expert < experts; expert += block_threads() / WARP) {
        const float score = score_of(p, x, expert);
        // A number that is none must not keep others from being ordered.
        if (lane == 0) scores[expert] = score == score ? score : -3.4e38f;
    }
    block_barrier();
    dependency_release();
    if (warp != 0) return;
    Best best = {0.0f, NO_EXPERT};
    float largest = 0.0f, of_chosen = 0.0f;
    for (uint32_t i = 0; i < p.top_k; i++) {
        best = next_best(scores, experts, best);
        if (i == 0) largest = best.score;
        const float raised = p.normalisation == 2 ? 1.0f / (1.0f + expf(-best.score)) : expf(best.score - largest);
        of_chosen += raised;
        if (lane == 0) {
            p.chosen[first + i] = best.expert;
            p.weights[first + i] = raised;
        }
    }
    float of_all = 0.0f;
    for (uint32_t expert = lane; expert < experts; expert += WARP) of_all += expf(scores[expert] - largest);
    of_all = warp_sum(of_all);
    if (lane == 0)
        for (uint32_t i = 0; i < p.top_k; i++) p.weights[first + i] /= p.normalisation == 0 ? of_all : of_chosen;
}
