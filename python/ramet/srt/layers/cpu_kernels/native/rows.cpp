// Owns what is done to each row of a pass between the products: norms, activations, rotation, the best token.
#include <algorithm>
#include <cmath>
#include <limits>

#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t NUMBERS_AT_ONCE = 8192;  // that a thread takes; fewer are done by the caller alone

int64_t rows_at_once(int64_t num) { return std::max<int64_t>(1, NUMBERS_AT_ONCE / std::max<int64_t>(1, num)); }

// Calls work(row) for each of `num_rows` rows of `num` numbers.
template <class Work> void for_each_row(int64_t num_rows, int64_t num, const Work& work) {
    const int64_t at_once = rows_at_once(num);
    for_each((num_rows + at_once - 1) / at_once, [&](int64_t place) {
        for (int64_t row = place * at_once; row < std::min(num_rows, (place + 1) * at_once); row++) work(row);
    });
}

// Calls work(place, how many) for runs of up to LANES numbers.
template <class Work> inline void for_each_vector(int64_t num, const Work& work) {
    int64_t i = 0;
    for (; i + LANES <= num; i += LANES) work(i, LANES);
    if (i < num) work(i, num - i);
}

template <class T> inline Vec take(const T* from, int64_t num) { return num == LANES ? load(from) : load_some(from, num); }
template <class T> inline void put(T* to, Vec values, int64_t num) {
    num == LANES ? store(to, values) : store_some(to, values, num);
}

// 1 / sqrt(mean(x^2) + eps)
template <class T> float scale_of(const T* x, int64_t num, float eps) {
    Vec squares = {};
    for_each_vector(num, [&](int64_t i, int64_t some) {
        Vec values = take(x + i, some);
        squares += values * values;
    });
    return 1.0f / std::sqrt(sum_of(squares) / num + eps);
}

template <class T>
void rms_norm(const void* x_, void* residual_, const void* weight_, void* y_, int64_t num_rows, int64_t num, float eps,
              float offset) {
    const T *x = static_cast<const T*>(x_), *weight = static_cast<const T*>(weight_);
    T *residual = static_cast<T*>(residual_), *y = static_cast<T*>(y_);
    for_each_row(num_rows, num, [&](int64_t row) {
        const T* from = x + row * num;
        if (residual) {
            T* sum = residual + row * num;
            for_each_vector(num, [&](int64_t i, int64_t some) { put(sum + i, take(from + i, some) + take(sum + i, some), some); });
            from = sum;
        }
        const Vec scale = splat(scale_of(from, num, eps));
        for_each_vector(num, [&](int64_t i, int64_t some) {
            put(y + row * num + i, take(from + i, some) * scale * (take(weight + i, some) + splat(offset)), some);
        });
    });
}

enum Activation { SILU = 0, GELU = 1, GELU_TANH = 2, RELU = 3 };

template <int KIND> inline Vec activate(Vec x) {
    if (KIND == SILU) return x / (splat(1.0f) + exponential(-x));
    if (KIND == RELU) return select(x <= Vec{}, Vec{}, x);  // NaN stays NaN
    if (KIND == GELU_TANH) {
        Vec inner = splat(0.7978845608028654f) * (x + splat(0.044715f) * x * x * x);
        return splat(0.5f) * x * (splat(1.0f) + hyperbolic_tangent(inner));
    }
    Vec y;
    for (int i = 0; i < LANES; i++) y[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067811865476f));
    return y;
}

template <class T, int KIND> void act_and_mul(const void* x_, void* y_, int64_t num_rows, int64_t num) {
    const T* x = static_cast<const T*>(x_);
    T* y = static_cast<T*>(y_);
    const int64_t num_parts = (num + NUMBERS_AT_ONCE - 1) / NUMBERS_AT_ONCE, at_once = round_up((num + num_parts - 1) / num_parts, LANES);
    for_each_row(num_rows * num_parts, at_once, [&](int64_t place) {
        const T* gate = x + place / num_parts * 2 * num;
        T* to = y + place / num_parts * num;
        const int64_t first = place % num_parts * at_once;
        for_each_vector(std::min(at_once, num - first), [&](int64_t i, int64_t some) {
            put(to + first + i, activate<KIND>(take(gate + first + i, some)) * take(gate + num + first + i, some), some);
        });
    });
}

