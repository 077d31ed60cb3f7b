// Attention of tiles of 128 packed rows over paged bf16 or f16 keys and values with Hopper's warpgroup products. Formula and
// AttentionParams in attention.cuh; f32 accumulation. Compiled only: no GPU has run it, and the shim cannot.
//
// q, out [rows, heads * head_width] f32; head_width at most WIDTH, rows of codes 16-byte aligned. Grid (slots, kv_heads), 384 threads. The
// first warpgroup copies keys and values, 128 at a time, to a ring of four places, keys and values in turn; each of the other
// two has 64 rows of the tile, queries and results in registers. A place is WIDTH / 64 panels of 128 rows of 128 bytes, swizzled
// (sm90.cuh). For each place two barriers: `full` (all copying threads), `empty` (all computing warps).
//
// Places all of whose keys are seen are copied by the tensor memory accelerator, a box of box_rows keys by 64 numbers at a time; at the
// ends of what is seen, and of pools that are no matrix (box_rows 0), threads copy 16 bytes each and put zeros where nothing is seen.
//
//   scores of tile 0; for each tile: softmax, then results += probabilities x values and the next tile's scores together
#include "attention_mma.cuh"
#include "sm90.cuh"

struct AttentionSm90Params {
    AttentionParams attention;
    uint32_t box_rows;    // keys of a box, of which PLACE_KEYS and a block are multiples; 0: no boxes
    uint32_t block_rows;  // rows of `pool` from one block to the next
    TensorMap pool;       // matrix of rows of head_width numbers from attention.kv.bytes on, boxes of box_rows by 64
};

constexpr uint32_t PLACES = 4, PLACE_KEYS = 128, GROUP_ROWS = 64, COMPUTE_WARPS = 8;

template <uint32_t WIDTH>
struct Place {
    static constexpr uint32_t PANEL_BYTES = PLACE_KEYS * 128;
    static constexpr uint32_t BYTES = WIDTH / 64 * PANEL_BYTES;
};

struct Ring {
    unsigned char* places;
    uint64_t* full;
    uint64_t* empty;
};

// Where in the ring a side is: places are taken in turn, and each turn changes the parity.
struct Turn {
    uint32_t place;
    uint32_t parity;
};

DEVICE void next_place(Turn& turn) {
    turn.place++;
    if (turn.place == PLACES) {
        turn.place = 0;
        turn.parity ^= 1;
    }
}

template <uint32_t WIDTH>
DEVICE Ring attention_ring() {
    unsigned char* start = shared_memory() + (1024 - shared_address(shared_memory()) % 1024) % 1024;
    uint64_t* barriers = reinterpret_cast<uint64_t*>(start + PLACES * Place<WIDTH>::BYTES);
    return {start, barriers, barriers + PLACES};
}

// Says that the place before the turn's has been copied, if that was not said: as long as one is on its way, is_told is false.
DEVICE void tell_copied(const Ring& ring, const Turn& turn, bool is_told) {
    shared_written();
    if (!is_told) arrive(ring.full + (turn.place + PLACES - 1) % PLACES);
}

// Keys, or values, of one step of an item, all of them seen, from this row of the pool on.
template <uint32_t WIDTH>
DEVICE void copy_boxes(const AttentionSm90Params& p, const uint32_t* blocks, uint32_t first, uint32_t row, const Ring& ring, Turn& turn) {
    arrivals_wait(ring.empty + turn.place, turn.parity ^ 1);
    uint64_t* full = ring.full + turn.place;
    if (thread_index() == 0) {
        arrive_expecting(full, Place<WIDTH>::BYTES);
        unsigned char* place = ring.places + turn.place * Place<WIDTH>::BYTES;
        for (uint32_t key = 0; key < PLACE_KEYS; key += p.box_rows) {
            const uint32_t block = (first + key) / p.attention.kv.block_tokens;
            const uint32_t from = row + blocks[block] * p.block_rows + (first + key) % p.attention.kv.block_tokens;
#pragma unroll
            for (uint32_t panel = 0; panel < WIDTH / 64; panel++)
                box_start(place + panel * Place<WIDTH>::PANEL_BYTES + key * 128, p.pool, panel * 64, from, full);
        }
    } else {
        arrive(full);
    }
    next_place(turn);
}

