// The end of a job of the sampler (sample.cuh): a token or a list. logits [rows, width] f32 in rows of any alignment. One block
// of ROW_THREADS threads per job: grid (1, jobs). shared: a Room.
//
// What sample_gather left is sorted, and its masses summed: filters and draw are then searches in one array. Where it left
// nothing there were too many tokens (a flat row, a very large top_k), or a list reaches below all bins (a row with one peak):
// the same questions are then answered by a radix search over the keys of the whole row, several slow passes of this one block.
#include "sample.cuh"

constexpr int RADIX_BITS = 11;
constexpr uint32_t RADIX_BINS = 1u << RADIX_BITS;
constexpr int RADIX_BINS_EACH = RADIX_BINS / ROW_THREADS;
constexpr int SORTED_EACH = GATHERED_MAX / ROW_THREADS;
constexpr uint32_t HALF_BITS = 20;

struct Room {
    float logits[CHUNK];
    union {
        struct {
            uint64_t keys[GATHERED_MAX];
            uint64_t sums[GATHERED_MAX];  // of masses up to this one
        };
        struct {
            uint32_t counts[RADIX_BINS], low[RADIX_BINS], high[RADIX_BINS];
        };
    };
    uint64_t scan[WARP];
    Place place;
    uint64_t found;
    uint32_t chunk, taken;
};

DEVICE Room& room_of() { return *reinterpret_cast<Room*>(shared_memory()); }

DEVICE uint32_t key_in(uint64_t sorted) { return ~static_cast<uint32_t>(sorted >> 32); }

// Sorts room.keys[0..count] upwards.
DEVICE void sort(Room& room, uint32_t count) {
    uint32_t padded = 2;
    while (padded < count) padded *= 2;
    for (uint32_t i = count + thread_index(); i < padded; i += block_threads()) room.keys[i] = ~uint64_t{0};
    for (uint32_t size = 2; size <= padded; size *= 2) {
        for (uint32_t step = size / 2; step > 0; step /= 2) {
            block_barrier();
            for (uint32_t i = thread_index(); i < padded / 2; i += block_threads()) {
                const uint32_t low = 2 * i - (i & (step - 1)), high = low + step;
                const uint64_t a = room.keys[low], b = room.keys[high];
                const bool is_upward = (low & size) == 0;
                if ((a > b) == is_upward) room.keys[low] = b, room.keys[high] = a;
            }
        }
    }
    block_barrier();
}

// Fills room.sums for sorted keys.
DEVICE void sum_sorted(const Job& job, const Row& row, Room& room, uint32_t count) {
    uint64_t masses[SORTED_EACH], sum = 0, total;
#pragma unroll
    for (uint32_t i = 0; i < SORTED_EACH; i++) {
        const uint32_t at = thread_index() * SORTED_EACH + i;
        masses[i] = at < count ? mass_of(job, row.largest, key_in(room.keys[at])) : 0;
        sum += masses[i];
    }
    uint64_t before = block_scan(sum, room.scan, total);
#pragma unroll
    for (uint32_t i = 0; i < SORTED_EACH; i++) {
        const uint32_t at = thread_index() * SORTED_EACH + i;
        before += masses[i];
        if (at < count) room.sums[at] = before;
    }
    block_barrier();
}

// The first place from `from` to `until` at which `is_met`, which stays true from there on; `until` if nowhere.
template <typename F>
DEVICE uint32_t first_place(uint32_t from, uint32_t until, F is_met) {
    while (from < until) {
        const uint32_t middle = from + (until - from) / 2;
        if (is_met(middle)) until = middle;
        else from = middle + 1;
    }
    return from;
}

// The lowest key that passes min_p.
DEVICE uint32_t key_min(const Job& job, const Row& row) { return key_of(clean(row.largest + job.min_p_below)); }

