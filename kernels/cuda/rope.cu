// Rotary position embedding of queries in place, and of keys on their way to the KV blocks, with the values.
//
//   half:        (x[i], x[i + pairs])      interleaved: (x[2 i], x[2 i + 1])      for i < pairs in each head
//   (a, b) -> (a cos - b sin, b cos + a sin)      cos = table[position][0][i], sin = table[position][1][i]
//
// q [rows, heads * head_width] f32, read and written; k, v [rows, kv_heads * head_width] f32, read. Tables f32, null: no rotation.
// positions, owners [rows] u32; a row whose owner is NO_SEQUENCE is padding and left alone. A row's keys and values go to slot
// position % block_tokens of block block_table[owner * blocks_stride + position / block_tokens], as galerne.cuh lays it out. Integers
// are round(x / scale), scale = max(|x| of the head) / 127. What is stored is finite: larger numbers become the largest, NaN a number.
//
// Grid (rows, jobs / warps): a warp has one job, 32 vectors of pairs of q, or one head of k or v. Vectors are of one number, or four if
// everything is aligned (is_vector): views, and head_width and pairs multiples of 4.
#include "vector.cuh"

struct RopeParams {
    View q;
    View k;
    View v;
    KvLayer kv;  // kv_heads 0: nothing is appended
    const float* q_table;
    const float* k_table;
    const uint32_t* positions;
    const uint32_t* owners;
    const uint32_t* block_table;
    uint32_t rows;
    uint32_t heads;
    uint32_t head_width;
    uint32_t q_pairs;
    uint32_t k_pairs;
    uint32_t q_interleaved;
    uint32_t k_interleaved;
    uint32_t blocks_stride;
    uint32_t is_vector;
    uint32_t reserved;
};

constexpr uint32_t NO_SEQUENCE = 0xffffffffu;

// Rotates pairs N * unit and following of a head, in place.
template <uint32_t N>
DEVICE void rotate_in_place(float* head, uint32_t unit, const float* table, uint32_t pairs, bool is_interleaved) {
    float* first = head + (is_interleaved ? 2 : 1) * N * unit;
    float* second = first + (is_interleaved ? N : pairs);
    const Floats<N> x = load_floats<N>(first), y = load_floats<N>(second);
    const Floats<N> cosine = load_floats<N>(table + N * unit), sine = load_floats<N>(table + pairs + N * unit);
    float both[2 * N];
    for (uint32_t i = 0; i < N; i++) both[i] = x.at[i], both[N + i] = y.at[i];
    Floats<N> out_x, out_y;
    for (uint32_t i = 0; i < N; i++) {
        const float a = is_interleaved ? both[2 * i] : both[i], b = is_interleaved ? both[2 * i + 1] : both[N + i];
        out_x.at[i] = a * cosine.at[i] - b * sine.at[i];
        out_y.at[i] = b * cosine.at[i] + a * sine.at[i];
    }
    if (is_interleaved) {
        for (uint32_t i = 0; i < N; i++) both[2 * i] = out_x.at[i], both[2 * i + 1] = out_y.at[i];
        for (uint32_t i = 0; i < N; i++) out_x.at[i] = both[i], out_y.at[i] = both[N + i];
    }
    store_floats<N>(first, out_x);
    store_floats<N>(second, out_y);
}

// Numbers c and following of a head, rotated if there is a table.
template <uint32_t N>
DEVICE Floats<N> rotated(const float* head, uint32_t c, const float* table, uint32_t pairs, bool is_interleaved) {
    Floats<N> x = load_floats<N>(head + c);
    if (!table || c >= 2 * pairs) return x;
    Floats<N> other, cosine, sine;
    if (is_interleaved) {
        for (uint32_t i = 0; i < N; i++) {
            other.at[i] = N == 1 ? head[c ^ 1] : x.at[(i ^ 1) % N];
            cosine.at[i] = table[(c + i) / 2];
            sine.at[i] = (c + i) % 2 == 0 ? -table[pairs + (c + i) / 2] : table[pairs + (c + i) / 2];
        }
    } else {
        const bool is_first = c < pairs;
        const uint32_t at = is_first ? c : c - pairs;
        other = load_floats<N>(head + (is_first ? c + pairs : at));
        cosine = load_floats<N>(table + at);
        sine = load_floats<N>(table + pairs + at);
        if (is_first)
            for (uint32_t i = 0; i < N; i++) sine.at[i] = -sine.at[i];
    }
    for (uint32_t i = 0; i < N; i++) x.at[i] = x.at[i] * cosine.at[i] + other.at[i] * sine.at[i];
    return x;
}

// The order makes a number of NaN.
DEVICE float bounded(float x, float largest) { return fminf(fmaxf(x, -largest), largest); }

// 16-bit codes of two numbers; the first in the low half.
template <uint32_t DTYPE>
DEVICE uint32_t codes_16(float low, float high) {
    // The largest finite numbers of the formats.
    if constexpr (DTYPE == KV_BF16) return pack_bf16(bounded(low, 3.3895314e38f), bounded(high, 3.3895314e38f));
    else return pack_f16(bounded(low, 65504.0f), bounded(high, 65504.0f));
}

template <uint32_t DTYPE>
DEVICE uint32_t code_8(float x, float scale) {
    if constexpr (DTYPE == KV_INT8) return static_cast<uint32_t>(static_cast<int32_t>(rintf(bounded(x / scale, 127.0f)))) & 255;
    else return f32_to_fp8(bounded(x, 448.0f));
}

