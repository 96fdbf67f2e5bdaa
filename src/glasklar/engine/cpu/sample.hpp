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
        top_ = -INFINITY;
        for (int i = 0; i < count; ++i)
            if (logits[i] > top_) top_ = logits[i], best_ = i;
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
        Floats p = weights(i);
        int last = best_;
        for (int j = 0; j < LANES && i + j < count_; ++j) {
            if (p[j] > 0) last = i + j;
            before += p[j];
            if (before > threshold) return i + j;
        }
        return last;  // sums of 16 and of single tokens may differ in the last bit
    }

   private:
    Floats weights(int i) const {
        Floats v = spread(-INFINITY);
        if (i + LANES <= count_) v = load(logits_ + i);
        else
            for (int j = 0; i + j < count_; ++j) v[j] = logits_[i + j];
        return exp((v - top_) * inverse_);
    }
    double block(int i) const { return sum(weights(i)); }

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