// Draws among gathered tokens.
DEVICE uint32_t draw_gathered(const Job& job, const Row& row, const Cut& cut, Room& room) {
    sort(room, cut.gathered);
    sum_sorted(job, row, room, cut.gathered);
    const bool is_top_k = has_top_k(job, row.tokens);
    // Where the filters can end. Sums of tokens from there on are room.sums + shift, even where that wraps around.
    const uint32_t from = cut.last_at, until = is_top_k ? job.top_k : cut.gathered;
    const uint64_t shift = cut.above_last - (from > 0 ? room.sums[from - 1] : 0);
    uint64_t kept = until > from ? room.sums[until - 1] + shift : cut.above_last;
    if (job.top_p < 1.0f) {
        const uint64_t target = top_p_target(job, is_top_k ? kept : row.total);
        const uint32_t end = first_place(from, until, [&](uint32_t at) { return room.sums[at] + shift >= target; });
        if (end < until) kept = room.sums[end] + shift;
    }
    const uint32_t lowest = key_min(job, row);
    const uint32_t end = first_place(from, until, [&](uint32_t at) { return key_in(room.keys[at]) < lowest; });
    if (end < until) {
        const uint64_t passing = end > from ? room.sums[end - 1] + shift : cut.above_last;
        kept = passing < kept ? passing : kept;
    }
    const uint64_t most_likely = mass_of(job, row.largest, static_cast<uint32_t>(row.best >> 32));
    kept = kept > most_likely ? kept : most_likely;
    const uint64_t target = draw_target(job, kept);
    const uint32_t at =
        first_place(0, cut.gathered - 1, [&](uint32_t at) { return room.sums[at] + cut.above_first >= target; });
    return static_cast<uint32_t>(room.keys[at]);
}

// Where a sum of masses, or a number of tokens, is reached in the order of the whole row.
struct Reached {
    uint32_t key;
    uint32_t nth;   // of the tokens with this key
    uint64_t mass;  // up to this token
};

// Adds a chunk's tokens whose bits from `known` on are `prefix` to the histogram of the digit at `shift`, largest digit first.
DEVICE void count_digits(const Job& job, const Row& row, Room& room, const Keys<1>& keys, uint32_t prefix, uint32_t known,
                         uint32_t shift) {
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        const uint32_t key = keys.at[i];
        if (key == 0 || static_cast<uint64_t>(key) >> known != prefix) continue;
        const uint32_t bin = RADIX_BINS - 1 - (key >> shift & (RADIX_BINS - 1));
        const uint64_t mass = mass_of(job, row.largest, key);
        atomic_add(&room.counts[bin], 1u);
        atomic_add(&room.low[bin], static_cast<uint32_t>(mass) & ((1u << HALF_BITS) - 1));
        atomic_add(&room.high[bin], static_cast<uint32_t>(mass >> HALF_BITS));
    }
}

// That histogram over the whole row.
DEVICE Bins<RADIX_BINS_EACH> count_row(const SampleParams& p, const Job& job, const Row& row, Room& room, uint32_t prefix,
                                       uint32_t known, uint32_t shift) {
    Bins<RADIX_BINS_EACH> bins = {};
    for (uint32_t chunk = 0; chunk < p.chunks; chunk++) {
        for (uint32_t i = thread_index(); i < RADIX_BINS; i += block_threads())
            room.counts[i] = 0, room.low[i] = 0, room.high[i] = 0;
        block_barrier();
        count_digits(job, row, room, load_keys<1>(p, job, chunk, room.logits), prefix, known, shift);
        block_barrier();
#pragma unroll
        for (uint32_t i = 0; i < RADIX_BINS_EACH; i++) {
            const uint32_t at = thread_index() * RADIX_BINS_EACH + i;
            bins.mass[i] += (static_cast<uint64_t>(room.high[at]) << HALF_BITS) + room.low[at];
            bins.count[i] += room.counts[at];
        }
        block_barrier();
    }
    sum_bins(bins, room.scan);
    return bins;
}

