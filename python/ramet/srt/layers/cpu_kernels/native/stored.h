// Owns what a matrix is as it is stored: where its numbers, scales and zeros lie, and what they say.
#pragma once

#include <algorithm>

#include "vectors.h"

enum Numbers { AS_E4M3, AS_E2M1, AS_UINT4, AS_UINT8, AS_INT8, AS_FLOAT32, AS_BFLOAT16, AS_FLOAT16 };
enum Places {
    ALONG_COLUMNS,     // rows of numbers, or of words of them
    WORDS_OF_COLUMNS,  // [words, rows], each of neighbouring columns
    WORDS_OF_ROWS,     // [columns, words], each of eight neighbouring rows in AutoAWQ's order
};
enum ScaleNumbers { SCALES_FLOAT32, SCALES_EXPONENT, SCALES_E4M3 };

// A matrix, or a stack of equally cut ones. Its Python side is stored.py: the same fields in the same order.
struct Matrix {
    const char *values, *scales, *zeros, *outer_scales;  // of the first one; the last three may be null
    const int32_t* scale_rows;     // the row of `scales` of each row of the matrix; null: its own
    const int32_t* column_groups;  // [parts, num_columns]: the column of scales and zeros of each column; null: in order
    const int32_t* column_parts;   // the row of `column_groups` of each row of the matrix
    int64_t values_bytes, scales_bytes, zeros_bytes, outer_scales_bytes, column_groups_bytes;  // from one of a stack to the next
    int64_t num_rows, num_columns;
    int64_t num_groups;     // of columns that share a scale
    int64_t group_columns;  // of each
    int64_t first_column;   // of the matrix, counted from the beginning of its first group
    int32_t numbers, places, scale_numbers;
    int32_t divides;         // the outer scale divides
    uint32_t zeros_add;      // to each word of zeros
    int32_t are_transposed;  // scales [groups, rows] and zeros [groups, words of rows]; else [rows, groups], [words, groups]

    int64_t bits() const { return numbers == AS_E2M1 || numbers == AS_UINT4 ? 4 : numbers == AS_FLOAT32 ? 32 : numbers >= AS_BFLOAT16 ? 16 : 8; }
    int64_t num_bytes() const { return num_rows * num_columns * bits() / 8; }
    bool is_unsigned() const { return numbers == AS_UINT4 || numbers == AS_UINT8; }
    int64_t group_of(int64_t column) const { return std::min(num_groups - 1, (first_column + column) / group_columns); }
    // The first column that is not of this group.
    int64_t end_of(int64_t group) const {
        return group + 1 >= num_groups ? num_columns : std::min(num_columns, (group + 1) * group_columns - first_column);
    }
    Matrix of(int64_t place) const {
        Matrix one = *this;
        one.values += place * values_bytes;
        if (scales) one.scales += place * scales_bytes;
        if (zeros) one.zeros += place * zeros_bytes;
        if (outer_scales) one.outer_scales += place * outer_scales_bytes;
        if (column_groups) one.column_groups += place * column_groups_bytes / sizeof(int32_t);
        return one;
    }
    // The zero where none are stored, of numbers as `unpack` gives them.
    float middle() const { return numbers == AS_UINT4 ? 8.0f : numbers == AS_E2M1 ? 12.0f : 128.0f; }
};

// 2^(e - 127) of bytes e; NaN of 255. A float32 has the same exponent.
static inline Vec load_powers(const uint8_t* from) {
    Bits bytes = __builtin_convertvector(load_raw<Bytes>(from), Bits);
    Bits is_smallest = (Bits)(bytes == 0), is_nan = (Bits)(bytes == 255);  // 2^-127 is a subnormal number
    return as_floats((bytes << 23) | (is_smallest & 0x00400000) | (is_nan & 0x7fc00000));
}

static inline Vec load_scales(const Matrix& matrix, int64_t place) {
    if (matrix.scale_numbers == SCALES_FLOAT32) return load(reinterpret_cast<const float*>(matrix.scales) + place);
    if (matrix.scale_numbers == SCALES_E4M3) return load(reinterpret_cast<const F8*>(matrix.scales) + place);
    return load_powers(reinterpret_cast<const uint8_t*>(matrix.scales) + place);
}

// The scales of a row of the matrix times a factor, where rows have theirs together: `to` has room for a multiple of LANES.
static inline void read_scales(const Matrix& matrix, int64_t row, float factor, float* to) {
    const int64_t num = matrix.num_groups, from = (matrix.scale_rows ? matrix.scale_rows[row] : row) * num;
    if (matrix.outer_scales) {
        const float outer = reinterpret_cast<const float*>(matrix.outer_scales)[row];
        factor = matrix.divides ? factor / outer : factor * outer;
    }
    for (int64_t g = 0; g < num; g += LANES) {
        Vec values;
        if (num - g >= LANES) {
            values = load_scales(matrix, from + g);
        } else {  // nothing behind the last one is read
            const int64_t size = matrix.scale_numbers == SCALES_FLOAT32 ? 4 : 1;
            char some[4 * LANES] = {};
            memcpy(some, matrix.scales + (from + g) * size, (num - g) * size);
            Matrix rest = matrix;
            rest.scales = some;
            values = load_scales(rest, 0);
        }
        store(to + g, values * splat(factor));
    }
}

// The zero of a row and a group of columns.
static inline float read_zero(const Matrix& matrix, int64_t row, int64_t group) {
    if (!matrix.zeros) return matrix.middle();
    const int64_t bits = matrix.bits(), num = 32 / bits, word = row / num;
    const int64_t place = matrix.are_transposed ? group * (matrix.num_rows / num) + word : word * matrix.num_groups + group;
    int64_t within = row % num;
    if (matrix.places == WORDS_OF_ROWS) within = within / 2 + within % 2 * 4;
    const uint32_t all = reinterpret_cast<const uint32_t*>(matrix.zeros)[place] + matrix.zeros_add;
    return float((all >> (within * bits)) & ((1u << bits) - 1));
}
