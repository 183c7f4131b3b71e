// Owns attention over the paged KV cache: any number of new tokens of each sequence, read where their keys lie.
//
// A thread takes some queries of one KV head and goes through their keys block by block, with the softmax's sums carried
// along (Milakov and Gimelshein, 2018; Dao et al., 2022). Few queries of long sequences are computed in several ranges of
// keys, whose results are combined.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "team.h"
#include "tiles.h"

extern "C" struct RametAttention {
    int64_t num_sequences, num_heads, num_kv_heads, key_dim, value_dim, value_stride, page_size, table_stride, window;
    const int64_t *rows, *starts, *ends, *first_tokens;  // of the sequences
    const int64_t* req_to_page;                          // the pages of each row, `table_stride` apart
    const void *q, *keys, *values;                       // values of a token are `value_stride` numbers apart
    void* out;
    const float* kv_scales;  // of keys and values, or null
    const void* sinks;       // of each head, like q, or null
    float scale, soft_cap;   // soft_cap 0: none
    int32_t dtype, cache_dtype;
};

namespace {

constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr int64_t ROWS_AT_ONCE = 48;    // queries times heads
constexpr int64_t FEW_ROWS = 12;        // below, keys are multiplied as they are in the cache
constexpr int64_t KEY_BYTES = 32 << 10; // of a block of widened keys
constexpr int64_t KEYS_OF_PART = 256;   // at least, of a range that is computed by itself

struct Item {
    int64_t sequence, head, first_row, num_rows, begin, end;  // begin and end: of its keys
};

// C: of the cache. Queries and results are read and written once, in the type that the call says.
template <class C> struct Pass {
    const RametAttention& call;
    const int64_t group = call.num_heads / call.num_kv_heads;
    const int64_t key_columns = round_up(call.key_dim, PAIR), value_columns = round_up(call.value_dim, LANES);
    const int64_t block = std::clamp(KEY_BYTES / int64_t(4 * key_columns) / LANES * LANES, int64_t(LANES), int64_t(64));
    const float key_scale = call.scale * (call.kv_scales ? call.kv_scales[0] : 1.0f);
    const float value_scale = call.kv_scales ? call.kv_scales[1] : 1.0f;
    const bool reads_whole_vectors = call.value_dim % LANES == 0;

    int64_t num_tokens(int64_t sequence) const { return call.ends[sequence] - call.starts[sequence]; }
    int64_t blocks_of(int64_t sequence) const {
        return (num_tokens(sequence) * group + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE * call.num_kv_heads;
    }

    Item item(int64_t sequence, int64_t place) const {
        Item made{sequence, place % call.num_kv_heads, place / call.num_kv_heads * ROWS_AT_ONCE, 0, 0, 0};
        made.num_rows = std::min(ROWS_AT_ONCE, num_tokens(sequence) * group - made.first_row);
        made.begin = first_key(made, 0);
        made.end = last_key(made, made.num_rows - 1) + 1;
        return made;
    }
    int64_t last_key(const Item& item, int64_t row) const {
        return call.starts[item.sequence] + (item.first_row + row) / group;
    }
    int64_t first_key(const Item& item, int64_t row) const {
        return call.window ? std::max<int64_t>(0, last_key(item, row) + 1 - call.window) : 0;
    }
    int64_t query(const Item& item, int64_t row) const {  // its place among [num_tokens, num_heads]
        const int64_t at = item.first_row + row;
        return (call.first_tokens[item.sequence] + at / group) * call.num_heads + item.head * group + at % group;
    }

    // The first slot of keys from `key` on that lie side by side, and how many of them there are below `end`.
    int64_t run(const Item& item, int64_t key, int64_t end, int64_t* num) const {
        const int64_t* pages = call.req_to_page + call.rows[item.sequence] * call.table_stride;
        const int64_t place = key % call.page_size;
        *num = std::min(end - key, call.page_size - place);
        return pages[key / call.page_size] * call.page_size + place;
    }
    const C* key_at(int64_t slot, int64_t head) const {
        return static_cast<const C*>(call.keys) + (slot * call.num_kv_heads + head) * call.key_dim;
    }
    int64_t key_stride() const { return call.num_kv_heads * call.key_dim; }
    const C* value_at(int64_t slot, int64_t head) const {
        return static_cast<const C*>(call.values) + (slot * call.num_kv_heads + head) * call.value_stride;
    }
    int64_t value_stride() const { return call.num_kv_heads * call.value_stride; }

    // Blended values, the largest score and the sum of weights of an item's rows over the keys from `begin` to `end`.
    void attend(const Item& item, int64_t begin, int64_t end, float* out, float* best, float* total) const {
        const int64_t num_rows = item.num_rows;
        float* queries = scratch(QUERIES, num_rows * key_columns);
        float* scores = scratch(SCORES, num_rows * block);
        for (int64_t row = 0; row < num_rows; row++) {
            read_query(query(item, row) * call.key_dim, queries + row * key_columns);
            std::fill_n(out + row * value_columns, value_columns, 0.0f);
            best[row] = NONE, total[row] = 0.0f;
        }
        const bool widens = num_rows >= FEW_ROWS || !reads_whole_vectors;
        float* keys = widens ? scratch(KEYS, block * key_columns) : nullptr;
        float* values = widens ? scratch(VALUES, block * value_columns) : nullptr;
        for (int64_t first = begin; first < end; first += block) {
            const int64_t num = std::min(block, end - first);
            for (int64_t done = 0, length; done < num; done += length) {
                const int64_t slot = run(item, first + done, first + num, &length);
                if (!widens) {
                    dot_block(queries, key_columns, num_rows, key_at(slot, item.head), key_stride(), length, call.key_dim,
                              scores + done, block, false);
                    continue;
                }
                for (int64_t k = 0; k < length; k++) {
                    widen_row(key_at(slot, item.head) + k * key_stride(), call.key_dim, keys + (done + k) * key_columns);
                    widen_value(value_at(slot, item.head) + k * value_stride(), values + (done + k) * value_columns);
                }
            }
            if (widens) dot_block(queries, key_columns, num_rows, keys, key_columns, num, key_columns, scores, block, false);
            for (int64_t row = 0; row < num_rows; row++)
                weigh(scores + row * block, num, first_key(item, row) - first, last_key(item, row) + 1 - first, best + row,
                      total + row, out + row * value_columns);
            if (widens) {
                blend_block(scores, block, num_rows, values, value_columns, num, value_columns, out, value_columns);
                continue;
            }
            for (int64_t done = 0, length; done < num; done += length) {
                const int64_t slot = run(item, first + done, first + num, &length);
                blend_block(scores + done, block, num_rows, value_at(slot, item.head), value_stride(), length, value_columns,
                            out, value_columns);
            }
        }
    }

    // Calls `work` with a pointer of the type of queries and results to where `place` is.
    template <class Work> auto by_type(const void* from, int64_t place, const Work& work) const {
        if (call.dtype == BFLOAT16) return work(static_cast<const Bf16*>(from) + place);
        if (call.dtype == FLOAT16) return work(static_cast<const F16*>(from) + place);
        return work(static_cast<const float*>(from) + place);
    }

    // A query times the scale, in the order in which keys are read.
    void read_query(int64_t place, float* to) const {
        by_type(call.q, place, [&](auto* from) {
            if (std::is_same_v<decltype(from), const C*>) return widen_row(from, call.key_dim, to);
            for (int64_t i = 0; i < key_columns; i += LANES)
                store(to + i, load_some(from + i, std::clamp<int64_t>(call.key_dim - i, 0, LANES)));
        });
        for (int64_t i = 0; i < key_columns; i += LANES) store(to + i, load(to + i) * splat(key_scale));
    }

    void widen_value(const C* from, float* to) const {
        int64_t i = 0;
        for (; i + LANES <= call.value_dim; i += LANES) store(to + i, load(from + i));
        if (i < call.value_dim) store(to + i, load_some(from + i, call.value_dim - i));
    }

    // Scores of a block -> weights relative to the largest score so far; those outside of first to last are 0.
    void weigh(float* scores, int64_t num, int64_t first, int64_t last, float* best, float* total, float* out) const {
        const int64_t padded = round_up(num, LANES);
        std::fill(scores + num, scores + padded, NONE);
        if (first > 0) std::fill(scores, scores + std::min(first, num), NONE);
        if (last < num) std::fill(scores + std::max<int64_t>(last, 0), scores + num, NONE);
        if (call.soft_cap != 0.0f)
            for (int64_t i = 0; i < padded; i += LANES) {
                Vec x = load(scores + i);
                store(scores + i, select(x == splat(NONE), x,
                                         splat(call.soft_cap) * hyperbolic_tangent(x * splat(1.0f / call.soft_cap))));
            }
        Vec most = load(scores);
        for (int64_t i = LANES; i < padded; i += LANES) most = maximum(load(scores + i), most);
        const float largest = std::max(largest_of(most), *best);
        if (largest == NONE) {
            std::fill(scores, scores + padded, 0.0f);
            return;
        }
        if (largest > *best) {
            const Vec factor = splat(*best == NONE ? 0.0f : std::exp(*best - largest));
            *total *= factor[0];
            for (int64_t i = 0; i < value_columns; i += LANES) store(out + i, load(out + i) * factor);
            *best = largest;
        }
        Vec sum = {};
        for (int64_t i = 0; i < padded; i += LANES) {
            Vec weight = exponential(load(scores + i) - splat(largest));
            store(scores + i, weight);
            sum += weight;
        }
        *total += sum_of(sum);
    }

    void write(const Item& item, int64_t row, const float* blended, float best, float total) const {
        const int64_t place = query(item, row);
        if (call.sinks)
            total += std::exp(by_type(call.sinks, place % call.num_heads, [](auto* from) { return widen(*from); }) - best);
        const Vec factor = splat(value_scale / total);
        by_type(call.out, place * call.value_dim, [&](auto* where) {
            auto* to = const_cast<std::remove_const_t<std::remove_pointer_t<decltype(where)>>*>(where);
            int64_t i = 0;
            for (; i + LANES <= call.value_dim; i += LANES) store(to + i, load(blended + i) * factor);
            if (i < call.value_dim) store_some(to + i, load(blended + i) * factor, call.value_dim - i);
        });
    }

    void compute() const {
        int64_t num_items = 0, longest = 0;
        for (int64_t sequence = 0; sequence < call.num_sequences; sequence++) {
            num_items += blocks_of(sequence);
            longest = std::max(longest, call.ends[sequence]);
        }
        if (call.window) longest = std::min(longest, call.window + ROWS_AT_ONCE);
        int64_t num_parts = 1;
        if (num_items < 4 * num_team_threads() && num_team_threads() > 1)
            num_parts = std::clamp<int64_t>(longest / KEYS_OF_PART, 1, 4 * num_team_threads() / num_items + 1);
        auto find = [&](int64_t place) {
            int64_t sequence = 0;
            for (int64_t blocks; place >= (blocks = blocks_of(sequence)); sequence++) place -= blocks;
            return item(sequence, place);
        };
        const int64_t numbers = value_columns + 2;  // of a row: blended values, the largest score, the sum
        float* parts = num_parts == 1 ? nullptr : scratch(PARTS, num_items * num_parts * ROWS_AT_ONCE * numbers);
        for_each(num_items * num_parts, [&](int64_t place) {
            const Item mine = find(place / num_parts);
            const int64_t part = place % num_parts, length = (mine.end - mine.begin + num_parts - 1) / num_parts;
            const int64_t begin = std::min(mine.end, mine.begin + part * length), end = std::min(mine.end, begin + length);
            float* out = parts ? parts + place * ROWS_AT_ONCE * numbers : scratch(OUTPUTS, ROWS_AT_ONCE * numbers);
            float *best = out + ROWS_AT_ONCE * value_columns, *total = best + ROWS_AT_ONCE;
            attend(mine, begin, end, out, best, total);
            for (int64_t row = 0; row < mine.num_rows && !parts; row++)
                write(mine, row, out + row * value_columns, best[row], total[row]);
        });
        if (!parts) return;
        for_each(num_items, [&](int64_t place) {
            const Item mine = find(place);
            float* first = parts + place * num_parts * ROWS_AT_ONCE * numbers;
            for (int64_t row = 0; row < mine.num_rows; row++) {
                float best = NONE, total = 0.0f;
                for (int64_t part = 0; part < num_parts; part++)
                    best = std::max(best, first[(part * numbers + value_columns) * ROWS_AT_ONCE + row]);
                float* blended = scratch(OUTPUTS, value_columns);
                std::fill_n(blended, value_columns, 0.0f);
                for (int64_t part = 0; part < num_parts; part++) {
                    const float* one = first + part * ROWS_AT_ONCE * numbers;
                    const float own = one[ROWS_AT_ONCE * value_columns + row];
                    if (own == NONE) continue;
                    const float factor = std::exp(own - best);
                    total += factor * one[ROWS_AT_ONCE * (value_columns + 1) + row];
                    for (int64_t i = 0; i < value_columns; i += LANES)
                        store(blended + i, load(blended + i) + splat(factor) * load(one + row * value_columns + i));
                }
                write(mine, row, blended, best, total);
            }
        });
    }
};

}  // namespace

extern "C" void ramet_attention(const RametAttention* call) {
    switch (call->cache_dtype) {
        case BFLOAT16: return Pass<Bf16>{*call}.compute();
        case FLOAT16: return Pass<F16>{*call}.compute();
        case E4M3: return Pass<F8>{*call}.compute();
        default: return Pass<float>{*call}.compute();
    }
}
