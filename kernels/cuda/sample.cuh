// What the sampler's kernels share: the jobs they work on, a row as ordered keys, and sums and searches over a block.
//
// A job is one question about one row of logits [rows, width] f32: which token comes (the most likely; drawn), or which are
// the most likely tokens. A row counts as changed by the job's bias and penalties, without the tokens that its mask forbids;
// a logit that is not a number counts as minus infinity, infinity as the largest number. With m the largest logit,
//
//   weight(l) = exp((l - m) / temperature), kept as the integer mass = trunc(2^39 weight),
//
// so that no sum depends on the order of its terms. Tokens are ordered by logit, largest first, equal ones by id.
//
// A row is worked on in chunks of CHUNK tokens, a block each; then once more, in one block, where a token or a list comes out:
//   sample_best    each chunk's best token, number of tokens
//   sample_weigh   each chunk's mass; the row's histogram of masses and counts over BINS bins of falling logits
//   sample_gather  the tokens of the few bins in which the filters and the draw end, if they are few enough
//   sample_pick    sorts these and picks; where there were too many, searches the whole row for it
#pragma once

#include "galerne.cuh"

constexpr uint32_t CHUNK = 4096;
constexpr uint32_t BINS = 1024;
constexpr uint32_t GATHERED_MAX = 4096;
constexpr uint32_t CHUNK_THREADS = 256;
constexpr uint32_t ROW_THREADS = 1024;
constexpr uint32_t NO_MASK = 0xffffffffu;
constexpr float MASS_OF_ONE = 549755813888.0f;  // 2^39: a chunk's masses, in two halves of 20 bits, fit 32-bit sums
constexpr float LOGIT_MAX = 3.402823466e38f;

enum JobKind : uint32_t { JOB_NONE = 0, JOB_GREEDY = 1, JOB_DRAW = 2, JOB_LIST = 3 };

// Offsets are bytes from the upload's beginning.
struct Job {
    uint32_t kind;
    uint32_t row;
    uint32_t mask;  // words, bit t % 32 of word t / 32 allows token t; or NO_MASK
    uint32_t bias;  // pairs of token and f32; each token once
    uint32_t biases;
    uint32_t seen;  // pairs of token and occurrences in the output; each token once
    uint32_t seens;
    uint32_t top_k;  // 0: all
    float repetition;
    float frequency;
    float presence;
    float exponent;  // log2(e) / temperature
    float bins_per_logit;
    float min_p_below;  // how far below the largest logit a token may be; minus infinity: any
    float top_p;
    float uniform;
    uint32_t list;     // JOB_LIST: most tokens that are wanted
    uint32_t list_at;  // the list's first entry among those of all jobs
};

struct Result {
    uint64_t total;  // mass of the row
    uint32_t token;
    float raw;  // the token's logit as it came
    float largest;
    uint32_t listed;
};

struct Listed {
    uint32_t token;
    float logit;
};

struct Chunk {
    uint64_t mass;
    uint64_t best;  // key, then the complement of the token: the largest is the best
    uint32_t tokens;
    uint32_t padding;
};

// Which bins were gathered: from `first` to before `until`, and `last`, in which the filters end (BINS: nowhere).
struct Cut {
    uint64_t above_first;  // mass of all bins before it
    uint64_t above_last;
    uint32_t first, until, last;
    uint32_t last_at;   // place of the first token of bin `last` among those gathered, in order
    uint32_t gathered;  // tokens; 0 if there were too many
    uint32_t taken;
};

struct JobScratch {
    uint64_t masses[BINS];
    uint64_t gathered[GATHERED_MAX];  // complement of the key, then the token: sorts as tokens are ordered
    uint32_t counts[BINS];
    Cut cut;
    // Chunk chunks[]
};

struct SampleParams {
    View logits;
    const unsigned char* upload;  // jobs first
    unsigned char* scratch;       // per job: JobScratch, then a Chunk per chunk
    unsigned char* results;       // a Result per job, then the lists
    uint64_t job_bytes;
    uint32_t jobs;
    uint32_t chunks;
    uint32_t is_vector;
    uint32_t padding;
};

DEVICE const Job& job_of(const SampleParams& p) { return reinterpret_cast<const Job*>(p.upload)[block_y()]; }
DEVICE JobScratch& scratch_of(const SampleParams& p) {
    return *reinterpret_cast<JobScratch*>(p.scratch + block_y() * p.job_bytes);
}
DEVICE Chunk* chunks_of(const SampleParams& p) { return reinterpret_cast<Chunk*>(&scratch_of(p) + 1); }

// Keys order logits; 0 is a token that is not there.
DEVICE float clean(float x) { return x != x ? -INFINITY : fminf(x, LOGIT_MAX); }
DEVICE uint32_t key_of(float clean_logit) {
    const uint32_t bits = float_bits(clean_logit + 0.0f);  // the two zeros are equal
    return bits >> 31 ? ~bits : bits | 0x80000000u;
}
DEVICE float logit_of(uint32_t key) { return float_from_bits(key >> 31 ? key & 0x7fffffffu : ~key); }
DEVICE float largest_of(uint64_t best) { return fmaxf(logit_of(static_cast<uint32_t>(best >> 32)), -LOGIT_MAX); }

