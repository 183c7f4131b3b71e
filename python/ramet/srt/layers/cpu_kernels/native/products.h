// Owns what both kinds of products with stored matrices share: which rows go to which matrix, and how results are written.
#pragma once

#include <vector>

#include "stored.h"
#include "team.h"
#include "tiles.h"

// x W^T + b for contiguous x [num_rows, num_columns] and y [num_rows, num outputs] of one type.
struct Product {
    Matrix matrix;
    int64_t num_matrices;
    const int32_t* ends;  // where each matrix' rows of x end; null: all rows go to the only one
    int64_t num_rows;
    int dtype;  // of x, bias and y
    const void *x, *bias;
    void* y;
};

// Some rows of x for some rows of one matrix.
struct Task {
    int64_t place, first_x, num_x, first_w, num_w;
};

// `cost_bytes` of a matrix' rows are what a thread takes at once, `unit` rows at least.
static inline std::vector<Task> tasks_of(const Product& product, int64_t x_at_once, int64_t unit) {
    constexpr int64_t MOST_BYTES = 128 << 10, TASKS_OF_THREAD = 6;
    const Matrix& matrix = product.matrix;
    std::vector<Task> groups;
    int64_t begin = 0;
    for (int64_t place = 0; place < product.num_matrices; place++) {
        const int64_t end = product.ends ? product.ends[place] : product.num_rows;
        for (; begin < end; begin += std::min(x_at_once, end - begin))
            groups.push_back({place, begin, std::min(x_at_once, end - begin), 0, 0});
    }
    const int64_t row_bytes = std::max<int64_t>(1, matrix.num_columns * matrix.bits() / 8);
    const int64_t share = int64_t(groups.size()) * matrix.num_rows / (TASKS_OF_THREAD * num_team_threads());
    const int64_t at_once = std::max(unit, std::min(MOST_BYTES / row_bytes, share) / unit * unit);
    std::vector<Task> tasks;
    for (const Task& group : groups)
        for (int64_t first = 0; first < matrix.num_rows; first += at_once)
            tasks.push_back({group.place, group.first_x, group.num_x, first, std::min(at_once, matrix.num_rows - first)});
    return tasks;
}

// y[first_x + m, first_w + r] = sums[m, r] + bias[first_w + r]; sums have room for whole vectors.
static inline void finish(const Product& product, const float* sums, int64_t stride, int64_t first_x, int64_t num_x, int64_t first_w,
                          int64_t num_w) {
    const int64_t y_stride = product.matrix.num_rows, place = first_x * y_stride + first_w;
    auto write = [&](auto* y, auto* bias) {
        finish_rows(sums, stride, num_x, num_w, bias ? bias + first_w : bias, y + place, y_stride);
    };
    if (product.dtype == BFLOAT16) write(static_cast<Bf16*>(product.y), static_cast<const Bf16*>(product.bias));
    else if (product.dtype == FLOAT16) write(static_cast<F16*>(product.y), static_cast<const F16*>(product.bias));
    else write(static_cast<float*>(product.y), static_cast<const float*>(product.bias));
}

// `num` numbers in float32.
static inline const float* widened(int dtype, const void* x, int64_t first, int64_t num, float* to) {
    if (dtype == FLOAT32) return static_cast<const float*>(x) + first;
    auto widen_all = [&](auto* from) {
        for (int64_t i = 0; i < num; i += LANES)
            num - i < LANES ? store_some(to + i, load_some(from + i, num - i), num - i) : store(to + i, load(from + i));
    };
    dtype == BFLOAT16 ? widen_all(static_cast<const Bf16*>(x) + first) : widen_all(static_cast<const F16*>(x) + first);
    return to;
}

// Calls `work(row, its numbers in float32)` for all rows of x, some at once in each thread.
template <class Work> void for_rows_of_x(const Product& product, const Work& work) {
    const int64_t num = product.matrix.num_columns, at_once = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, num));
    for_each((product.num_rows + at_once - 1) / at_once, [&](int64_t place) {
        float* memory = scratch(SUMS, num);
        for (int64_t m = place * at_once; m < std::min(product.num_rows, (place + 1) * at_once); m++)
            work(m, widened(product.dtype, product.x, m * num, num, memory));
    });
}

void multiply_words(const Product& product);  // by matrices whose words lie next to those of other rows