// `is_count`: the target is a number of tokens, else a mass. It is at least 1 and no more than the row has.
DEVICE Reached reach(const SampleParams& p, const Job& job, const Row& row, Room& room, uint64_t target, bool is_count) {
    uint32_t prefix = 0, known = 32;
    uint64_t above = 0;
    while (known > 0) {
        const uint32_t shift = known > RADIX_BITS ? known - RADIX_BITS : 0;
        const Bins<RADIX_BINS_EACH> bins = count_row(p, job, row, room, prefix, known, shift);
        const Place at =
            is_count ? find_count(bins, &room.place, static_cast<uint32_t>(target)) : find_mass(bins, &room.place, target);
        target -= is_count ? at.count_before : at.mass_before;
        above += at.mass_before;
        const uint32_t digit = (RADIX_BINS - 1 - at.bin) & ((1u << (known - shift)) - 1);
        prefix = prefix << (known - shift) | digit;
        known = shift;
    }
    const uint64_t mass = mass_of(job, row.largest, prefix);
    const uint64_t nth = is_count ? target : (target + mass - 1) / (mass > 0 ? mass : 1);
    return {prefix, static_cast<uint32_t>(nth), above + nth * mass};
}

// Mass of the tokens with this key or a larger one.
DEVICE uint64_t mass_from(const SampleParams& p, const Job& job, const Row& row, Room& room, uint32_t key) {
    uint64_t sum = 0;
    for (uint32_t chunk = 0; chunk < p.chunks; chunk++) {
        const Keys<1> keys = load_keys<1>(p, job, chunk, room.logits);
#pragma unroll
        for (uint32_t i = 0; i < 4; i++)
            if (keys.at[i] >= key && keys.at[i] != 0) sum += mass_of(job, row.largest, keys.at[i]);
    }
    block_scan(sum, room.scan, sum);
    return sum;
}

// Leaves all tokens above `end`, and it itself, in room.keys in no order, if there is room for so many; room.found is the
// token of `end`.
DEVICE void collect(const SampleParams& p, const Job& job, Room& room, const Reached& end, uint32_t room_for) {
    if (thread_index() == 0) room.taken = 0;
    uint64_t equal_before = 0;
    for (uint32_t chunk = 0; chunk < p.chunks; chunk++) {
        const Keys<1> keys = load_keys<1>(p, job, chunk, room.logits);
        uint64_t equal = 0, all;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) equal += keys.at[i] == end.key;
        uint64_t nth = equal_before + block_scan(equal, room.scan, all);
        equal_before += all;
#pragma unroll
        for (uint32_t i = 0; i < 4; i++) {
            nth += keys.at[i] == end.key;
            if (keys.at[i] < end.key || (keys.at[i] == end.key && nth > end.nth)) continue;
            const uint32_t token = token_of(chunk, i);
            if (keys.at[i] == end.key && nth == end.nth) room.found = token;
            if (room_for == 0) continue;
            const uint32_t place = atomic_add(&room.taken, 1u);
            if (place < room_for) room.keys[place] = static_cast<uint64_t>(~keys.at[i]) << 32 | token;
        }
    }
    block_barrier();
}

// Draws from a row of which too many tokens come into question.
DEVICE uint32_t draw_whole(const SampleParams& p, const Job& job, const Row& row, Room& room) {
    uint64_t kept = row.total;
    if (has_top_k(job, row.tokens)) kept = reach(p, job, row, room, job.top_k, true).mass;
    uint64_t passing = kept;
    if (has_min_p(job)) passing = mass_from(p, job, row, room, key_min(job, row));
    if (job.top_p < 1.0f) kept = reach(p, job, row, room, top_p_target(job, kept), false).mass;
    kept = passing < kept ? passing : kept;
    const uint64_t most_likely = mass_of(job, row.largest, static_cast<uint32_t>(row.best >> 32));
    kept = kept > most_likely ? kept : most_likely;
    const Reached drawn = reach(p, job, row, room, draw_target(job, kept), false);
    collect(p, job, room, drawn, 0);
    return static_cast<uint32_t>(room.found);
}

// Draws in the order of ids, from all tokens.
DEVICE uint32_t draw_by_id(const SampleParams& p, const Job& job, const Row& row, Room& room) {
    const uint64_t target = draw_target(job, row.total);
    uint64_t before = 0, all;
    for (uint32_t first = 0; first < p.chunks; first += block_threads()) {
        const uint32_t chunk = first + thread_index();
        const uint64_t mass = chunk < p.chunks ? chunks_of(p)[chunk].mass : 0;
        const uint64_t start = before + block_scan(mass, room.scan, all);
        if (start < target && target <= start + mass) room.chunk = chunk, room.found = start;
        before += all;
    }
    block_barrier();
    const Keys<1> keys = load_keys<1>(p, job, room.chunk, room.logits);
    uint64_t masses[4], sum = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        masses[i] = keys.at[i] != 0 ? mass_of(job, row.largest, keys.at[i]) : 0;
        sum += masses[i];
    }
    uint64_t start = room.found + block_scan(sum, room.scan, all);
