// Runs a kernel's blocks one after another, each thread of a block as a fiber on a stack of its own. Between two waits a
// fiber runs alone; who comes first is random by seed, round by round, and some warps lag behind, so that a missing barrier
// shows as a wrong number under some seed. Shared memory is 0xff before every block. A fiber that fails, and all others of
// its block, are left where they are: kernels own nothing.
#include "shim.hpp"

#include <csetjmp>
#include <csignal>
#include <cstdio>
#include <string>
#include <vector>

#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

namespace shim {

__thread Place place;

namespace {

constexpr size_t STACK_BYTES = 128 * 1024, GUARD_BYTES = 4096;
constexpr uint32_t THREADS_MAX = 1024, LANES = 32;
// What a block can have on sm_90 and sm_100.
constexpr size_t SHARED_BYTES_MAX = 227 * 1024, SHARED_ALIGNMENT = 128;

Kernel* kernels = nullptr;

struct Copy {
    void* to;
    const void* from;
    size_t bytes;
};

struct Fiber {
    ucontext_t context;
    jmp_buf at;
    bool is_started = false;
    Wait waits = Wait::Nothing;
    std::vector<Copy> copies;
    std::vector<size_t> groups;  // how many copies each closed group has
};

struct Warp {
    Words given[LANES], taken[LANES];
    uint32_t seldom;  // runs in one of so many rounds
};

struct Scheduler {
    std::vector<Fiber> fibers;
    unsigned char* stacks = nullptr;
    unsigned char* shared_end = nullptr;
    Warp warps[THREADS_MAX / LANES];
    jmp_buf home;
    const Kernel* kernel;
    const void* params;
    uint64_t random;
    bool has_waited;
    std::string error;

