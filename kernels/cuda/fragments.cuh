// Weights as the first operand of mma, straight from device memory: how a warp holds 16 rows of a matrix, in chunks of columns, and turns
// them to bf16 (f16 for f16 weights).
//
// Lane 4 g + t of a warp holds SLICE consecutive columns, from SLICE * t of the chunk, of rows g and g + 8. mma's k is numbered such that
// step j takes columns 4 j .. 4 j + 3 of every lane's slice; the other operand, staged by the kernel, has to be numbered alike.
#pragma once

#include "weights.cuh"

DEVICE constexpr uint32_t word_of(const uint4& x, uint32_t i) { return i == 0 ? x.x : i == 1 ? x.y : i == 2 ? x.z : x.w; }
DEVICE uint32_t both_bf16(float x) { return pack_bf16(x, x); }

// Pairs of bf16: 1, -1, 128; 2^117 and 2^120 bring back what a smaller exponent's bias takes away.
constexpr uint32_t MINUS_ONE = 0xbf80bf80u, MAGIC_128 = 0x43004300u, TWO_TO_120 = 0x7b807b80u;
constexpr float TWO_TO_117 = 0x1p117f, TWO_TO_9 = 512.0f;

// Integers below 128 in both halves as 128 more than that, exact in bf16.
DEVICE uint32_t as_128_more(uint32_t codes) { return codes | MAGIC_128; }
// a - b, exact where it is used.
DEVICE uint32_t minus_bf16(uint32_t a, uint32_t b) { return fma_bf16(b, MINUS_ONE, a); }

template <uint32_t F>
struct Fragments {
    static constexpr FormatSpec S = format_spec(F);
    static constexpr uint32_t SLICE = S.plain_bytes ? 8 : 32;
    static constexpr uint32_t CHUNK = 4 * SLICE;
    static constexpr uint32_t VECTORS = S.plain_bytes == 4 || S.code_bits == 8 ? 2 : 1;
    static constexpr bool IS_F16 = F == W_F16;

    // A slice as stored.
    struct Raw {
        uint4 codes[VECTORS];
        Scales scales;
    };

    // Where a lane's slices of row g of a panel lie; of row g + 8 they lie a fixed distance behind, as do those of later chunks.
    struct Cursor {
        const unsigned char* codes;
        const unsigned char* slice_scales;
        const unsigned char* row_scales;
    };

    DEVICE_MEMBER Cursor cursor(const Matrix& m, uint32_t panel, uint32_t chunk, uint32_t lane) {
        if constexpr (S.plain_bytes != 0) {
            const unsigned char* row = plain_row(m, S, panel * PANEL_ROWS + lane / 4);
            return {row + (chunk * CHUNK + lane % 4 * SLICE) * S.plain_bytes, nullptr, nullptr};
        } else {
            const unsigned char* tile = tile_at(m, S, panel, chunk);
            const unsigned char* scales = tile + codes_bytes(S);
            return {tile + lane * 16, scales + lane * S.slice_bytes,
                    scales + PANEL_ROWS * 4 * S.slice_bytes + lane / 4 * S.row_bytes};
        }
    }

    // Bytes from a chunk to the next.
    static constexpr uint32_t CHUNK_BYTES = S.plain_bytes ? CHUNK * S.plain_bytes : tile_bytes(S);

    DEVICE_MEMBER void advance(Cursor& c, uint32_t chunks) {
        c.codes += chunks * CHUNK_BYTES;
        if (S.slice_bytes) c.slice_scales += chunks * CHUNK_BYTES;
        if (S.row_bytes) c.row_scales += chunks * CHUNK_BYTES;
    }

    // The slice `chunk` chunks further, of row g + 8 * `half`.
    DEVICE_MEMBER Raw load(const Cursor& c, const Matrix& m, uint32_t chunk, uint32_t half) {
        Raw x = {};
        if constexpr (S.plain_bytes != 0) {
            const size_t row_bytes = static_cast<size_t>(divide_up(m.width, 32) * 32) * S.plain_bytes;
            const unsigned char* at = c.codes + half * 8 * row_bytes + chunk * CHUNK_BYTES;
            for (uint32_t i = 0; i < VECTORS; i++) x.codes[i] = load_once(at + 16 * i);
        } else {
            const unsigned char* at = c.codes + chunk * CHUNK_BYTES + half * 512;
            for (uint32_t i = 0; i < VECTORS; i++) x.codes[i] = load_once(at + 1024 * i);
            const unsigned char* slice = c.slice_scales + chunk * CHUNK_BYTES + half * 32 * S.slice_bytes;
            if (S.slice_bytes == 2) x.scales.slice = *reinterpret_cast<const uint16_t*>(slice);
            if (S.slice_bytes == 4) x.scales.slice = *reinterpret_cast<const uint32_t*>(slice);
            const unsigned char* row = c.row_scales + chunk * CHUNK_BYTES + half * 8 * S.row_bytes;
            if (S.row_bytes == 4) x.scales.row = *reinterpret_cast<const uint32_t*>(row);
        }
        return x;
    }

