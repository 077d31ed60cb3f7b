// The sampler's passes over chunks of a row; sample.cuh tells what they are for. logits [rows, width] f32 in rows of any
// alignment; every kernel has grid (chunks, jobs) and CHUNK_THREADS threads.
//
//   sample_best    shared: CHUNK floats, a Room. Clears the row's histogram.
//   sample_weigh   shared: CHUNK floats, a Room, 3 x BINS u32. Adds its tokens to the row's histogram.
//   sample_gather  shared: CHUNK floats, a Room. Every block finds the same bins; the first one notes them.
//
// They copy their job: what a loop writes could be the job, for all the compiler knows, and it would be read again and again.
#include "sample.cuh"

struct Room {
    uint64_t sums[WARP];
    Place place;
};

constexpr int QUADS = CHUNK / 4 / CHUNK_THREADS;
constexpr int BINS_EACH = BINS / CHUNK_THREADS;
constexpr uint32_t HALF_BITS = 20;

DEVICE float* chunk_room() { return reinterpret_cast<float*>(shared_memory()); }
DEVICE Room* block_room() { return reinterpret_cast<Room*>(shared_memory() + CHUNK * sizeof(float)); }

GALERNE_KERNEL(sample_best, SampleParams, 256, 4) {
    dependency_wait();
    const Job job = job_of(p);
    if (job.kind == JOB_NONE) return;
    const Keys<QUADS> keys = load_keys<QUADS>(p, job, block_x(), chunk_room());
    uint64_t best = 0, tokens = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4 * QUADS; i++) {
        const uint64_t key = static_cast<uint64_t>(keys.at[i]) << 32 | ~token_of(block_x(), i);
        best = key > best ? key : best;
        tokens += keys.at[i] != 0;
    }
    Room* room = block_room();
    best = block_max(best, room->sums);
    block_scan(tokens, room->sums, tokens);
    if (thread_index() == 0) chunks_of(p)[block_x()] = {0, best, static_cast<uint32_t>(tokens), 0};
    JobScratch& scratch = scratch_of(p);
    for (uint32_t i = block_x() * block_threads() + thread_index(); i < BINS; i += p.chunks * block_threads())
        scratch.masses[i] = 0, scratch.counts[i] = 0;
    if (block_x() == 0 && thread_index() == 0) scratch.cut.taken = 0;
    dependency_release();
}

// Adds the block's histogram, masses in two halves, to the row's.
DEVICE void flush_bins(JobScratch& scratch, const uint32_t* counts, const uint32_t* low, const uint32_t* high) {
    for (uint32_t i = thread_index(); i < BINS; i += block_threads()) {
        if (counts[i] == 0) continue;
        atomic_add(&scratch.counts[i], counts[i]);
        const uint64_t mass = (static_cast<uint64_t>(high[i]) << HALF_BITS) + low[i];
        if (mass > 0) atomic_add(&scratch.masses[i], mass);
    }
}

GALERNE_KERNEL(sample_weigh, SampleParams, 256, 4) {
    dependency_wait();
    const Job job = job_of(p);
    if (job.kind == JOB_NONE || job.kind == JOB_GREEDY) return;
    Room* room = block_room();
    uint32_t* counts = reinterpret_cast<uint32_t*>(room + 1);
    uint32_t *low = counts + BINS, *high = low + BINS;
    const bool is_binned = has_bins(job);
    if (is_binned)
        for (uint32_t i = thread_index(); i < 3 * BINS; i += block_threads()) counts[i] = 0;
    const Keys<QUADS> keys = load_keys<QUADS>(p, job, block_x(), chunk_room());
    uint64_t best = 0;
    for (uint32_t c = thread_index(); c < p.chunks; c += block_threads()) {
        const uint64_t other = chunks_of(p)[c].best;
        best = other > best ? other : best;
    }
    const float largest = largest_of(block_max(best, room->sums));
    uint64_t sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4 * QUADS; i++) {
        if (keys.at[i] == 0) continue;
        const uint64_t mass = mass_of(job, largest, keys.at[i]);
        sum += mass;
        const uint32_t bin = is_binned ? bin_of(job, largest, logit_of(keys.at[i])) : BINS;
        if (bin == BINS) continue;
        atomic_add(&counts[bin], 1u);
        const uint32_t low_half = static_cast<uint32_t>(mass) & ((1u << HALF_BITS) - 1);
        const uint32_t high_half = static_cast<uint32_t>(mass >> HALF_BITS);
        if (low_half > 0) atomic_add(&low[bin], low_half);
        if (high_half > 0) atomic_add(&high[bin], high_half);
    }
    uint64_t total;
    block_scan(sum, room->sums, total);
    if (thread_index() == 0) chunks_of(p)[block_x()].mass = total;
    if (is_binned) flush_bins(scratch_of(p), counts, low, high);
    dependency_release();
}

