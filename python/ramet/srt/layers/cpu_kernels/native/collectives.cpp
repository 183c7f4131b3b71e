// Owns sums and gathers between processes of one machine, over memory that all of them have mapped.
//
// An operation is made of steps. In each, every rank writes to its own slot what others need, says so, waits until all
// have, and reads. A rank has two slots, for steps of even and of odd number: it writes to one again when all others have
// said that they are at the step between, and so have read it.
#include "team.h"
#include "vectors.h"

#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <new>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t LINE_BYTES = 128;         // of a rank's line; neighbouring lines are fetched together
constexpr int64_t PAGE_BYTES = 4096;
constexpr int64_t WHOLE_BYTES = 64 << 10;   // that every rank sums up by itself; of more each has a share
constexpr int64_t BLOCK_BYTES = 64 << 10;   // that a thread of the team takes at a time
constexpr int SPINS = 1000;                 // looks at what another rank says, before other processes get a chance
constexpr int64_t AWAKE_NS = 2000000;       // that long others get it between two looks, then this process sleeps
constexpr int64_t SLEEP_NS = 20000000;      // after so long it looks whether the other one lives
enum Failure { NONE = 0, LATE = 1, ENDED = 2, DIFFERS = 3 };

struct Line {  // of a rank: written by it alone, except for `num_sleeping`
    std::atomic<uint32_t> step;
    std::atomic<uint32_t> num_sleeping;  // ranks that wait for it
    uint64_t subject[2];                 // what the operation is whose step this is, for each slot
};

struct Exchange {
    char* lines;
    char* slots;
    int64_t slot_bytes;
    int rank, num_ranks;
    int64_t timeout_ns;
    std::vector<int> processes;  // descriptors of the ranks' processes; -1: the system has none
    uint32_t step = 0;
    uint64_t subject = 0;
    int failure = 0;

    Line& line(int of) { return *reinterpret_cast<Line*>(lines + of * LINE_BYTES); }
    char* slot(int of) { return slots + (2 * of + step % 2) * slot_bytes; }
};

bool has_ended(const Exchange& exchange, int rank) {
    pollfd process{exchange.processes[rank], POLLIN, 0};
    return process.fd >= 0 && poll(&process, 1, 0) > 0;
}

bool has_come(Exchange& exchange, int rank) {
    uint32_t ahead = exchange.line(rank).step.load(std::memory_order_acquire) - exchange.step;
    return int32_t(ahead) >= 0;  // the numbers begin again after 2^32
}

void sleep_until(Exchange& exchange, int rank) {
    Line& line = exchange.line(rank);
    uint32_t seen = line.step.load();
    line.num_sleeping.fetch_add(1);
    if (!has_come(exchange, rank)) {
        timespec most{0, SLEEP_NS};
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&line.step), FUTEX_WAIT, seen, &most, nullptr, 0);
    }
    line.num_sleeping.fetch_sub(1);
}

Failure wait_for(Exchange& exchange, int rank) {
    for (int spin = 0; spin < SPINS; spin++) {
        if (has_come(exchange, rank)) return NONE;
        relax();
    }
    const int64_t began = now_ns();
    while (now_ns() - began < AWAKE_NS) {
        if (has_come(exchange, rank)) return NONE;
        sched_yield();
    }
    while (!has_come(exchange, rank)) {
        const bool is_gone = has_ended(exchange, rank);
        if (has_come(exchange, rank)) break;  // the last thing that it did
        if (is_gone) return ENDED;
        if (now_ns() - began > exchange.timeout_ns) return LATE;
        sleep_until(exchange, rank);
    }
    return NONE;
}

// What the caller is told: a failure, and the rank that it is about.
int fail(Exchange& exchange, Failure failure, int rank) { return exchange.failure = failure << 16 | rank; }

void begin_step(Exchange& exchange) { exchange.step++; }

// Say that this rank's slot is filled, and wait until those of all others are.
int end_writing(Exchange& exchange) {
    Line& own = exchange.line(exchange.rank);
    own.subject[exchange.step % 2] = exchange.subject;
    own.step.store(exchange.step);
    if (own.num_sleeping.load())
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&own.step), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    for (int rank = 0; rank < exchange.num_ranks; rank++) {
        if (rank == exchange.rank) continue;
        if (Failure failure = wait_for(exchange, rank)) return fail(exchange, failure, rank);
        if (exchange.line(rank).subject[exchange.step % 2] != exchange.subject) return fail(exchange, DIFFERS, rank);
    }
    return 0;
}

// Numbers that are equal on all ranks exactly if they are at the same operation, but for chance.
uint64_t subject_of(int kind, int64_t number, const int64_t* sizes, int num_sizes) {
    uint64_t subject = 0xcbf29ce484222325u;
    auto add = [&](uint64_t value) { subject = (subject ^ value) * 0x9e3779b97f4a7c15u, subject ^= subject >> 29; };
    add(kind);
    add(number);
    for (int i = 0; i < num_sizes; i++) add(sizes[i]);
    return subject;
}

