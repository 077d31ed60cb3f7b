// Attention of rows over paged keys and values in f32, for any head width, block size and KV dtype. See attention.cuh for the formula.
//
// q, out [rows, heads * head_width] f32. Grid (slots, kv_heads), 4 warps; a warp takes a packed row: 32 keys at a time, first a key per
// lane for the scores, then a column per lane for the values. Shared memory per warp: 32 addresses, 32 probabilities, the
// query and the result (head_width floats each).
#include "attention.cuh"

template <uint32_t DTYPE>
DEVICE float kv_number(const unsigned char* at, uint32_t index) {
    if (DTYPE == KV_F32) return reinterpret_cast<const float*>(at)[index];
    if (DTYPE == KV_BF16) return bf16_to_f32(reinterpret_cast<const uint16_t*>(at)[index]);
    if (DTYPE == KV_F16) return f16_to_f32(reinterpret_cast<const uint16_t*>(at)[index]);
    if (DTYPE == KV_INT8) return static_cast<float>(reinterpret_cast<const int8_t*>(at)[index]);
    return fp8_to_f32(at[index]);
}

struct ExactRoom {
    const unsigned char** values;  // [32]
    float* weights;                // [32]
    float* q;                      // [head_width]
    float* out;                    // [head_width]
};

struct ExactState {
    float largest;
    float sum;
};

// The score of this lane's key; leaves where its values lie.
template <uint32_t DTYPE>
DEVICE float exact_score(const AttentionParams& p, const ExactRoom& room, const KeyPlace& place, uint32_t kv_head, float& value_scale) {
    const uint32_t lane = thread_index() % WARP, width = p.kv.head_width;
    const size_t slot = static_cast<size_t>(kv_head) * p.kv.block_tokens + place.slot;
    const unsigned char* block = p.kv.bytes + place.block;
    const unsigned char* key = block + slot * width * kv_bytes(DTYPE);
    room.values[lane] = key + kv_values_at(p.kv);
    float dot = 0.0f;
    for (uint32_t c = 0; c < width; c++) dot += room.q[c] * kv_number<DTYPE>(key, c);
    if (DTYPE == KV_INT8) {
        dot *= reinterpret_cast<const float*>(block + kv_scales_at(p.kv, false))[slot];
        value_scale = reinterpret_cast<const float*>(block + kv_scales_at(p.kv, true))[slot];
    }
    const float score = dot * p.scale;
    return p.soft_cap > 0.0f ? p.soft_cap * tanhf(score / p.soft_cap) : score;
}

// Adds 32 keys, of which `count` are there, to the row's result.
template <uint32_t DTYPE>
DEVICE void exact_step(const AttentionParams& p, const ExactRoom& room, const uint32_t* blocks, uint32_t kv_head, uint32_t first,
                       uint32_t count, ExactState& state) {
    const uint32_t lane = thread_index() % WARP;
    float score = -INFINITY, value_scale = 1.0f;
    if (lane < count) score = exact_score<DTYPE>(p, room, key_place(p, blocks, first + lane), kv_head, value_scale);
    const float largest = fmaxf(state.largest, warp_max(score));
    const float weight = lane < count ? expf(score - largest) : 0.0f;
    const float shrink = expf(state.largest - largest);
    state.sum = state.sum * shrink + warp_sum(weight);
    state.largest = largest;
    room.weights[lane] = weight * value_scale;
    warp_barrier();
    for (uint32_t c = lane; c < p.kv.head_width; c += WARP) {
        float sum = room.out[c] * shrink;
        for (uint32_t k = 0; k < count; k++) sum += room.weights[k] * kv_number<DTYPE>(room.values[k], c);
        room.out[c] = sum;
    }
    warp_barrier();
}

template <uint32_t DTYPE>
DEVICE void exact_row(const AttentionParams& p, const AttentionItem& item, const ExactRoom& room, uint32_t index) {
    const uint32_t lane = thread_index() % WARP, width = p.kv.head_width;
    const AttentionRow row = attention_row(p, item, block_y(), index);
    const float* q = p.q.at + row.row * p.q.stride + row.column;
    for (uint32_t c = lane; c < width; c += WARP) {
        room.q[c] = q[c];
        room.out[c] = 0.0f;
    }
    warp_barrier();
    const uint32_t* blocks = p.block_table + static_cast<size_t>(item.sequence) * p.blocks_stride;
    ExactState state = {-INFINITY, 0.0f};
    for (uint32_t key = row.begin; key < row.end; key += WARP)
        exact_step<DTYPE>(p, room, blocks, block_y(), key, row.end - key < WARP ? row.end - key : WARP, state);
    float* out = p.out.at + row.row * p.out.stride + row.column;
    const bool is_whole = item.partial == WHOLE;
    if (!is_whole) {
        out = p.partial + row.partial * partial_stride(p);
        if (lane == 0) out[width] = state.sum > 0.0f ? (state.largest + logf(state.sum)) * LOG2_E : -INFINITY;
    }
    const float factor = state.sum > 0.0f ? 1.0f / state.sum : 0.0f;
    for (uint32_t c = lane; c < width; c += WARP) out[c] = room.out[c] * factor;
    warp_barrier();
}

template <uint32_t DTYPE>
DEVICE void attention_exact(const AttentionParams& p) {
    dependency_wait();
    const uint32_t warp = thread_index() / WARP, warps = block_threads() / WARP, width = p.kv.head_width;
    float* floats = reinterpret_cast<float*>(shared_memory() + warps * WARP * sizeof(void*)) + warp * (WARP + 2 * width);
    const ExactRoom room = {reinterpret_cast<const unsigned char**>(shared_memory()) + warp * WARP, floats, floats + WARP,
                            floats + WARP + width};
    const uint32_t end = p.plan[p.slots_at + block_x() + 1];
    for (uint32_t at = p.plan[p.slots_at + block_x()]; at < end; at += ITEM_WORDS) {
        const AttentionItem item = attention_item(p.plan + at);
        for (uint32_t index = warp; index < item.rows; index += warps) exact_row<DTYPE>(p, item, room, index);
    }
    dependency_release();
}

GALERNE_KERNEL(attention_exact_f32, AttentionParams, 128, 4) { attention_exact<KV_F32>(p); }
GALERNE_KERNEL(attention_exact_bf16, AttentionParams, 128, 4) { attention_exact<KV_BF16>(p); }
GALERNE_KERNEL(attention_exact_f16, AttentionParams, 128, 4) { attention_exact<KV_F16>(p); }
GALERNE_KERNEL(attention_exact_int8, AttentionParams, 128, 4) { attention_exact<KV_INT8>(p); }
GALERNE_KERNEL(attention_exact_fp8, AttentionParams, 128, 4) { attention_exact<KV_FP8>(p); }
