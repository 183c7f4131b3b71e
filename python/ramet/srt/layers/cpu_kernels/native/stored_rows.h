// Owns products with matrices whose rows lie in memory one after the other: numbers become float32 in registers.
//
// A chunk is a vector of 32-bit words, each of NUM numbers of neighbouring columns. Its numbers come out in an order of
// their own, first those at the first place of each word: rows of x are brought into that order once (`in_chunks`).
#pragma once

#include "stored.h"
#include "tiles.h"

typedef uint8_t Chunk __attribute__((vector_size(4 * LANES)));
typedef int8_t SignedChunk __attribute__((vector_size(4 * LANES)));

struct E4m3Words {
    static constexpr int NUM = 4;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = true;
    static constexpr float FACTOR = 1.0f;  // of what `unpack` gives
    static inline void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 4
        for (int i = 0; i < NUM; i++) {  // the sign goes to its place, the rest to the lower end of the exponent
            Ints bits = (Ints)(words << (24 - 8 * i)) >> 4;
            to[i] = as_floats((Bits)bits & 0x87f00000) * splat(1.329227995784916e+36f);  // 2^120
        }
    }
};

struct ByteWords {
    static constexpr int NUM = 4;
    static constexpr bool IS_UNSIGNED = true, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static inline void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 4
        for (int i = 0; i < NUM; i++) to[i] = __builtin_convertvector((Ints)((words >> (8 * i)) & 255), Vec);
    }
};

struct Int8Words {
    static constexpr int NUM = 4;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static inline void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 4
        for (int i = 0; i < NUM; i++) to[i] = __builtin_convertvector((Ints)(words << (24 - 8 * i)) >> 24, Vec);
    }
};

struct NibbleWords {
    static constexpr int NUM = 8;
    static constexpr bool IS_UNSIGNED = true, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static inline void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 8
        for (int i = 0; i < NUM; i++) to[i] = __builtin_convertvector((Ints)((words >> (4 * i)) & 15), Vec);
    }
};

struct E2m1Words {
    static constexpr int NUM = 8;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 0.5f;
    // Twice the numbers in the lower halves of bytes: 0, 1, 2, 3, 4, 6, 8, 12, and the same below zero.
    static inline Bits twice(Chunk halves) {
        Chunk size = halves & 7, four = Chunk{} + 4;
        Chunk is_largest = (Chunk)(size == 7), is_negative = (Chunk)((halves & 8) == 8);
        Chunk number = size + (size > four ? size : four) - four + (is_largest & 2);
        return (Bits)((number ^ is_negative) - is_negative);
    }
    static inline void unpack(Bits words, Vec (&to)[NUM]) {
        Bits even = twice((Chunk)(words & 0x0f0f0f0f)), odd = twice((Chunk)((words >> 4) & 0x0f0f0f0f));
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) {
            to[2 * i] = __builtin_convertvector((Ints)(even << (24 - 8 * i)) >> 24, Vec);
            to[2 * i + 1] = __builtin_convertvector((Ints)(odd << (24 - 8 * i)) >> 24, Vec);
        }
    }
};

struct Bf16Words {
    static constexpr int NUM = 2;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static inline void unpack(Bits words, Vec (&to)[NUM]) {
        to[0] = as_floats(words << 16), to[1] = as_floats(words & 0xffff0000);
    }
};

struct F16Words {
    static constexpr int NUM = 2;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static inline void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 2
        for (int i = 0; i < NUM; i++) {  // as load(F16*) does
            Bits bits = (words >> (16 * i)) & 0xffff;
            Vec size = as_floats((bits & 0x7fff) << 13) * splat(5.192296858534828e+33f);
            Bits special = (Bits)((bits & 0x7c00) == 0x7c00) & 0x7f800000;
            to[i] = as_floats(as_bits(size) | special | ((bits & 0x8000) << 16));
        }
    }
};

struct F32Words {
    static constexpr int NUM = 1;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static inline void unpack(Bits words, Vec (&to)[NUM]) { to[0] = as_floats(words); }
};

constexpr int CHUNK_BYTES = 4 * LANES;
template <class F> constexpr int CHUNK = F::NUM * LANES;  // numbers
template <class F> constexpr int X_MULTIPLE = CHUNK<F> < PAIR ? PAIR : CHUNK<F>;

static inline Bits load_chunk(const char* from, int64_t num_bytes) {
    if (num_bytes >= CHUNK_BYTES) return load_raw<Bits>(from);
    char some[CHUNK_BYTES] = {};
    memcpy(some, from, num_bytes);
    return load_raw<Bits>(some);
}

// `num` numbers in that order, with zeros up to a multiple of X_MULTIPLE; `sums` gets those of each word.
template <class F, class T> static inline void in_chunks(const T* from, int64_t num, float* to, float* sums) {
    for (int64_t i = 0; i < round_up(num, X_MULTIPLE<F>); i += CHUNK<F>, to += CHUNK<F>) {
        float natural[CHUNK<F>];
        for (int v = 0; v < F::NUM; v++) {
            const int64_t left = num - i - v * LANES;
            Vec values = left >= LANES ? load(from + i + v * LANES) : left > 0 ? load_some(from + i + v * LANES, left) : Vec{};
            store(natural + v * LANES, values);
        }
        Vec sum = {};
        for (int place = 0; place < F::NUM; place++) {
            for (int lane = 0; lane < LANES; lane++) to[place * LANES + lane] = natural[lane * F::NUM + place];
            sum += load(to + place * LANES);
        }
        if (F::IS_UNSIGNED) {
            store(sums, sum);
            sums += LANES;
        }
    }
}

