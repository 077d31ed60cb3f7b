// Functions of the elements of one or two matrices.
//
//   out[r][c] = f(a[r][c], b[r][c])
//
// a, b, out [rows, width] f32; out may be a or b, b may be null where it says so. Threads take one number, or four if all views are
// aligned (is_vector), in row-major order, `UNROLL` of them a grid apart: so many loads are in flight. Fewer than 2^31 threads' worth.
#include "activations.cuh"
#include "vector.cuh"

struct ElementwiseParams {
    View a;
    View b;  // at null: all 1
    View out;
    uint32_t rows;
    uint32_t is_vector;
    float constant;
    uint32_t reserved;
};

DEVICE float add(float a, float b, float) { return a + b; }
DEVICE float mul(float a, float b, float) { return a * b; }
DEVICE float scale(float a, float, float factor) { return a * factor; }
DEVICE float soft_cap(float a, float, float cap) { return cap * tanhf(a / cap); }

template <float (*ACTIVATION)(float)>
DEVICE float activated(float a, float b, float) { return ACTIVATION(a) * b; }

constexpr uint32_t UNROLL = 4;

template <float (*FUNCTION)(float, float, float), uint32_t N>
DEVICE void map(const ElementwiseParams& p) {
    const uint32_t per_row = p.out.width / N, total = per_row * p.rows, step = grid_x() * block_threads();
    for (uint32_t first = block_x() * block_threads() + thread_index(); first < total; first += UNROLL * step) {
        Floats<N> a[UNROLL], b[UNROLL];
#pragma unroll
        for (uint32_t k = 0; k < UNROLL; k++) {
            const uint32_t index = first + k * step;
            if (index >= total) break;
            const size_t row = index / per_row, column = index % per_row * N;
            a[k] = load_floats<N>(p.a.at + row * p.a.stride + column);
            b[k] = p.b.at ? load_floats<N>(p.b.at + row * p.b.stride + column) : all_floats<N>(1.0f);
        }
#pragma unroll
        for (uint32_t k = 0; k < UNROLL; k++) {
            const uint32_t index = first + k * step;
            if (index >= total) break;
            const size_t row = index / per_row, column = index % per_row * N;
            Floats<N> out;
            for (uint32_t i = 0; i < N; i++) out.at[i] = FUNCTION(a[k].at[i], b[k].at[i], p.constant);
            store_floats<N>(p.out.at + row * p.out.stride + column, out);
        }
    }
}

template <float (*FUNCTION)(float, float, float)>
DEVICE void elementwise(const ElementwiseParams& p) {
    dependency_wait();
    if (p.is_vector) map<FUNCTION, 4>(p);
    else map<FUNCTION, 1>(p);
    dependency_release();
}

GALERNE_KERNEL(elementwise_add, ElementwiseParams, 256, 4) { elementwise<add>(p); }
GALERNE_KERNEL(elementwise_mul, ElementwiseParams, 256, 4) { elementwise<mul>(p); }
GALERNE_KERNEL(elementwise_scale, ElementwiseParams, 256, 4) { elementwise<scale>(p); }
GALERNE_KERNEL(elementwise_soft_cap, ElementwiseParams, 256, 4) { elementwise<soft_cap>(p); }
GALERNE_KERNEL(elementwise_silu, ElementwiseParams, 256, 4) { elementwise<activated<silu>>(p); }
GALERNE_KERNEL(elementwise_gelu, ElementwiseParams, 256, 4) { elementwise<activated<gelu>>(p); }
GALERNE_KERNEL(elementwise_gelu_tanh, ElementwiseParams, 256, 4) { elementwise<activated<gelu_tanh>>(p); }
GALERNE_KERNEL(elementwise_relu, ElementwiseParams, 256, 4) { elementwise<activated<relu>>(p); }
GALERNE_KERNEL(elementwise_tanh, ElementwiseParams, 256, 4) { elementwise<activated<hyperbolic_tangent>>(p); }
GALERNE_KERNEL(elementwise_sigmoid, ElementwiseParams, 256, 4) { elementwise<activated<sigmoid>>(p); }
