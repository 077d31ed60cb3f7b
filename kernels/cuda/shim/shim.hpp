// The CPU's side of the names that kernels use; gpu.cuh has the GPU's. A thread of a block is a fiber, see shim.cpp.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
static inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
template <typename T>
static inline T min(T a, T b) { return b < a ? b : a; }
template <typename T>
static inline T max(T a, T b) { return a < b ? b : a; }

namespace shim {

struct Kernel {
    const char* name;
    size_t params_bytes;
    uint32_t threads_max;
    void (*run)(const void* params);
    Kernel* next;
};

// Enters a kernel in the table.
struct Registration {
    Kernel kernel;
    Registration(const char* name, size_t params_bytes, uint32_t threads_max, void (*run)(const void*));
};

// The block that runs on this system thread, and the fiber in it.
struct Place {
    const char* kernel;
    uint32_t grid[3], block[3];
    uint32_t threads, thread;
    unsigned char* shared;
    size_t shared_bytes;
};
extern __thread Place place;

// What a fiber waits for.
enum class Wait : uint32_t { Nothing, End, Block, Warp, Shuffle, Ballot, Matrices, Mma };

// What a lane gives to the others.
struct Words {
    uint32_t at[8];
};

void block_barrier();
// Waits until all lanes of the warp are here; what each gave, good until this lane's next exchange.
const Words* exchange(Wait what, const void* given, size_t bytes);
void copy_start(void* shared, const void* from, size_t bytes, bool is_valid);
void copy_commit();
void copy_wait(size_t pending);
void dependency_wait();
// Ends the launch with an error.
[[noreturn]] void fail(const char* reason);

uint16_t round_bf16(float x);
uint16_t round_f16(float x);
uint8_t round_fp8(float x);
float widen_f16(uint16_t bits);
float widen_fp8(uint8_t bits);

template <typename T>
static inline T shuffle_from(T value, uint32_t lane) {
    static_assert(sizeof(T) <= sizeof(Words), "too wide for an exchange");
    const Words* all = exchange(Wait::Shuffle, &value, sizeof(T));
    std::memcpy(&value, &all[lane], sizeof(T));
    return value;
}

template <float (*WIDEN)(uint16_t)>
static inline void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    const uint32_t given[6] = {a[0], a[1], a[2], a[3], b[0], b[1]};
    const Words* all = exchange(Wait::Mma, given, sizeof given);
    const uint32_t group = place.thread % 32 / 4, pair = place.thread % 4;
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t column = 2 * pair + i % 2;
        double sum = 0.0;
        for (uint32_t k = 0; k < 16; k++) {
            // Registers hold pairs of k; those of a: rows below 8, then above, then the same for k from 8 on.
            const uint32_t of_a = all[4 * group + k % 8 / 2].at[i / 2 + k / 8 * 2] >> k % 2 * 16;
            const uint32_t of_b = all[4 * column + k % 8 / 2].at[4 + k / 8] >> k % 2 * 16;
            sum += static_cast<double>(WIDEN(static_cast<uint16_t>(of_a))) * WIDEN(static_cast<uint16_t>(of_b));
        }
        c[i] = static_cast<float>(c[i] + sum);
    }
}

static inline const Words* give_row(const void* row) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("load_matrices: a row is not 16-byte aligned");
    return exchange(Wait::Matrices, row, 16);
}

}  // namespace shim

#define DEVICE static inline
#define DEVICE_MEMBER static inline
#define GALERNE_KERNEL(NAME, PARAMS, THREADS, BLOCKS_MIN)                                              \
    static void NAME(const PARAMS& p);                                                                 \
    static const shim::Registration NAME##_registration(#NAME, sizeof(PARAMS), THREADS,                \
        [](const void* params) { NAME(*static_cast<const PARAMS*>(params)); });                        \
    static void NAME([[maybe_unused]] const PARAMS& p)

DEVICE uint32_t thread_index() { return shim::place.thread; }
DEVICE uint32_t block_threads() { return shim::place.threads; }
DEVICE uint32_t block_x() { return shim::place.block[0]; }
DEVICE uint32_t block_y() { return shim::place.block[1]; }
DEVICE uint32_t block_z() { return shim::place.block[2]; }
DEVICE uint32_t grid_x() { return shim::place.grid[0]; }
DEVICE uint32_t grid_y() { return shim::place.grid[1]; }
DEVICE uint32_t grid_z() { return shim::place.grid[2]; }
DEVICE unsigned char* shared_memory() { return shim::place.shared; }

DEVICE void block_barrier() { shim::block_barrier(); }
DEVICE void warp_barrier() { shim::exchange(shim::Wait::Warp, nullptr, 0); }
template <typename T>
DEVICE T shuffle_xor(T value, uint32_t lanes) {
    return shim::shuffle_from(value, (shim::place.thread ^ lanes) % 32);
}
template <typename T>
DEVICE T shuffle(T value, uint32_t lane) {
    return shim::shuffle_from(value, lane % 32);
}
template <typename T>
DEVICE T shuffle_up(T value, uint32_t lanes) {
    const uint32_t lane = shim::place.thread % 32;
    return shim::shuffle_from(value, lane < lanes ? lane : lane - lanes);
}
DEVICE uint32_t warp_ballot(bool value) {
    const uint32_t given = value ? 1 : 0;
    const shim::Words* all = shim::exchange(shim::Wait::Ballot, &given, sizeof given);
    uint32_t bits = 0;
    for (uint32_t lane = 0; lane < 32; lane++) bits |= (all[lane].at[0] == 1 ? 1u : 0u) << lane;
    return bits;
}