// Scales and zeros of each word of a row, of the matrix' `scales` as read_scales gives them.
template <class F> struct RowTables {
    float* scales = nullptr;
    float* zeros = nullptr;
    bool is_uniform = false;  // one scale and zero for all columns
    int64_t row = -1;         // of `scales` in memory, which the tables are of; -1: none that others share

    void fill(const Matrix& matrix, int64_t of, float* memory) {
        is_uniform = matrix.num_groups <= 1;
        const bool is_shared = matrix.scale_rows && !matrix.outer_scales && !matrix.zeros;
        if (is_shared && row == matrix.scale_rows[of]) return;
        row = is_shared ? matrix.scale_rows[of] : -1;
        if (!matrix.scales) {
            scales[0] = 1.0f;
            return;
        }
        read_scales(matrix, of, memory);
        for (int64_t g = 0; g < matrix.num_groups; g++) memory[g] *= F::FACTOR;
        if (is_uniform) {
            scales[0] = memory[0];
            if (F::IS_UNSIGNED) zeros[0] = read_zero(matrix, of, 0);
            return;
        }
        const int64_t num_words = round_up(matrix.num_columns, CHUNK<F>) / F::NUM;
        for (int64_t g = 0, word = 0; g < matrix.num_groups; g++) {
            const int64_t end = g + 1 < matrix.num_groups ? matrix.end_of(g) / F::NUM : num_words;
            const Vec scale = splat(memory[g]);
            const Vec zero = splat(F::IS_UNSIGNED ? read_zero(matrix, of, g) : 0.0f);
            for (; word < end; word += LANES) {  // beyond the end the next group's follow
                store(scales + word, scale);
                if (F::IS_UNSIGNED) store(zeros + word, zero);
            }
            word = end;
        }
    }
};

// Whether one of the bytes is e4m3's NaN.
static inline bool has_nan(Chunk sizes) {
    uint64_t words[CHUNK_BYTES / 8], any = 0;
    memcpy(words, &sizes, sizeof(Chunk));
    for (uint64_t word : words) any |= word + 0x0101010101010101;  // no byte is above 0x7f
    return any & 0x8080808080808080;
}

// x . w for one row each; see `in_chunks` for x and its sums.
template <class F, bool IS_UNIFORM>
static inline float dot_stored(const char* w, const float* x, const float* x_sums, int64_t num_bytes, const float* scales,
                               const float* zeros) {
    constexpr int AHEAD = 2048;
    Vec sums[4] = {}, zero_sum = {};
    Chunk largest = {};
    for (int64_t byte = 0, word = 0; byte < num_bytes; byte += CHUNK_BYTES, word += LANES, x += CHUNK<F>) {
        __builtin_prefetch(w + byte + AHEAD);
        Bits words = load_chunk(w + byte, num_bytes - byte);
        if (F::HAS_NAN) {
            Chunk sizes = (Chunk)words & 0x7f;
            largest = sizes > largest ? sizes : largest;
        }
        Vec numbers[F::NUM];
        F::unpack(words, numbers);
        if (IS_UNIFORM) {
            for (int i = 0; i < F::NUM; i++) sums[i % 4] += load(x + i * LANES) * numbers[i];
            if (F::IS_UNSIGNED) zero_sum += load(x_sums + word);
        } else {
            Vec even = load(x) * numbers[0], odd = F::NUM > 1 ? load(x + LANES) * numbers[1 % F::NUM] : Vec{};
#pragma GCC unroll 4
            for (int i = 2; i < F::NUM; i += 2) {
                even += load(x + i * LANES) * numbers[i];
                odd += load(x + (i + 1) * LANES) * numbers[i + 1];
            }
            if (F::IS_UNSIGNED) even -= load(x_sums + word) * load(zeros + word);
            sums[0] += load(scales + word) * (even + odd);
        }
    }
    if (F::HAS_NAN && has_nan(largest)) return __builtin_nanf("");
    Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (!IS_UNIFORM) return sum_of(total);
    if (F::IS_UNSIGNED) total -= zero_sum * splat(zeros[0]);
    return sum_of(total) * scales[0];
}

// What some chunks of a row stand for, in that order; `word` is their first word's place.
template <class F>
static inline void widen_stored(const char* w, int64_t num_bytes, const RowTables<F>& tables, int64_t word, float* to) {
    Chunk largest = {};
    Vec scale = splat(tables.scales[0]), zero = splat(F::IS_UNSIGNED ? tables.zeros[0] : 0.0f);
    for (int64_t byte = 0; byte < num_bytes; byte += CHUNK_BYTES, word += LANES) {
        Bits words = load_chunk(w + byte, num_bytes - byte);
        if (F::HAS_NAN) {
            Chunk sizes = (Chunk)words & 0x7f;
            largest = sizes > largest ? sizes : largest;
        }
        if (!tables.is_uniform) {
            scale = load(tables.scales + word);
            if (F::IS_UNSIGNED) zero = load(tables.zeros + word);
        }
        Vec numbers[F::NUM];
        F::unpack(words, numbers);
#pragma GCC unroll 8
        for (int i = 0; i < F::NUM; i++)
            store(to + byte * F::NUM / 4 + i * LANES, F::IS_UNSIGNED ? (numbers[i] - zero) * scale : numbers[i] * scale);
    }
    if (!F::HAS_NAN || !has_nan(largest)) return;
    for (int64_t byte = 0; byte < num_bytes; byte++)
        if ((w[byte] & 0x7f) == 0x7f) to[byte / CHUNK_BYTES * CHUNK<F> + byte % 4 * LANES + byte % CHUNK_BYTES / 4] = __builtin_nanf("");
}
