// Owns products of rows with a weight matrix: x W^T + b, summed in float32 and rounded once.
#include <algorithm>

#include "team.h"
#include "tiles.h"

namespace {

constexpr int64_t CHUNK_BYTES = 64 << 10;  // of weights that a thread takes at once
constexpr int64_t ROWS_AT_ONCE = 1024;     // of x in float32, which stay in memory
constexpr int64_t FEW_COLUMNS = 1024;
constexpr int64_t MANY_ROWS = 2 * X_ROWS;    // from here on weights are widened once for all rows
constexpr int64_t RUN_BYTES = 256 << 10;    // of weights that a thread takes at once for many rows
constexpr int64_t BLOCK_W = 16, BLOCK_X = 256, BLOCK_COLUMNS = 1024;  // 64 KB of widened weights: half of a small L2 cache

// The rows of x so, `stride` apart.
template <class T> const float* widened_rows(const T* x, int64_t num_rows, int64_t num, int64_t stride) {
    float* rows = scratch(ROWS, num_rows * stride);
    const int64_t at_once = std::max<int64_t>(1, 16384 / num);
    for_each((num_rows + at_once - 1) / at_once, [&](int64_t place) {
        for (int64_t m = place * at_once; m < std::min(num_rows, (place + 1) * at_once); m++)
            widen_row(x + m * num, num, rows + m * stride);
    });
    return rows;
}

template <class T>
void few_rows(const float* x, int64_t x_stride, const T* w, const T* bias, T* y, int64_t num_rows, int64_t num_outputs,
              int64_t num) {
    const int64_t at_once = std::max<int64_t>(LANES, round_up(CHUNK_BYTES / (num * sizeof(T)), LANES));
    for_each((num_outputs + at_once - 1) / at_once, [&](int64_t place) {
        const int64_t first = place * at_once, num_w = std::min(at_once, num_outputs - first);
        const int64_t stride = round_up(at_once, LANES);
        float* sums = scratch(SUMS, num_rows * stride);
        const T* mine = w + first * num;
        if (num_rows == 1) {
            for (int64_t r = 0; r < num_w; r++) sums[r] = dot_row(x, mine + r * num, num);
        } else {
            const int64_t columns = num_rows <= X_ROWS ? num : FEW_COLUMNS;  // of x, in a core's first cache
            for (int64_t begin = 0; begin < num; begin += columns)
                for (int64_t r = 0; r < num_w; r += W_ROWS)  // a weight comes from memory once, for all rows
                    dot_block(x + begin, x_stride, num_rows, mine + r * num + begin, num,
                              std::min<int64_t>(W_ROWS, num_w - r), std::min(columns, num - begin), sums + r, stride,
                              begin > 0);
        }
        finish_rows(sums, stride, num_rows, num_w, bias ? bias + first : bias, y + first, num_outputs);
    });
}

// A thread takes some rows of x and a run of the rows of W, of which it widens one block after the other.
template <class T>
void many_rows(const float* x, int64_t x_stride, const T* w, const T* bias, T* y, int64_t num_rows, int64_t num_outputs,
               int64_t num) {
    const int64_t num_parts = (num + BLOCK_COLUMNS - 1) / BLOCK_COLUMNS;
    const int64_t columns = round_up((num + num_parts - 1) / num_parts, PAIR);
    const int64_t x_at_once = std::min(num_rows, BLOCK_X);
    const int64_t w_at_once = std::max(BLOCK_W, RUN_BYTES / int64_t(num * sizeof(T)) / BLOCK_W * BLOCK_W);
    const int64_t num_runs = (num_outputs + w_at_once - 1) / w_at_once;
    for_each(num_runs * ((num_rows + x_at_once - 1) / x_at_once), [&](int64_t place) {
        const int64_t end = std::min(num_outputs, (place % num_runs + 1) * w_at_once);
        const int64_t first_x = place / num_runs * x_at_once, num_x = std::min(x_at_once, num_rows - first_x);
        float* sums = scratch(SUMS, x_at_once * BLOCK_W);
        float* block = scratch(BLOCK, BLOCK_W * columns);
        for (int64_t first = place % num_runs * w_at_once; first < end; first += BLOCK_W) {
            const int64_t num_w = std::min(BLOCK_W, end - first);
            for (int64_t begin = 0; begin < num; begin += columns) {
                const int64_t length = std::min(columns, num - begin);
                const T* from = w + first * num + begin;
                for (int64_t r = 0; r < num_w; r++) widen_row(from + r * num, length, block + r * columns);
                Ahead ahead;  // the block behind this one
                if (begin + columns < num) {
                    ahead.row = reinterpret_cast<const char*>(from + columns);
                    ahead.num_rows = num_w;
                    ahead.row_bytes = std::min(columns, num - begin - columns) * sizeof(T);
                } else if (first + BLOCK_W < num_outputs) {
                    ahead.row = reinterpret_cast<const char*>(w + (first + BLOCK_W) * num);
                    ahead.num_rows = std::min(BLOCK_W, num_outputs - first - BLOCK_W);
                    ahead.row_bytes = std::min(columns, num) * sizeof(T);
                }
                ahead.row_stride = num * sizeof(T);
                const int64_t num_tiles = num_x_tiles(num_x) * std::max<int64_t>(1, num_w / W_ROWS);
                ahead.num_lines = ahead.num_rows * (ahead.row_bytes / LINE_BYTES + 1) / num_tiles + 1;
                dot_block(x + first_x * x_stride + begin, x_stride, num_x, block, columns, num_w, round_up(length, PAIR), sums, BLOCK_W,
                          begin > 0, ahead);
            }
            finish_rows(sums, BLOCK_W, num_x, num_w, bias ? bias + first : bias, y + first_x * num_outputs + first, num_outputs);
        }
    });
}

template <class T>
void linear(const void* x_, const void* w, const void* bias, void* y_, int64_t num_rows, int64_t num_outputs, int64_t num) {
    const T* x = static_cast<const T*>(x_);
    T* y = static_cast<T*>(y_);
    const int64_t stride = round_up(num, PAIR);
    for (int64_t done = 0; done < num_rows; done += ROWS_AT_ONCE) {
        const int64_t some = std::min(ROWS_AT_ONCE, num_rows - done);
        const float* rows = widened_rows(x + done * num, some, num, stride);
        auto multiply = some < MANY_ROWS ? few_rows<T> : many_rows<T>;
        multiply(rows, stride, static_cast<const T*>(w), static_cast<const T*>(bias), y + done * num_outputs, some,
                 num_outputs, num);
    }
}

}  // namespace

// y = x W^T + b for contiguous x [num_rows, num], W [num_outputs, num], b [num_outputs] or null, y [num_rows, num_outputs],
// all of one type.
extern "C" void ramet_linear(int dtype, const void* x, const void* w, const void* bias, void* y, int64_t num_rows,
                             int64_t num_outputs, int64_t num) {
    auto multiply = dtype == BFLOAT16 ? linear<Bf16> : dtype == FLOAT16 ? linear<F16> : linear<float>;
    multiply(x, w, bias, y, num_rows, num_outputs, num);
}
