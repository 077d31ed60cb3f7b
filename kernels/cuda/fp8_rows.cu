// A matrix of 8-bit floats (W_FP8 in weights.cuh) row by row, for libraries that know no tiles: out[r, k] = the code of w[r, k], without
// the row's factor.
//
// w [rows, width], of which the rows from first_row on are taken; out [taken, width padded to 128] bytes, 16-byte aligned; padding is
// zero. One block per row: grid (taken).
#include "weights.cuh"

struct Fp8RowsParams {
    Matrix matrix;
    uint4* out;
    uint32_t first_row;
    uint32_t unused;
};

// A word's bytes are its columns 0, 2, 1, 3.
DEVICE uint32_t in_order(uint32_t word) {
    return (word & 0xff0000ffu) | (word >> 8 & 0x0000ff00u) | (word << 8 & 0x00ff0000u);
}

GALERNE_KERNEL(fp8_rows, Fp8RowsParams, 256, 1) {
    const uint32_t row = p.first_row + block_x(), tiles = divide_up(p.matrix.width, TILE_COLUMNS);
    uint4* out = p.out + static_cast<size_t>(block_x()) * tiles * (TILE_COLUMNS / 16);
    dependency_wait();
    // 16 codes: half a slice, of 8 in a tile's row.
    for (uint32_t half = thread_index(); half < tiles * 8; half += block_threads()) {
        const unsigned char* tile = tile_at(p.matrix, format_spec(W_FP8), row / PANEL_ROWS, half / 8);
        const uint32_t slice = row % PANEL_ROWS * 4 + half % 8 / 2;
        const uint4 codes = reinterpret_cast<const uint4*>(tile + half % 2 * 1024)[slice];
        out[half] = make_uint4(in_order(codes.x), in_order(codes.y), in_order(codes.z), in_order(codes.w));
    }
    dependency_release();
}