    ~Scheduler() {
        if (stacks) munmap(stacks, THREADS_MAX * (STACK_BYTES + GUARD_BYTES));
        if (shared_end) munmap(shared_end - SHARED_BYTES_MAX - GUARD_BYTES, SHARED_BYTES_MAX + 2 * GUARD_BYTES);
    }
};

thread_local Scheduler scheduler;

uint32_t random_below(uint32_t end) {
    // splitmix64
    uint64_t x = scheduler.random += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return static_cast<uint32_t>(((x ^ x >> 31) >> 32) * end >> 32);
}

unsigned char* map(size_t bytes) {
    void* at = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<unsigned char*>(at);
}

__attribute__((noinline)) void yield() {
    Fiber& fiber = scheduler.fibers[place.thread];
    if (_setjmp(fiber.at) == 0) _longjmp(scheduler.home, 1);
}

void wait(Wait what) {
    scheduler.fibers[place.thread].waits = what;
    yield();
}

void fiber_main() {
    for (;;) {
        scheduler.kernel->run(scheduler.params);
        Fiber& fiber = scheduler.fibers[place.thread];
        fiber.copies.clear();
        fiber.groups.clear();
        wait(Wait::End);
    }
}

__attribute__((noinline)) void resume(uint32_t thread) {
    Fiber& fiber = scheduler.fibers[thread];
    place.thread = thread;
    if (_setjmp(scheduler.home) != 0) return;
    if (fiber.is_started) _longjmp(fiber.at, 1);
    fiber.is_started = true;
    getcontext(&fiber.context);
    unsigned char* stack = scheduler.stacks + thread * (STACK_BYTES + GUARD_BYTES);
    mprotect(stack, GUARD_BYTES, PROT_NONE);
    fiber.context.uc_stack.ss_sp = stack + GUARD_BYTES;
    fiber.context.uc_stack.ss_size = STACK_BYTES;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, fiber_main, 0);
    setcontext(&fiber.context);
}

void forget_fibers() {
    for (Fiber& fiber : scheduler.fibers) {
        fiber.is_started = false;
        fiber.copies.clear();
        fiber.groups.clear();
    }
}

uint32_t lanes(uint32_t warp) { return min(LANES, place.threads - warp * LANES); }

// Lets a warp go on whose lanes all wait for the same thing.
bool release_warp(uint32_t warp) {
    Fiber* fibers = &scheduler.fibers[warp * LANES];
    const Wait what = fibers[0].waits;
    if (what <= Wait::Block) return false;
    for (uint32_t lane = 1; lane < lanes(warp); lane++)
        if (fibers[lane].waits != what) return false;
    std::memcpy(scheduler.warps[warp].taken, scheduler.warps[warp].given, sizeof(Warp::given));
    for (uint32_t lane = 0; lane < lanes(warp); lane++) fibers[lane].waits = Wait::Nothing;
    return true;
}

bool all_wait_for(Wait what) {
    for (uint32_t thread = 0; thread < place.threads; thread++)
        if (scheduler.fibers[thread].waits != what) return false;
    return true;
}

std::string deadlock() {
    static const char* const NAMES[] = {"run", "have ended", "are at a block barrier", "are at a warp barrier",
        "are at a shuffle", "are at a ballot", "are at load_matrices", "are at an mma"};
    uint32_t counts[8] = {};
    for (uint32_t thread = 0; thread < place.threads; thread++) counts[static_cast<uint32_t>(scheduler.fibers[thread].waits)]++;
    std::string text = "threads wait for each other:";
    for (uint32_t i = 0; i < 8; i++)
        if (counts[i]) text += " " + std::to_string(counts[i]) + " " + NAMES[i] + ";";
    return text + " all of the block, or of the warp, have to come to the same place";
}

// Runs fibers that can, each until it waits, in random order, leaving out some warps.
void run_round() {
    static thread_local std::vector<uint32_t> ready;
    ready.clear();
    const uint32_t warps = (place.threads + LANES - 1) / LANES;
    for (bool leave_out = warps > 1; ready.empty(); leave_out = false)
        for (uint32_t warp = 0; warp < warps; warp++) {
            if (leave_out && random_below(scheduler.warps[warp].seldom) != 0) continue;
            for (uint32_t thread = warp * LANES; thread < warp * LANES + lanes(warp); thread++)
                if (scheduler.fibers[thread].waits == Wait::Nothing) ready.push_back(thread);
        }
    for (uint32_t left = static_cast<uint32_t>(ready.size()); left > 0; left--) {
        const uint32_t chosen = random_below(left), thread = ready[chosen];
        ready[chosen] = ready[left - 1];
        resume(thread);
        if (!scheduler.error.empty()) return;
    }
}

// Lets go on who can; false if nobody can.
bool release() {
    bool has_released = false;
    for (uint32_t thread = 0; thread < place.threads && !has_released; thread++)
        has_released = scheduler.fibers[thread].waits == Wait::Nothing;
    for (uint32_t warp = 0; warp * LANES < place.threads; warp++) has_released |= release_warp(warp);
    if (all_wait_for(Wait::Block)) {
        for (uint32_t thread = 0; thread < place.threads; thread++) scheduler.fibers[thread].waits = Wait::Nothing;
        has_released = true;
    }
    return has_released;
}

void run_block() {
    std::memset(place.shared, 0xff, scheduler.shared_end - place.shared);
    std::memset(scheduler.warps, 0xff, sizeof scheduler.warps);
    for (Warp& warp : scheduler.warps) warp.seldom = 1u << 2 * random_below(3);
    for (uint32_t thread = 0; thread < place.threads; thread++) scheduler.fibers[thread].waits = Wait::Nothing;
    scheduler.has_waited = false;
    while (scheduler.error.empty() && !all_wait_for(Wait::End)) {
        run_round();
        if (scheduler.error.empty() && !all_wait_for(Wait::End) && !release()) scheduler.error = deadlock();
    }
    if (scheduler.error.empty() && !scheduler.has_waited)
        scheduler.error = "ended without dependency_wait; the kernel after it would not wait for those before it";
    for (const unsigned char* at = place.shared + place.shared_bytes; at < scheduler.shared_end; at++)
        if (*at != 0xff && scheduler.error.empty()) scheduler.error = "wrote past its shared memory";
}

std::string check(const Kernel& kernel, size_t params_bytes, const uint32_t* grid, uint32_t threads, size_t shared_bytes) {
    const auto wrong = [](const char* what, size_t expected, size_t got) {
        return std::string(what) + ": expected " + std::to_string(expected) + ", got " + std::to_string(got);
    };
    if (params_bytes != kernel.params_bytes) return wrong("bytes of parameters", kernel.params_bytes, params_bytes);
    if (threads == 0 || threads > kernel.threads_max) return wrong("threads, at most", kernel.threads_max, threads);
    if (shared_bytes > SHARED_BYTES_MAX) return wrong("shared memory, at most", SHARED_BYTES_MAX, shared_bytes);
    if (grid[0] > 0x7fffffff) return wrong("blocks in x, at most", 0x7fffffff, grid[0]);
    for (uint32_t i = 1; i < 3; i++)
        if (grid[i] > 65535) return wrong("blocks in y and z, at most", 65535, grid[i]);
    return "";
}

bool prepare(size_t shared_bytes) {
    Scheduler& s = scheduler;
    if (s.fibers.empty()) s.fibers.resize(THREADS_MAX);
    if (!s.stacks) s.stacks = map(THREADS_MAX * (STACK_BYTES + GUARD_BYTES));
    if (!s.shared_end) {
        unsigned char* at = map(SHARED_BYTES_MAX + 2 * GUARD_BYTES);
        if (!at) return false;
        s.shared_end = at + GUARD_BYTES + SHARED_BYTES_MAX;
        mprotect(at, GUARD_BYTES, PROT_NONE);
        mprotect(s.shared_end, GUARD_BYTES, PROT_NONE);
    }
    place.shared_bytes = shared_bytes;
    place.shared = s.shared_end - (shared_bytes + SHARED_ALIGNMENT - 1) / SHARED_ALIGNMENT * SHARED_ALIGNMENT;
    return s.stacks != nullptr;
}

// Says which kernel it was, then lets the signal take its course.
void on_fault(int signal) {
    if (place.kernel) {
        char text[256];
        const int length = snprintf(text, sizeof text, "shim: kernel %s, block (%u, %u, %u), thread %u: signal %d\n", place.kernel,
            place.block[0], place.block[1], place.block[2], place.thread, signal);
        if (write(2, text, static_cast<size_t>(length)) < 0) _exit(1);
    }
    std::signal(signal, SIG_DFL);
}

}  // namespace

