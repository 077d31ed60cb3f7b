// Kernels that test the shim itself.
#include "galerne.cuh"

struct TestParams {
    const void* in;
    void* out;
    uint32_t mode;
    uint32_t count;
};

// out[block] = sum of in[block][threads] f32
GALERNE_KERNEL(test_block_sum, TestParams, 1024, 1) {
    dependency_wait();
    const float* in = static_cast<const float*>(p.in) + static_cast<size_t>(block_x()) * block_threads();
    const float sum = block_sum(in[thread_index()], reinterpret_cast<float*>(shared_memory()));
    if (thread_index() == 0) static_cast<float*>(p.out)[block_x()] = sum;
}

// out[thread][5] u32: the values of other lanes
GALERNE_KERNEL(test_exchanges, TestParams, 1024, 1) {
    dependency_wait();
    uint32_t* out = static_cast<uint32_t*>(p.out) + thread_index() * 5;
    out[0] = shuffle_xor(thread_index(), 5);
    out[1] = shuffle(thread_index(), thread_index() * 7);
    out[2] = shuffle_up(thread_index(), 3);
    out[3] = warp_ballot(thread_index() % 3 == 0);
    const uint64_t wide = shuffle_xor((static_cast<uint64_t>(thread_index()) << 40) + 1, 1);
    out[4] = static_cast<uint32_t>(wide >> 40) + static_cast<uint32_t>(wide);
}

// out[thread] = the number of the thread opposite; mode 0 forgets the barrier between
GALERNE_KERNEL(test_barrier, TestParams, 1024, 1) {
    dependency_wait();
    uint32_t* room = reinterpret_cast<uint32_t*>(shared_memory());
    room[thread_index()] = thread_index();
    if (p.mode == 1) block_barrier();
    static_cast<uint32_t*>(p.out)[thread_index()] = room[block_threads() - 1 - thread_index()];
}

// The first threads end, or shuffle, while the others are at a barrier.
GALERNE_KERNEL(test_deadlock, TestParams, 1024, 1) {
    dependency_wait();
    if (thread_index() >= 40) block_barrier();
    else if (p.mode == 1) shuffle_xor(1u, 1);
}

GALERNE_KERNEL(test_no_wait, TestParams, 32, 1) {}

// out[16 bytes * threads] = in, through shared memory. mode 0: as it should be; 1 forgets to wait; 2 waits for too few groups;
// 3 zeroes instead
GALERNE_KERNEL(test_copies, TestParams, 1024, 1) {
    dependency_wait();
    const uint32_t threads = block_threads();
    uint4* room = reinterpret_cast<uint4*>(shared_memory());
    const uint4* in = static_cast<const uint4*>(p.in);
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t at = i * threads + thread_index();
        copy_start(room + at, in + at, p.mode != 3);
        copy_commit();
    }
    if (p.mode == 2) copy_wait<1>();
    else if (p.mode != 1) copy_wait<0>();
    block_barrier();
    for (uint32_t i = 0; i < 2; i++) {
        const uint32_t at = i * threads + (thread_index() + 1) % threads;
        static_cast<uint4*>(p.out)[at] = room[at];
    }
}

// out[16][8] f32 += a[16][16] b, 16-bit floats: bf16 in mode 0 and f16 in mode 1. b is [8][16] ([column][k]) if count is 0, else
// [16][8] and loaded transposed. in: a, then b.
GALERNE_KERNEL(test_mma, TestParams, 32, 1) {
    dependency_wait();
    unsigned char* room = shared_memory();
    const uint32_t lane = thread_index();
    for (uint32_t i = lane; i < 768 / 16; i += WARP) copy_start(room + 16 * i, static_cast<const unsigned char*>(p.in) + 16 * i, true);
    copy_commit();
    copy_wait<0>();
    warp_barrier();
    uint32_t a[4], b[4];
    // Matrices of a: rows below 8 and above, then the same for k from 8 on.
    load_matrices(a, room + (lane % 16) * 32 + lane / 16 * 16);
    // Of b there are only two, so the other lanes give the same addresses.
    if (p.count == 0) load_matrices(b, room + 512 + lane % 8 * 32 + lane / 8 % 2 * 16);
    else load_matrices_transposed(b, room + 512 + lane % 16 * 16);
    float* out = static_cast<float*>(p.out);
    float c[4];
    const uint32_t two[2] = {b[0], b[1]};
    const uint32_t first = lane / 4 * 8 + lane % 4 * 2;
    for (uint32_t i = 0; i < 4; i++) c[i] = out[first + i / 2 * 64 + i % 2];
    if (p.mode == 0) mma_bf16(c, a, two);
    else mma_f16(c, a, two);
    for (uint32_t i = 0; i < 4; i++) out[first + i / 2 * 64 + i % 2] = c[i];
}

// count numbers: mode 0 f32 -> bf16, 1 f32 -> f16, 2 f32 -> fp8; 3 bf16 -> f32, 4 f16 -> f32, 5 fp8 -> f32; the narrow ones in u16
GALERNE_KERNEL(test_convert, TestParams, 1024, 1) {
    dependency_wait();
    const float* wide = static_cast<const float*>(p.in);
    const uint16_t* narrow = static_cast<const uint16_t*>(p.in);
    for (uint32_t i = block_x() * block_threads() + thread_index(); i < p.count; i += grid_x() * block_threads()) {
        if (p.mode < 3) {
            const float x = wide[i];
            static_cast<uint16_t*>(p.out)[i] = p.mode == 0 ? f32_to_bf16(x) : p.mode == 1 ? f32_to_f16(x) : f32_to_fp8(x);
        } else {
            const uint16_t x = narrow[i];
            const float y = p.mode == 3 ? bf16_to_f32(x) : p.mode == 4 ? f16_to_f32(x) : fp8_to_f32(static_cast<uint8_t>(x));
            static_cast<float*>(p.out)[i] = y;
        }
    }
}

// Reads in[count] f32, or if mode is 1 the 16 bytes from in[1].
GALERNE_KERNEL(test_read, TestParams, 32, 1) {
    dependency_wait();
    const float* in = static_cast<const float*>(p.in);
    if (p.mode == 1) static_cast<float4*>(p.out)[0] = *reinterpret_cast<const float4*>(in + 1);
    else static_cast<float*>(p.out)[0] = in[p.count];
}

// Counts in u64 and u32 at out: every thread adds 1, and its number to maximum and minimum.
GALERNE_KERNEL(test_atomics, TestParams, 1024, 1) {
    dependency_wait();
    atomic_add(static_cast<uint64_t*>(p.out), static_cast<uint64_t>(1));
    uint32_t* out = static_cast<uint32_t*>(p.out);
    atomic_add(out + 2, 1u);
    atomic_max(out + 3, thread_index());
    atomic_min(out + 4, thread_index());
}
