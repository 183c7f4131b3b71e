// Owns products with matrices whose words lie next to those of other rows: GPTQ's of columns and AutoAWQ's of rows.
//
// Lanes are rows of W, so that no sums are taken across them: 8 * LANES rows are a tile. Its places are its rows in
// order in GPTQ's, and in AutoAWQ's first the rows at the first place of each word, then those at the second, and so on.
#include "products.h"
#include "tiles.h"

namespace {

constexpr int TILE = 8 * LANES;
constexpr int64_t BLOCK_X = 256, BLOCK_COLUMNS = 128;  // 32 KB of widened weights
constexpr int64_t COLUMNS_OF_PART = 256;               // at least, where a matrix has too few rows for all threads
constexpr int AHEAD = 16;                              // words that are fetched before they are needed, from row to row of words
constexpr uint32_t AWQ_ROWS[8] = {0, 2, 4, 6, 1, 3, 5, 7};    // of a word: whose number is the i-th from the lowest bits

template <int BITS> inline Vec number_at(Bits words, int place) {
    return __builtin_convertvector((Ints)((words >> (BITS * place)) & ((1u << BITS) - 1)), Vec);
}

inline Bits load_words(const uint32_t* from, int64_t num) {
    if (num >= LANES) return load_raw<Bits>(from);
    uint32_t some[LANES] = {};
    if (num > 0) memcpy(some, from, num * sizeof(uint32_t));
    return load_raw<Bits>(some);
}

// Rows of W as they stand in a tile.
template <bool IS_AWQ> struct Tile {
    const Matrix& matrix;
    int64_t first, num;  // rows; the rest of the tile is empty

    int64_t num_words() const { return IS_AWQ ? num / 8 : num; }
    int64_t words_stride() const { return IS_AWQ ? matrix.num_rows / 8 : matrix.num_rows; }
    const uint32_t* words() const { return reinterpret_cast<const uint32_t*>(matrix.values) + (IS_AWQ ? first / 8 : first); }

    // The scales and zeros of a group of columns, by place; 0 for what is empty, and for rows that are not of `part`.
    void read(int64_t group, int32_t part, float* scales, float* zeros) const {
        float natural[TILE] = {};
        memcpy(natural, reinterpret_cast<const float*>(matrix.scales) + group * matrix.num_rows + first, num * sizeof(float));
        if (part >= 0)
            for (int64_t r = 0; r < num; r++) natural[r] = matrix.column_parts[first + r] == part ? natural[r] : 0.0f;
        if (!IS_AWQ) memcpy(scales, natural, sizeof(natural));
        else
            for (int place = 0; place < 8; place++)
                for (int word = 0; word < LANES; word++) scales[place * LANES + word] = natural[word * 8 + AWQ_ROWS[place]];
        read_zeros(group, zeros);
    }

    void read_zeros(int64_t group, float* to) const {
        if (!matrix.zeros) {
            for (int i = 0; i < TILE; i++) to[i] = matrix.middle();
            return;
        }
        const int bits = matrix.bits(), numbers = 32 / bits;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(matrix.zeros) + (group * matrix.num_rows + first) / numbers;
        if (IS_AWQ) {
            const Bits words = load_words(from, num / 8);
            for (int place = 0; place < 8; place++) store(to + place * LANES, number_at<4>(words, place));
        } else if (bits == 4) {
            for (int64_t word = 0; word < num / 8; word++)
                for (int i = 0; i < 8; i++) to[word * 8 + i] = float(((from[word] + matrix.zeros_add) >> (4 * i)) & 15);
        } else {
            for (int64_t word = 0; word < num / 4; word++)
                for (int i = 0; i < 4; i++) to[word * 4 + i] = float(((from[word] + matrix.zeros_add) >> (8 * i)) & 255);
        }
        for (int64_t r = num; r < TILE && !IS_AWQ; r++) to[r] = 0.0f;
    }

    // What stands at all places, of one column: numbers less zeros, times scales.
    template <int BITS> void widen(int64_t column, const float* scales, const float* zeros, float* to) const {
        constexpr int NUM = 32 / BITS;
        const uint32_t* from = words() + (IS_AWQ ? column : column / NUM) * words_stride();
        const Bits all = IS_AWQ ? load_words(from, num_words()) : Bits{};
        for (int v = 0; v < 8; v++) {
            Vec numbers = IS_AWQ ? number_at<BITS>(all, v) : number_at<BITS>(load_words(from + v * LANES, num - v * LANES), column % NUM);
            store(to + v * LANES, (numbers - load(zeros + v * LANES)) * load(scales + v * LANES));
        }
    }
};

// sums[place] += x[column] * number, for some columns of a tile of AutoAWQ's.
template <int BITS> inline float add_columns(const Tile<true>& tile, int64_t begin, int64_t end, const float* x, float* sums) {
    Vec own[8] = {};
    const uint32_t* from = tile.words() + begin * tile.words_stride();
    float x_sum = 0.0f;
    for (int64_t column = begin; column < end; column++, from += tile.words_stride()) {
        __builtin_prefetch(from + AHEAD * tile.words_stride());
        const Bits words = load_words(from, tile.num_words());
        const Vec value = splat(x[column]);
        x_sum += x[column];
#pragma GCC unroll 8
        for (int place = 0; place < 8; place++) own[place] += value * number_at<4>(words, place);
    }
    for (int v = 0; v < 8; v++) store(sums + v * LANES, own[v]);
    return x_sum;
}

// The same for GPTQ's; both ends are those of words.
template <int BITS> inline float add_columns(const Tile<false>& tile, int64_t begin, int64_t end, const float* x, float* sums) {
    constexpr int NUM = 32 / BITS, VECTORS = 4;
    float x_sum = 0.0f;
    for (int64_t column = begin; column < end; column++) x_sum += x[column];
    for (int half = 0; half < 8; half += VECTORS) {
        Vec own[VECTORS] = {};
        const uint32_t* from = tile.words() + begin / NUM * tile.words_stride() + half * LANES;
        const int64_t left = tile.num - half * LANES;
        for (int64_t column = begin; column < end; column += NUM, from += tile.words_stride()) {
            for (int line = 0; line < VECTORS * LANES * 4; line += LINE_BYTES)
                __builtin_prefetch(reinterpret_cast<const char*>(from + AHEAD / 2 * tile.words_stride()) + line);
            Bits words[VECTORS];
            for (int v = 0; v < VECTORS; v++) words[v] = load_words(from + v * LANES, left - v * LANES);
#pragma GCC unroll 8
            for (int place = 0; place < NUM; place++) {
                const Vec value = splat(x[column + place]);
#pragma GCC unroll 4
                for (int v = 0; v < VECTORS; v++) own[v] += value * number_at<BITS>(words[v], place);
            }
        }
        for (int v = 0; v < VECTORS; v++) store(sums + (half + v) * LANES, own[v]);
    }
    return x_sum;
}

template <bool IS_AWQ, int BITS> class WordProducts {
   public:
    explicit WordProducts(const Product& product) : product(product), matrix(product.matrix) {}

    void run() {
        stride = round_up(matrix.num_columns, LANES);
        float* all = scratch(ROWS, product.num_rows * stride);
        for_rows_of_x(product, [&](int64_t m, const float* from) {
            for (int64_t i = 0; i < matrix.num_columns; i += LANES)
                store(all + m * stride + i, matrix.num_columns - i < LANES ? load_some(from + i, matrix.num_columns - i) : load(from + i));
        });
        x = all;
        // Two of AutoAWQ's tiles share the lines of memory.
        const std::vector<Task> tasks = tasks_of(product, BLOCK_X, IS_AWQ ? 2 * TILE : TILE);
        const int64_t num = tasks.size(), most_parts = matrix.num_columns / COLUMNS_OF_PART;
        if (num < 4 * num_team_threads() && num_team_threads() > 1 && !matrix.column_groups)
            num_parts = std::max<int64_t>(1, std::min(most_parts, 4 * num_team_threads() / std::max<int64_t>(1, num)));
        if (num_parts == 1) return for_each(num, [&](int64_t place) { multiply(tasks[place]); });
        part_sums = scratch(PARTS, num_parts * product.num_rows * matrix.num_rows);
        for_each(num * num_parts, [&](int64_t place) { multiply_part(tasks[place / num_parts], place % num_parts); });
        for_each(num, [&](int64_t place) { add_parts(tasks[place]); });
    }

   private:
    const Product& product;
    const Matrix& matrix;
    int64_t stride, num_parts = 1;
    const float* x;
    float* part_sums;  // [parts, rows of x, rows of W]

    int64_t begin_of(int64_t part) const {  // columns; all words, and lines of memory, are of one part
        return part == num_parts ? matrix.num_columns : matrix.num_columns * part / num_parts / 64 * 64;
    }

    float* sums_of(int64_t part, const Task& task) const {
        return part_sums + (part * product.num_rows + task.first_x) * matrix.num_rows + task.first_w;
    }

    // Calls `take(tile, sums)` for the tiles of a task.
    template <class Take> void for_tiles(const Task& task, int64_t begin, int64_t end, const Take& take) {
        const Matrix mine = matrix.of(task.place);
        float* sums = scratch(SUMS, task.num_x * TILE);
        for (int64_t first = 0; first < task.num_w; first += TILE) {
            const Tile<IS_AWQ> tile{mine, task.first_w + first, std::min<int64_t>(TILE, task.num_w - first)};
            std::fill(sums, sums + task.num_x * TILE, 0.0f);
            add_tile(tile, task, begin, end, sums);
            if (IS_AWQ) order_rows(sums, task.num_x);
            take(tile, sums);
        }
    }

    void multiply(const Task& task) {
        for_tiles(task, 0, matrix.num_columns, [&](const Tile<IS_AWQ>& tile, const float* sums) {
            finish(product, sums, TILE, task.first_x, task.num_x, tile.first, tile.num);
        });
    }

    void multiply_part(const Task& task, int64_t part) {
        float* to = sums_of(part, task);
        for_tiles(task, begin_of(part), begin_of(part + 1), [&](const Tile<IS_AWQ>& tile, const float* sums) {
            for (int64_t m = 0; m < task.num_x; m++)
                memcpy(to + m * matrix.num_rows + tile.first - task.first_w, sums + m * TILE, tile.num * sizeof(float));
        });
    }

    void add_parts(const Task& task) {
        const int64_t sums_stride = round_up(task.num_w, LANES);
        float* sums = scratch(SUMS, task.num_x * sums_stride);
        for (int64_t m = 0; m < task.num_x; m++) {
            float* row = sums + m * sums_stride;
            std::fill(row, row + sums_stride, 0.0f);
            for (int64_t part = 0; part < num_parts; part++) {
                const float* from = sums_of(part, task) + m * matrix.num_rows;
                for (int64_t r = 0; r < task.num_w; r++) row[r] += from[r];
            }
        }
        finish(product, sums, sums_stride, task.first_x, task.num_x, task.first_w, task.num_w);
    }

    // Of some columns.
    void add_tile(const Tile<IS_AWQ>& tile, const Task& task, int64_t begin, int64_t end, float* sums) {
        const float* rows = x + task.first_x * stride;
        const int32_t* parts = tile.matrix.column_parts;
        if (!tile.matrix.column_groups && task.num_x == 1) return one_row(tile, begin, end, rows, sums);
        if (!tile.matrix.column_groups) return blocks(tile, -1, begin, end, rows, task.num_x, sums);
        for (int64_t r = 0; r < tile.num; r++) {  // each part of the rows has its own groups
            const int32_t part = parts[tile.first + r];
            if (r == 0 || part != parts[tile.first + r - 1]) blocks(tile, part, begin, end, rows, task.num_x, sums);
        }
    }

    void one_row(const Tile<IS_AWQ>& tile, int64_t begin, int64_t last, const float* row, float* sums) {
        float scales[TILE], zeros[TILE], own[TILE];
        for (int64_t end; begin < last; begin = end) {
            const int64_t group = matrix.group_of(begin);
            end = std::min(last, matrix.end_of(group));
            tile.read(group, -1, scales, zeros);
            const Vec x_sum = splat(add_columns<BITS>(tile, begin, end, row, own));
            for (int i = 0; i < TILE; i += LANES)
                store(sums + i, load(sums + i) + (load(own + i) - x_sum * load(zeros + i)) * load(scales + i));
        }
    }

    void blocks(const Tile<IS_AWQ>& tile, int32_t part, int64_t begin, int64_t end, const float* rows, int64_t num_x, float* sums) {
        float* scales = scratch(SCALES, matrix.num_groups * TILE);
        float* zeros = scratch(ZEROS, matrix.num_groups * TILE);
        for (int64_t g = 0; g < matrix.num_groups; g++) tile.read(g, part, scales + g * TILE, zeros + g * TILE);
        const int32_t* groups = part < 0 ? nullptr : tile.matrix.column_groups + part * matrix.num_columns;
        float* block = scratch(BLOCK, BLOCK_COLUMNS * TILE);
        for (; begin < end; begin += BLOCK_COLUMNS) {
            const int64_t num = std::min(BLOCK_COLUMNS, end - begin);
            for (int64_t i = 0; i < num; i++) {
                const int64_t group = groups ? groups[begin + i] : matrix.group_of(begin + i);
                tile.template widen<BITS>(begin + i, scales + group * TILE, zeros + group * TILE, block + i * TILE);
            }
            int64_t m = 0;
            for (; m + X_ROWS <= num_x; m += X_ROWS)
                blend_rows<X_ROWS>(rows + m * stride + begin, stride, block, TILE, num, TILE, sums + m * TILE, TILE);
            blend_block(rows + m * stride + begin, stride, num_x - m, block, TILE, num, TILE, sums + m * TILE, TILE);
        }
    }

    static void order_rows(float* sums, int64_t num_x) {
        for (int64_t m = 0; m < num_x; m++, sums += TILE) {
            float places[TILE];
            memcpy(places, sums, sizeof(places));
            for (int place = 0; place < 8; place++)
                for (int word = 0; word < LANES; word++) sums[word * 8 + AWQ_ROWS[place]] = places[place * LANES + word];
        }
    }
};

}  // namespace

void multiply_words(const Product& product) {
    if (product.matrix.places == WORDS_OF_ROWS) return WordProducts<true, 4>(product).run();
    product.matrix.numbers == AS_UINT4 ? WordProducts<false, 4>(product).run() : WordProducts<false, 8>(product).run();
}
