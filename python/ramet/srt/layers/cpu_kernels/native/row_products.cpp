// Owns products with matrices whose rows lie in memory one after the other, and the choice between both kinds.
#include "products.h"
#include "stored_rows.h"

namespace {

constexpr int64_t BLOCK_W = 16, FEW_W = 4, BLOCK_X = 256, BLOCK_NUMBERS = 1 << 14;  // 64 KB of widened weights: half of a small L2 cache

template <class F> class RowProducts {
   public:
    explicit RowProducts(const Product& product) : product(product), matrix(product.matrix) {
        stride = round_up(matrix.num_columns, X_MULTIPLE<F>);
        num_words = stride / F::NUM;
        row_bytes = matrix.num_columns * matrix.bits() / 8;
    }

    void run() {
        float* all = scratch(ROWS, product.num_rows * stride);
        float* sums = scratch(ROW_SUMS, F::IS_UNSIGNED ? product.num_rows * num_words : 0);
        for_rows_of_x(product, [&](int64_t m, const float* from) {
            in_chunks<F>(from, matrix.num_columns, all + m * stride, sums + m * num_words);
        });
        x = all, x_sums = sums;
        const std::vector<Task> tasks = tasks_of(product, BLOCK_X, BLOCK_W);
        for_each(tasks.size(), [&](int64_t place) { tasks[place].num_x == 1 ? one_row(tasks[place]) : rows(tasks[place]); });
    }

   private:
    const Product& product;
    const Matrix& matrix;
    int64_t stride, num_words, row_bytes;
    const float *x, *x_sums;

    void one_row(const Task& task) {
        const Matrix mine = matrix.of(task.place);
        float* sums = scratch(SUMS, round_up(task.num_w, LANES));
        RowTables<F> tables(mine);
        const float *row = x + task.first_x * stride, *row_sums = x_sums + task.first_x * num_words;
        for (int64_t r = 0; r < task.num_w; r++) {
            const char* w = mine.values + (task.first_w + r) * row_bytes;
            tables.fill(mine, task.first_w + r);
            sums[r] = dot_stored(w, row, row_sums, row_bytes, tables);
        }
        finish(product, sums, task.num_w, task.first_x, 1, task.first_w, task.num_w);
    }

    void rows(const Task& task) {
        const Matrix mine = matrix.of(task.place);
        const int64_t block_w = task.num_x < 2 * X_ROWS ? FEW_W : BLOCK_W, most = BLOCK_NUMBERS / block_w;
        const int64_t num_parts = (stride + most - 1) / most;
        const int64_t columns = round_up((stride + num_parts - 1) / num_parts, X_MULTIPLE<F>);
        const int64_t sums_stride = round_up(task.num_w, LANES);
        RowTables<F> tables(mine);
        float* block = scratch(BLOCK, block_w * columns);
        float* sums = scratch(SUMS, task.num_x * sums_stride);
        for (int64_t first = 0; first < task.num_w; first += block_w) {
            const int64_t num_w = std::min(block_w, task.num_w - first);
            for (int64_t begin = 0; begin < matrix.num_columns; begin += columns) {
                const int64_t num = std::min(columns, round_up(matrix.num_columns, CHUNK<F>) - begin);
                const int64_t bytes = begin / F::NUM * 4, num_bytes = std::min(row_bytes, bytes + num / F::NUM * 4) - bytes;
                for (int64_t r = 0; r < num_w; r++) {
                    tables.fill(mine, task.first_w + first + r);
                    const char* w = mine.values + (task.first_w + first + r) * row_bytes + bytes;
                    for (int64_t line = 0; line < num_bytes; line += LINE_BYTES) __builtin_prefetch(w + row_bytes + line);
                    widen_stored(w, num_bytes, tables, begin / F::NUM, block + r * columns);
                }
                dot_block(x + task.first_x * stride + begin, stride, task.num_x, block, columns, num_w, num, sums + first, sums_stride,
                          begin > 0);
            }
        }
        finish(product, sums, sums_stride, task.first_x, task.num_x, task.first_w, task.num_w);
    }
};

}  // namespace

// See Product. `takes_stored` of Ramet's Python says which matrices this takes.
extern "C" void ramet_stored_linear(const Matrix* matrix, int64_t num_matrices, const int32_t* ends, int dtype, const void* x,
                                    const void* bias, void* y, int64_t num_rows) {
    const Product product{*matrix, num_matrices, ends, num_rows, dtype, x, bias, y};
    if (matrix->places != ALONG_COLUMNS) return multiply_words(product);
    switch (matrix->numbers) {
        case AS_E4M3: return RowProducts<E4m3Words>(product).run();
        case AS_E2M1: return RowProducts<E2m1Words>(product).run();
        case AS_UINT4: return RowProducts<NibbleWords>(product).run();
        case AS_UINT8: return RowProducts<ByteWords>(product).run();
        case AS_INT8: return RowProducts<Int8Words>(product).run();
        case AS_BFLOAT16: return RowProducts<Bf16Words>(product).run();
        case AS_FLOAT16: return RowProducts<F16Words>(product).run();
        default: return RowProducts<F32Words>(product).run();
    }
}
