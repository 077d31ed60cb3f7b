// One or four consecutive f32 at a time, so that a kernel is written once for aligned views and once for any.
#pragma once

#include "galerne.cuh"

template <uint32_t N>
struct Floats {
    float at[N];
};

// With N = 4 the address is a multiple of 16.
template <uint32_t N>
DEVICE Floats<N> load_floats(const float* from) {
    if constexpr (N == 4) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        return {{x.x, x.y, x.z, x.w}};
    } else {
        return {{*from}};
    }
}

template <uint32_t N>
DEVICE void store_floats(float* to, const Floats<N>& x) {
    if constexpr (N == 4) *reinterpret_cast<float4*>(to) = make_float4(x.at[0], x.at[1], x.at[2], x.at[3]);
    else *to = x.at[0];
}

template <uint32_t N>
DEVICE Floats<N> all_floats(float value) {
    Floats<N> x;
    for (uint32_t i = 0; i < N; i++) x.at[i] = value;
    return x;
}
