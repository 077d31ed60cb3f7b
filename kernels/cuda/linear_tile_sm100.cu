// linear_tile.cu's maps with Blackwell's matrix products: same parameters, same steps of k, same tiles in shared memory; sums in tensor memory, a
// lane for each of 128 rows and a column for each of 128 outputs. Compiled only: no GPU has run it, and the shim cannot.
//
// x [rows, depth] as linear_cast makes it, out [rows, columns] f32. Grid (ceil(rows / 128), ceil(columns / 128)), 256 threads. One thread starts the
// products of a step, and a barrier of each of the two tiles says when they are done: then all write the next step but one there.
// Shared memory: the tiles at a multiple of 1,024 bytes, two barriers, the address of the sums.
#include "linear_tile.cuh"
#include "sm100.cuh"

template <uint32_t F>
struct TileKernel : Tiles<F> {
    using W = Fragments<F>;
    using Tiles<F>::copy_x;
    using Tiles<F>::load;
    using Tiles<F>::store;

    DEVICE_MEMBER void multiply(uint32_t sums, const uint4* x, const uint4* w, bool is_first) {
#pragma unroll
        for (uint32_t step = 0; step < TILE_DEPTH / 16; step++) {
            const uint64_t a = tcgen05_matrix(shared_address(x) + step * 32), b = tcgen05_matrix(shared_address(w) + step * 32);
            tcgen05_product<TILE_OUTPUTS, W::IS_F16>(sums, a, b, !is_first || step > 0);
        }
    }

    // A thread has one row and, of the tile's outputs, half.
    DEVICE_MEMBER void finish(const LinearTileParams& p, uint32_t sums, uint32_t first_row, uint32_t first_column) {
        const uint32_t warp = thread_index() / WARP;
        const uint32_t row = first_row + warp % 4 * WARP + thread_index() % WARP;
#pragma unroll 1
        for (uint32_t part = 0; part < TILE_OUTPUTS / 2 / 32; part++) {
            const uint32_t first = warp / 4 * (TILE_OUTPUTS / 2) + part * 32;
            float values[32];
            warp_barrier();
            tensor_memory_load(values, sums + (warp % 4 * WARP << 16) + first);
            if (row >= p.rows) continue;
            float* out = p.out.at + static_cast<size_t>(row) * p.out.stride + first_column + first;
#pragma unroll
            for (uint32_t i = 0; i < 32; i++) {
                const uint32_t column = first_column + first + i;
                if (column >= p.matrix.rows) continue;
                const float value = values[i] * W::row_factor_left(p.matrix, column) + (p.bias ? p.bias[column] : 0.0f);
                out[i] = p.accumulate ? out[i] + value : value;
            }
        }
    }

    DEVICE_MEMBER void run(const LinearTileParams& p) {
        constexpr uint32_t PIECES = TILE_ROWS * PIECES_PER_ROW;
        unsigned char* start = shared_memory() + (1024 - shared_address(shared_memory()) % 1024) % 1024;
        uint4* x = reinterpret_cast<uint4*>(start);
        uint4* w = x + 2 * PIECES;
        uint64_t* done = reinterpret_cast<uint64_t*>(w + 2 * PIECES);
        uint32_t* address = reinterpret_cast<uint32_t*>(done + 2);
        const uint32_t first_row = block_x() * TILE_ROWS, first_column = block_y() * TILE_OUTPUTS;
        const uint32_t thread = thread_index(), row = thread / 2, part = thread % 2;
        if (thread < WARP) tensor_memory_take<TILE_OUTPUTS>(address);
        if (thread == 0) {
            arrivals_start(done, 1);
            arrivals_start(done + 1, 1);
        }
        typename Tiles<F>::Weights next;
        load(p, first_column + row, part * 32, next);
        dependency_wait();
        copy_x(p, x, first_row, 0);
        store(next, w, row, part);
        load(p, first_column + row, TILE_DEPTH + part * 32, next);
        tensor_memory_before_barrier();
        block_barrier();
        tensor_memory_after_barrier();
        const uint32_t sums = *address, steps = p.depth / TILE_DEPTH;
        for (uint32_t step = 0; step < steps; step++) {
            const uint32_t now = step % 2, then = 1 - now;
            copy_wait<0>();
            shared_written();
            block_barrier();
            if (thread == 0) {
                multiply(sums, x + now * PIECES, w + now * PIECES, step == 0);
                tcgen05_arrive(done + now);
            }
            if (step + 1 == steps) break;
            if (step > 0) arrivals_wait(done + then, (step - 1) / 2 % 2);
            copy_x(p, x + then * PIECES, first_row, (step + 1) * TILE_DEPTH);
            store(next, w + then * PIECES, row, part);
            load(p, first_column + row, (step + 2) * TILE_DEPTH + part * 32, next);
        }
        dependency_release();
        arrivals_wait(done + (steps - 1) % 2, (steps - 1) / 2 % 2);
        tensor_memory_after_barrier();
        finish(p, sums, first_row, first_column);
        tensor_memory_before_barrier();
        block_barrier();
        if (thread < WARP) tensor_memory_give<TILE_OUTPUTS>(sums);
    }
};

#define LINEAR_TILE(FORMAT, F) \
    GALERNE_KERNEL(linear_tile_sm100_##FORMAT, LinearTileParams, 256, 1) { TileKernel<F>::run(p); }

FOR_EACH_FORMAT(LINEAR_TILE)
