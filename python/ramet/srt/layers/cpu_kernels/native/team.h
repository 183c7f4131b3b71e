// Owns the threads that compute together.
#pragma once

#include <algorithm>
#include <time.h>

#include <atomic>
#include <cstdint>

inline int64_t now_ns() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * int64_t(1000000000) + now.tv_nsec;
}

// What a thread does between two looks at something that another one changes.
inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("isb");
#endif
}

// Run `work(context)` in all threads of the team, the caller's among them, and wait for all. In the caller's alone, if
// another thread has the team.
void run_together(void (*work)(void*), void* context);

int num_team_threads();

// Some places of `for_each`, in order: first for one thread, and for the others when they have done theirs.
struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
};
constexpr int64_t MOST_RANGES = 64;

// Calls `work(place)` for all places below `num`. Each thread has a range of them, so that it reads on where it has been.
template <class Work> void for_each(int64_t num, const Work& work) {
    const int64_t num_ranges = std::min({int64_t(num_team_threads()), num, MOST_RANGES});
    if (num_ranges <= 1) {
        for (int64_t place = 0; place < num; place++) work(place);
        return;
    }
    struct Context {
        const Work& work;
        const int64_t num_ranges;
        std::atomic<int64_t> num_threads{0};
        Range ranges[MOST_RANGES];
    };
    Context context{work, num_ranges};
    for (int64_t i = 0; i < num_ranges; i++) {
        context.ranges[i].next.store(num * i / num_ranges, std::memory_order_relaxed);
        context.ranges[i].end = num * (i + 1) / num_ranges;
    }
    run_together(
        [](void* pointer) {
            auto& mine = *static_cast<Context*>(pointer);
            const int64_t own = mine.num_threads.fetch_add(1, std::memory_order_relaxed);
            for (int64_t i = 0; i < mine.num_ranges; i++) {
                Range& range = mine.ranges[(own + i) % mine.num_ranges];
                while (range.next.load(std::memory_order_relaxed) < range.end) {
                    const int64_t place = range.next.fetch_add(1, std::memory_order_relaxed);
                    if (place < range.end) mine.work(place);
                }
            }
        },
        &context);
}

// float32 memory of the calling thread, kept from call to call: `num` numbers at a multiple of 64 bytes.
// Purposes that are in use at once have their own `slot`.
float* scratch(int slot, int64_t num);
enum Scratch { ROWS, BLOCK, SUMS, QUERIES, KEYS, VALUES, SCORES, OUTPUTS, PARTS, SCALES, ZEROS, ROW_SUMS, NUM_SCRATCH };
