// Owns products with matrices whose rows lie in memory one after the other: numbers become float32 in registers.
//
// A chunk is a vector of 32-bit words, each of NUM numbers of neighbouring columns. Its numbers come out in an order of
// their own, first those at the first place of each word, and times `raised(place)`, a power of two, where that saves
// shifts: rows of x are brought into that order, and divided by it, once (`in_chunks`).
#pragma once

#include <type_traits>

#include "stored.h"
#include "team.h"
#include "tiles.h"

typedef uint8_t Chunk __attribute__((vector_size(4 * LANES)));
constexpr int CHUNK_BYTES = 4 * LANES;

struct E4m3Words {
    static constexpr int NUM = 4;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = true;
    static constexpr float FACTOR = 1.0f;  // that what `unpack` gives lacks
    static constexpr float raised(int) { return 1.0f; }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) {
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
    static constexpr float raised(int place) { return place == 3 ? 1.0f : float(1 << (8 * place)); }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 4
        for (int i = 0; i < 3; i++) to[i] = __builtin_convertvector((Ints)(words & (255u << (8 * i))), Vec);
        to[3] = __builtin_convertvector((Ints)(words >> 24), Vec);
    }
};

struct Int8Words {
    static constexpr int NUM = 4;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static constexpr float raised(int) { return 1.0f; }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 4
        for (int i = 0; i < NUM; i++) to[i] = __builtin_convertvector((Ints)(words << (24 - 8 * i)) >> 24, Vec);
    }
};

struct NibbleWords {
    static constexpr int NUM = 8;
    static constexpr bool IS_UNSIGNED = true, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static constexpr float raised(int place) { return place == 7 ? 1.0f : float(1 << (4 * place)); }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) {
#pragma GCC unroll 8
        for (int i = 0; i < 7; i++) to[i] = __builtin_convertvector((Ints)(words & (15u << (4 * i))), Vec);
        to[7] = __builtin_convertvector((Ints)(words >> 28), Vec);
    }
};

struct E2m1Words {
    static constexpr int NUM = 8;
    static constexpr bool IS_UNSIGNED = true, HAS_NAN = false;
    static constexpr float FACTOR = 0.5f;
    static constexpr float raised(int place) { return ByteWords::raised(place / 2); }
    // Twelve plus twice the numbers in bytes below 16: 0, 1, 2, 3, 4, 6, 8, 12, and the same below zero.
    ALWAYS_INLINE Bits twice(Chunk halves) {
#if defined(__AVX512BW__) || (defined(__AVX2__) && !defined(__AVX512F__))
        constexpr char TABLE[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
        Chunk table, found;
        for (int i = 0; i < CHUNK_BYTES; i += 16) memcpy(reinterpret_cast<char*>(&table) + i, TABLE, 16);
        asm("vpshufb %2, %1, %0" : "=v"(found) : "v"(table), "v"(halves));
        return (Bits)found;
#else
        Chunk size = halves & 7, four = Chunk{} + 4;
        Chunk is_largest = (Chunk)(size == 7), is_negative = (Chunk)((halves & 8) == 8);
        Chunk number = size + (size > four ? size : four) - four + (is_largest & 2);
        return (Bits)((number ^ is_negative) - is_negative + 12);
#endif
    }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) {
        Bits even = twice((Chunk)(words & 0x0f0f0f0f)), odd = twice((Chunk)((words >> 4) & 0x0f0f0f0f));
        Vec numbers[2][4];
        ByteWords::unpack(even, numbers[0]);
        ByteWords::unpack(odd, numbers[1]);
#pragma GCC unroll 8
        for (int i = 0; i < NUM; i++) to[i] = numbers[i % 2][i / 2];
    }
};

struct Bf16Words {
    static constexpr int NUM = 2;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static constexpr float raised(int) { return 1.0f; }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) {
        to[0] = as_floats(words << 16), to[1] = as_floats(words & 0xffff0000);
    }
};