template <class Work> void in_blocks(int64_t nbytes, const Work& work) {
    for_each((nbytes + BLOCK_BYTES - 1) / BLOCK_BYTES, [&](int64_t block) {
        work(block * BLOCK_BYTES, std::min(nbytes, (block + 1) * BLOCK_BYTES));
    });
}

void copy(void* to, const void* from, int64_t nbytes) {
    if (to == from) return;
    in_blocks(nbytes, [&](int64_t start, int64_t stop) {
        memcpy(static_cast<char*>(to) + start, static_cast<const char*>(from) + start, stop - start);
    });
}

// The sum of the ranks' numbers, in their order: so it is the same wherever it is made. `to` may be one of the parts.
template <class T> void add_up(T* to, const std::vector<const T*>& parts, int64_t num) {
    in_blocks(num * sizeof(T), [&](int64_t start, int64_t stop) {
        const int64_t first = start / sizeof(T), last = stop / sizeof(T);
        int64_t i = first;
        for (; i + LANES <= last; i += LANES) {
            Vec sum = load(parts[0] + i);
            for (size_t rank = 1; rank < parts.size(); rank++) sum += load(parts[rank] + i);
            store(to + i, sum);
        }
        if (i == last) return;
        Vec sum = load_some(parts[0] + i, last - i);
        for (size_t rank = 1; rank < parts.size(); rank++) sum += load_some(parts[rank] + i, last - i);
        store_some(to + i, sum, last - i);
    });
}

// Every rank gets the sum of all that the ranks have.
template <class T> int sum_whole(Exchange& exchange, T* data, int64_t num) {
    begin_step(exchange);
    copy(exchange.slot(exchange.rank), data, num * sizeof(T));
    if (int failure = end_writing(exchange)) return failure;
    std::vector<const T*> parts(exchange.num_ranks);
    for (int rank = 0; rank < exchange.num_ranks; rank++) parts[rank] = reinterpret_cast<T*>(exchange.slot(rank));
    parts[exchange.rank] = data;
    add_up(data, parts, num);
    return 0;
}

// Every rank gets the sum of its share, which is as long as `counts` says; `out` may be where it stands in `data`.
template <class T> int sum_shares(Exchange& exchange, const T* data, T* out, const int64_t* counts) {
    const int own = exchange.rank, num_ranks = exchange.num_ranks;
    const int64_t piece = exchange.slot_bytes / num_ranks / 64 * 64 / sizeof(T), most = *std::max_element(counts, counts + num_ranks);
    std::vector<int64_t> begins(num_ranks, 0);
    for (int rank = 1; rank < num_ranks; rank++) begins[rank] = begins[rank - 1] + counts[rank - 1];
    std::vector<const T*> parts(num_ranks);
    for (int64_t start = 0; start < most; start += piece) {
        auto length = [&](int rank) { return std::max<int64_t>(0, std::min(piece, counts[rank] - start)); };
        begin_step(exchange);
        T* slot = reinterpret_cast<T*>(exchange.slot(own));
        for (int rank = 0; rank < num_ranks; rank++)
            if (rank != own) copy(slot + rank * piece, data + begins[rank] + start, length(rank) * sizeof(T));
        if (int failure = end_writing(exchange)) return failure;
        for (int rank = 0; rank < num_ranks; rank++) parts[rank] = reinterpret_cast<T*>(exchange.slot(rank)) + own * piece;
        parts[own] = data + begins[own] + start;
        add_up(out + start, parts, length(own));
    }
    return 0;
}

// Put bytes `start` to `stop` of a matrix with rows of `width` bytes to where they belong among wider rows.
void place(char* out, const char* from, int64_t start, int64_t stop, int64_t width, int64_t row_bytes) {
    while (start < stop) {
        const int64_t row = start / width, column = start % width, length = std::min(stop - start, width - column);
        copy(out + row * row_bytes + column, from, length);
        from += length, start += length;
    }
}

// Every rank gets the columns of all, side by side: `widths` of them, in bytes.
int gather(Exchange& exchange, const char* data, char* out, int64_t num_rows, const int64_t* widths) {
    const int own = exchange.rank, num_ranks = exchange.num_ranks;
    const int64_t piece = exchange.slot_bytes, most = num_rows * *std::max_element(widths, widths + num_ranks);
    std::vector<int64_t> begins(num_ranks, 0);
    for (int rank = 1; rank < num_ranks; rank++) begins[rank] = begins[rank - 1] + widths[rank - 1];
    const int64_t row_bytes = begins[num_ranks - 1] + widths[num_ranks - 1];
    for (int64_t start = 0; start < most; start += piece) {
        auto stop = [&](int rank) { return std::min(start + piece, num_rows * widths[rank]); };
        begin_step(exchange);
        if (stop(own) > start) copy(exchange.slot(own), data + start, stop(own) - start);
        if (int failure = end_writing(exchange)) return failure;
        for (int rank = 0; rank < num_ranks; rank++) {
            const char* from = rank == own ? data + start : exchange.slot(rank);
            place(out + begins[rank], from, start, stop(rank), widths[rank], row_bytes);
        }
    }
    return 0;
}

