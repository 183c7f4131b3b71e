#include "team.h"

#include "vectors.h"

#include <pthread.h>
#include <sched.h>
#include <time.h>

#include <cstdlib>
#include <new>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

constexpr int MAX_THREADS = 256;
constexpr int SPINS = 4000;         // while a pass runs, before other processes get a chance at every look
constexpr long AWAKE_NS = 2000000;  // that long after the last work the threads look for more, then they sleep

struct Team {
    int num_threads = 1;
    void (*work)(void*) = nullptr;
    void* context = nullptr;
    std::atomic<uint32_t> round{0};
    std::atomic<int> num_running{0};
    std::atomic<int> num_sleeping{0};
    pid_t owner = 0;  // a forked child has none of the threads
} team;

long now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000L + now.tv_nsec;
}

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

void sleep_while(std::atomic<uint32_t>& value, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAKE_PRIVATE, MAX_THREADS, nullptr, nullptr, 0);
}

uint32_t next_round(uint32_t seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (team.round.load(std::memory_order_acquire) != seen) return seen + 1;
        relax();
    }
    for (long began = now_ns(); now_ns() - began < AWAKE_NS;) {
        if (team.round.load(std::memory_order_acquire) != seen) return seen + 1;
        sched_yield();
    }
    team.num_sleeping.fetch_add(1);
    while (team.round.load() == seen) sleep_while(team.round, seen);
    team.num_sleeping.fetch_sub(1);
    return seen + 1;
}

void* follow(void* first) {
    uint32_t seen = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(first));
    for (;;) {
        seen = next_round(seen);
        team.work(team.context);
        team.num_running.fetch_sub(1, std::memory_order_release);
    }
    return nullptr;
}

struct Memory {
    float* data[NUM_SCRATCH] = {};
    int64_t size[NUM_SCRATCH] = {};
    ~Memory() {
        for (float* one : data) free(one);
    }
};

}  // namespace

int num_team_threads() { return team.num_threads; }

void run_together(void (*work)(void*), void* context) {
    team.work = work;
    team.context = context;
    team.num_running.store(team.num_threads - 1, std::memory_order_relaxed);
    team.round.fetch_add(1);
    if (team.num_sleeping.load()) wake_all(team.round);
    work(context);
    for (int spin = 0; team.num_running.load(std::memory_order_acquire); spin++) spin < SPINS ? relax() : (void)sched_yield();
}

float* scratch(int slot, int64_t num) {
    static thread_local Memory memory;
    if (memory.size[slot] < num) {
        free(memory.data[slot]);
        memory.data[slot] = static_cast<float*>(aligned_alloc(64, (num * sizeof(float) + 63) / 64 * 64));
        if (!memory.data[slot]) throw std::bad_alloc();
        memory.size[slot] = num;
    }
    return memory.data[slot];
}

// The size of the team; it grows only. All calls of this library come from one thread at a time.
// Returns how many threads there are: fewer if the system gives no more.
extern "C" int ramet_set_threads(int num) {
    if (team.owner != getpid()) {
        team.owner = getpid();
        team.num_threads = 1;
        team.num_sleeping.store(0);
    }
    while (team.num_threads < num && team.num_threads < MAX_THREADS) {
        pthread_t thread;
        uintptr_t round = team.round.load();
        if (pthread_create(&thread, nullptr, follow, reinterpret_cast<void*>(round))) break;
        pthread_detach(thread);
        team.num_threads++;
    }
    return team.num_threads;
}

// Numbers in a vector.
extern "C" int ramet_lanes() { return LANES; }
