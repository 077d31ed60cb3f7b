// A matrix of weights as src/cuda/weights.rs packs it, and its elements eight at a time, exact.
#pragma once

#include "galerne.cuh"

enum WeightFormat : uint32_t {
    W_F32 = 0,
    W_F16 = 1,
    W_BF16 = 2,
    W_CODES4 = 3,
    W_CODES4_MIN = 4,
    W_CODES4_SUPER = 5,
    W_CODES8 = 6,
    W_CODES8_MIN = 7,
    W_CODES8_SUPER = 8,
    W_CODES8_PAIR = 9,
    W_FP8 = 10,
    W_NVFP4 = 11,
    W_INT4 = 12,
};

// [rows, width]; `at` is 256-byte aligned.
struct Matrix {
    const unsigned char* at;
    uint32_t rows;
    uint32_t width;
    uint32_t format;  // WeightFormat
    uint32_t unused;
};

constexpr uint32_t PANEL_ROWS = 16, TILE_COLUMNS = 128, SLICE_COLUMNS = 32;

DEVICE constexpr uint32_t divide_up(uint32_t a, uint32_t b) { return (a + b - 1) / b; }

// Bytes of a tile's parts, and of an element of plain formats.
struct FormatSpec {
    uint32_t plain_bytes;  // 0: codes in tiles
    uint32_t code_bits;
    uint32_t slice_bytes;
    uint32_t row_bytes;
    bool has_factors;
};

DEVICE constexpr FormatSpec format_spec(uint32_t format) {
    switch (format) {
        case W_F32: return {4, 0, 0, 0, false};
        case W_F16: return {2, 0, 0, 0, false};
        case W_BF16: return {2, 0, 0, 0, false};
        case W_CODES4: return {0, 4, 2, 0, false};
        case W_CODES4_MIN: return {0, 4, 4, 0, false};
        case W_CODES4_SUPER: return {0, 4, 2, 4, false};
        case W_CODES8: return {0, 8, 2, 0, false};
        case W_CODES8_MIN: return {0, 8, 4, 0, false};
        case W_CODES8_SUPER: return {0, 8, 2, 4, false};
        case W_CODES8_PAIR: return {0, 8, 2, 4, false};
        case W_FP8: return {0, 8, 0, 0, true};
        case W_NVFP4: return {0, 4, 2, 0, true};
        default: return {0, 4, 0, 4, false};
    }
}

DEVICE constexpr uint32_t codes_bytes(FormatSpec s) { return PANEL_ROWS * TILE_COLUMNS * s.code_bits / 8; }
DEVICE constexpr uint32_t tile_bytes(FormatSpec s) {
    return codes_bytes(s) + PANEL_ROWS * 4 * s.slice_bytes + PANEL_ROWS * s.row_bytes;
}

// The tile of panel `panel` and columns from 128 * `tile`.
DEVICE const unsigned char* tile_at(const Matrix& m, FormatSpec s, uint32_t panel, uint32_t tile) {
    const size_t tiles = divide_up(m.width, TILE_COLUMNS);
    return m.at + (panel * tiles + tile) * tile_bytes(s);
}

// Where row `row` of a plain format begins.
DEVICE const unsigned char* plain_row(const Matrix& m, FormatSpec s, uint32_t row) {
    return m.at + static_cast<size_t>(row) * (divide_up(m.width, 32) * 32 * s.plain_bytes);
}

// The factor of row `row`: 1 for formats without.
DEVICE float row_factor(const Matrix& m, FormatSpec s, uint32_t row) {
    if (!s.has_factors) return 1.0f;
    const uint32_t panels = divide_up(m.rows, PANEL_ROWS);
    return reinterpret_cast<const float*>(tile_at(m, s, panels, 0))[row];
}

// Scales of a slice as stored: what the slice has of its own, and what its row of the tile has.
struct Scales {
    uint32_t slice;
    uint32_t row;
};

// `slice` = 4 * (row in the panel) + slice in the tile.
DEVICE Scales load_scales(const unsigned char* tile, FormatSpec s, uint32_t slice) {
    const unsigned char* at = tile + codes_bytes(s);
    Scales x = {0, 0};
    if (s.slice_bytes == 2) x.slice = reinterpret_cast<const uint16_t*>(at)[slice];
    if (s.slice_bytes == 4) x.slice = reinterpret_cast<const uint32_t*>(at)[slice];
    at += PANEL_ROWS * 4 * s.slice_bytes;
    if (s.row_bytes == 4) x.row = reinterpret_cast<const uint32_t*>(at)[slice / 4];
    return x;
}

// Elements of a slice are scale[half] * code + minimum, code as code_offset has it.
struct Affine {
    float scale[2];
    float minimum;
};

DEVICE float low_half(uint32_t pair) { return f16_to_f32(static_cast<uint16_t>(pair)); }
DEVICE float high_half(uint32_t pair) { return f16_to_f32(static_cast<uint16_t>(pair >> 16)); }
DEVICE float low_integer(uint32_t x) { return static_cast<float>(static_cast<int8_t>(x)); }
DEVICE float high_integer(uint32_t x) { return static_cast<float>(static_cast<int8_t>(x >> 8)); }

