// What the tensor core attention kernels share: fragments of mma.m16n8k16 out of paged codes in shared memory.
//
// Keys and values lie in shared memory as rows of codes, WIDTH of them and 16 bytes of padding, so that eight rows of a
// matrix fall on different banks. 16-bit codes go to the tensor cores as they are. 8-bit codes lie there as stored and are
// converted exactly in registers, integers to bf16 and e4m3 to f16; a matrix "of 16-bit numbers" then holds pairs of
// codes, so that a fragment's columns are permuted: `query_column` and `value_column` say which is which.
#pragma once

#include "attention.cuh"

template <uint32_t DTYPE>
struct Codes {
    static constexpr bool IS_BYTE = DTYPE == KV_INT8 || DTYPE == KV_FP8;
    static constexpr bool HAS_SCALES = DTYPE == KV_INT8;
    static constexpr bool IS_BF16 = DTYPE == KV_BF16 || DTYPE == KV_INT8;
    static constexpr uint32_t BYTES = IS_BYTE ? 1 : 2;
};

// Rows of `WIDTH` codes in shared memory.
template <uint32_t DTYPE, uint32_t WIDTH>
struct CodeRows {
    static constexpr uint32_t CHUNKS = WIDTH * Codes<DTYPE>::BYTES / 16;  // of 16 bytes in a row
    static constexpr uint32_t STRIDE = (CHUNKS + 1) * 16;                 // bytes
};

template <uint32_t DTYPE>
DEVICE uint32_t pack_pair(float low, float high) {
    return Codes<DTYPE>::IS_BF16 ? pack_bf16(low, high) : pack_f16(low, high);
}

template <uint32_t DTYPE>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if (Codes<DTYPE>::IS_BF16)
        mma_bf16(c, a, b);
    else
        mma_f16(c, a, b);
}

// Two of four codes as 16-bit numbers: bytes FIRST and SECOND.
template <uint32_t DTYPE, uint32_t FIRST, uint32_t SECOND>
DEVICE uint32_t widen_codes(uint32_t codes) {
    if (DTYPE == KV_FP8) return fp8_to_f16(permute_bytes(codes, 0, SECOND << 4 | FIRST));
    // 128 + the low seven bits, less 128 or, of negative ones, 256: exact, as bf16 has 7 bits behind the first.
    const uint32_t bytes = permute_bytes(codes, 0, 0x4040u | SECOND << 8 | FIRST);
    return subtract_bf16((bytes & 0x007f007fu) | 0x43004300u, (bytes & 0x00800080u) | 0x43004300u);
}

// The column of q that element `e` of half `half` of an a fragment stands for, of 16 columns `step`.
template <uint32_t DTYPE>
DEVICE uint32_t query_column(uint32_t step, uint32_t half, uint32_t e) {
    const uint32_t pair = thread_index() % 4;
    return 16 * step + (Codes<DTYPE>::IS_BYTE ? 4 * pair + 2 * half : 2 * pair + 8 * half) + e;
}

// The column of the result that element `e` of a row of c fragment `tile` stands for.
template <uint32_t DTYPE>
DEVICE uint32_t value_column(uint32_t tile, uint32_t e) {
    const uint32_t pair = thread_index() % 4;
    return Codes<DTYPE>::IS_BYTE ? 16 * (tile / 2) + 4 * pair + 2 * e + tile % 2 : 8 * tile + 2 * pair + e;
}

// b fragments of 16 keys (two tiles) and columns 32 part .. + 32 (two steps).
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void load_keys(uint32_t (&b)[2][2][2], const unsigned char* rows, uint32_t part) {
    using Rows = CodeRows<DTYPE, WIDTH>;
    const uint32_t lane = thread_index() % WARP, row = lane % 8, odd = lane / 8 % 2, upper = lane / 16;
    uint32_t m[4];
    if constexpr (Codes<DTYPE>::IS_BYTE) {
        load_matrices(m, rows + (odd * 8 + row) * Rows::STRIDE + (part * 2 + upper) * 16);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            b[i / 2][i % 2][0] = widen_codes<DTYPE, 0, 1>(m[i]);
            b[i / 2][i % 2][1] = widen_codes<DTYPE, 2, 3>(m[i]);
        }
    } else {
#pragma unroll
        for (uint32_t step = 0; step < 2; step++) {
            load_matrices(m, rows + (upper * 8 + row) * Rows::STRIDE + (part * 4 + step * 2 + odd) * 16);
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) b[step][i / 2][i % 2] = m[i];
        }
    }
}

