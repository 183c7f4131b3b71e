// Owns the innermost loops of products: some rows with some rows, and some rows with the rows of a matrix.
#pragma once

#include <algorithm>

#include "vectors.h"

constexpr int X_ROWS = 6;                    // of a tile, at most
constexpr int W_ROWS = LANES == 16 ? 4 : 2;  // as many sums as registers hold beside what is added to them
constexpr int LINE_BYTES = 64;

// Rows of memory that are needed soon: each tile fetches some of their lines.
struct Ahead {
    const char* row = nullptr;
    int64_t row_stride = 0, row_bytes = 0, num_rows = 0;
    int64_t num_lines = 0;  // for each tile
    int64_t column = 0;
    void fetch() {
        for (int64_t line = 0; line < num_lines && num_rows; line++) {
            __builtin_prefetch(row + column);
            column += LINE_BYTES;
            if (column >= row_bytes) column = 0, row += row_stride, num_rows--;
        }
    }
};

template <int X, int W>
static inline __attribute__((always_inline)) void add_products(Vec (&sums)[X][W], const float* x, int64_t x_stride,
                                                               Vec (&w)[W]) {
#pragma GCC unroll 8
    for (int r = 0; r < W; r++) hold(w[r]);
#pragma GCC unroll 8
    for (int m = 0; m < X; m++) {
        Vec row = load(x + m * x_stride);
        hold(row);
#pragma GCC unroll 8
        for (int r = 0; r < W; r++) sums[m][r] += row * w[r];
    }
}

// out[m * out_stride + r] (+)= x[m] . w[r] for X rows of float32 and W rows of another type, `num` numbers each.
// Rows of x are in the order of load_pair for T, with zeros up to a multiple of PAIR.
template <int X, int W, class T>
static inline void dot_tile(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t num, float* out,
                            int64_t out_stride, bool adds) {
    Vec sums[X][W];
#pragma GCC unroll 8
    for (int m = 0; m < X; m++)
#pragma GCC unroll 8
        for (int r = 0; r < W; r++) sums[m][r] = Vec{};
    int64_t i = 0;
    for (; i + PAIR <= num; i += PAIR) {
        Vec first[W], second[W];
#pragma GCC unroll 8
        for (int r = 0; r < W; r++) {
            if (sizeof(T) < 4) __builtin_prefetch(w + (W + r) * w_stride + i);  // from memory: the rows behind these
            Pair pair = load_pair(w + r * w_stride + i);
            first[r] = pair.first, second[r] = pair.second;
        }
        add_products(sums, x + i, x_stride, first);
        add_products(sums, x + i + LANES, x_stride, second);
    }
    if (i < num) {
        Vec first[W], second[W];
#pragma GCC unroll 8
        for (int r = 0; r < W; r++) {
            Pair pair = load_some_of_pair(w + r * w_stride + i, num - i);
            first[r] = pair.first, second[r] = pair.second;
        }
        add_products(sums, x + i, x_stride, first);
        add_products(sums, x + i + LANES, x_stride, second);
    }
    const Vec none = {};
#pragma GCC unroll 8
    for (int m = 0; m < X; m++)
#pragma GCC unroll 8
        for (int r = 0; r < W; r += 4) {
            float* to = out + m * out_stride + r;
            constexpr int LAST = W - 1;
            Four four = sums_of(sums[m][r], r + 1 < W ? sums[m][r + 1 < W ? r + 1 : LAST] : none,
                                r + 2 < W ? sums[m][r + 2 < W ? r + 2 : LAST] : none,
                                r + 3 < W ? sums[m][r + 3 < W ? r + 3 : LAST] : none);
            const int num_sums = W - r < 4 ? W - r : 4;
            for (int i = 0; i < num_sums; i++) to[i] = four[i] + (adds ? to[i] : 0.0f);
        }
}

