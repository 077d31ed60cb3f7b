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

constexpr uint32_t WARPS = 4;                         // of a block
constexpr uint32_t WARP_KEYS = 16;                    // that a warp copies of a tile of keys
constexpr uint32_t TILE_KEYS = WARPS * WARP_KEYS;

// What a warp's lanes need to copy their part of every 64 keys; lanes `i` and `i + 16` care for the place of key `i`.
struct KeyStream {
    const uint32_t* blocks;
    uint32_t first_seen;  // keys before it are not read
    uint32_t end;
    uint32_t next;   // first key of the next copy
    uint32_t block;  // of this lane's key in it
};

DEVICE uint32_t block_index(const AttentionParams& p, uint32_t key) {
    return p.block_shift < 32 ? key >> p.block_shift : key / p.kv.block_tokens;
}

DEVICE uint32_t stream_block(const AttentionParams& p, const KeyStream& stream) {
    const uint32_t own = stream.next + thread_index() % WARP_KEYS;
    const uint32_t key = own < stream.first_seen ? stream.first_seen : own < stream.end ? own : stream.end - 1;
    return stream.blocks[block_index(p, key)];
}

DEVICE KeyStream key_stream(const AttentionParams& p, const AttentionItem& item, uint32_t kv_head, uint32_t warp) {
    KeyStream stream = {p.block_table + static_cast<size_t>(item.sequence) * p.blocks_stride,
                        attention_row(p, item, kv_head, 0).begin, item.key_end, item.key_begin + warp * WARP_KEYS, 0};
    if (stream.first_seen >= stream.end) stream.first_seen = stream.end - 1;
    stream.block = stream_block(p, stream);
    return stream;
}

// Starts copying the warp's next 16 keys and values, 0 for those that no row sees, and looks up the blocks of those after.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void start_keys(const AttentionParams& p, KeyStream& stream, unsigned char* keys, unsigned char* values,
                       unsigned char* key_scales, unsigned char* value_scales) {
    using Rows = CodeRows<DTYPE, WIDTH>;
    const uint32_t lane = thread_index() % WARP, key = lane % WARP_KEYS, own = stream.next + key;
    const bool is_seen = own >= stream.first_seen && own < stream.end;
    const uint64_t block = stream.block * p.kv.block_bytes;
    const uint64_t slot =
        static_cast<uint64_t>(block_y()) * p.kv.block_tokens + own - block_index(p, own) * p.kv.block_tokens;
    const uint32_t row_chunks = p.kv.head_width * Codes<DTYPE>::BYTES / 16;
    const uint64_t place = is_seen ? block + slot * (row_chunks * 16) : 0;
    const uint32_t seen = warp_ballot(is_seen);
    const size_t values_at = kv_values_at(p.kv);
    // Unrolled further it takes registers that the results need.
#pragma unroll 4
    for (uint32_t i = 0; i < WARP_KEYS * Rows::CHUNKS / WARP; i++) {
        const uint32_t row = (i * WARP + lane) / Rows::CHUNKS, chunk = (i * WARP + lane) % Rows::CHUNKS;
        const bool is_valid = (seen >> row & 1) != 0 && chunk < row_chunks;
        // Where nothing is copied the address is the pool's first.
        const unsigned char* from = p.kv.bytes + shuffle(place, row) + (is_valid ? chunk * 16 : 0);
        const uint32_t to = row * Rows::STRIDE + chunk * 16;
        copy_start(keys + to, from, is_valid);
        copy_start(values + to, from + (is_valid ? values_at : 0), is_valid);
    }
    if (Codes<DTYPE>::HAS_SCALES) {
        const bool is_value = lane >= WARP_KEYS;
        const uint64_t from = is_seen ? block + slot * 4 + kv_scales_at(p.kv, is_value) : 0;
        copy_start_word((is_value ? value_scales : key_scales) + key * 4, p.kv.bytes + from, is_seen);
    }
    stream.next += TILE_KEYS;
    if (stream.next < stream.end) stream.block = stream_block(p, stream);
}

// The keys that the two rows of a 16-row tile see whose numbers a thread holds, lane / 4 and lane / 4 + 8.
struct TileRows {
    uint32_t begin[2];
    uint32_t end[2];
};

// The thread's row `r` of the tile that begins at row `first` of an item; what the item's last row is where that is past the end.
DEVICE AttentionRow tile_row(const AttentionParams& p, const AttentionItem& item, uint32_t first, uint32_t r, bool& is_there) {
    const uint32_t index = first + thread_index() % WARP / 4 + 8 * r;
    is_there = index < item.rows;
    return attention_row(p, item, block_y(), is_there ? index : item.rows - 1);
}