struct F16Words {
    static constexpr int NUM = 2;
    static constexpr bool IS_UNSIGNED = false, HAS_NAN = false;
    static constexpr float FACTOR = 1.0f;
    static constexpr float raised(int) { return 1.0f; }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) {
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
    static constexpr float raised(int) { return 1.0f; }
    ALWAYS_INLINE void unpack(Bits words, Vec (&to)[NUM]) { to[0] = as_floats(words); }
};

template <class F> constexpr int CHUNK = F::NUM * LANES;  // numbers
template <class F> constexpr int X_MULTIPLE = CHUNK<F> < PAIR ? PAIR : CHUNK<F>;

static inline Bits load_chunk(const char* from, int64_t num_bytes) {
    if (num_bytes >= CHUNK_BYTES) return load_raw<Bits>(from);
    char some[CHUNK_BYTES] = {};
    memcpy(some, from, num_bytes);
    return load_raw<Bits>(some);
}

// `num` numbers in that order, with zeros up to a multiple of X_MULTIPLE; `sums` gets those of each word.
template <class F> static inline void in_chunks(const float* from, int64_t num, float* to, float* sums) {
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
            Vec values = load(to + place * LANES);
            sum += values;
            if (F::raised(place) != 1.0f) store(to + place * LANES, values * splat(1.0f / F::raised(place)));
        }
        if (F::IS_UNSIGNED) {
            store(sums, sum);
            sums += LANES;
        }
    }
}

// How many words of a row share a scale and a zero.
enum Spread {
    ALL,     // all
    CHUNKS,  // so many that each chunk has one
    TWO,
    FOUR,
    ANY,     // they stand for each word
};

// from[0], NUM times, from[1], ... No more is read: what has just been written in whole vectors comes from there then.
template <int NUM> static inline Vec repeat_each(const float* from) {
    constexpr int SOME = LANES / NUM;
    if constexpr (SOME == 1) return splat(*from);
    typedef float Part __attribute__((vector_size(SOME < 4 ? 16 : 4 * SOME)));
    Part part;
    if constexpr (SOME == 2) {
        typedef int64_t Both __attribute__((vector_size(16)));
        part = (Part)Both{load_raw<int64_t>(from), 0};
    } else {
        memcpy(&part, from, sizeof(part));
    }
#if defined(__AVX512F__)
    return __builtin_shufflevector(part, part, 0, 1 / NUM, 2 / NUM, 3 / NUM, 4 / NUM, 5 / NUM, 6 / NUM, 7 / NUM, 8 / NUM, 9 / NUM,
                                   10 / NUM, 11 / NUM, 12 / NUM, 13 / NUM, 14 / NUM, 15 / NUM);
#elif defined(__AVX__)
    return __builtin_shufflevector(part, part, 0, 1 / NUM, 2 / NUM, 3 / NUM, 4 / NUM, 5 / NUM, 6 / NUM, 7 / NUM);
#else
    return __builtin_shufflevector(part, part, 0, 1 / NUM, 2 / NUM, 3 / NUM);
#endif
}

// Scales or zeros of the words of one chunk after the other.
template <Spread SPREAD> struct Spreader {
    const float* from;
    int64_t chunks, left;  // of those that share one

    Spreader(const float* first, int64_t group_words, int64_t word) : from(first), chunks(group_words / LANES), left(0) {
        if (SPREAD == CHUNKS) from += word / group_words, left = chunks - word % group_words / LANES;
        if (SPREAD == TWO) from += word / 2;
        if (SPREAD == FOUR) from += word / 4;
        if (SPREAD == ANY) from += word;
    }
    Vec next() {
        if (SPREAD == ALL) return splat(*from);
        if (SPREAD == CHUNKS) {
            Vec values = splat(*from);
            if (--left == 0) from++, left = chunks;
            return values;
        }
        constexpr int STEP = SPREAD == TWO ? LANES / 2 : SPREAD == FOUR ? LANES / 4 : LANES;
        from += STEP;
        return SPREAD == TWO ? repeat_each<2>(from - STEP) : SPREAD == FOUR ? repeat_each<4>(from - STEP) : load(from - STEP);
    }
};