// b fragments of 16 keys' values, columns 32 part .. + 32 (four tiles).
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void load_values(uint32_t (&b)[4][2], const unsigned char* rows, uint32_t part) {
    using Rows = CodeRows<DTYPE, WIDTH>;
    const uint32_t lane = thread_index() % WARP, upper = lane / 16;
    const unsigned char* row = rows + lane % 16 * Rows::STRIDE;
    uint32_t m[4];
    if constexpr (Codes<DTYPE>::IS_BYTE) {
        load_matrices_transposed(m, row + (part * 2 + upper) * 16);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            b[i / 2 * 2][i % 2] = widen_codes<DTYPE, 0, 2>(m[i]);
            b[i / 2 * 2 + 1][i % 2] = widen_codes<DTYPE, 1, 3>(m[i]);
        }
    } else {
#pragma unroll
        for (uint32_t half = 0; half < 2; half++) {
            load_matrices_transposed(m, row + (part * 4 + half * 2 + upper) * 16);
#pragma unroll
            for (uint32_t i = 0; i < 4; i++) b[half * 2 + i / 2][i % 2] = m[i];
        }
    }
}

// The two rows of a 16-row tile whose numbers a thread holds, lane / 4 and lane / 4 + 8.
struct TileRows {
    AttentionRow row[2];
    bool is_there[2];
};

// Rows `first` .. `first` + 16 of an item; rows past its end see what its last one sees, and are not stored.
DEVICE TileRows tile_rows(const AttentionParams& p, const AttentionItem& item, uint32_t kv_head, uint32_t first) {
    TileRows rows;
#pragma unroll
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t index = first + thread_index() % WARP / 4 + 8 * i;
        rows.is_there[i] = index < item.rows;
        rows.row[i] = attention_row(p, item, kv_head, rows.is_there[i] ? index : item.rows - 1);
    }
    return rows;
}

// The a fragments of the tile's queries; 0 past the head's width.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void load_queries(uint32_t (&a)[WIDTH / 16][4], const AttentionParams& p, const TileRows& rows) {
#pragma unroll
    for (uint32_t step = 0; step < WIDTH / 16; step++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const AttentionRow& row = rows.row[i % 2];
            const float* q = p.q.at + row.row * p.q.stride + row.column;
            const uint32_t column = query_column<DTYPE>(step, i / 2, 0);
            const bool is_there = rows.is_there[i % 2] && column < p.kv.head_width;
            float low = is_there ? q[column] : 0.0f, high = is_there ? q[column + 1] : 0.0f;
            if (!Codes<DTYPE>::IS_BF16) {
                low = fminf(fmaxf(low, -65504.0f), 65504.0f);
                high = fminf(fmaxf(high, -65504.0f), 65504.0f);
            }
            a[step][i] = pack_pair<DTYPE>(low, high);
        }
    }
}

// A dot product as the score's logarithm to base 2.
DEVICE float score_log2(const AttentionParams& p, float dot) {
    const float score = dot * p.scale;
    if (p.soft_cap <= 0.0f) return score * LOG2_E;
    const float e = fast_exp2(score * (2.0f * LOG2_E / p.soft_cap));
    return p.soft_cap * (1.0f - 2.0f / (e + 1.0f)) * LOG2_E;
}

// Scores of 16 rows and KEYS keys, which then become probabilities; the running softmax of each of the thread's two rows.
template <uint32_t KEYS>
struct Scores {
    float c[KEYS / 8][4];
};

struct Softmax {
    float largest[2];  // base 2
    float sum[2];      // of this thread's columns only
};

