// Work between the products, each in one pass over memory: norms, gates, rotations, log-probabilities, routing.
//
// Sums over rows (gradients of norm weights) are taken in CHUNKS fixed parts, so that they do not depend on the number of
// threads.
#pragma once

#include "vector.hpp"

namespace glasklar {

constexpr int CHUNKS = 32;

template <class T>
void rms_norm_forward_row(const T* x, const T* weight, float eps, T* y, float* inverse, int D) {
    Floats squares{};
    each_vector(D, [&](int i, int n) {
        Floats v = take(x + i, n);
        squares += v * v;
    });
    float r = 1.0f / std::sqrt(sum(squares) / float(D) + eps);
    *inverse = r;
    each_vector(D, [&](int i, int n) { give(y + i, take(x + i, n) * r * take(weight + i, n), n); });
}

// `total` [D] gathers the gradient of the weight. `other` is a gradient that reaches x by another way, or null.
template <class T>
void rms_norm_backward_row(const T* x, const T* weight, float r, const T* grad, const T* other, T* grad_x, float* total,
                           int D) {
    Floats dot{};
    each_vector(D, [&](int i, int n) {
        Floats v = take(x + i, n), g = take(grad + i, n);
        dot += v * g * take(weight + i, n);
        give(total + i, take(total + i, n) + g * v * r, n);
    });
    float mean = sum(dot) * r * r / float(D);
    each_vector(D, [&](int i, int n) {
        Floats v = (take(grad + i, n) * take(weight + i, n) - take(x + i, n) * mean) * r;
        give(grad_x + i, other ? v + take(other + i, n) : v, n);
    });
}

template <class T>
void add_row(const T* a, const T* b, T* sum, int D) {
    each_vector(D, [&](int i, int n) { give(sum + i, take(a + i, n) + take(b + i, n), n); });
}

// The gate's logits of one token in fp32: x [D], weight [E, D].
template <class T>
void gate_forward_row(const T* x, const float* weight, float* logits, int D, int E) {
    constexpr int TOGETHER = 4;
    for (int e = 0; e < E; e += TOGETHER) {
        const int count = std::min(TOGETHER, E - e);
        Floats total[TOGETHER] = {};
        each_vector(D, [&](int i, int n) {
            const Floats v = take(x + i, n);
            for (int j = 0; j < TOGETHER; ++j)  // the last row again in place of missing ones
                total[j] += v * take(weight + std::size_t(e + std::min(j, count - 1)) * D + i, n);
        });
        for (int j = 0; j < count; ++j) logits[e + j] = sum(total[j]);
    }
}

// `total` [E, D] gathers the gradient of the weight.
template <class T>
void gate_backward_row(const T* x, const float* weight, const float* grad, T* grad_x, float* total, int D, int E) {
    each_vector(D, [&](int i, int n) {
        const Floats v = take(x + i, n);
        Floats back{};
        for (int e = 0; e < E; ++e) {
            const std::size_t at = std::size_t(e) * D + i;
            back += take(weight + at, n) * grad[e];
            give(total + at, take(total + at, n) + v * grad[e], n);
        }
        give(grad_x + i, back, n);
    });
}

// Keys [H, N + R] of one token: each head's own part, the first N of its X numbers, then the turned part that all share.
template <class T>
void join_keys_row(const T* own, const T* shared, T* keys, int H, int X, int N, int R) {
    for (int h = 0; h < H; ++h) {
        std::memcpy(keys + h * (N + R), own + h * X, N * sizeof(T));
        std::memcpy(keys + h * (N + R) + N, shared, R * sizeof(T));
    }
}

template <class T>
void split_keys_row(const T* grad_keys, T* grad_own, T* grad_shared, int H, int X, int N, int R) {
    for (int h = 0; h < H; ++h) std::memcpy(grad_own + h * X, grad_keys + h * (N + R), N * sizeof(T));
    each_vector(R, [&](int i, int n) {
        Floats total{};
        for (int h = 0; h < H; ++h) total += take(grad_keys + h * (N + R) + N + i, n);
        give(grad_shared + i, total, n);
    });
}

// Gradients of gate and up for the gradient `g` of silu(gate) * up.
inline void swiglu_gradient(Floats gate, Floats up, Floats g, Floats& grad_gate, Floats& grad_up) {
    Floats s = sigmoid(gate), silu = gate * s;
    grad_gate = g * up * (s + silu * (1.0f - s));
    grad_up = g * silu;
}

// The rotation of one position, for all heads there; `direction` -1 turns back. Pairs are neighbours, or first and second
// half.
class Turn {
   public:
    Turn(const float* cosine, const float* sine, float direction, bool interleave, int R)
        : interleave(interleave), R(R), cosine(Scratch::get<float>(0, R)), sine(Scratch::get<float>(1, R)) {
        for (int i = 0; i < R / 2; ++i) {
            const int a = interleave ? 2 * i : i, b = interleave ? 2 * i + 1 : i + R / 2;
            this->cosine[a] = this->cosine[b] = cosine[i];
            this->sine[a] = -direction * sine[i];
            this->sine[b] = direction * sine[i];
        }
    }

    template <class T>
    void row(const T* x, T* y) const {
        if (interleave)
            each_vector(R, [&](int i, int n) { turn(i, n, take(x + i, n), swap_neighbours(take(x + i, n)), y); });
        else
            each_vector(R / 2, [&](int i, int n) {
                const Floats first = take(x + i, n), second = take(x + R / 2 + i, n);
                turn(i, n, first, second, y);
                turn(R / 2 + i, n, second, first, y);
            });
    }