template <class T> void act_and_mul(int kind, const void* x, void* y, int64_t num_rows, int64_t num) {
    auto compute = kind == SILU        ? act_and_mul<T, SILU>
                   : kind == GELU      ? act_and_mul<T, GELU>
                   : kind == GELU_TANH ? act_and_mul<T, GELU_TANH>
                                       : act_and_mul<T, RELU>;
    compute(x, y, num_rows, num);
}

}  // namespace

// y = x / sqrt(mean(x^2) + eps) * (weight + offset) for rows of `num`. With a residual, x is x + residual, which takes the
// residual's place.
extern "C" void ramet_rms_norm(int dtype, const void* x, void* residual, const void* weight, void* y, int64_t num_rows,
                               int64_t num, float eps, float offset) {
    auto compute = dtype == BFLOAT16 ? rms_norm<Bf16> : dtype == FLOAT16 ? rms_norm<F16> : rms_norm<float>;
    compute(x, residual, weight, y, num_rows, num, eps, offset);
}

// y [num_rows, num] = act(first half) * second half of x [num_rows, 2 * num].
extern "C" void ramet_act_and_mul(int dtype, int kind, const void* x, void* y, int64_t num_rows, int64_t num) {
    auto compute = dtype == BFLOAT16 ? act_and_mul<Bf16> : dtype == FLOAT16 ? act_and_mul<F16> : act_and_mul<float>;
    compute(kind, x, y, num_rows, num);
}

extern "C" struct RametRotation {
    int64_t num_tokens, num_heads, num_kv_heads, head_dim, half;  // half: of the columns that are rotated
    const void* qkv;                                              // [num_tokens, columns]
    const void *cos, *sin;                                        // [num_tokens, half], or null
    const void *q_norm, *k_norm;                                  // [head_dim], or null
    const int64_t* slots;                                         // of the cache, one for each token
    void *q, *k_cache, *v_cache;
    const float* kv_scales;  // of keys and values in the cache, or null
    float eps, offset;       // of the norms
    int32_t has_gates;       // each head of the queries has one behind it
    int32_t dtype, cache_dtype;
};

