// Attention of small tiles (16 packed rows) over paged 16-bit and 8-bit keys and values, on tensor cores: streams the KV cache
// once. Formula and parameters in attention.cuh, fragments in attention_mma.cuh; f32 accumulation.
//
// q, out [rows, heads * head_width] f32; head_width at most WIDTH, rows of codes 16-byte aligned. Grid (slots, kv_heads), 4
// warps. A warp takes 16 of every 64 keys, with its own softmax, and its own ring of stages in shared memory that copies
// fill ahead: warps do not wait for each other until the item ends, where their results are joined.
// A stage: 16 rows of keys, 16 rows of values, then for 8-bit integers 16 scales of the keys and 16 of the values.
#include "attention_mma.cuh"

constexpr uint32_t TILE_ROWS = 16;

template <uint32_t DTYPE, uint32_t WIDTH>
struct Decode {
    using Rows = CodeRows<DTYPE, WIDTH>;
    // So many that about 100 KB are under way or in use per block (200 KB of heads of 256).
    static constexpr uint32_t STAGES = Codes<DTYPE>::IS_BYTE ? 6 : 3;
    static constexpr uint32_t SIDE_BYTES = WARP_KEYS * Rows::STRIDE;
    static constexpr uint32_t STAGE_BYTES = 2 * SIDE_BYTES + (Codes<DTYPE>::HAS_SCALES ? 2 * WARP_KEYS * 4 : 0);
};

// One stage's 16 keys into the warp's running result.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void decode_step(const AttentionParams& p, const TileRows& rows, const RegisterQueries<WIDTH>& queries,
                        const unsigned char* stage, uint32_t key, Softmax& state, float (&out)[WIDTH / 8][4]) {
    using Plan = Decode<DTYPE, WIDTH>;
    const float* scales = reinterpret_cast<const float*>(stage + 2 * Plan::SIDE_BYTES);
    Scores<WARP_KEYS> scores = {};
    score_keys<DTYPE, WIDTH>(scores, queries, stage, 0);
    finish_scores<DTYPE>(scores, p, rows, key, scales, true);
    float shrink[2];
    step_softmax(scores, state, shrink);
    shrink_out<WIDTH>(out, shrink);
    uint32_t a[4];
    probabilities<DTYPE>(a, scores, 0, scales + WARP_KEYS);
    add_values<DTYPE, WIDTH>(out, a, stage + Plan::SIDE_BYTES);
}

// A warp's result in shared memory: 16 largest scores, 16 sums, then rows of WIDTH and 8 numbers of padding.
template <uint32_t WIDTH>
struct WarpResult {
    static constexpr uint32_t STRIDE = WIDTH + 8;
    static constexpr uint32_t FLOATS = 2 * TILE_ROWS + TILE_ROWS * STRIDE;
};

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void leave_result(float* room, const Softmax& state, const float (&out)[WIDTH / 8][4]) {
    const uint32_t lane = thread_index() % WARP;
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        const uint32_t row = lane / 4 + 8 * r;
        float sum = state.sum[r] + shuffle_xor(state.sum[r], 1);
        sum += shuffle_xor(sum, 2);
        if (lane % 4 == 0) {
            room[row] = state.largest[r];
            room[TILE_ROWS + row] = sum;
        }
        float* at = room + 2 * TILE_ROWS + row * WarpResult<WIDTH>::STRIDE;
#pragma unroll
        for (uint32_t tile = 0; tile < WIDTH / 8; tile++) {
            at[value_column<DTYPE>(tile, 0)] = out[tile][2 * r];
            at[value_column<DTYPE>(tile, 1)] = out[tile][2 * r + 1];
        }
    }
}

// Joins the warps' results: a warp takes a row, a lane some columns.
template <uint32_t WIDTH>
DEVICE void join_results(const AttentionParams& p, const AttentionItem& item, const float* room) {
    constexpr uint32_t FLOATS = WarpResult<WIDTH>::FLOATS;
    const uint32_t lane = thread_index() % WARP;
    for (uint32_t index = thread_index() / WARP; index < item.rows; index += WARPS) {
        float largest = -INFINITY, sum = 0.0f, weight[WARPS];
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++) largest = fmaxf(largest, room[w * FLOATS + index]);
#pragma unroll
        for (uint32_t w = 0; w < WARPS; w++) {
            weight[w] = largest == -INFINITY ? 0.0f : fast_exp2(room[w * FLOATS + index] - largest);
            sum += weight[w] * room[w * FLOATS + TILE_ROWS + index];
        }
        const AttentionRow row = attention_row(p, item, block_y(), index);
        const bool is_whole = item.partial == WHOLE;
        float* out = is_whole ? p.out.at + row.row * p.out.stride + row.column : p.partial + row.partial * partial_stride(p);
        if (!is_whole && lane == 0) out[p.kv.head_width] = sum > 0.0f ? largest + log2f(sum) : -INFINITY;
        const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
        for (uint32_t c = lane; c < p.kv.head_width; c += WARP) {
            const float* at = room + 2 * TILE_ROWS + index * WarpResult<WIDTH>::STRIDE + c;
            float result = 0.0f;
#pragma unroll
            for (uint32_t w = 0; w < WARPS; w++) result += weight[w] * at[w * FLOATS];
            out[c] = result * factor;
        }
    }
}

