// Rounding to 16 and 8 bits as the GPU does: to nearest, ties to even; NaN to the one NaN of the format.
#include "shim.hpp"

namespace shim {

namespace {

// Rounds |x| to `mantissa` bits, with subnormals below 2^exponent_min: how many units of 2^-mantissa its code is past 0.
uint32_t round_magnitude(float x, int mantissa, int exponent_min) {
    const double magnitude = std::fabs(static_cast<double>(x));
    int exponent;
    std::frexp(magnitude, &exponent);
    exponent = magnitude == 0.0 || exponent - 1 < exponent_min ? exponent_min : exponent - 1;
    // Of the default rounding mode: to nearest, ties to even. A mantissa that rounds up to the next power carries over.
    const double units = std::nearbyint(std::ldexp(magnitude, mantissa - exponent));
    return static_cast<uint32_t>(units) + (static_cast<uint32_t>(exponent - exponent_min) << mantissa);
}

// The number whose exponent and mantissa are `code`: as an f32's they mean 2^(127 - bias) less, and the product is exact.
float widen(uint32_t code, int mantissa, float factor) { return float_from_bits(code << (23 - mantissa)) * factor; }

}  // namespace

uint16_t round_bf16(float x) {
    const uint32_t bits = float_bits(x);
    if (std::isnan(x)) return 0x7fff;
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

uint16_t round_f16(float x) {
    if (std::isnan(x)) return 0x7fff;
    const uint32_t sign = float_bits(x) >> 31 << 15;
    if (std::fabs(x) >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
    return static_cast<uint16_t>(sign | round_magnitude(x, 10, -14));
}

uint8_t round_fp8(float x) {
    if (std::isnan(x)) return 0x7f;
    const uint32_t sign = float_bits(x) >> 31 << 7;
    return static_cast<uint8_t>(sign | round_magnitude(std::fmin(std::fabs(x), 448.0f), 3, -6));
}

float widen_f16(uint16_t bits) {
    const uint32_t code = bits & 0x7fff;
    const float magnitude = code < 0x7c00 ? widen(code, 10, 0x1p112f) : code == 0x7c00 ? INFINITY : NAN;
    return bits >> 15 ? -magnitude : magnitude;
}

float widen_fp8(uint8_t bits) {
    const uint32_t code = bits & 0x7f;
    const float magnitude = code == 0x7f ? NAN : widen(code, 3, 0x1p120f);
    return bits >> 7 ? -magnitude : magnitude;
}

}  // namespace shim
