// Attention of large tiles (64 packed rows) over paged 16-bit and 8-bit keys and values, on tensor cores. Formula and
// parameters in attention.cuh, fragments in attention_mma.cuh; f32 accumulation.
//
// q, out [rows, heads * head_width] f32; head_width at most WIDTH, rows of codes 16-byte aligned. Grid (slots, kv_heads), 4
// warps. A warp has 16 rows of the tile, queries and results in registers, and goes through all keys, 64 at a time, that
// all warps together copy to one of two stages while they compute on the other.
// A stage: 64 rows of keys, 64 rows of values, then for 8-bit integers 64 scales of the keys and 64 of the values. Behind the stages,
// for heads wider than 128, the queries as fragments.
#include "attention_mma.cuh"

template <uint32_t WIDTH, bool IS_WIDE>
struct QueriesOf {
    using Type = RegisterQueries<WIDTH>;
};

template <uint32_t WIDTH>
struct QueriesOf<WIDTH, true> {
    using Type = SharedQueries;
};

template <uint32_t DTYPE, uint32_t WIDTH>
struct Prefill {
    using Rows = CodeRows<DTYPE, WIDTH>;
    static constexpr uint32_t SIDE_BYTES = TILE_KEYS * Rows::STRIDE;
    static constexpr uint32_t SCALE_BYTES = Codes<DTYPE>::HAS_SCALES ? TILE_KEYS * 4 : 0;
    static constexpr uint32_t STAGE_BYTES = 2 * SIDE_BYTES + 2 * SCALE_BYTES;
    static constexpr bool IS_WIDE = WIDTH > 128;
    using Queries = typename QueriesOf<WIDTH, IS_WIDE>::Type;
    // Keys whose scores are in registers at once.
    static constexpr uint32_t KEYS = IS_WIDE ? 32 : 64;
};

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void start_tile(const AttentionParams& p, KeyStream& stream, unsigned char* stage, uint32_t warp) {
    using Plan = Prefill<DTYPE, WIDTH>;
    const uint32_t row = warp * WARP_KEYS;
    unsigned char* keys = stage + row * Plan::Rows::STRIDE;
    unsigned char* scales = stage + 2 * Plan::SIDE_BYTES + row * 4;
    start_keys<DTYPE, WIDTH>(p, stream, keys, keys + Plan::SIDE_BYTES, scales, scales + Plan::SCALE_BYTES);
}

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void keep_queries(const SharedQueries& queries, const AttentionParams& p, const AttentionItem& item, uint32_t first) {
    uint32_t a[WIDTH / 16][4];
    load_queries<DTYPE, WIDTH>(a, p, item, first);
#pragma unroll
    for (uint32_t step = 0; step < WIDTH / 16; step++)  // read back by this lane alone
        queries.at[step * WARP + thread_index() % WARP] = make_uint4(a[step][0], a[step][1], a[step][2], a[step][3]);
}

// Which keys a warp's 16 rows see.
struct WarpKeys {
    uint32_t begin;      // before it none of them sees any
    uint32_t all_begin;  // from here on all of them see all,
    uint32_t all_end;    // up to here
    uint32_t end;        // from here on none sees any; 0 if there are no rows
};

DEVICE WarpKeys warp_keys(const AttentionParams& p, const AttentionItem& item, uint32_t first) {
    if (first >= item.rows) return {0, 0, 0, 0};
    const uint32_t last = first + 15 < item.rows ? first + 15 : item.rows - 1;
    const AttentionRow top = attention_row(p, item, block_y(), first), bottom = attention_row(p, item, block_y(), last);
    return {top.begin, bottom.begin, top.end, bottom.end};
}