namespace {

template <class T, class C> struct Rotate {
    const RametRotation& call;

    // A head -> float32, normed and rotated.
    void read(const T* from, const T* norm, int64_t token, float* to) const {
        const Vec scale = norm ? splat(scale_of(from, call.head_dim, call.eps)) : splat(1.0f);
        for_each_vector(call.head_dim, [&](int64_t i, int64_t some) {
            Vec x = take(from + i, some);
            if (norm) x = x * scale * (take(norm + i, some) + splat(call.offset));
            store(to + i, x);  // `to` has room for whole vectors
        });
        if (!call.cos) return;
        const T *cos = static_cast<const T*>(call.cos) + token * call.half, *sin = static_cast<const T*>(call.sin) + token * call.half;
        for_each_vector(call.half, [&](int64_t i, int64_t some) {
            Vec c = take(cos + i, some), s = take(sin + i, some), x = take(to + i, some), y = take(to + call.half + i, some);
            put(to + i, x * c - y * s, some);
            put(to + call.half + i, y * c + x * s, some);
        });
    }

    template <class D> void write(const float* from, D* to, float scale) const {
        for_each_vector(call.head_dim, [&](int64_t i, int64_t some) { put(to + i, load(from + i) * splat(scale), some); });
    }

    void compute() const {
        const int64_t dim = call.head_dim, num_queries = call.num_heads * (1 + call.has_gates);
        const int64_t columns = (num_queries + 2 * call.num_kv_heads) * dim;
        const float k_scale = call.kv_scales ? 1.0f / call.kv_scales[0] : 1.0f, v_scale = call.kv_scales ? 1.0f / call.kv_scales[1] : 1.0f;
        for_each_row(call.num_tokens, columns, [&](int64_t token) {
            const T* row = static_cast<const T*>(call.qkv) + token * columns;
            float* head = scratch(KEYS, round_up(dim, LANES));
            T* q = static_cast<T*>(call.q) + token * call.num_heads * dim;
            for (int64_t h = 0; h < call.num_heads; h++) {
                read(row + h * (1 + call.has_gates) * dim, static_cast<const T*>(call.q_norm), token, head);
                write(head, q + h * dim, 1.0f);
            }
            const int64_t place = call.slots[token] * call.num_kv_heads * dim;
            for (int64_t h = 0; h < call.num_kv_heads; h++) {
                read(row + (num_queries + h) * dim, static_cast<const T*>(call.k_norm), token, head);
                write(head, static_cast<C*>(call.k_cache) + place + h * dim, k_scale);
                for_each_vector(dim, [&](int64_t i, int64_t some) {
                    put(static_cast<C*>(call.v_cache) + place + h * dim + i,
                        take(row + (num_queries + call.num_kv_heads + h) * dim + i, some) * splat(v_scale), some);
                });
            }
        });
    }
};

template <class T> void rotate(const RametRotation& call) {
    if (call.cache_dtype == E4M3)
        Rotate<T, F8>{call}.compute();
    else
        Rotate<T, T>{call}.compute();
}

}  // namespace

// Norm and rotate queries and keys, and write keys and values to the cache.
extern "C" void ramet_rotate_and_store(const RametRotation* call) {
    auto compute = call->dtype == BFLOAT16 ? rotate<Bf16> : call->dtype == FLOAT16 ? rotate<F16> : rotate<float>;
    compute(*call);
}

// The place of the largest number of each row of float32 [num_rows, num], the first of equal ones; `invalid` for a row in
// which there is NaN, or whose largest number is infinite.
extern "C" void ramet_best_tokens(const float* logits, int64_t* tokens, int64_t num_rows, int64_t num, int64_t invalid) {
    const int64_t num_parts = num_rows >= 2 * num_team_threads() ? 1 : std::clamp<int64_t>(num / NUMBERS_AT_ONCE, 1, 4 * num_team_threads());
    const int64_t at_once = round_up((num + num_parts - 1) / num_parts, LANES);
    float* best = scratch(PARTS, num_rows * num_parts);
    for_each(num_rows * num_parts, [&](int64_t place) {
        const int64_t first = place % num_parts * at_once, end = std::min(num, first + at_once);
        const float* row = logits + place / num_parts * num;
        const Vec none = splat(-std::numeric_limits<float>::infinity());
        Vec most = none, odd = {};
        int64_t i = first;
        for (; i + LANES <= end; i += LANES) {
            Vec x = load(row + i);
            most = maximum(x, most);
            odd += x * Vec{};  // NaN if any is infinite or NaN
        }
        float largest = largest_of(most);
        for (; i < end; i++) largest = std::max(largest, row[i]), odd[0] += row[i] * 0.0f;
        if (sum_of(odd) != 0.0f)
            for (i = first; i < end; i++)
                if (row[i] != row[i]) largest = row[i];
        best[place] = largest;
    });
    for (int64_t row = 0; row < num_rows; row++) {
        const float* parts = best + row * num_parts;
        int64_t part = 0;
        for (int64_t i = 1; i < num_parts && parts[part] == parts[part]; i++)
            if (parts[i] > parts[part] || parts[i] != parts[i]) part = i;
        tokens[row] = invalid;
        if (!std::isfinite(parts[part])) continue;
        const float* numbers = logits + row * num;
        tokens[row] = std::find(numbers + part * at_once, numbers + num, parts[part]) - numbers;
    }
}
