// What only Blackwell (sm_100a) has: matrix products out of shared memory into tensor memory, 128 lanes of columns of 32 bits that a
// block takes and gives back. Formats and rules: PTX ISA, "tcgen05".
#pragma once

#include "barriers.cuh"

// Takes so many columns (a power of two, 32 at least) for the block and puts their address into shared memory; one whole warp calls both.
template <uint32_t COLUMNS>
DEVICE void tensor_memory_take(uint32_t* shared) {
    asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(shared_address(shared)), "n"(COLUMNS)
                 : "memory");
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::1.sync.aligned;" ::: "memory");
}
template <uint32_t COLUMNS>
DEVICE void tensor_memory_give(uint32_t address) {
    asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, %1;" ::"r"(address), "n"(COLUMNS) : "memory");
}

// Around a barrier of the block: what was done to tensor memory before it is done before what comes behind.
DEVICE void tensor_memory_before_barrier() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
DEVICE void tensor_memory_after_barrier() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }

// A matrix in shared memory of rows of 128 bytes, swizzled by 128 bytes (16-byte piece p of row r at p ^ r % 8), at a multiple of 1,024
// bytes; `address` may be at a multiple of 32 bytes of its first row.
DEVICE uint64_t tcgen05_matrix(uint32_t address) {
    constexpr uint64_t SWIZZLE_128 = 2ull << 61, VERSION = 1ull << 46, EIGHT_ROWS = 1024 / 16;
    return SWIZZLE_128 | VERSION | EIGHT_ROWS << 32 | (address & 0x3ffff) / 16;
}

// 128 rows of a by COLUMNS rows of b, 16 numbers deep, in f32: lane r, column c of `sums` = a[r] . b[c], plus what was there if is_added.
// One thread starts it for the block.
template <uint32_t COLUMNS, bool IS_F16>
DEVICE void tcgen05_product(uint32_t sums, uint64_t a, uint64_t b, bool is_added) {
    constexpr uint32_t TO_F32 = 1u << 4, FORMAT = IS_F16 ? 0 : 1;
    constexpr uint32_t SHAPE = TO_F32 | FORMAT << 7 | FORMAT << 10 | COLUMNS / 8 << 17 | 128 / 16 << 24;
    asm volatile(
        "{\n"
        ".reg .pred added;\n"
        "setp.ne.u32 added, %4, 0;\n"
        "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, added;\n"
        "}\n" ::"r"(sums),
        "l"(a), "l"(b), "r"(SHAPE), "r"(is_added ? 1 : 0)
        : "memory");
}
// A barrier's arrival, when all products that this thread started are done.
DEVICE void tcgen05_arrive(uint64_t* barrier) {
    asm volatile("tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// 32 columns from `address` on of the lane of each thread; a warp reads the 32 lanes of its number in four, the address says which.
DEVICE void tensor_memory_load(float (&columns)[32], uint32_t address) {
    uint32_t bits[32];
    asm volatile(
        "tcgen05.ld.sync.aligned.32x32b.x32.b32 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
        "}, [%32];\n"
        "tcgen05.wait::ld.sync.aligned;"
        : "=r"(bits[0]), "=r"(bits[1]), "=r"(bits[2]), "=r"(bits[3]), "=r"(bits[4]), "=r"(bits[5]), "=r"(bits[6]), "=r"(bits[7]),
          "=r"(bits[8]), "=r"(bits[9]), "=r"(bits[10]), "=r"(bits[11]), "=r"(bits[12]), "=r"(bits[13]), "=r"(bits[14]),
          "=r"(bits[15]), "=r"(bits[16]), "=r"(bits[17]), "=r"(bits[18]), "=r"(bits[19]), "=r"(bits[20]), "=r"(bits[21]),
          "=r"(bits[22]), "=r"(bits[23]), "=r"(bits[24]), "=r"(bits[25]), "=r"(bits[26]), "=r"(bits[27]), "=r"(bits[28]),
          "=r"(bits[29]), "=r"(bits[30]), "=r"(bits[31])
        : "r"(address)
        : "memory");
#pragma unroll
    for (uint32_t i = 0; i < 32; i++) columns[i] = float_from_bits(bits[i]);
}