DEVICE uint64_t mass_of(const Job& job, float largest, uint32_t key) {
    return static_cast<uint64_t>(fast_exp2((logit_of(key) - largest) * job.exponent) * MASS_OF_ONE);
}
// What lies past the last bin has no mass: bins_per_logit is at most BINS / 32 per factor of e.
DEVICE uint32_t bin_of(const Job& job, float largest, float logit) {
    const float bin = (largest - logit) * job.bins_per_logit;
    return bin < static_cast<float>(BINS) ? static_cast<uint32_t>(bin) : BINS;
}
DEVICE bool has_min_p(const Job& job) { return job.min_p_below > -INFINITY; }
DEVICE bool has_bins(const Job& job) {
    return job.kind == JOB_LIST ? job.list > 0
                                : job.kind == JOB_DRAW && (job.top_k > 0 || job.top_p < 1.0f || has_min_p(job));
}
DEVICE bool has_top_k(const Job& job, uint32_t tokens) { return job.top_k > 0 && job.top_k < tokens; }
// Tokens are drawn in the order of ids if the filters leave all of them.
DEVICE bool is_drawn_by_id(const Job& job, uint32_t tokens) {
    return job.kind == JOB_DRAW && !has_top_k(job, tokens) && job.top_p >= 1.0f && !has_min_p(job);
}
// The sum at which the filter by top_p, and the draw, have met their end.
DEVICE uint64_t top_p_target(const Job& job, uint64_t mass) {
    const uint64_t target = static_cast<uint64_t>(ceil(static_cast<double>(job.top_p) * static_cast<double>(mass)));
    return target > 0 ? target : 1;
}
DEVICE uint64_t draw_target(const Job& job, uint64_t mass) {
    return static_cast<uint64_t>(static_cast<double>(job.uniform) * static_cast<double>(mass)) + 1;
}

// The token of element `i` of Keys; with one quad a thread, elements are in the order of ids.
DEVICE uint32_t token_of(uint32_t chunk, uint32_t i) {
    return chunk * CHUNK + (i / 4 * block_threads() + thread_index()) * 4 + i % 4;
}

template <int QUADS>
struct Keys {
    uint32_t at[4 * QUADS];
};

DEVICE void apply_seen(const Job& job, float* logit, uint32_t occurrences) {
    float x = *logit > 0.0f ? *logit / job.repetition : *logit * job.repetition;
    x -= job.frequency * static_cast<float>(occurrences);
    *logit = occurrences > 0 ? x - job.presence : x;
}

// Bias and penalties on a chunk's logits, which pass through shared memory for it.
template <int QUADS>
DEVICE void change(const SampleParams& p, const Job& job, uint32_t chunk, float (&values)[4 * QUADS], float* room) {
    const uint32_t first = chunk * CHUNK;
#pragma unroll
    for (uint32_t i = 0; i < 4 * QUADS; i++) room[token_of(0, i)] = clean(values[i]);
    block_barrier();
    const uint2* bias = reinterpret_cast<const uint2*>(p.upload + job.bias);
    for (uint32_t i = thread_index(); i < job.biases; i += block_threads())
        if (bias[i].x - first < CHUNK) room[bias[i].x - first] += float_from_bits(bias[i].y);
    block_barrier();
    const uint2* seen = reinterpret_cast<const uint2*>(p.upload + job.seen);
    for (uint32_t i = thread_index(); i < job.seens; i += block_threads())
        if (seen[i].x - first < CHUNK) apply_seen(job, &room[seen[i].x - first], seen[i].y);
    block_barrier();
#pragma unroll
    for (uint32_t i = 0; i < 4 * QUADS; i++) values[i] = room[token_of(0, i)];
}