// Every product here is exact: f16 times an integer of at most 8 bits.
DEVICE Affine affine(uint32_t format, Scales s) {
    switch (format) {
        case W_CODES4:
        case W_CODES8: return {{low_half(s.slice), low_half(s.slice)}, 0.0f};
        case W_CODES4_MIN:
        case W_CODES8_MIN: return {{low_half(s.slice), low_half(s.slice)}, high_half(s.slice)};
        case W_CODES4_SUPER:
        case W_CODES8_SUPER: {
            const float scale = low_half(s.row) * low_integer(s.slice);
            return {{scale, scale}, high_half(s.row) * high_integer(s.slice)};
        }
        case W_CODES8_PAIR:
            return {{low_half(s.row) * low_integer(s.slice), low_half(s.row) * high_integer(s.slice)}, 0.0f};
        case W_NVFP4: return {{fp8_to_f32(static_cast<uint8_t>(s.slice)), fp8_to_f32(static_cast<uint8_t>(s.slice >> 8))}, 0.0f};
        case W_INT4: return {{low_half(s.row), low_half(s.row)}, -low_half(s.row) * high_half(s.row)};
        default: return {{1.0f, 1.0f}, 0.0f};
    }
}

// Nibble `i` of a word as a number: columns 0, 2, 4, 6, 1, 3, 5, 7 of eight.
DEVICE float nibble(uint32_t format, uint32_t word, uint32_t i) {
    const uint32_t code = word >> (4 * i) & 15;
    if (format == W_NVFP4) {
        // Exponent and mantissa of e2m1 become those of an f32 smaller by 2^126.
        const float size = float_from_bits((code & 7) << 22) * 0x1p126f;
        return code & 8 ? -size : size;
    }
    return static_cast<float>(code) - (format == W_CODES4 ? 8.0f : 0.0f);
}

DEVICE float code_byte(uint32_t format, uint32_t word, uint32_t i) {
    const uint8_t code = static_cast<uint8_t>(word >> (8 * i));
    return format == W_FP8 ? fp8_to_f32(code) : static_cast<float>(static_cast<int8_t>(code));
}

// The byte of a word that holds column `column` of its four.
DEVICE constexpr uint32_t byte_of(uint32_t column) { return column == 1 ? 2 : column == 2 ? 1 : column; }

// Eight elements as stored.
struct Eight {
    uint4 low;   // plain: the first 16 bytes; codes: those of the eight in x, or x and y
    uint4 high;  // f32: the other 16 bytes
    Scales scales;
};

// Columns 8 * `eighth` .. of row `row`, which may be padding of the matrix.
DEVICE Eight load_eight(const Matrix& m, uint32_t format, uint32_t row, uint32_t eighth) {
    const FormatSpec s = format_spec(format);
    Eight x = {};
    if (s.plain_bytes) {
        const uint4* at = reinterpret_cast<const uint4*>(plain_row(m, s, row) + eighth * 8 * s.plain_bytes);
        x.low = at[0];
        if (s.plain_bytes == 4) x.high = at[1];
        return x;
    }
    const unsigned char* tile = tile_at(m, s, row / PANEL_ROWS, eighth / 16);
    const uint32_t slice = row % PANEL_ROWS * 4 + eighth % 16 / 4, part = eighth % 4;
    if (s.code_bits == 4) {
        x.low.x = reinterpret_cast<const uint32_t*>(tile)[slice * 4 + part];
    } else {
        const uint2 codes = reinterpret_cast<const uint2*>(tile + part / 2 * 1024)[slice * 2 + part % 2];
        x.low.x = codes.x;
        x.low.y = codes.y;
    }
    x.scales = load_scales(tile, s, slice);
    return x;
}

// The numbers of eight elements, but for the row's factor. `eighth` as in load_eight.
DEVICE void decode_eight(const Eight& x, uint32_t format, uint32_t eighth, float (&out)[8]) {
    const FormatSpec s = format_spec(format);
    const uint32_t words[8] = {x.low.x, x.low.y, x.low.z, x.low.w, x.high.x, x.high.y, x.high.z, x.high.w};
    if (s.plain_bytes) {
#pragma unroll
        for (uint32_t i = 0; i < 8; i++) {
            const uint16_t half = static_cast<uint16_t>(words[i / 2] >> (i % 2 * 16));
            out[i] = format == W_F32 ? float_from_bits(words[i]) : format == W_F16 ? f16_to_f32(half) : bf16_to_f32(half);
        }
        return;
    }
    const Affine a = affine(format, x.scales);
    const float scale = eighth % 4 < 2 ? a.scale[0] : a.scale[1];
#pragma unroll
    for (uint32_t i = 0; i < 8; i++) {
        const float code = s.code_bits == 4 ? nibble(format, words[0], i / 2 + i % 2 * 4)
                                            : code_byte(format, words[i / 4], byte_of(i % 4));
        out[i] = scale * code + a.minimum;
    }
}