// Keys, or values, of one step of an item: copies and, when those of the place before have come, says that they have.
template <uint32_t WIDTH>
DEVICE void copy_place(const AttentionParams& p, const Ring& ring, Turn& turn, const unsigned char* pool, uint64_t own, uint32_t seen,
                       bool& is_told) {
    constexpr uint32_t CHUNKS = WIDTH / 8, ROWS = WARP / CHUNKS, PASSES = WARP / ROWS;
    const uint32_t lane = thread_index() % WARP, warp = thread_index() / WARP;
    const uint32_t row_chunks = p.kv.head_width / 8;
    arrivals_wait(ring.empty + turn.place, turn.parity ^ 1);
    unsigned char* place = ring.places + turn.place * Place<WIDTH>::BYTES;
#pragma unroll 4
    for (uint32_t i = 0; i < PASSES; i++) {
        const uint32_t source = i * ROWS + lane / CHUNKS, row = i * 4 * ROWS + warp * ROWS + lane / CHUNKS, chunk = lane % CHUNKS;
        const bool is_valid = (seen >> source & 1) != 0 && chunk < row_chunks;
        const unsigned char* from = pool + shuffle(own, source) + (is_valid ? chunk * 16 : 0);
        copy_start(place + chunk / 8 * Place<WIDTH>::PANEL_BYTES + row * 128 + (chunk % 8 ^ row % 8) * 16, from, is_valid);
    }
    copy_commit();
    copy_wait<1>();
    tell_copied(ring, turn, is_told);
    is_told = false;
    next_place(turn);
}

template <uint32_t WIDTH>
DEVICE void copy_item(const AttentionSm90Params& all, const AttentionItem& item, const Ring& ring, Turn& turn, bool& is_told) {
    constexpr uint32_t ROWS = WARP / (WIDTH / 8);
    const AttentionParams& p = all.attention;
    const uint32_t lane = thread_index() % WARP, warp = thread_index() / WARP;
    const uint32_t first_seen = attention_row(p, item, block_y(), 0).begin;
    const uint32_t* blocks = p.block_table + static_cast<size_t>(item.sequence) * p.blocks_stride;
    for (uint32_t first = item.key_begin; first < item.key_end; first += PLACE_KEYS) {
        const bool is_whole = first >= first_seen && first + PLACE_KEYS <= item.key_end;
        if (is_whole && all.box_rows > 0 && first % all.box_rows == 0) {
            copy_wait<0>();
            tell_copied(ring, turn, is_told);
            is_told = true;
            const uint32_t keys = block_y() * p.kv.block_tokens;
            copy_boxes<WIDTH>(all, blocks, first, keys, ring, turn);
            copy_boxes<WIDTH>(all, blocks, first, keys + p.kv.kv_heads * p.kv.block_tokens, ring, turn);
            continue;
        }
        // The lane's key of those that its warp copies.
        const uint32_t key = first + lane / ROWS * 4 * ROWS + warp * ROWS + lane % ROWS;
        const bool is_seen = key >= first_seen && key < item.key_end;
        uint64_t own = 0;
        if (is_seen) {
            const KeyPlace at = key_place(p, blocks, key);
            own = at.block + (static_cast<uint64_t>(block_y()) * p.kv.block_tokens + at.slot) * (p.kv.head_width * 2);
        }
        const uint32_t seen = warp_ballot(is_seen);
        copy_place<WIDTH>(p, ring, turn, p.kv.bytes, own, seen, is_told);
        copy_place<WIDTH>(p, ring, turn, p.kv.bytes + kv_values_at(p.kv), own, seen, is_told);
    }
}

template <uint32_t WIDTH>
DEVICE void copy_all(const AttentionSm90Params& all, const Ring& ring) {
    const AttentionParams& p = all.attention;
    Turn turn = {0, 0};
    bool is_told = true;
    const uint32_t end = p.plan[p.slots_at + block_x() + 1];
    for (uint32_t at = p.plan[p.slots_at + block_x()]; at < end; at += ITEM_WORDS)
        copy_item<WIDTH>(all, attention_item(p.plan + at), ring, turn, is_told);
    copy_wait<0>();
    tell_copied(ring, turn, is_told);
}

template <uint32_t DTYPE, uint32_t TILES, bool IS_TRANSPOSED>
DEVICE void wgmma(float (&c)[TILES][4], const uint32_t (&a)[4], uint64_t b, bool is_added) {
    if constexpr (DTYPE == KV_BF16)
        wgmma_bf16<IS_TRANSPOSED>(c, a, b, is_added);
    else
        wgmma_f16<IS_TRANSPOSED>(c, a, b, is_added);
}

// Starts scores = queries x keys of a place.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void start_scores(Scores<PLACE_KEYS>& scores, const RegisterQueries<WIDTH>& queries, const unsigned char* place) {
    const uint32_t address = shared_address(place);
#pragma unroll
    for (uint32_t step = 0; step < WIDTH / 16; step++) {
        const uint32_t at = address + step / 4 * Place<WIDTH>::PANEL_BYTES + step % 4 * 32;
        wgmma<DTYPE, PLACE_KEYS / 8, false>(scores.c, queries.a[step], wgmma_matrix(at, 16), step > 0);
    }
    wgmma_commit();
}

// Starts out += probabilities x values of a place.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void start_values(float (&out)[WIDTH / 8][4], const uint32_t (&a)[PLACE_KEYS / 16][4], const unsigned char* place) {
    const uint32_t address = shared_address(place);
#pragma unroll
    for (uint32_t part = 0; part < PLACE_KEYS / 16; part++)
        wgmma<DTYPE, WIDTH / 8, true>(out, a[part], wgmma_matrix(address + part * 2048, Place<WIDTH>::PANEL_BYTES), true);
    wgmma_commit();
}