// x . w for one row each, x as above: four sums, so that additions don't wait for each other, and memory far ahead.
template <class T> static inline float dot_row(const float* x, const T* w, int64_t num) {
    constexpr int AHEAD = 2048 / sizeof(T), STEP = 2 * PAIR, LINE = LINE_BYTES / sizeof(T);
    Vec sums[4] = {};
    int64_t i = 0;
    for (; i + STEP <= num; i += STEP) {
#pragma GCC unroll 8
        for (int line = 0; line < STEP; line += LINE) __builtin_prefetch(w + i + AHEAD + line);
        Pair a = load_pair(w + i), b = load_pair(w + i + PAIR);
        sums[0] += load(x + i) * a.first;
        sums[1] += load(x + i + LANES) * a.second;
        sums[2] += load(x + i + PAIR) * b.first;
        sums[3] += load(x + i + PAIR + LANES) * b.second;
    }
    for (; i < num; i += PAIR) {
        Pair pair = num - i < PAIR ? load_some_of_pair(w + i, num - i) : load_pair(w + i);
        sums[0] += load(x + i) * pair.first;
        sums[1] += load(x + i + LANES) * pair.second;
    }
    return sum_of((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <int X, class T>
static inline void dot_rows(const float* x, int64_t x_stride, const T* w, int64_t w_stride, int64_t num_w, int64_t num,
                            float* out, int64_t out_stride, bool adds, Ahead& ahead) {
    int64_t r = 0;
    for (; r + W_ROWS <= num_w; r += W_ROWS, ahead.fetch())
        dot_tile<X, W_ROWS>(x, x_stride, w + r * w_stride, w_stride, num, out + r, out_stride, adds);
    for (; r < num_w; r++) dot_tile<X, 1>(x, x_stride, w + r * w_stride, w_stride, num, out + r, out_stride, adds);
}

static inline int64_t num_x_tiles(int64_t num_x) { return (num_x + X_ROWS - 1) / X_ROWS; }

// out[m, r] (+)= x[m] . w[r] for all of num_x and num_w rows, each tile of x with all rows of w. Tiles are of like sizes.
template <class T>
__attribute__((noinline)) void dot_block(const float* x, int64_t x_stride, int64_t num_x, const T* w, int64_t w_stride, int64_t num_w,
                             int64_t num, float* out, int64_t out_stride, bool adds, Ahead ahead = {}) {
    const int64_t num_tiles = num_x_tiles(num_x);
    for (int64_t tile = 0, m = 0; tile < num_tiles; tile++) {
        const int64_t size = num_x / num_tiles + (tile < num_x % num_tiles);
        const float* rows = x + m * x_stride;
        float* to = out + m * out_stride;
        switch (size) {
            case 6: dot_rows<6>(rows, x_stride, w, w_stride, num_w, num, to, out_stride, adds, ahead); break;
            case 5: dot_rows<5>(rows, x_stride, w, w_stride, num_w, num, to, out_stride, adds, ahead); break;
            case 4: dot_rows<4>(rows, x_stride, w, w_stride, num_w, num, to, out_stride, adds, ahead); break;
            case 3: dot_rows<3>(rows, x_stride, w, w_stride, num_w, num, to, out_stride, adds, ahead); break;
            case 2: dot_rows<2>(rows, x_stride, w, w_stride, num_w, num, to, out_stride, adds, ahead); break;
            default: dot_rows<1>(rows, x_stride, w, w_stride, num_w, num, to, out_stride, adds, ahead);
        }
        m += size;
    }
}

// out[m, c] += sum over j of weights[m, j] * values[j, c] for X rows and V vectors of columns.
template <int X, int V, class T>
static inline void blend_tile(const float* weights, int64_t weights_stride, const T* values, int64_t values_stride,
                              int64_t num, float* out, int64_t out_stride) {
    Vec sums[X][V];
#pragma GCC unroll 8
    for (int m = 0; m < X; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) sums[m][v] = load(out + m * out_stride + v * LANES);
    for (int64_t j = 0; j < num; j++) {
        Vec row[V];
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) row[v] = load(values + j * values_stride + v * LANES);
#pragma GCC unroll 8
        for (int m = 0; m < X; m++) {
            Vec weight = splat(weights[m * weights_stride + j]);
#pragma GCC unroll 8
            for (int v = 0; v < V; v++) sums[m][v] += weight * row[v];
        }
    }
#pragma GCC unroll 8
    for (int m = 0; m < X; m++)
#pragma GCC unroll 8
        for (int v = 0; v < V; v++) store(out + m * out_stride + v * LANES, sums[m][v]);
}

template <int X, class T>
static inline void blend_rows(const float* weights, int64_t weights_stride, const T* values, int64_t values_stride,
                              int64_t num, int64_t columns, float* out, int64_t out_stride) {
    int64_t c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES)
        blend_tile<X, 2>(weights, weights_stride, values + c, values_stride, num, out + c, out_stride);
    if (c < columns) blend_tile<X, 1>(weights, weights_stride, values + c, values_stride, num, out + c, out_stride);
}

// The same for all rows and columns; `columns` is a multiple of LANES.
template <class T>
__attribute__((noinline)) void blend_block(const float* weights, int64_t weights_stride, int64_t num_x, const T* values,
                               int64_t values_stride, int64_t num, int64_t columns, float* out, int64_t out_stride) {
    const int64_t num_tiles = (num_x + 3) / 4;
    for (int64_t tile = 0, m = 0; tile < num_tiles; tile++) {
        const int64_t size = num_x / num_tiles + (tile < num_x % num_tiles);
        const float* w = weights + m * weights_stride;
        float* o = out + m * out_stride;
        switch (size) {
            case 4: blend_rows<4>(w, weights_stride, values, values_stride, num, columns, o, out_stride); break;
            case 3: blend_rows<3>(w, weights_stride, values, values_stride, num, columns, o, out_stride); break;
            case 2: blend_rows<2>(w, weights_stride, values, values_stride, num, columns, o, out_stride); break;
            default: blend_rows<1>(w, weights_stride, values, values_stride, num, columns, o, out_stride);
        }
        m += size;
    }
}

// y[m, r] = sums[m, r] + bias[r]; a row of sums has room for whole vectors.
template <class T>
static inline void finish_rows(const float* sums, int64_t stride, int64_t num_x, int64_t num_w, const T* bias, T* y, int64_t y_stride) {
    for (int64_t m = 0; m < num_x; m++) {
        for (int64_t r = 0; r < num_w; r += LANES) {
            const int64_t num = std::min<int64_t>(LANES, num_w - r);
            Vec values = load(sums + m * stride + r);
            if (bias) values += load_some(bias + r, num);
            num == LANES ? store(y + m * y_stride + r, values) : store_some(y + m * y_stride + r, values, num);
        }
    }
}

// They are compiled once, in tiles.cpp.
#define RAMET_TILES(KIND, T)                                                                                                   \
    KIND template void dot_block(const float*, int64_t, int64_t, const T*, int64_t, int64_t, int64_t, float*, int64_t, bool,    \
                                 Ahead);                                                                                       \
    KIND template void blend_block(const float*, int64_t, int64_t, const T*, int64_t, int64_t, int64_t, float*, int64_t);
RAMET_TILES(extern, float)
RAMET_TILES(extern, Bf16)
RAMET_TILES(extern, F16)
RAMET_TILES(extern, F8)
