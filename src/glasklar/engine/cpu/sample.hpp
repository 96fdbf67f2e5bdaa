// From a row of logits to a token, where a request asks for nothing but a temperature.
#pragma once

#include "lanes.hpp"

namespace glasklar {

struct Choice {
    int32_t token;
    float logprob;  // under the model's own distribution; not finite where the logits are not
};

// The distribution at a temperature, summed in blocks of 16 in order.
class Distribution {
   public:
    Distribution(const float* logits, int count, float temperature) : logits_(logits), count_(count), inverse_(1 / temperature) {
        alignas(64) float tops[NEAR];
        Near top = spread_as<Near>(-INFINITY);
        int whole = 0;
        for (; whole + NEAR <= count; whole += NEAR) top = larger(top, near_at(logits + whole));  // NaN is never the larger one
        put(tops, top);
        top_ = *std::max_element(tops, tops + NEAR);
        for (; whole < count; ++whole) top_ = std::max(top_, logits[whole]);
        if (top_ > -INFINITY)
            while (logits[best_] != top_) ++best_;
        for (int i = 0; i < count; i += LANES) total_ += block(i);
    }
    int best() const { return best_; }
    double log_total() const { return std::log(total_) + top_ * inverse_; }

    // The first token whose cumulative probability exceeds u in [0, 1).
    int draw(double u) const {
        double threshold = u * total_, before = 0;
        int i = 0;
        for (; i + LANES < count_; i += LANES) {
            double here = block(i);
            if (before + here > threshold) break;
            before += here;
        }
        float p[LANES];
        weights(i, p);
        int last = best_;
        for (int j = 0; j < LANES && i + j < count_; ++j) {
            if (p[j] > 0) last = i + j;
            before += p[j];
            if (before > threshold) return i + j;
        }
        return last;  // sums of 16 and of single tokens may differ in the last bit
    }

   private:
    void weights(int i, float* to) const {
        float padded[LANES];
        const float* from = logits_ + i;
        if (i + LANES > count_) std::fill(std::copy(from, logits_ + count_, padded), padded + LANES, -INFINITY), from = padded;
        for (int j = 0; j < LANES; j += NEAR) put(to + j, exp((near_at(from + j) - top_) * inverse_));
    }
    double block(int i) const {
        alignas(64) float p[LANES];
        weights(i, p);
        return sum_at(p);
    }

    const float* logits_;
    int count_, best_ = 0;
    float inverse_, top_;
    double total_ = 0;
};

constexpr float COLDEST = 1e-5f;  // as engine/sampler.py has it

inline Choice choose(const float* logits, int count, float temperature, double u) {
    Distribution own(logits, count, 1);
    int token = own.best();
    if (temperature >= COLDEST) token = temperature == 1 ? own.draw(u) : Distribution(logits, count, temperature).draw(u);
    return {token, float(logits[token] - own.log_total())};
}

}  // namespace glasklar
