// The GPU's side of the names that kernels use: PTX and intrinsics behind plain functions. shim/shim.hpp defines the same for
// the CPU; a name is added to both.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#define DEVICE static __device__ __forceinline__
// The same for member functions, which need no object.
#define DEVICE_MEMBER static __device__ __forceinline__
#define GALERNE_KERNEL(NAME, PARAMS, THREADS, BLOCKS_MIN) \
    extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS_MIN) NAME(const __grid_constant__ PARAMS p)

// Where a thread is.
DEVICE uint32_t thread_index() { return threadIdx.x; }
DEVICE uint32_t block_threads() { return blockDim.x; }
DEVICE uint32_t block_x() { return blockIdx.x; }
DEVICE uint32_t block_y() { return blockIdx.y; }
DEVICE uint32_t block_z() { return blockIdx.z; }
DEVICE uint32_t grid_x() { return gridDim.x; }
DEVICE uint32_t grid_y() { return gridDim.y; }
DEVICE uint32_t grid_z() { return gridDim.z; }

DEVICE unsigned char* shared_memory() {
    extern __shared__ __align__(128) unsigned char galerne_shared[];
    return galerne_shared;
}

// Barriers and exchanges between threads. Exchanges are among all 32 lanes of a warp.
DEVICE void block_barrier() { __syncthreads(); }
DEVICE void warp_barrier() { __syncwarp(); }
template <typename T>
DEVICE T shuffle_xor(T value, uint32_t lanes) {
    return __shfl_xor_sync(0xffffffffu, value, lanes);
}
template <typename T>
DEVICE T shuffle(T value, uint32_t lane) {
    return __shfl_sync(0xffffffffu, value, lane);
}
template <typename T>
DEVICE T shuffle_up(T value, uint32_t lanes) {
    return __shfl_up_sync(0xffffffffu, value, lanes);
}
DEVICE uint32_t warp_ballot(bool value) { return __ballot_sync(0xffffffffu, value); }

// Atomics on global or shared memory; each returns what was there.
DEVICE uint32_t atomic_add(uint32_t* at, uint32_t value) { return atomicAdd(at, value); }
DEVICE uint64_t atomic_add(uint64_t* at, uint64_t value) {
    return atomicAdd(reinterpret_cast<unsigned long long*>(at), static_cast<unsigned long long>(value));
}
DEVICE uint32_t atomic_max(uint32_t* at, uint32_t value) { return atomicMax(at, value); }
DEVICE uint32_t atomic_min(uint32_t* at, uint32_t value) { return atomicMin(at, value); }

// Arithmetic.
DEVICE float fast_exp2(float x) { return exp2f(x); }
DEVICE float reciprocal_sqrt(float x) { return rsqrtf(x); }
DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
DEVICE float float_from_bits(uint32_t x) { return __uint_as_float(x); }
DEVICE uint32_t popcount(uint32_t x) { return static_cast<uint32_t>(__popc(x)); }
DEVICE uint32_t leading_zeros(uint32_t x) { return static_cast<uint32_t>(__clz(x)); }

// 16-bit floats as their bits. Pairs have the first number in the low half.
DEVICE float bf16_to_f32(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }
DEVICE uint16_t f32_to_bf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
DEVICE float f16_to_f32(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
// Larger numbers than 65,504 become that.
DEVICE uint16_t f32_to_f16(float x) { return __half_as_ushort(__float2half_rn(fminf(fmaxf(x, -65504.0f), 65504.0f))); }
DEVICE uint32_t pack_bf16(float low, float high) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
DEVICE uint32_t pack_f16(float low, float high) {
    const __half2 pair = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t*>(&pair);
}
// a b + c of both numbers of bf16 pairs, each rounded once.
DEVICE uint32_t fma_bf16(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t x;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
    return x;
}
// 8-bit floats (e4m3, no infinities, saturating).
DEVICE float fp8_to_f32(uint8_t bits) {
    __nv_fp8_e4m3 x;
    x.__x = bits;
    return static_cast<float>(x);
}
DEVICE uint8_t f32_to_fp8(float x) { return __nv_fp8_e4m3(x).__x; }
// Two 8-bit floats, in the low half, as a pair of f16; exact.
DEVICE uint32_t fp8_to_f16(uint32_t codes) {
    const __half2_raw pair = __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(codes), __NV_E4M3);
    return pair.x | static_cast<uint32_t>(pair.y) << 16;
}
// Differences of pairs of bf16.
DEVICE uint32_t subtract_bf16(uint32_t a, uint32_t b) {
    const __nv_bfloat162 pair = __hsub2(*reinterpret_cast<const __nv_bfloat162*>(&a), *reinterpret_cast<const __nv_bfloat162*>(&b));
    return *reinterpret_cast<const uint32_t*>(&pair);
}
// Four of eight bytes, a's the first: each digit (4 bits, the last one first) of `selector` says which.
DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) { return __byte_perm(a, b, selector); }

// Memory. A 16-byte load that is read once and should leave the caches to others; `at` is 16-byte aligned and read-only
// while the kernel runs.
DEVICE uint4 load_once(const void* at) {
    uint4 x;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(at));
    return x;
}
// A number that another block has written in this launch, and said so (memory_fence, then an atomic).
DEVICE float load_fresh(const float* at) { return __ldcg(at); }
// What this thread wrote or read before is before what it writes or reads after, for threads of other blocks too.
DEVICE void memory_fence() { __threadfence(); }
// Starts copying 16 aligned bytes to shared memory, or starts zeroing them if !is_valid (`from` is then not read). Done for this thread after
// copy_wait, for others after a barrier behind it.
DEVICE void copy_start(void* shared, const void* from, bool is_valid) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(is_valid ? 16 : 0) : "memory");
}
// The same for 4 aligned bytes.
DEVICE void copy_start_word(void* shared, const void* from, bool is_valid) {
    const uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(from), "r"(is_valid ? 4 : 0) : "memory");
}
// Closes a group of copies.
DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `PENDING` of this thread's groups are unfinished.
template <int PENDING>
DEVICE void copy_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

// Matrices of 8 x 8 16-bit numbers from shared memory, as mma takes them: lane 8 i + r gives the address of row r of matrix i.
DEVICE void load_matrices(uint32_t (&matrices)[4], const void* shared_row) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(at)
                 : "memory");
}
// The same, each matrix transposed.
DEVICE void load_matrices_transposed(uint32_t (&matrices)[4], const void* shared_row) {
    const uint32_t at = static_cast<uint32_t>(__cvta_generic_to_shared(shared_row));
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(matrices[0]), "=r"(matrices[1]), "=r"(matrices[2]), "=r"(matrices[3])
                 : "r"(at)
                 : "memory");
}

// c += a b on a warp: a is 16 x 16, b 16 x 8, c 16 x 8 in f32; fragments as PTX's mma.m16n8k16 has them.
DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Programmatic dependent launch: before `dependency_wait` a kernel may only read what no kernel before it writes (weights);
// after `dependency_release` the next one may start. Every kernel calls the first before it reads its input.
DEVICE void dependency_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
DEVICE void dependency_release() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