// Stores numbers c and following of a head that begins at `to`.
template <uint32_t DTYPE, uint32_t N>
DEVICE void store_codes(unsigned char* to, uint32_t c, Floats<N> x, float scale) {
    to += static_cast<size_t>(c) * kv_bytes(DTYPE);
    if constexpr (DTYPE == KV_F32) {
        for (uint32_t i = 0; i < N; i++) x.at[i] = bounded(x.at[i], 3.40282347e38f);
        store_floats<N>(reinterpret_cast<float*>(to), x);
    } else if constexpr (DTYPE == KV_BF16 || DTYPE == KV_F16) {
        if constexpr (N == 1) *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(codes_16<DTYPE>(x.at[0], 0.0f));
        else *reinterpret_cast<uint2*>(to) = make_uint2(codes_16<DTYPE>(x.at[0], x.at[1]), codes_16<DTYPE>(x.at[2], x.at[3]));
    } else {
        uint32_t codes = 0;
        for (uint32_t i = 0; i < N; i++) codes |= code_8<DTYPE>(x.at[i], scale) << 8 * i;
        if constexpr (N == 1) *to = static_cast<unsigned char>(codes);
        else *reinterpret_cast<uint32_t*>(to) = codes;
    }
}

// A warp appends one head of k or, from kv_heads on, of v.
template <uint32_t DTYPE, uint32_t N>
DEVICE void append_head(const RopeParams& p, uint32_t index, uint32_t owner, uint32_t position) {
    const bool is_value = index >= p.kv.kv_heads;
    const uint32_t head = is_value ? index - p.kv.kv_heads : index, lane = thread_index() % WARP;
    const View& view = is_value ? p.v : p.k;
    const float* from = view.at + static_cast<size_t>(block_x()) * view.stride + head * p.head_width;
    const float* table = is_value || !p.k_table ? nullptr : p.k_table + static_cast<size_t>(position) * 2 * p.k_pairs;
    const uint32_t block = p.block_table[static_cast<size_t>(owner) * p.blocks_stride + position / p.kv.block_tokens];
    unsigned char* bytes = p.kv.bytes + block * p.kv.block_bytes;
    const size_t place = static_cast<size_t>(head) * p.kv.block_tokens + position % p.kv.block_tokens;
    float scale = 1.0f;
    if (DTYPE == KV_INT8) {
        float largest = 0.0f;
        for (uint32_t c = lane * N; c < p.head_width; c += WARP * N) {
            const Floats<N> x = rotated<N>(from, c, table, p.k_pairs, p.k_interleaved);
            for (uint32_t i = 0; i < N; i++) largest = fmaxf(largest, fabsf(x.at[i]));
        }
        // 0 would be divided by; of numbers so small nothing is left anyway.
        scale = fmaxf(fminf(warp_max(largest), 3.40282347e38f) / 127.0f, 1e-30f);
        if (lane == 0) reinterpret_cast<float*>(bytes + kv_scales_at(p.kv, is_value))[place] = scale;
    }
    unsigned char* to = bytes + (is_value ? kv_values_at(p.kv) : 0) + place * p.head_width * kv_bytes(DTYPE);
    for (uint32_t c = lane * N; c < p.head_width; c += WARP * N)
        store_codes<DTYPE, N>(to, c, rotated<N>(from, c, table, p.k_pairs, p.k_interleaved), scale);
}

template <uint32_t DTYPE, uint32_t N>
DEVICE void rope_job(const RopeParams& p) {
    const uint32_t owner = p.owners[block_x()], position = p.positions[block_x()];
    if (owner == NO_SEQUENCE) return;
    const uint32_t job = block_y() * (block_threads() / WARP) + thread_index() / WARP;
    const uint32_t per_head = p.q_pairs / N, units = p.q_table ? p.heads * per_head : 0, q_jobs = (units + WARP - 1) / WARP;
    if (job >= q_jobs) {
        if (job - q_jobs < 2 * p.kv.kv_heads) append_head<DTYPE, N>(p, job - q_jobs, owner, position);
        return;
    }
    const uint32_t unit = job * WARP + thread_index() % WARP;
    if (unit >= units) return;
    float* head = p.q.at + static_cast<size_t>(block_x()) * p.q.stride + unit / per_head * p.head_width;
    const float* table = p.q_table + static_cast<size_t>(position) * 2 * p.q_pairs;
    rotate_in_place<N>(head, unit % per_head, table, p.q_pairs, p.q_interleaved);
}

template <uint32_t DTYPE>
DEVICE void rope_append(const RopeParams& p) {
    dependency_wait();
    if (p.is_vector) rope_job<DTYPE, 4>(p);
    else rope_job<DTYPE, 1>(p);
    dependency_release();
}

GALERNE_KERNEL(rope_append_f32, RopeParams, 256, 4) { rope_append<KV_F32>(p); }
GALERNE_KERNEL(rope_append_bf16, RopeParams, 256, 4) { rope_append<KV_BF16>(p); }
GALERNE_KERNEL(rope_append_f16, RopeParams, 256, 4) { rope_append<KV_F16>(p); }
GALERNE_KERNEL(rope_append_int8, RopeParams, 256, 4) { rope_append<KV_INT8>(p); }
GALERNE_KERNEL(rope_append_fp8, RopeParams, 256, 4) { rope_append<KV_FP8>(p); }
