// Barriers in shared memory, which Hopper and later have (PTX ISA, "mbarrier").
#pragma once

#include "galerne.cuh"

DEVICE uint32_t shared_address(const void* shared) { return static_cast<uint32_t>(__cvta_generic_to_shared(shared)); }

// Barriers in shared memory. A phase ends when as many have arrived as was said at the start; waiting for the parity of a phase
// returns at once for the one before the current.
DEVICE void arrivals_start(uint64_t* barrier, uint32_t count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
DEVICE void arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
DEVICE void arrivals_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra through;\n"
        "bra again;\n"
        "through:\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
}

// What this thread wrote to shared memory is seen by matrix products and copies of boxes that begin after a barrier behind it.
DEVICE void shared_written() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
