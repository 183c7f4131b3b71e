// Owns the choice of tokens by chance: what top_k, top_p and min_p keep, found without sorting a row, and one of it.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "team.h"
#include "vectors.h"

namespace {

constexpr int64_t AT_ONCE = 1024;  // numbers that are summed in float32; such sums, in float64
// Weights are from 0 to 1: their bits grow with them. A bucket has those with the same exponent and 5 bits behind it.
constexpr int BUCKET_SHIFT = 18, NUM_BUCKETS = (0x3f800000 >> BUCKET_SHIFT) + 1;

struct Rules {
    float temperature, top_p, min_p;
    int64_t top_k;
};

int bucket_of(float weight) {
    uint32_t bits;
    memcpy(&bits, &weight, sizeof(bits));
    return bits >> BUCKET_SHIFT;
}

// The numbers of one row in proportion to their probabilities, 1 for the largest.
class Weights {
   public:
    Weights(const float* logits, int64_t num, float largest, float temperature) : num(num), weights(scratch(SCORES, round_up(num, LANES))) {
        const float scale = 1.0f / temperature;
        for (int64_t i = 0; i < num; i += LANES) {
            Vec x = num - i < LANES ? load_some(logits + i, num - i) : load(logits + i);
            Vec weight = exponential((x - splat(largest)) * splat(scale));
            num - i < LANES ? store_some(weights + i, weight, num - i) : store(weights + i, weight);
        }
    }

    // Leave out all that the rules do.
    void filter(const Rules& rules) {
        std::vector<double> sums(NUM_BUCKETS, 0.0);
        std::vector<int64_t> counts(NUM_BUCKETS, 0);
        double total = 0.0;
        for (int64_t i = 0; i < num; i++) {
            const int bucket = bucket_of(weights[i]);
            sums[bucket] += weights[i], counts[bucket]++;
        }
        for (double sum : sums) total += sum;
        float least = std::min(rules.min_p, 1.0f);
        if (rules.top_k < num) {
            int64_t above = 0;
            double sum = 0.0;
            int bucket = NUM_BUCKETS - 1;
            for (; above + counts[bucket] < rules.top_k; bucket--) above += counts[bucket], sum += sums[bucket];
            const std::vector<float> falling = of_bucket(bucket);
            for (int64_t i = 0; i < rules.top_k - above; i++) sum += falling[i];
            total = sum;
            least = std::max(least, falling[rules.top_k - above - 1]);
        }
        if (rules.top_p < 1.0f) {
            const double limit = rules.top_p * total;
            double sum = 0.0;
            int bucket = NUM_BUCKETS - 1;
            for (; bucket > 0 && sum + sums[bucket] <= limit; bucket--) sum += sums[bucket];
            float last = 0.0f;
            for (float weight : of_bucket(bucket)) {
                if (sum > limit) break;
                sum += last = weight;
            }
            least = std::max(least, last);
        }
        for (int64_t i = 0; i < num; i++) weights[i] = weights[i] < least ? 0.0f : weights[i];
    }

    // The first one at which the cumulated weight passes `uniform` of the total.
    int64_t draw(float uniform) const {
        const int64_t num_parts = (num + AT_ONCE - 1) / AT_ONCE;
        std::vector<double> sums(num_parts);
        double total = 0.0;
        for (int64_t part = 0; part < num_parts; part++) total += sums[part] = sum_of_part(part);
        const double target = uniform * total;
        double before = 0.0;
        int64_t last = 0;  // that has a weight: the sum of a part's weights one by one may be less by a rounding
        for (int64_t part = 0; part < num_parts; before += sums[part++]) {
            if (before + sums[part] <= target) {
                continue;
            }
            double passed = before;
            for (int64_t i = part * AT_ONCE; i < std::min(num, (part + 1) * AT_ONCE); i++) {
                if (weights[i] == 0.0f) continue;
                last = i;
                if ((passed += weights[i]) > target) return i;
            }
            return last;
        }
        for (int64_t i = num; i-- > 0;)
            if (weights[i] > 0.0f) return i;
        return last;
    }

   private:
    const int64_t num;
    float* weights;

    std::vector<float> of_bucket(int bucket) const {
        std::vector<float> found;
        for (int64_t i = 0; i < num; i++)
            if (bucket_of(weights[i]) == bucket) found.push_back(weights[i]);
        std::sort(found.begin(), found.end(), std::greater<float>());
        return found;
    }

    double sum_of_part(int64_t part) const {
        const int64_t end = std::min(num, (part + 1) * AT_ONCE);
        Vec sum = {};
        int64_t i = part * AT_ONCE;
        for (; i + LANES <= end; i += LANES) sum += load(weights + i);
        double total = sum_of(sum);
        for (; i < end; i++) total += weights[i];
        return total;
    }
};

// The place of the largest number, the first of equal ones; -1 if there is NaN, or it is infinite.
int64_t best_of(const float* row, int64_t num) {
    Vec most = splat(-std::numeric_limits<float>::infinity());
    Ints odd = {};
    int64_t i = 0;
    for (; i + LANES <= num; i += LANES) {
        const Vec x = load(row + i);
        most = maximum(x, most);
        odd |= x != x;
    }
    float largest = largest_of(most);
    bool has_nan = false;
    for (int lane = 0; lane < LANES; lane++) has_nan |= odd[lane];
    for (; i < num; i++) largest = std::max(largest, row[i]), has_nan |= row[i] != row[i];
    if (has_nan || !std::isfinite(largest)) return -1;
    return std::find(row, row + num, largest) - row;
}

}  // namespace

// A token for each row of float32 [num_rows, num]. `is_greedy` rows get their best one, the others one by their number of
// `uniforms` and rules; `invalid` for a row with NaN, or whose largest number is infinite. top_k: `num` for none.
extern "C" void ramet_sample(const float* logits, int64_t* tokens, int64_t num_rows, int64_t num, const bool* is_greedy, const float* uniforms,
                             const float* temperatures, const int64_t* top_ks, const float* top_ps, const float* min_ps, int64_t invalid) {
    for_each(num_rows, [&](int64_t place) {
        const float* row = logits + place * num;
        const int64_t best = best_of(row, num);
        tokens[place] = best < 0 ? invalid : best;
        if (best < 0 || is_greedy[place]) return;
        const Rules rules{temperatures[place], top_ps[place], min_ps[place], top_ks[place]};
        Weights weights(row, num, row[best], rules.temperature);
        if (rules.top_k < num || rules.top_p < 1.0f || rules.min_p > 0.0f) weights.filter(rules);
        tokens[place] = weights.draw(uniforms[place]);
    });
}
