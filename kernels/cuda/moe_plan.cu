// Which rows go through which expert together, made on the device from what moe_route chose.
//
// An assignment a is choice a % top_k of row a / top_k. chosen [assignments] u32, 0xffffffff: none. order [assignments] u32: assignments,
// those of one expert one after the other, in any order. tiles [tiles][3] u32: expert, first in order, count of at most tile_rows;
// as many as may be needed, those that are not have count 0. One block. Shared memory: 2 x experts u32.
#include "galerne.cuh"

struct MoePlanParams {
    const uint32_t* chosen;
    uint32_t* order;
    uint32_t* tiles;
    uint32_t assignments;
    uint32_t experts;
    uint32_t tile_rows;
    uint32_t tiles_max;
};

GALERNE_KERNEL(moe_plan, MoePlanParams, 1024, 1) {
    uint32_t* counts = reinterpret_cast<uint32_t*>(shared_memory());
    uint32_t* next = counts + p.experts;
    const uint32_t thread = thread_index(), threads = block_threads();
    dependency_wait();
    for (uint32_t e = thread; e < p.experts; e += threads) counts[e] = 0;
    block_barrier();
    for (uint32_t a = thread; a < p.assignments; a += threads)
        if (p.chosen[a] < p.experts) atomic_add(&counts[p.chosen[a]], 1u);
    block_barrier();
    if (thread == 0) {
        uint32_t first = 0, tile = 0;
        for (uint32_t e = 0; e < p.experts; e++) {
            next[e] = first;
            for (uint32_t done = 0; done < counts[e]; done += p.tile_rows) {
                p.tiles[3 * tile] = e;
                p.tiles[3 * tile + 1] = first + done;
                p.tiles[3 * tile + 2] = min(p.tile_rows, counts[e] - done);
                tile++;
            }
            first += counts[e];
        }
        for (; tile < p.tiles_max; tile++) p.tiles[3 * tile + 2] = 0;
    }
    block_barrier();
    dependency_release();
    for (uint32_t a = thread; a < p.assignments; a += threads)
        if (p.chosen[a] < p.experts) p.order[atomic_add(&next[p.chosen[a]], 1u)] = a;
}
