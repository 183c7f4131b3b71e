// Owns vectors of float32 as wide as the processor's registers, and numbers of other types read into and written from them.
//
// GCC's and Clang's vector extensions: the same source for AVX2, AVX-512 and NEON.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint8_t Bytes __attribute__((vector_size(LANES)));

#define ALWAYS_INLINE static inline __attribute__((always_inline))

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2, E4M3 = 3 };

struct Bf16 { uint16_t bits; };
struct F16 { uint16_t bits; };
struct F8 { uint8_t bits; };  // e4m3fn

static inline int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

static inline Vec splat(float value) { return Vec{} + value; }
static inline Vec as_floats(Bits bits) { return (Vec)bits; }
static inline Bits as_bits(Vec values) { return (Bits)values; }
static inline Vec select(Ints where, Vec yes, Vec no) { return (Vec)(((Bits)yes & (Bits)where) | ((Bits)no & ~(Bits)where)); }
static inline Vec maximum(Vec a, Vec b) { return a > b ? a : b; }

// Keeps a value in a register, where the compiler would rather read it again at each use.
static inline void hold(Vec& value) {
#if defined(__x86_64__)
    asm("" : "+x"(value));
#elif defined(__aarch64__)
    asm("" : "+w"(value));
#endif
}

template <class V> static inline V load_raw(const void* from) {
    V value;
    memcpy(&value, from, sizeof(V));
    return value;
}

static inline Vec load(const float* from) { return load_raw<Vec>(from); }

static inline Vec load(const Bf16* from) {
    return as_floats(__builtin_convertvector(load_raw<Halves>(from), Bits) << 16);
}

static inline Vec load(const F16* from) {
    Bits bits = __builtin_convertvector(load_raw<Halves>(from), Bits);
    // The exponent moves from a bias of 15 to one of 127 by a product, which is right for subnormal numbers too.
    Vec size = as_floats((bits & 0x7fff) << 13) * splat(5.192296858534828e+33f);  // 2^112
    Bits special = (Bits)((bits & 0x7c00) == 0x7c00) & 0x7f800000;               // infinities and NaN
    return as_floats(as_bits(size) | special | ((bits & 0x8000) << 16));
}

static inline Vec load(const F8* from) {  // by whole numbers where it is subnormal: float32's own take long
    Bits bits = __builtin_convertvector(load_raw<Bytes>(from), Bits), size = bits & 0x7f;
    Vec normal = as_floats((size << 20) + (120u << 23)), small = __builtin_convertvector((Ints)size, Vec) * splat(0x1p-9f);
    Bits special = (Bits)(size == 0x7f) & 0x7fc00000;  // NaN; e4m3fn has no infinities
    return as_floats(as_bits(select((Ints)(size < 8), small, normal)) | special | ((bits & 0x80) << 24));
}

// Two vectors of neighbouring numbers, in an order that is the type's own: for products, where both sides have the same.
struct Pair {
    Vec first, second;
};
constexpr int PAIR = 2 * LANES;

template <class T> static inline Pair load_pair(const T* from) { return {load(from), load(from + LANES)}; }

static inline Pair load_pair(const Bf16* from) {  // those at even places and those at odd ones: no lane is crossed
    Bits bits = load_raw<Bits>(from);
    return {as_floats(bits << 16), as_floats(bits & 0xffff0000)};
}

template <class T> static inline Pair load_some_of_pair(const T* from, int64_t num) {
    T some[PAIR] = {};
    memcpy(some, from, num * sizeof(T));
    return load_pair(some);
}

template <class T> static inline Vec load_some(const T* from, int64_t num) {
    T some[LANES] = {};
    memcpy(some, from, num * sizeof(T));
    return load(some);
}

static inline float widen(float value) { return value; }
template <class T> static inline float widen(T value) { return load_some(&value, 1)[0]; }

static inline void store(float* to, Vec values) { memcpy(to, &values, sizeof(Vec)); }

static inline void store(Bf16* to, Vec values) {  // rounded to nearest, ties to even
    Bits bits = as_bits(values);
    Bits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Bits is_nan = (Bits)(values != values);
    Halves halves = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), Halves);
    memcpy(to, &halves, sizeof(Halves));
}

static inline void store(F16* to, Vec values) {
    Bits bits = as_bits(values), sign = (bits >> 16) & 0x8000, size = bits & 0x7fffffff;
    // Below 2^-14 numbers are multiples of 2^-24: adding 0.5 leaves them in the lowest bits, rounded.
    Bits subnormal = as_bits(as_floats(size) + splat(0.5f)) - 0x3f000000;
    Bits normal = (size - (112u << 23) + 0xfff + ((size >> 13) & 1)) >> 13;
    Bits is_small = (Bits)(size < 0x38800000), is_large = (Bits)(size >= 0x477ff000), is_nan = (Bits)(size > 0x7f800000);
    Bits half = (subnormal & is_small) | (normal & ~is_small);
    half = (half & ~is_large) | (is_large & 0x7c00) | (is_nan & 0x0200);
    Halves halves = __builtin_convertvector(half | sign, Halves);
    memcpy(to, &halves, sizeof(Halves));
}