DEVICE TileRows tile_rows(const AttentionParams& p, const AttentionItem& item, uint32_t first) {
    TileRows rows;
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        bool is_there;
        const AttentionRow row = tile_row(p, item, first, r, is_there);
        rows.begin[r] = row.begin;
        rows.end[r] = row.end;
    }
    return rows;
}

// The a fragments of a tile's queries, in registers,
template <uint32_t WIDTH>
struct RegisterQueries {
    uint32_t a[WIDTH / 16][4];
};

template <uint32_t WIDTH>
DEVICE void load_query(uint32_t (&a)[4], const RegisterQueries<WIDTH>& queries, uint32_t step) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) a[i] = queries.a[step][i];
}

// or, where results leave no room for them, in shared memory.
struct SharedQueries {
    uint4* at;  // [steps][32] of the warp
};

DEVICE void load_query(uint32_t (&a)[4], const SharedQueries& queries, uint32_t step) {
    const uint4 four = queries.at[step * WARP + thread_index() % WARP];
    a[0] = four.x;
    a[1] = four.y;
    a[2] = four.z;
    a[3] = four.w;
}

// Loads the queries of a tile; 0 past the head's width and the item's rows.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void load_queries(uint32_t (&a)[WIDTH / 16][4], const AttentionParams& p, const AttentionItem& item, uint32_t first) {
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        bool is_there;
        const AttentionRow row = tile_row(p, item, first, r, is_there);
        const float* q = p.q.at + row.row * p.q.stride + row.column;
#pragma unroll
        for (uint32_t i = 0; i < WIDTH / 8; i++) {
            const uint32_t step = i / 2, half = i % 2, column = query_column<DTYPE>(step, half, 0);
            float low = 0.0f, high = 0.0f;
            if (is_there && column < p.kv.head_width) {
                low = q[column];
                high = q[column + 1];
            }
            if (!Codes<DTYPE>::IS_BF16) {
                low = fminf(fmaxf(low, -65504.0f), 65504.0f);
                high = fminf(fmaxf(high, -65504.0f), 65504.0f);
            }
            a[step][2 * half + r] = pack_pair<DTYPE>(low, high);
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
            const bool is_seen = !is_masked || (key >= rows.begin[i / 2] && key < rows.end[i / 2]);
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
template <uint32_t DTYPE, uint32_t WIDTH, uint32_t KEYS, typename Queries>
DEVICE void score_keys(Scores<KEYS>& scores, const Queries& queries, const unsigned char* rows, uint32_t part) {
#pragma unroll
    for (uint32_t columns = 0; columns < WIDTH / 32; columns++) {
        uint32_t b[2][2][2];
        load_keys<DTYPE, WIDTH>(b, rows, columns);
#pragma unroll
        for (uint32_t step = 0; step < 2; step++) {
            uint32_t a[4];
            load_query(a, queries, 2 * columns + step);
#pragma unroll
            for (uint32_t tile = 0; tile < 2; tile++) mma<DTYPE>(scores.c[2 * part + tile], a, b[step][tile]);
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

// Stores the thread's part of a tile that begins at row `first` of an item: to out, or as a partial result.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void store_result(const AttentionParams& p, const AttentionItem& item, uint32_t first, const Softmax& state,
                         const float (&result)[WIDTH / 8][4]) {
    const uint32_t width = p.kv.head_width;
    const bool is_whole = item.partial == WHOLE;
#pragma unroll
    for (uint32_t r = 0; r < 2; r++) {
        float sum = state.sum[r] + shuffle_xor(state.sum[r], 1);
        sum += shuffle_xor(sum, 2);
        bool is_there;
        const AttentionRow row = tile_row(p, item, first, r, is_there);
        if (!is_there) continue;
        float* out = is_whole ? p.out.at + row.row * p.out.stride + row.column : p.partial + row.partial * partial_stride(p);
        if (!is_whole && thread_index() % 4 == 0)
            out[width] = sum > 0.0f ? state.largest[r] + log2f(sum) : -INFINITY;
        const float factor = sum > 0.0f ? 1.0f / sum : 0.0f;
#pragma unroll
        for (uint32_t tile = 0; tile < WIDTH / 8; tile++) {
#pragma unroll
            for (uint32_t e = 0; e < 2; e++) {
                const uint32_t column = value_column<DTYPE>(tile, e);
                if (column < width) out[column] = result[tile][2 * r + e] * factor;
            }
        }
    }
}