// A computing warp has read a place.
DEVICE void leave_place(const Ring& ring, uint32_t place) {
    if (thread_index() % WARP == 0) arrive(ring.empty + place);
}

// Scores of a tile to probabilities as products take them; earlier results are rescaled.
template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void finish_tile(const AttentionParams& p, const TileRows& rows, uint32_t key, bool is_masked, Scores<PLACE_KEYS>& scores,
                        Softmax& state, float (&out)[WIDTH / 8][4], uint32_t (&a)[PLACE_KEYS / 16][4]) {
    finish_scores<DTYPE>(scores, p, rows, key, nullptr, is_masked);
    float shrink[2];
    step_softmax(scores, state, shrink);
    shrink_out<WIDTH>(out, shrink);
#pragma unroll
    for (uint32_t part = 0; part < PLACE_KEYS / 16; part++) probabilities<DTYPE>(a[part], scores, part, nullptr);
}

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void compute_item(const AttentionParams& p, const uint32_t* words, const Ring& ring, Turn& turn) {
    const AttentionItem item = attention_item(words);
    const uint32_t first = (thread_index() / WARPGROUP - 1) * GROUP_ROWS + thread_index() % WARPGROUP / WARP * 16;
    const TileRows rows = tile_rows(p, item, first);
    const uint32_t all_begin = attention_row(p, item, block_y(), item.rows - 1).begin;
    const uint32_t all_end = attention_row(p, item, block_y(), 0).end;
    RegisterQueries<WIDTH> queries;
    load_queries<DTYPE, WIDTH>(queries.a, p, item, first);
    float out[WIDTH / 8][4] = {};
    Softmax state = {{-INFINITY, -INFINITY}, {0.0f, 0.0f}};
    Scores<PLACE_KEYS> scores;
    arrivals_wait(ring.full + turn.place, turn.parity);
    wgmma_begin();
    start_scores<DTYPE, WIDTH>(scores, queries, ring.places + turn.place * Place<WIDTH>::BYTES);
    wgmma_wait();
    leave_place(ring, turn.place);
    next_place(turn);
    for (uint32_t key = item.key_begin; key < item.key_end; key += PLACE_KEYS) {
        uint32_t a[PLACE_KEYS / 16][4];
        const bool is_masked = key < all_begin || key + PLACE_KEYS > all_end;
        finish_tile<DTYPE, WIDTH>(p, rows, key, is_masked, scores, state, out, a);
        const uint32_t values = turn.place;
        arrivals_wait(ring.full + values, turn.parity);
        next_place(turn);
        const bool has_next = key + PLACE_KEYS < item.key_end;
        if (has_next) arrivals_wait(ring.full + turn.place, turn.parity);
        wgmma_begin();
        start_values<DTYPE, WIDTH>(out, a, ring.places + values * Place<WIDTH>::BYTES);
        if (has_next) start_scores<DTYPE, WIDTH>(scores, queries, ring.places + turn.place * Place<WIDTH>::BYTES);
        wgmma_wait();
        leave_place(ring, values);
        if (has_next) {
            leave_place(ring, turn.place);
            next_place(turn);
        }
    }
    // Read again, as there are no registers to keep it.
    store_result<DTYPE, WIDTH>(p, attention_item(words), first, state, out);
}

template <uint32_t DTYPE, uint32_t WIDTH>
DEVICE void attention_prefill(const AttentionSm90Params& all) {
    const AttentionParams& p = all.attention;
    const Ring ring = attention_ring<WIDTH>();
    if (thread_index() == 0) {
        for (uint32_t place = 0; place < PLACES; place++) {
            arrivals_start(ring.full + place, WARPGROUP);
            arrivals_start(ring.empty + place, COMPUTE_WARPS);
        }
        shared_written();
    }
    block_barrier();
    dependency_wait();
    // One branch for each role: the compiler moves registers between them only so.
    if (thread_index() < WARPGROUP) {
        give_registers<40>();
        copy_all<WIDTH>(all, ring);
    } else {
        take_registers<232>();
        Turn turn = {0, 0};
        const uint32_t end = p.plan[p.slots_at + block_x() + 1];
        for (uint32_t at = p.plan[p.slots_at + block_x()]; at < end; at += ITEM_WORDS)
            compute_item<DTYPE, WIDTH>(p, p.plan + at, ring, turn);
    }
    dependency_release();
}

GALERNE_KERNEL(attention_prefill_sm90_bf16_64, AttentionSm90Params, 384, 1) { attention_prefill<KV_BF16, 64>(p); }
GALERNE_KERNEL(attention_prefill_sm90_bf16_128, AttentionSm90Params, 384, 1) { attention_prefill<KV_BF16, 128>(p); }
GALERNE_KERNEL(attention_prefill_sm90_f16_64, AttentionSm90Params, 384, 1) { attention_prefill<KV_F16, 64>(p); }
GALERNE_KERNEL(attention_prefill_sm90_f16_128, AttentionSm90Params, 384, 1) { attention_prefill<KV_F16, 128>(p); }