#pragma unroll
    for (uint32_t i = 0; i < 4; i++) {
        if (start < target && target <= start + masses[i]) room.taken = token_of(room.chunk, i);
        start += masses[i];
    }
    block_barrier();
    return room.taken;
}

// Writes the beginning of room.keys, `count` sorted tokens, that passes the filters; returns how many. `mass` is what top_p is a
// part of.
DEVICE uint32_t write_list(const SampleParams& p, const Job& job, const Row& row, Room& room, uint32_t count, uint64_t mass) {
    const uint32_t lowest = key_min(job, row);
    uint32_t kept = first_place(0, count, [&](uint32_t at) { return key_in(room.keys[at]) < lowest; });
    if (job.top_p < 1.0f) {
        const uint64_t target = top_p_target(job, mass);
        kept = min(kept, first_place(0, count, [&](uint32_t at) { return room.sums[at] >= target; }) + 1);
    }
    kept = min(max(kept, 1u), count);
    Listed* list = reinterpret_cast<Listed*>(p.results + p.jobs * sizeof(Result)) + job.list_at;
    for (uint32_t i = thread_index(); i < kept; i += block_threads())
        list[i] = {static_cast<uint32_t>(room.keys[i]), logit_of(key_in(room.keys[i]))};
    return kept;
}

DEVICE uint32_t list_tokens(const SampleParams& p, const Job& job, const Row& row, Room& room) {
    const bool is_top_k = has_top_k(job, row.tokens);
    uint32_t wanted = min(job.list, is_top_k ? job.top_k : row.tokens);
    if (wanted == 0) return 0;
    const Cut cut = scratch_of(p).cut;
    uint32_t count = cut.gathered;
    uint64_t mass = row.total;
    if (count > 0) {
        for (uint32_t i = thread_index(); i < count; i += block_threads()) room.keys[i] = scratch_of(p).gathered[i];
    } else {
        if (is_top_k && job.top_p < 1.0f) mass = reach(p, job, row, room, job.top_k, true).mass;
        count = wanted;
        collect(p, job, room, reach(p, job, row, room, wanted, true), wanted);
    }
    sort(room, count);
    sum_sorted(job, row, room, count);
    if (cut.gathered > 0 && is_top_k && job.top_p < 1.0f) mass = room.sums[job.top_k - 1];
    return write_list(p, job, row, room, wanted, mass);
}

DEVICE uint32_t pick_token(const SampleParams& p, const Job& job, const Row& row, Room& room) {
    if (job.kind == JOB_GREEDY || row.total == 0) return ~static_cast<uint32_t>(row.best);
    if (is_drawn_by_id(job, row.tokens)) return draw_by_id(p, job, row, room);
    const Cut cut = scratch_of(p).cut;
    if (cut.gathered == 0) return draw_whole(p, job, row, room);
    for (uint32_t i = thread_index(); i < cut.gathered; i += block_threads()) room.keys[i] = scratch_of(p).gathered[i];
    return draw_gathered(job, row, cut, room);
}

GALERNE_KERNEL(sample_pick, SampleParams, 1024, 1) {
    dependency_wait();
    const Job& job = job_of(p);
    if (job.kind == JOB_NONE) return;
    Room& room = room_of();
    const Row row = row_of(p, room.scan);
    Result result = {row.total, 0, 0.0f, row.largest, 0};
    if (job.kind == JOB_LIST) {
        result.listed = list_tokens(p, job, row, room);
    } else {
        result.token = pick_token(p, job, row, room);
        result.raw = p.logits.at[static_cast<size_t>(job.row) * p.logits.stride + result.token];
    }
    if (thread_index() == 0) reinterpret_cast<Result*>(p.results)[block_y()] = result;
    dependency_release();
}