// KEYS keys of a stage, from row `first` of it on, into the warp's running result.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void prefill_step(const AttentionParams& p, const TileRows& rows, const WarpKeys& seen,
                         const typename Prefill<DTYPE, WIDTH>::Queries& queries, const unsigned char* stage, uint32_t first,
                         uint32_t key, Softmax& state, float (&out)[WIDTH / 8][4]) {
    using Plan = Prefill<DTYPE, WIDTH>;
    constexpr uint32_t KEYS = Plan::KEYS;
    const unsigned char* keys = stage + first * Plan::Rows::STRIDE;
    const float* scales = reinterpret_cast<const float*>(stage + 2 * Plan::SIDE_BYTES) + first;
    Scores<KEYS> scores = {};
#pragma unroll
    for (uint32_t part = 0; part < KEYS / 16; part++)
        score_keys<DTYPE, WIDTH>(scores, queries, keys + part * 16 * Plan::Rows::STRIDE, part);
    if (key >= seen.all_begin && key + KEYS <= seen.all_end)
        finish_scores<DTYPE>(scores, p, rows, key, scales, false);
    else
        finish_scores<DTYPE>(scores, p, rows, key, scales, true);
    float shrink[2];
    step_softmax(scores, state, shrink);
    shrink_out<WIDTH>(out, shrink);
#pragma unroll
    for (uint32_t part = 0; part < KEYS / 16; part++) {
        uint32_t a[4];
        probabilities<DTYPE>(a, scores, part, scales + TILE_KEYS);
        add_values<DTYPE, WIDTH>(out, a, keys + Plan::SIDE_BYTES + part * 16 * Plan::Rows::STRIDE);
    }
}

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void prefill_item(const AttentionParams& p, const AttentionItem& item) {
    using Plan = Prefill<DTYPE, WIDTH>;
    const uint32_t warp = thread_index() / WARP;
    KeyStream stream = key_stream(p, item, block_y(), warp);
    start_tile<DTYPE, WIDTH>(p, stream, shared_memory(), warp);
    copy_commit();
    const TileRows rows = tile_rows(p, item, warp * 16);
    const WarpKeys seen = warp_keys(p, item, warp * 16);
    typename Plan::Queries queries;
    if constexpr (Plan::IS_WIDE) {
        queries.at = reinterpret_cast<uint4*>(shared_memory() + 2 * Plan::STAGE_BYTES) + warp * WIDTH / 16 * WARP;
        keep_queries<DTYPE, WIDTH>(queries, p, item, warp * 16);
    } else {
        load_queries<DTYPE, WIDTH>(queries.a, p, item, warp * 16);
    }
    float out[WIDTH / 8][4] = {};
    Softmax state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    uint32_t side = 0;
    for (uint32_t tile = item.key_begin; tile < item.key_end; tile += TILE_KEYS, side ^= 1) {
        copy_wait<0>();
        block_barrier();
        // All warps copy, also the last tile's keys past the end: as zeros.
        if (tile + TILE_KEYS < item.key_end)
            start_tile<DTYPE, WIDTH>(p, stream, shared_memory() + (side ^ 1) * Plan::STAGE_BYTES, warp);
        copy_commit();
#pragma unroll 1
        for (uint32_t first = 0; first < TILE_KEYS; first += Plan::KEYS) {
            const uint32_t key = tile + first;
            if (key + Plan::KEYS <= seen.begin || key >= seen.end) continue;
            prefill_step<DTYPE, WIDTH>(p, rows, seen, queries, shared_memory() + side * Plan::STAGE_BYTES, first, key, state, out);
        }
    }
    store_result<DTYPE, WIDTH>(p, item, warp * 16, state, out);
    block_barrier();
}

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void attention_prefill(const AttentionParams& p) {
    dependency_wait();
    const uint32_t end = p.plan[p.slots_at + block_x() + 1];
    for (uint32_t at = p.plan[p.slots_at + block_x()]; at < end; at += ITEM_WORDS)
        prefill_item<DTYPE, WIDTH>(p, attention_item(p.plan + at));
    dependency_release();
}

#define ATTENTION_PREFILL(NAME, DTYPE)                                                                                    \
    GALERNE_KERNEL(attention_prefill_##NAME##_64, AttentionParams, 128, 2) { attention_prefill<DTYPE, 64>(p); }          \
    GALERNE_KERNEL(attention_prefill_##NAME##_96, AttentionParams, 128, 2) { attention_prefill<DTYPE, 96>(p); }          \
    GALERNE_KERNEL(attention_prefill_##NAME##_128, AttentionParams, 128, 2) { attention_prefill<DTYPE, 128>(p); }        \
    GALERNE_KERNEL(attention_prefill_##NAME##_256, AttentionParams, 128, 1) { attention_prefill<DTYPE, 256>(p); }

ATTENTION_PREFILL(bf16, KV_BF16)
ATTENTION_PREFILL(f16, KV_F16)
ATTENTION_PREFILL(int8, KV_INT8)
ATTENTION_PREFILL(fp8, KV_FP8)