Registration::Registration(const char* name, size_t params_bytes, uint32_t threads_max, void (*run)(const void*))
    : kernel{name, params_bytes, threads_max, run, kernels} {
    kernels = &kernel;
}

void block_barrier() { wait(Wait::Block); }

const Words* exchange(Wait what, const void* given, size_t bytes) {
    const uint32_t thread = place.thread;
    Warp& warp = scheduler.warps[thread / LANES];
    if (bytes) std::memcpy(&warp.given[thread % LANES], given, bytes);
    wait(what);
    return warp.taken;
}

void copy_start(void* shared, const void* from, size_t bytes, bool is_valid) {
    const unsigned char* to = static_cast<unsigned char*>(shared);
    if (to < place.shared || to + bytes > place.shared + place.shared_bytes) fail("copy_start: not to shared memory");
    if (static_cast<size_t>(to - place.shared) % bytes != 0) fail("copy_start: not to aligned bytes");
    if (is_valid && reinterpret_cast<uintptr_t>(from) % bytes != 0) fail("copy_start: not from aligned bytes");
    // Until it is waited for, what lies there is nothing to read.
    std::memset(shared, 0xff, bytes);
    scheduler.fibers[place.thread].copies.push_back({shared, is_valid ? from : nullptr, bytes});
}

void copy_commit() {
    Fiber& fiber = scheduler.fibers[place.thread];
    size_t closed = 0;
    for (const size_t group : fiber.groups) closed += group;
    fiber.groups.push_back(fiber.copies.size() - closed);
}

void copy_wait(size_t pending) {
    Fiber& fiber = scheduler.fibers[place.thread];
    while (fiber.groups.size() > pending) {
        const size_t count = fiber.groups.front();
        for (size_t i = 0; i < count; i++) {
            const Copy& copy = fiber.copies[i];
            if (copy.from) std::memcpy(copy.to, copy.from, copy.bytes);
            else std::memset(copy.to, 0, copy.bytes);
        }
        fiber.copies.erase(fiber.copies.begin(), fiber.copies.begin() + static_cast<std::ptrdiff_t>(count));
        fiber.groups.erase(fiber.groups.begin());
    }
}

void dependency_wait() { scheduler.has_waited = true; }

void fail(const char* reason) {
    scheduler.error = reason;
    _longjmp(scheduler.home, 1);
}

}  // namespace shim

using namespace shim;

// The kernel's number, or -1. Numbers go from 0 on without gaps.
extern "C" int shim_find(const char* name) {
    int index = 0, found = -1;
    for (const Kernel* kernel = kernels; kernel; kernel = kernel->next, index++)
        if (std::strcmp(kernel->name, name) == 0) found = found == -1 ? index : -2;
    return found;
}

// A kernel's name and the size of its parameters; null past the last.
extern "C" const char* shim_kernel(int index, size_t* params_bytes) {
    const Kernel* kernel = kernels;
    for (; kernel && index > 0; index--) kernel = kernel->next;
    if (!kernel) return nullptr;
    *params_bytes = kernel->params_bytes;
    return kernel->name;
}

// Runs a kernel. Returns the length of what went wrong, of which `error` gets at most `error_bytes`; 0 if nothing did.
extern "C" size_t shim_launch(int index, const void* params, size_t params_bytes, const uint32_t* grid, uint32_t threads,
    size_t shared_bytes, uint64_t seed, char* error, size_t error_bytes) {
    static const bool has_handlers = [] {
        struct sigaction action = {};
        action.sa_handler = on_fault;
        action.sa_flags = SA_ONSTACK;
        for (const int signal : {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE}) sigaction(signal, &action, nullptr);
        return true;
    }();
    static_cast<void>(has_handlers);
    const Kernel* kernel = kernels;
    for (; index > 0; index--) kernel = kernel->next;
    Scheduler& s = scheduler;
    s.kernel = kernel;
    s.params = params;
    s.random = seed;
    s.error = check(*kernel, params_bytes, grid, threads, shared_bytes);
    place.kernel = kernel->name;
    place.threads = threads;
    std::memcpy(place.grid, grid, sizeof place.grid);
    if (s.error.empty() && !prepare(shared_bytes)) s.error = "no memory for stacks";
    uint32_t* block = place.block;
    for (block[2] = 0; s.error.empty() && block[2] < grid[2]; block[2]++)
        for (block[1] = 0; s.error.empty() && block[1] < grid[1]; block[1]++)
            for (block[0] = 0; s.error.empty() && block[0] < grid[0]; block[0]++) {
                run_block();
                if (!s.error.empty())
                    s.error = "block (" + std::to_string(block[0]) + ", " + std::to_string(block[1]) + ", " + std::to_string(block[2]) +
                              "): " + s.error;
            }
    if (!s.error.empty()) forget_fibers();
    place.kernel = nullptr;
    std::memcpy(error, s.error.data(), min(error_bytes, s.error.size()));
    return s.error.size();
}