// A chunk's tokens as the job sees them. `room` is CHUNK floats of shared memory for this alone.
template <int QUADS>
DEVICE Keys<QUADS> load_keys(const SampleParams& p, const Job& job, uint32_t chunk, float* room) {
    const float* row = p.logits.at + static_cast<size_t>(job.row) * p.logits.stride;
    const uint32_t width = p.logits.width;
    float values[4 * QUADS];
    uint32_t allowed[QUADS];
#pragma unroll
    for (uint32_t q = 0; q < QUADS; q++) {
        const uint32_t token = token_of(chunk, 4 * q);
        const uint32_t count = token < width ? min(width - token, 4u) : 0;
        allowed[q] = (1u << count) - 1;
    }
    if (p.is_vector) {
#pragma unroll
        for (uint32_t q = 0; q < QUADS; q++) {
            const uint32_t token = token_of(chunk, 4 * q);
            const float4 x = token < width ? *reinterpret_cast<const float4*>(row + token) : make_float4(0, 0, 0, 0);
            values[4 * q] = x.x, values[4 * q + 1] = x.y, values[4 * q + 2] = x.z, values[4 * q + 3] = x.w;
        }
    } else {
#pragma unroll
        for (uint32_t i = 0; i < 4 * QUADS; i++) {
            const uint32_t token = token_of(chunk, i);
            values[i] = token < width ? row[token] : 0.0f;
        }
    }
    if (job.mask != NO_MASK) {
        const uint32_t* mask = reinterpret_cast<const uint32_t*>(p.upload + job.mask);
#pragma unroll
        for (uint32_t q = 0; q < QUADS; q++) {
            const uint32_t token = token_of(chunk, 4 * q);
            if (token < width) allowed[q] &= mask[token / 32] >> token % 32;
        }
    }
    if (job.biases + job.seens > 0) change<QUADS>(p, job, chunk, values, room);
    Keys<QUADS> keys;
#pragma unroll
    for (uint32_t i = 0; i < 4 * QUADS; i++)
        keys.at[i] = allowed[i / 4] >> i % 4 & 1 ? key_of(clean(values[i])) : 0;
    return keys;
}

// Sum of the values of the threads before this one; `total`: of all. `room` is 32 values that nothing else uses until the
// next barrier after the return.
template <typename T>
DEVICE T block_scan(T value, T* room, T& total) {
    const uint32_t warp = thread_index() / WARP, lane = thread_index() % WARP;
    T inclusive = value;
    for (uint32_t lanes = 1; lanes < WARP; lanes *= 2) {
        const T other = shuffle_up(inclusive, lanes);
        if (lane >= lanes) inclusive += other;
    }
    if (lane == WARP - 1) room[warp] = inclusive;
    block_barrier();
    T before = 0;
    total = 0;
    for (uint32_t w = 0; w < block_threads() / WARP; w++) {
        if (w == warp) before = total;
        total += room[w];
    }
    block_barrier();
    return before + inclusive - value;
}

// What is known of a job's whole row once its chunks are.
struct Row {
    uint64_t best;
    uint64_t total;
    uint32_t tokens;
    float largest;
};

DEVICE Row row_of(const SampleParams& p, uint64_t* room) {
    Row row = {0, 0, 0, 0.0f};
    for (uint32_t c = thread_index(); c < p.chunks; c += block_threads()) {
        const Chunk chunk = chunks_of(p)[c];
        row.best = chunk.best > row.best ? chunk.best : row.best;
        row.total += chunk.mass;
        row.tokens += chunk.tokens;
    }
    row.best = block_max(row.best, room);
    uint64_t tokens;
    block_scan<uint64_t>(row.total, room, row.total);
    block_scan<uint64_t>(row.tokens, room, tokens);
    row.tokens = static_cast<uint32_t>(tokens);
    row.largest = largest_of(row.best);
    return row;
}

// A histogram over bins of falling logits, PER bins to a thread, and where in it a sum is reached.
struct Place {
    uint64_t mass_before, mass;
    uint32_t bin, count_before, count;
    uint32_t padding;
};

template <int PER>
struct Bins {
    uint64_t mass[PER];
    uint32_t count[PER];
    uint64_t mass_before;  // of the bins before this thread's
    uint32_t count_before;
};

// Fills in what lies before each thread's bins.
template <int PER>
DEVICE void sum_bins(Bins<PER>& bins, uint64_t* room) {
    uint64_t masses = 0, counts = 0, total;
#pragma unroll
    for (int i = 0; i < PER; i++) masses += bins.mass[i], counts += bins.count[i];
    bins.mass_before = block_scan(masses, room, total);
    bins.count_before = static_cast<uint32_t>(block_scan(counts, room, total));
}

// The only bin for which `is_it` is true, in every thread; if there is none, one past the last. `room` is in shared memory.
template <int PER, typename F>
DEVICE Place find(const Bins<PER>& bins, Place* room, F is_it) {
    block_barrier();
    if (thread_index() == 0) *room = {0, 0, PER * block_threads(), 0, 0, 0};
    block_barrier();
    Place here = {bins.mass_before, 0, thread_index() * PER, bins.count_before, 0, 0};
#pragma unroll
    for (int i = 0; i < PER; i++) {
        here.mass = bins.mass[i];
        here.count = bins.count[i];
        if (is_it(here)) *room = here;
        here.mass_before += here.mass;
        here.count_before += here.count;
        here.bin++;
    }
    block_barrier();
    return *room;
}

// The bin in which a sum of masses, or a number of tokens, is reached.
template <int PER>
DEVICE Place find_mass(const Bins<PER>& bins, Place* room, uint64_t target) {
    return find(bins, room, [=](const Place& at) {
        return at.mass_before < target && at.mass_before + at.mass >= target;
    });
}
template <int PER>
DEVICE Place find_count(const Bins<PER>& bins, Place* room, uint32_t target) {
    return find(bins, room, [=](const Place& at) {
        return at.count_before < target && at.count_before + at.count >= target;
    });
}