template <class T> int sum(Exchange& exchange, T* data, int64_t num) {
    const int num_ranks = exchange.num_ranks;
    if (num * int64_t(sizeof(T)) <= std::min(WHOLE_BYTES, exchange.slot_bytes)) return sum_whole(exchange, data, num);
    const int64_t share = ((num + num_ranks - 1) / num_ranks + 63) / 64 * 64;
    std::vector<int64_t> counts(num_ranks), widths(num_ranks);
    for (int rank = 0; rank < num_ranks; rank++) {
        counts[rank] = std::max<int64_t>(0, std::min(share, num - rank * share));
        widths[rank] = counts[rank] * sizeof(T);
    }
    T* own = data + std::min(num, exchange.rank * share);
    if (int failure = sum_shares(exchange, data, own, counts.data())) return failure;
    return gather(exchange, reinterpret_cast<char*>(own), reinterpret_cast<char*>(data), 1, widths.data());
}

template <class Call> int with_type(int dtype, const Call& call) {
    switch (dtype) {
        case FLOAT32: return call(static_cast<float*>(nullptr));
        case BFLOAT16: return call(static_cast<Bf16*>(nullptr));
        default: return call(static_cast<F16*>(nullptr));
    }
}

}  // namespace

// A rank's part of an exchange over `nbytes` of zeroed memory, which all ranks have mapped. `processes` are descriptors
// (pidfd_open(2)), by which the end of another rank is seen. Null if there is no memory, or too little of it.
extern "C" void* ramet_exchange_open(void* memory, int64_t nbytes, int rank, int num_ranks, const int* processes, int64_t timeout_ms) {
    const int64_t header = (num_ranks * LINE_BYTES + PAGE_BYTES - 1) / PAGE_BYTES * PAGE_BYTES;
    const int64_t slot_bytes = (nbytes - header) / (2 * num_ranks) / PAGE_BYTES * PAGE_BYTES;
    if (slot_bytes < num_ranks * LINE_BYTES) return nullptr;
    auto* exchange = new (std::nothrow) Exchange;
    if (!exchange) return nullptr;
    exchange->lines = static_cast<char*>(memory);
    exchange->slots = exchange->lines + header;
    exchange->slot_bytes = slot_bytes;
    exchange->rank = rank;
    exchange->num_ranks = num_ranks;
    exchange->timeout_ns = timeout_ms * 1000000;
    exchange->processes.assign(processes, processes + num_ranks);
    return exchange;
}

// These return 0, or a failure times 65536 and the rank that it is about; after that the exchange is of no use.

// `num` numbers: what each rank has becomes the sum of all.
extern "C" int ramet_exchange_sum(void* handle, int dtype, void* data, int64_t num) {
    auto& exchange = *static_cast<Exchange*>(handle);
    if (exchange.failure) return exchange.failure;
    exchange.subject = subject_of(dtype, num, nullptr, 0);
    return with_type(dtype, [&](auto* type) { return sum(exchange, static_cast<decltype(type)>(data), num); });
}

// Each rank gets the sum of its own share: `data` has a share for each rank, of `counts` numbers.
extern "C" int ramet_exchange_sum_shares(void* handle, int dtype, const void* data, void* out, const int64_t* counts) {
    auto& exchange = *static_cast<Exchange*>(handle);
    if (exchange.failure) return exchange.failure;
    exchange.subject = subject_of(16 + dtype, 0, counts, exchange.num_ranks);
    return with_type(dtype, [&](auto* type) {
        using T = decltype(type);
        return sum_shares(exchange, static_cast<const std::remove_pointer_t<T>*>(data), static_cast<T>(out), counts);
    });
}

// `num_rows` rows, of `widths` bytes on each rank: all get the rows of all ranks side by side.
extern "C" int ramet_exchange_gather(void* handle, const void* data, void* out, int64_t num_rows, const int64_t* widths) {
    auto& exchange = *static_cast<Exchange*>(handle);
    if (exchange.failure) return exchange.failure;
    exchange.subject = subject_of(32, num_rows, widths, exchange.num_ranks);
    return gather(exchange, static_cast<const char*>(data), static_cast<char*>(out), num_rows, widths);
}