// Fibers of all blocks run on one thread: nothing comes between.
DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) {
    const uint32_t before = *at;
    *at = before + value;
    return before;
}
DEVICE uint64_t atomic_add(uint64_t* at, uint64_t value) {
    const uint64_t before = *at;
    *at = before + value;
    return before;
}
DEVICE uint32_t atomic_max(uint32_t* at, uint32_t value) {
    const uint32_t before = *at;
    *at = max(before, value);
    return before;
}
DEVICE uint32_t atomic_min(uint32_t* at, uint32_t value) {
    const uint32_t before = *at;
    *at = min(before, value);
    return before;
}

DEVICE float fast_exp2(float x) { return exp2f(x); }
DEVICE float reciprocal_sqrt(float x) { return 1.0f / sqrtf(x); }
DEVICE uint32_t float_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float float_from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
DEVICE uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(__builtin_popcount(x)); }
DEVICE uint32_t leading_zeros(uint32_t x) { return x == 0 ? 32 : static_cast<uint32_t>(__builtin_clz(x)); }

DEVICE float bf16_to_f32(uint16_t bits) { return float_from_bits(static_cast<uint32_t>(bits) << 16); }
DEVICE uint16_t f32_to_bf16(float x) { return shim::round_bf16(x); }
DEVICE float f16_to_f32(uint16_t bits) { return shim::widen_f16(bits); }
DEVICE uint16_t f32_to_f16(float x) { return shim::round_f16(fminf(fmaxf(x, -65504.0f), 65504.0f)); }
DEVICE uint32_t pack_bf16(float low, float high) {
    return shim::round_bf16(low) | static_cast<uint32_t>(shim::round_bf16(high)) << 16;
}
DEVICE uint32_t pack_f16(float low, float high) {
    return shim::round_f16(low) | static_cast<uint32_t>(shim::round_f16(high)) << 16;
}
DEVICE uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    const auto one = [&](uint32_t shift) {
        const auto widen = [&](uint32_t x) -> double { return bf16_to_f32(static_cast<uint16_t>(x >> shift)); };
        return static_cast<float>(widen(a) * widen(b) + widen(c));
    };
    return pack_bf16(one(0), one(16));
}
DEVICE float fp8_to_f32(uint8_t bits) { return shim::widen_fp8(bits); }
DEVICE uint8_t f32_to_fp8(float x) { return shim::round_fp8(x); }
DEVICE uint32_t fp8_to_f16(uint32_t codes) {
    return pack_f16(shim::widen_fp8(static_cast<uint8_t>(codes)), shim::widen_fp8(static_cast<uint8_t>(codes >> 8)));
}
DEVICE uint32_t subtract_bf16(uint32_t a, uint32_t b) {
    return pack_bf16(bf16_to_f32(static_cast<uint16_t>(a)) - bf16_to_f32(static_cast<uint16_t>(b)),
                     bf16_to_f32(static_cast<uint16_t>(a >> 16)) - bf16_to_f32(static_cast<uint16_t>(b >> 16)));
}
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
    uint32_t result = 0;
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t which = selector >> 4 * i & 7;
        result |= static_cast<uint32_t>(bytes >> 8 * which & 0xff) << 8 * i;
    }
    return result;
}

DEVICE uint4 load_once(const void* at) { return *static_cast<const uint4*>(at); }
DEVICE float load_fresh(const float* at) { return *at; }
DEVICE void memory_fence() {}
DEVICE void copy_start(void* shared, const void* from, bool is_valid) { shim::copy_start(shared, from, 16, is_valid); }
DEVICE void copy_start_word(void* shared, const void* from, bool is_valid) { shim::copy_start(shared, from, 4, is_valid); }
DEVICE void copy_commit() { shim::copy_commit(); }
template <int PENDING>
DEVICE void copy_wait() {
    shim::copy_wait(PENDING);
}

DEVICE void load_matrices(uint32_t (&matrices)[4], const void* shared_row) {
    const shim::Words* rows = shim::give_row(shared_row);
    const uint32_t lane = shim::place.thread % 32;
    for (uint32_t i = 0; i < 4; i++) matrices[i] = rows[8 * i + lane / 4].at[lane % 4];
}
DEVICE void load_matrices_transposed(uint32_t (&matrices)[4], const void* shared_row) {
    const shim::Words* rows = shim::give_row(shared_row);
    const uint32_t lane = shim::place.thread % 32, column = lane / 4;
    for (uint32_t i = 0; i < 4; i++) {
        matrices[i] = 0;
        for (uint32_t half = 0; half < 2; half++) {
            const uint32_t pair = rows[8 * i + 2 * (lane % 4) + half].at[column / 2];
            matrices[i] |= (pair >> column % 2 * 16 & 0xffff) << half * 16;
        }
    }
}
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { shim::mma<bf16_to_f32>(c, a, b); }
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) { shim::mma<shim::widen_f16>(c, a, b); }

DEVICE void dependency_wait() { shim::dependency_wait(); }
DEVICE void dependency_release() {}