// The first bins, as far as a number of tokens needs.
DEVICE Cut cut_by_count(const Job& job, const Row& row, const Bins<BINS_EACH>& bins, Place* room) {
    uint32_t wanted = row.tokens;
    if (has_top_k(job, row.tokens)) wanted = job.top_k;
    // A list's shorter than top_k, but what top_p leaves of top_k tokens depends on all their masses.
    const bool is_part = !has_top_k(job, row.tokens) || job.top_p >= 1.0f;
    if (job.kind == JOB_LIST && is_part) wanted = min(wanted, job.list);
    const Place end = find_count(bins, room, wanted);
    const uint32_t count = end.bin < BINS ? end.count_before + end.count : 0;
    return {0, 0, 0, end.bin + 1, BINS, 0, count <= GATHERED_MAX ? count : 0, 0};
}

// The bin in which top_p and min_p end, and those in which the draw may end, wherever in that bin they do.
DEVICE Cut cut_by_mass(const Job& job, const Row& row, const Bins<BINS_EACH>& bins, Place* room) {
    const uint32_t by_min_p =
        has_min_p(job) ? bin_of(job, row.largest, row.largest + job.min_p_below) : BINS;
    const uint32_t by_top_p =
        job.top_p < 1.0f ? find_mass(bins, room, top_p_target(job, row.total)).bin : BINS;
    const uint32_t last_bin = min(by_min_p, by_top_p);
    Place last = find(bins, room, [=](const Place& at) { return at.bin == last_bin; });
    if (last_bin == BINS) last.mass_before = row.total;
    // The first bin has mass: only there does nothing lie above the last one.
    const Place first = find_mass(bins, room, draw_target(job, last.mass_before > 0 ? last.mass_before : 1));
    const Place until = find_mass(bins, room, draw_target(job, last.mass_before + last.mass));
    const uint32_t before_until = until.count_before + until.count - first.count_before;
    const bool is_apart = last_bin != until.bin;
    const uint32_t count = before_until + (is_apart ? last.count : 0);
    const uint32_t last_at = is_apart ? before_until : last.count_before - first.count_before;
    return {first.mass_before, last.mass_before, first.bin, until.bin + 1, last_bin, last_at,
            count <= GATHERED_MAX ? count : 0, 0};
}

GALERNE_KERNEL(sample_gather, SampleParams, 256, 2) {
    dependency_wait();
    const Job job = job_of(p);
    if (!has_bins(job)) return;
    Room* room = block_room();
    // Read before it is known which are wanted: the row is on its way meanwhile.
    const Keys<QUADS> keys = load_keys<QUADS>(p, job, block_x(), chunk_room());
    const Row row = row_of(p, room->sums);
    if (is_drawn_by_id(job, row.tokens) || (job.kind == JOB_DRAW && row.total == 0)) return;
    JobScratch& scratch = scratch_of(p);
    Bins<BINS_EACH> bins;
#pragma unroll
    for (uint32_t i = 0; i < BINS_EACH; i++) {
        bins.mass[i] = scratch.masses[thread_index() * BINS_EACH + i];
        bins.count[i] = scratch.counts[thread_index() * BINS_EACH + i];
    }
    sum_bins(bins, room->sums);
    const bool is_counted = job.kind == JOB_LIST || has_top_k(job, row.tokens);
    const Cut cut = is_counted ? cut_by_count(job, row, bins, &room->place) : cut_by_mass(job, row, bins, &room->place);
    if (block_x() == 0 && thread_index() == 0) {
        Cut& noted = scratch.cut;  // but for `taken`, which others count already
        noted.above_first = cut.above_first, noted.above_last = cut.above_last;
        noted.first = cut.first, noted.until = cut.until, noted.last = cut.last;
        noted.last_at = cut.last_at, noted.gathered = cut.gathered;
    }
    if (cut.gathered == 0) return;
#pragma unroll
    for (uint32_t i = 0; i < 4 * QUADS; i++) {
        if (keys.at[i] == 0) continue;
        const uint32_t bin = bin_of(job, row.largest, logit_of(keys.at[i]));
        if (bin == BINS || !((cut.first <= bin && bin < cut.until) || bin == cut.last)) continue;
        const uint32_t place = atomic_add(&scratch.cut.taken, 1u);
        scratch.gathered[place] = static_cast<uint64_t>(~keys.at[i]) << 32 | token_of(block_x(), i);
    }
    dependency_release();
}
