#include "team.h"

#include "vectors.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>

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

// A round of work: its number, whether threads may still join it, and how many have. The caller doesn't wait for threads
// that the system has not let run: when nothing is left to take it closes the round.
constexpr uint64_t ONE_ROUND = uint64_t(1) << 32, OPEN = uint64_t(1) << 31, NUM_JOINED = OPEN - 1;

struct Team {
    int num_threads = 1;
    void (*work)(void*) = nullptr;
    void* context = nullptr;
    std::atomic<uint64_t> round{0};
    std::atomic<uint32_t> num_begun{0};  // rounds; what threads sleep on
    std::atomic<int> num_sleeping{0};
    std::atomic<bool> is_taken{false};
} team;

// A forked child has none of the threads.
void forget_threads() {
    team.num_threads = 1;
    team.round.store(0);
    team.num_sleeping.store(0);
    team.is_taken.store(false);
}

void sleep_while(std::atomic<uint32_t>& value, uint32_t seen) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0);
}

void wake_all(std::atomic<uint32_t>& value) {
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&value), FUTEX_WAKE_PRIVATE, MAX_THREADS, nullptr, nullptr, 0);
}

// Join the round that is open, if there is one.
bool join() {
    uint64_t round = team.round.load(std::memory_order_acquire);
    while (round & OPEN)
        if (team.round.compare_exchange_weak(round, round + 1, std::memory_order_acq_rel)) return true;
    return false;
}

void wait_for_more(uint32_t seen) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (team.num_begun.load(std::memory_order_acquire) != seen) return;
        relax();
    }
    for (int64_t began = now_ns(); now_ns() - began < AWAKE_NS;) {
        if (team.num_begun.load(std::memory_order_acquire) != seen) return;
        sched_yield();
    }
    team.num_sleeping.fetch_add(1);
    while (team.num_begun.load() == seen) sleep_while(team.num_begun, seen);
    team.num_sleeping.fetch_sub(1);
}

void* follow(void*) {
    for (;;) {
        const uint32_t seen = team.num_begun.load(std::memory_order_acquire);
        if (join()) {
            team.work(team.context);
            team.round.fetch_sub(1, std::memory_order_release);
        }
        wait_for_more(seen);
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
    if (team.is_taken.exchange(true, std::memory_order_acquire)) return work(context);  // another thread has them
    team.work = work;
    team.context = context;
    team.round.store((team.round.load(std::memory_order_relaxed) & ~(ONE_ROUND - 1)) + ONE_ROUND + OPEN);
    team.num_begun.fetch_add(1);
    if (team.num_sleeping.load()) wake_all(team.num_begun);
    work(context);
    team.round.fetch_and(~OPEN);
    for (int spin = 0; team.round.load(std::memory_order_acquire) & NUM_JOINED; spin++)
        spin < SPINS ? relax() : (void)sched_yield();
    team.is_taken.store(false, std::memory_order_release);
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

// The size of the team; it grows only. One thread calls this, at a time when nothing is computed.
// Returns how many threads there are: fewer if the system gives no more.
extern "C" int ramet_set_threads(int num) {
    static const int kept = pthread_atfork(nullptr, nullptr, forget_threads);
    (void)kept;
    sigset_t all, before;  // signals are for the process's other threads
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (team.num_threads < num && team.num_threads < MAX_THREADS) {
        pthread_t thread;
        if (pthread_create(&thread, nullptr, follow, nullptr)) break;
        pthread_detach(thread);
        team.num_threads++;
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return team.num_threads;
}

// Numbers in a vector.
extern "C" int ramet_lanes() { return LANES; }