    // Codes of formats with a minimum are taken from the middle of their range (4 or 5 bits), the minimum to match: smaller numbers
    // are rounded to bf16 less far.
    static constexpr float CENTRE = F == W_CODES4_MIN || F == W_CODES4_SUPER   ? 8.0f
                                    : F == W_CODES8_MIN || F == W_CODES8_SUPER ? 16.0f
                                                                               : 0.0f;

    // A slice's scales as pairs of bf16: elements are scale[half] * (128 + code - offset) + minimum.
    struct Factors {
        uint32_t scale[2];
        uint32_t offset;
        uint32_t minimum;
    };

    DEVICE_MEMBER Factors factors(const Raw& x) {
        Factors f = {{0, 0}, MAGIC_128, 0};
        if constexpr (S.plain_bytes == 0) {
            const Affine a = affine(F, x.scales);
            const float larger = F == W_NVFP4 ? TWO_TO_117 : 1.0f;
            f.scale[0] = F == W_FP8 ? TWO_TO_120 : both_bf16(a.scale[0] * larger);
            f.scale[1] = F == W_CODES8_PAIR || F == W_NVFP4 ? both_bf16(a.scale[1] * larger) : f.scale[0];
            f.minimum = F == W_INT4 ? 0 : both_bf16(a.minimum + CENTRE * a.scale[0]);
            f.offset = both_bf16(128.0f + (F == W_INT4 ? high_half(x.scales.row) : F == W_CODES4 ? 8.0f : CENTRE));
        }
        return f;
    }

    // What remains to be multiplied to a row's sum, in f32.
    DEVICE_MEMBER float row_factor_left(const Matrix& m, uint32_t row) {
        return row_factor(m, S, row) * (F == W_NVFP4 ? TWO_TO_9 : 1.0f);
    }

    // Two codes, one in the low bits of each half of `codes`, as bf16.
    DEVICE_MEMBER uint32_t convert(uint32_t codes, const Factors& f, uint32_t half) {
        uint32_t plain;
        if constexpr (F == W_FP8) {
            plain = (codes & 0x00800080u) << 8 | (codes & 0x007f007fu) << 4;
        } else if constexpr (F == W_NVFP4) {
            plain = (codes & 0x00080008u) << 12 | (codes & 0x00070007u) << 6;
        } else if constexpr (S.code_bits == 4 || CENTRE > 0.0f) {
            plain = minus_bf16(as_128_more(codes & (S.code_bits == 4 ? 0x000f000fu : 0x001f001fu)), f.offset);
        } else {
            // A set sign bit makes 128 to be taken away into 256.
            plain = minus_bf16(as_128_more(codes & 0x007f007fu), as_128_more(codes & 0x00800080u));
        }
        return fma_bf16(plain, f.scale[half], f.minimum);
    }

    // Elements 4 j and 4 j + 1, then 4 j + 2 and 4 j + 3.
    DEVICE_MEMBER uint2 pairs(const Raw& x, const Factors& f, uint32_t j) {
        if constexpr (S.plain_bytes == 4) {
            const uint4 w = x.codes[j];
            return make_uint2(pack_bf16(float_from_bits(w.x), float_from_bits(w.y)),
                              pack_bf16(float_from_bits(w.z), float_from_bits(w.w)));
        } else if constexpr (S.plain_bytes == 2) {
            return make_uint2(word_of(x.codes[0], 2 * j), word_of(x.codes[0], 2 * j + 1));
        } else if constexpr (S.code_bits == 4) {
            const uint32_t word = word_of(x.codes[0], j / 2) >> j % 2 * 8;
            return make_uint2(convert(word, f, j / 4), convert(word >> 4, f, j / 4));
        } else {
            const uint32_t word = word_of(x.codes[j / 4 % VECTORS], j % 4);
            return make_uint2(convert(word, f, j / 4), convert(word >> 8, f, j / 4));
        }
    }
};