// Scales, caps and masks; `scales` are the keys' scales if they have any.
template <uint32_t DTYPE, uint32_t KEYS>
DEVICE void finish_scores(Scores<KEYS>& scores, const AttentionParams& p, const TileRows& rows, uint32_t first_key,
                          const float* scales, bool is_masked) {
    const uint32_t pair = thread_index() % 4;
#pragma unroll
    for (uint32_t tile = 0; tile < KEYS / 8; tile++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            const uint32_t column = 8 * tile + 2 * pair + i % 2, key = first_key + column;
            const float dot = scores.c[tile][i] * (Codes<DTYPE>::HAS_SCALES ? scales[column] : 1.0f);
            const AttentionRow& row = rows.row[i / 2];
            const bool is_seen = !is_masked || (key >= row.begin && key < row.end);
            scores.c[tile][i] = is_seen ? score_log2(p, dot) : -INFINITY;
        }
    }
}

// Scores to probabilities over the row's new largest score; `shrink` is what earlier results are multiplied by.
template <uint32_t KEYS>
DEVICE void step_softmax(Scores<KEYS>& scores, Softmax& state, float (&shrink)[2]) {
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        float largest = state.largest[r];
#pragma unroll
        for (uint32_t tile = 0; tile < KEYS / 8; tile++)
            largest = fmaxf(largest, fmaxf(scores.c[tile][2 * r], scores.c[tile][2 * r + 1]));
        largest = fmaxf(largest, shuffle_xor(largest, 1));
        largest = fmaxf(largest, shuffle_xor(largest, 2));
        // A row that has seen nothing yet.
        const float base = largest == -INFINITY ? 0.0f : largest;
        shrink[r] = fast_exp2(state.largest[r] - base);
        state.largest[r] = largest;
        float sum = state.sum[r] * shrink[r];
#pragma unroll
        for (uint32_t tile = 0; tile < KEYS / 8; tile++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                float& score = scores.c[tile][2 * r + e];
                score = fast_exp2(score - base);
                sum += score;
            }
        }
        state.sum[r] = sum;
    }
}

// The a fragment of probabilities of 16 keys from 16 `part` on, times the values' scales if they have any.
template <uint32_t DTYPE, uint32_t KEYS>
DEVICE void probabilities(uint32_t (&a)[4], const Scores<KEYS>& scores, uint32_t part, const float* scales) {
    const uint32_t pair = thread_index() % 4;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t tile = 2 * part + i / 2;
        float low = scores.c[tile][i % 2 * 2], high = scores.c[tile][i % 2 * 2 + 1];
        if (Codes<DTYPE>::HAS_SCALES) {
            low *= scales[8 * tile + 2 * pair];
            high *= scales[8 * tile + 2 * pair + 1];
        }
        a[i] = pack_pair<DTYPE>(low, high);
    }
}

// scores += queries x 16 keys, of tiles 2 part and 2 part + 1.
template <uint32_t DTYPE, uint32_t WIDTH, uint32_t KEYS>
DEVICE void score_keys(Scores<KEYS>& scores, const uint32_t (&queries)[WIDTH / 16][4], const unsigned char* rows, uint32_t part) {
#pragma unroll
    for (uint32_t columns = 0; columns < WIDTH / 32; columns++) {
        uint32_t b[2][2][2];
        load_keys<DTYPE, WIDTH>(b, rows, columns);
#pragma unroll
        for (uint32_t step = 0; step < 2; step++) {
#pragma unroll
            for (uint32_t tile = 0; tile < 2; tile++) mma<DTYPE>(scores.c[2 * part + tile], queries[2 * columns + step], b[step][tile]);
        }
    }
}

// out += probabilities x values of 16 keys.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void add_values(float (&out)[WIDTH / 8][4], const uint32_t (&a)[4], const unsigned char* rows) {
#pragma unroll
    for (uint32_t columns = 0; columns < WIDTH / 32; columns++) {
        uint32_t b[4][2];
        load_values<DTYPE, WIDTH>(b, rows, columns);
#pragma unroll
        for (uint32_t tile = 0; tile < 4; tile++) mma<DTYPE>(out[4 * columns + tile], a, b[tile]);
    }
}

template <uint32_t WIDTH>
DEVICE void shrink_out(float (&out)[WIDTH / 8][4], const float (&shrink)[2]) {
#pragma unroll
    for (uint32_t tile = 0; tile < WIDTH / 8; tile++) {
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) out[tile][i] *= shrink[i / 2];
    }
}