// Scales and zeros of a row: of each group, or of each word.
template <class F> struct RowTables {
    Spread spread = ALL;
    int64_t group_words = 1, num_words;
    float *scales, *zeros, *read;
    bool has_zeros;    // else the first one is that of all words
    int64_t row = -1;  // of the scales in memory, which these are, where several rows share those

    explicit RowTables(const Matrix& matrix) : num_words(round_up(matrix.num_columns, CHUNK<F>) / F::NUM), has_zeros(matrix.zeros) {
        const int64_t num_groups = round_up(matrix.num_groups, LANES) + LANES;
        if (matrix.num_groups > 1) {
            group_words = matrix.group_columns / F::NUM;
            spread = matrix.first_column != 0        ? ANY
                     : group_words % LANES == 0                 ? CHUNKS
                     : F::NUM == 8 && group_words == 2          ? TWO
                     : F::NUM == 8 && group_words == 4          ? FOUR
                                                                : ANY;
        }
        const int64_t num = spread == ANY ? num_words + LANES : num_groups;
        scales = scratch(SCALES, num + LANES + num_groups);
        read = spread == ANY ? scales + round_up(num, LANES) : scales;
        zeros = scratch(ZEROS, num);
        std::fill(scales, scales + num + LANES + num_groups, 0.0f);  // a row's last words may read beyond its groups
        std::fill(zeros, zeros + num, 0.0f);
        zeros[0] = F::IS_UNSIGNED ? matrix.middle() : 0.0f;
        if (!matrix.scales) scales[0] = 1.0f;
    }

    void fill(const Matrix& matrix, int64_t of) {
        if (!matrix.scales) return;
        const bool is_shared = matrix.scale_rows && !matrix.outer_scales && !matrix.zeros;
        if (is_shared && row == matrix.scale_rows[of]) return;
        if (is_shared) row = matrix.scale_rows[of];
        read_scales(matrix, of, F::FACTOR, read);
        if (spread == ANY) return fill_words(matrix, of);
        if (F::IS_UNSIGNED && has_zeros)
            for (int64_t g = 0; g < matrix.num_groups; g++) zeros[g] = read_zero(matrix, of, g);
    }

    void fill_words(const Matrix& matrix, int64_t of) {
        for (int64_t g = 0, word = 0; g < matrix.num_groups; g++) {
            const int64_t end = g + 1 < matrix.num_groups ? matrix.end_of(g) / F::NUM : num_words;
            const Vec scale = splat(read[g]), zero = splat(has_zeros ? read_zero(matrix, of, g) : 0.0f);
            for (; word < end; word += LANES) {  // beyond the end the next group's follow
                store(scales + word, scale);
                if (F::IS_UNSIGNED && has_zeros) store(zeros + word, zero);
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
template <class F, Spread SPREAD, bool HAS_ZEROS>
__attribute__((noinline)) static float dot_words(const char* w, const float* x, const float* x_sums, int64_t num_bytes, const RowTables<F>& tables) {
    constexpr int AHEAD = 2048;
    Vec sums[4] = {}, zero_sum = {}, zero = splat(tables.zeros[0]);
    Chunk largest = {};
    Spreader<SPREAD> scales(tables.scales, tables.group_words, 0), zeros(tables.zeros, tables.group_words, 0);
    for (int64_t byte = 0; byte < num_bytes; byte += CHUNK_BYTES, x += CHUNK<F>) {
        __builtin_prefetch(w + byte + AHEAD);
        Bits words = load_chunk(w + byte, num_bytes - byte);
        if (F::HAS_NAN) {
            Chunk sizes = (Chunk)words & 0x7f;
            largest = sizes > largest ? sizes : largest;
        }
        Vec numbers[F::NUM];
        F::unpack(words, numbers);
        if (SPREAD == ALL) {
#pragma GCC unroll 8
            for (int i = 0; i < F::NUM; i++) sums[i % 4] += load(x + i * LANES) * numbers[i];
            if (F::IS_UNSIGNED) zero_sum += load(x_sums + byte / 4);
        } else {
            Vec even = load(x) * numbers[0], odd = F::NUM > 1 ? load(x + LANES) * numbers[1 % F::NUM] : Vec{};
#pragma GCC unroll 4
            for (int i = 2; i < F::NUM; i += 2) {
                even += load(x + i * LANES) * numbers[i];
                odd += load(x + (i + 1) * LANES) * numbers[i + 1];
            }
            if (HAS_ZEROS) zero = zeros.next();
            if (F::IS_UNSIGNED) even -= load(x_sums + byte / 4) * zero;
            sums[0] += scales.next() * (even + odd);
        }
    }
    if (F::HAS_NAN && has_nan(largest)) return __builtin_nanf("");
    Vec total = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    if (SPREAD != ALL) return sum_of(total);
    if (F::IS_UNSIGNED) total -= zero_sum * zero;
    return sum_of(total) * tables.scales[0];
}

// What some chunks of a row stand for, in that order and raised; `word` is their first word's place.
template <class F, Spread SPREAD>
__attribute__((noinline)) static void widen_words(const char* w, int64_t num_bytes, const RowTables<F>& tables, int64_t word, float* to) {
    Chunk largest = {};
    Vec zero = splat(tables.zeros[0]);
    Spreader<SPREAD> scales(tables.scales, tables.group_words, word), zeros(tables.zeros, tables.group_words, word);
    for (int64_t byte = 0; byte < num_bytes; byte += CHUNK_BYTES) {
        Bits words = load_chunk(w + byte, num_bytes - byte);
        if (F::HAS_NAN) {
            Chunk sizes = (Chunk)words & 0x7f;
            largest = sizes > largest ? sizes : largest;
        }
        const Vec scale = scales.next();
        if (F::IS_UNSIGNED && SPREAD != ALL && tables.has_zeros) zero = zeros.next();
        Vec numbers[F::NUM];
        F::unpack(words, numbers);
#pragma GCC unroll 8
        for (int i = 0; i < F::NUM; i++) {
            Vec number = F::IS_UNSIGNED ? numbers[i] - zero * splat(F::raised(i)) : numbers[i];
            store(to + byte * F::NUM / 4 + i * LANES, number * scale);
        }
    }
    if (!F::HAS_NAN || !has_nan(largest)) return;
    for (int64_t byte = 0; byte < num_bytes; byte++)
        if ((w[byte] & 0x7f) == 0x7f)
            to[byte / CHUNK_BYTES * CHUNK<F> + byte % 4 * LANES + byte % CHUNK_BYTES / 4] = __builtin_nanf("");
}

// Calls `work(Spread)` with a type for what a format's tables can be.
template <class F, class Work> static inline auto by_spread(Spread spread, const Work& work) {
    if constexpr (F::NUM >= 4) {
        if (spread == CHUNKS) return work(std::integral_constant<Spread, CHUNKS>());
        if (spread == ANY) return work(std::integral_constant<Spread, ANY>());
    }
    if constexpr (F::NUM == 8) {
        if (spread == TWO) return work(std::integral_constant<Spread, TWO>());
        if (spread == FOUR) return work(std::integral_constant<Spread, FOUR>());
    }
    return work(std::integral_constant<Spread, ALL>());
}

template <class F>
static inline float dot_stored(const char* w, const float* x, const float* x_sums, int64_t num_bytes, const RowTables<F>& tables) {
    return by_spread<F>(tables.spread, [&](auto spread) {
        if (F::IS_UNSIGNED && tables.has_zeros) return dot_words<F, spread, F::IS_UNSIGNED>(w, x, x_sums, num_bytes, tables);
        return dot_words<F, spread, false>(w, x, x_sums, num_bytes, tables);
    });
}

template <class F>
static inline void widen_stored(const char* w, int64_t num_bytes, const RowTables<F>& tables, int64_t word, float* to) {
    by_spread<F>(tables.spread, [&](auto spread) { widen_words<F, spread>(w, num_bytes, tables, word, to); });
}
