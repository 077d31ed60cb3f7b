// Activations, and which one: `Activation` in src/cuda/launch/elementwise.rs.
#pragma once

#include "galerne.cuh"

enum Activation : uint32_t {
    ACTIVATION_NONE = 0,
    ACTIVATION_SILU = 1,
    ACTIVATION_GELU = 2,
    ACTIVATION_GELU_TANH = 3,
    ACTIVATION_RELU = 4,
    ACTIVATION_TANH = 5,
    ACTIVATION_SIGMOID = 6,
};

DEVICE float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }
DEVICE float silu(float x) { return x * sigmoid(x); }
// By the complement: 1 + erf(x) has no digits left where x is far below 0.
DEVICE float gelu(float x) { return 0.5f * x * erfcf(x * -0.70710678f); }
// 0.5 (1 + tanh(u)) = sigmoid(2 u)
DEVICE float gelu_tanh(float x) { return x * sigmoid(1.59576912f * (x + 0.044715f * x * x * x)); }
DEVICE float relu(float x) { return fmaxf(x, 0.0f); }
DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }

DEVICE float activate(uint32_t activation, float x) {
    switch (activation) {
        case ACTIVATION_SILU: return silu(x);
        case ACTIVATION_GELU: return gelu(x);
        case ACTIVATION_GELU_TANH: return gelu_tanh(x);
        case ACTIVATION_RELU: return relu(x);
        case ACTIVATION_TANH: return hyperbolic_tangent(x);
        default: return sigmoid(x);
    }
}