// Starts copying the stream's next keys to a stage.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void start_stage(const AttentionParams& p, KeyStream& stream, unsigned char* stage) {
    using Plan = Decode<DTYPE, WIDTH>;
    if (stream.next >= stream.end) return;
    unsigned char* scales = stage + 2 * Plan::SIDE_BYTES;
    start_keys<DTYPE, WIDTH>(p, stream, stage, stage + Plan::SIDE_BYTES, scales, scales + WARP_KEYS * 4);
}

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void decode_item(const AttentionParams& p, const AttentionItem& item) {
    using Plan = Decode<DTYPE, WIDTH>;
    const uint32_t warp = thread_index() / WARP;
    unsigned char* ring = shared_memory() + warp * Plan::STAGES * Plan::STAGE_BYTES;
    const TileRows rows = tile_rows(p, item, 0);
    KeyStream stream = key_stream(p, item, block_y(), warp);
#pragma unroll
    for (uint32_t stage = 0; stage + 1 < Plan::STAGES; stage++) {
        start_stage<DTYPE, WIDTH>(p, stream, ring + stage * Plan::STAGE_BYTES);
        copy_commit();
    }
    RegisterQueries<WIDTH> queries;
    load_queries<DTYPE, WIDTH>(queries.a, p, item, 0);
    float out[WIDTH / 8][4] = {};
    Softmax state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    uint32_t stage = 0;
    for (uint32_t key = item.key_begin + warp * WARP_KEYS; key < item.key_end; key += TILE_KEYS) {
        copy_wait<static_cast<int>(Plan::STAGES) - 2>();
        warp_barrier();
        const uint32_t free_stage = stage == 0 ? Plan::STAGES - 1 : stage - 1;
        start_stage<DTYPE, WIDTH>(p, stream, ring + free_stage * Plan::STAGE_BYTES);
        copy_commit();
        decode_step<DTYPE, WIDTH>(p, rows, queries, ring + stage * Plan::STAGE_BYTES, key, state, out);
        stage = stage + 1 == Plan::STAGES ? 0 : stage + 1;
    }
    copy_wait<0>();
    block_barrier();
    float* room = reinterpret_cast<float*>(shared_memory());
    leave_result<DTYPE, WIDTH>(room + warp * WarpResult<WIDTH>::FLOATS, state, out);
    block_barrier();
    join_results<WIDTH>(p, item, room);
    block_barrier();
}

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void attention_decode(const AttentionParams& p) {
    dependency_wait();
    const uint32_t end = p.plan[p.slots_at + block_x() + 1];
    for (uint32_t at = p.plan[p.slots_at + block_x()]; at < end; at += ITEM_WORDS)
        decode_item<DTYPE, WIDTH>(p, attention_item(p.plan + at));
    dependency_release();
}

#define ATTENTION_DECODE(NAME, DTYPE)                                                                                     \
    GALERNE_KERNEL(attention_decode_##NAME##_64, AttentionParams, 128, 2) { attention_decode<DTYPE, 64>(p); }            \
    GALERNE_KERNEL(attention_decode_##NAME##_96, AttentionParams, 128, 2) { attention_decode<DTYPE, 96>(p); }            \
    GALERNE_KERNEL(attention_decode_##NAME##_128, AttentionParams, 128, 2) { attention_decode<DTYPE, 128>(p); }          \
    GALERNE_KERNEL(attention_decode_##NAME##_256, AttentionParams, 128, 1) { attention_decode<DTYPE, 256>(p); }

ATTENTION_DECODE(bf16, KV_BF16)
ATTENTION_DECODE(f16, KV_F16)
ATTENTION_DECODE(int8, KV_INT8)
ATTENTION_DECODE(fp8, KV_FP8)