static inline void store(F8* to, Vec values) {  // saturated at 448, as the engine clamps before it stores
    Bits bits = as_bits(values), sign = (bits >> 24) & 0x80, size = bits & 0x7fffffff;
    Bits is_nan = (Bits)(size > 0x7f800000), is_large = (Bits)(size > 0x43e00000);
    size = (size & ~is_large) | (is_large & 0x43e00000);
    // Below 2^-6 numbers are multiples of 2^-9: adding 2^14 leaves them in the lowest bits, rounded.
    Bits subnormal = as_bits(as_floats(size) + splat(16384.0f)) - 0x46800000;
    Bits normal = (size - (120u << 23) + 0x7ffff + ((size >> 20) & 1)) >> 20;
    Bits is_small = (Bits)(size < 0x3c800000);
    Bits byte = (((subnormal & is_small) | (normal & ~is_small)) & ~is_nan) | (is_nan & 0x7f) | sign;
    Bytes bytes = __builtin_convertvector(byte, Bytes);
    memcpy(to, &bytes, sizeof(Bytes));
}

template <class T> static inline void store_some(T* to, Vec values, int64_t num) {
    T some[LANES];
    store(some, values);
    memcpy(to, some, num * sizeof(T));
}

template <class T> static inline void narrow(T* to, float value) { store_some(to, splat(value), 1); }

// `num` numbers in float32, in the order of load_pair, with zeros up to a multiple of PAIR.
template <class T> static inline void widen_row(const T* from, int64_t num, float* to) {
    for (int64_t i = 0; i < num; i += PAIR) {
        Pair pair = num - i < PAIR ? load_some_of_pair(from + i, num - i) : load_pair(from + i);
        store(to + i, pair.first);
        store(to + i + LANES, pair.second);
    }
}

// (a0 + a1, a2 + a3, b0 + b1, b2 + b3) of each four lanes.
static inline Vec add_neighbours(Vec a, Vec b) {
#if defined(__AVX512F__)
    Vec even = __builtin_shufflevector(a, b, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
    Vec odd = __builtin_shufflevector(a, b, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
#elif defined(__AVX__)
    Vec even = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14);
    Vec odd = __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
#else
    Vec even = __builtin_shufflevector(a, b, 0, 2, 4, 6);
    Vec odd = __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
    return even + odd;
}

typedef float Four __attribute__((vector_size(16)));

// The sums of the lanes of four vectors.
static inline Four sums_of(Vec a, Vec b, Vec c, Vec d) {
    Vec sums = add_neighbours(add_neighbours(a, b), add_neighbours(c, d));
#if defined(__AVX512F__)
    Four parts[4];
    memcpy(parts, &sums, sizeof(Vec));
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
#elif defined(__AVX__)
    return __builtin_shufflevector(sums, sums, 0, 1, 2, 3) + __builtin_shufflevector(sums, sums, 4, 5, 6, 7);
#else
    return sums;
#endif
}

static inline float sum_of(Vec values) { return sums_of(values, Vec{}, Vec{}, Vec{})[0]; }

static inline float largest_of(Vec values) {
    float best = values[0];
    for (int i = 1; i < LANES; i++) best = values[i] > best ? values[i] : best;
    return best;
}

// e^x for x <= 0 and moderate ones above: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' coefficients), within
// 2 units of the last place. Below -87 it is 0; NaN stays NaN.
static inline Vec exponential(Vec x) {
    Vec y = x * splat(1.44269504088896341f);
    y = y > splat(127.0f) ? splat(127.0f) : y;
    const Vec magic = splat(12582912.0f);  // 1.5 * 2^23: what is added and taken away again leaves a whole number
    Vec turns = (y + magic) - magic;
    Vec r = (x - turns * splat(0.693359375f)) - turns * splat(-2.12194440e-4f);
    Vec p = splat(1.9875691500e-4f);
    p = p * r + splat(1.3981999507e-3f);
    p = p * r + splat(8.3334519073e-3f);
    p = p * r + splat(4.1665795894e-2f);
    p = p * r + splat(1.6666665459e-1f);
    p = p * r + splat(5.0000001201e-1f);
    p = p * r * r + r + splat(1.0f);
    Ints is_tiny = x < splat(-87.0f);
    Vec bounded = select(is_tiny, splat(0.0f), turns);
    Ints exponent = __builtin_convertvector(bounded, Ints);
    Vec scaled = (Vec)((Bits)(exponent + 127) << 23) * p;
    return select(x != x, x, select(is_tiny, splat(0.0f), scaled));
}

// tanh(x) = sign(x) (1 - t) / (1 + t) with t = e^(-2 |x|).
static inline Vec hyperbolic_tangent(Vec x) {
    Bits sign = as_bits(x) & 0x80000000;
    Vec t = exponential(as_floats(as_bits(x) & 0x7fffffff) * splat(-2.0f));
    Vec size = (splat(1.0f) - t) / (splat(1.0f) + t);
    return as_floats(as_bits(size) | sign);
}