   private:
    template <class T>
    void turn(int i, int n, Floats x, Floats partner, T* y) const {
        give(y + i, x * take(cosine + i, n) + partner * take(sine + i, n), n);
    }

    bool interleave;
    int R;
    float *cosine, *sine;
};

template <class T>
void logprob_forward_row(const T* logits, int64_t target, float* logprob, float* entropy, float* log_sum, int W) {
    Floats top = spread(-std::numeric_limits<float>::infinity());
    each_vector(W, [&](int i, int n) {
        top = larger(top, take(logits + i, n, -std::numeric_limits<float>::infinity()));
    });
    float peak = largest(top);
    Floats total{}, weighted{};
    each_vector(W, [&](int i, int n) {
        Floats x = take(logits + i, n, -1e30f) - peak, e = exp(x);
        total += e;
        weighted += e * x;
    });
    float mass = sum(total), log_mass = std::log(mass);
    *log_sum = peak + log_mass;
    *logprob = value(logits[target]) - *log_sum;
    *entropy = log_mass - sum(weighted) / mass;
}

template <class T>
void logprob_backward_row(const T* logits, int64_t target, float log_sum, float grad, T* grad_logits, int W) {
    each_vector(W, [&](int i, int n) { give(grad_logits + i, exp(take(logits + i, n) - log_sum) * -grad, n); });
    put(grad_logits + target, grad * (1.0f - std::exp(value(logits[target]) - log_sum)));
}

struct RouteShape {
    int experts, active, groups, groups_kept;
    bool sigmoid, normalise;
    float scaling;
};

// Index of the largest of `n` values not yet taken; ties go to the lower index. The winner is set to -inf.
inline int take_largest(float* values, int n) {
    int best = 0;
    for (int i = 1; i < n; ++i)
        if (values[i] > values[best]) best = i;
    values[best] = -std::numeric_limits<float>::infinity();
    return best;
}

inline void keep_best_groups(const RouteShape& r, float* choice) {
    constexpr float NEVER = -std::numeric_limits<float>::infinity();
    int size = r.experts / r.groups;
    float* rank = Scratch::get<float>(13, r.groups);
    for (int g = 0; g < r.groups; ++g) {
        float best = NEVER, second = NEVER;
        for (int i = g * size; i < (g + 1) * size; ++i) {
            if (choice[i] > best) second = best, best = choice[i];
            else if (choice[i] > second) second = choice[i];
        }
        rank[g] = r.sigmoid ? best + second : best;
    }
    for (int k = 0; k < r.groups_kept; ++k) take_largest(rank, r.groups);
    for (int g = 0; g < r.groups; ++g)
        if (rank[g] != NEVER) std::fill(choice + g * size, choice + (g + 1) * size, NEVER);
}

inline void route_forward_row(const RouteShape& r, const float* logits, const float* bias, int64_t* ids, float* weights,
                              float* scores) {
    const int E = r.experts;
    if (r.sigmoid) {
        each_vector(E, [&](int i, int n) { give(scores + i, sigmoid(take(logits + i, n)), n); });
    } else {
        float peak = *std::max_element(logits, logits + E), total = 0;
        each_vector(E, [&](int i, int n) { give(scores + i, exp(take(logits + i, n) - peak), n); });
        for (int i = 0; i < E; ++i) total += scores[i];
        for (int i = 0; i < E; ++i) scores[i] /= total;
    }
    float* choice = Scratch::get<float>(14, E);
    for (int i = 0; i < E; ++i) choice[i] = bias ? scores[i] + bias[i] : scores[i];
    if (r.groups > 1) keep_best_groups(r, choice);
    float total = 1e-20f;
    for (int a = 0; a < r.active; ++a) {
        ids[a] = take_largest(choice, E);
        total += weights[a] = scores[ids[a]];
    }
    for (int a = 0; a < r.active; ++a) weights[a] *= r.scaling / (r.normalise ? total : 1.0f);
}

// `grad_scores` may be null. Weights are w = scaling * s / total (or scaling * s).
inline void route_backward_row(const RouteShape& r, const int64_t* ids, const float* scores, const float* grad_weights,
                               const float* grad_scores, float* grad_logits) {
    const int E = r.experts;
    for (int i = 0; i < E; ++i) grad_logits[i] = grad_scores ? grad_scores[i] : 0.0f;
    float total = 1e-20f, dot = 0;
    for (int a = 0; a < r.active; ++a) {
        total += scores[ids[a]];
        dot += grad_weights[a] * scores[ids[a]];
    }
    for (int a = 0; a < r.active; ++a)
        grad_logits[ids[a]] += r.scaling * (r.normalise ? (grad_weights[a] - dot / total) / total : grad_weights[a]);
    if (r.sigmoid) {
        for (int i = 0; i < E; ++i) grad_logits[i] *= scores[i] * (1.0f - scores[i]);
    } else {
        float mean = 0;
        for (int i = 0; i < E; ++i) mean += grad_logits[i] * scores[i];
        for (int i = 0; i < E; ++i) grad_logits[i] = (grad_logits[i] - mean) * scores[i];
    }
}

}  // namespace glasklar
