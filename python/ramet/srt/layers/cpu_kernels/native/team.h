// Owns the threads that compute together.
#pragma once

#include <atomic>
#include <cstdint>

// Run `work(context)` in all threads of the team, the caller's among them, and wait for all. In the caller's alone, if
// another thread has the team.
void run_together(void (*work)(void*), void* context);

int num_team_threads();

// Calls `work(place)` for all places below `num`, each in one of the threads that is free.
template <class Work> void for_each(int64_t num, const Work& work) {
    if (num <= 1 || num_team_threads() == 1) {
        for (int64_t place = 0; place < num; place++) work(place);
        return;
    }
    struct Context {
        const Work& work;
        const int64_t num;
        std::atomic<int64_t> next{0};
    } context{work, num};
    run_together(
        [](void* pointer) {
            auto& mine = *static_cast<Context*>(pointer);
            for (int64_t place; (place = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.num;) mine.work(place);
        },
        &context);
}

// float32 memory of the calling thread, kept from call to call: `num` numbers at a multiple of 64 bytes.
// Purposes that are in use at once have their own `slot`.
float* scratch(int slot, int64_t num);
enum Scratch { ROWS, BLOCK, SUMS, QUERIES, KEYS, VALUES, SCORES, OUTPUTS, PARTS, SCALES, ZEROS, ROW_SUMS, NUM_SCRATCH };
