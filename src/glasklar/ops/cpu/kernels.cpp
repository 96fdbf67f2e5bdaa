// The C interface: plain pointers and sizes, one function for each operation and number type. Nothing of torch is linked;
// the OpenMP calls find the runtime that torch has loaded, so that both use the same threads.

#include <type_traits>

#include "attention.hpp"
#include "experts.hpp"

using namespace glasklar;

namespace {

template <class T>
void rms_norm_forward(const T* x, int64_t stride, const T* weight, float eps, T* y, float* inverse, int64_t rows,
                      int64_t D, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) rms_norm_forward_row(x + i * stride, weight, eps, y + i * D, inverse + i, int(D));
}

template <class T>
void rms_norm_backward(const T* x, int64_t stride, const T* weight, const float* inverse, const T* grad, T* grad_x,
                       float* partial, T* grad_weight, int64_t rows, int64_t D, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int c = 0; c < CHUNKS; ++c) {
        float* total = partial + c * D;
        std::fill(total, total + D, 0.0f);
        for (int64_t i = rows * c / CHUNKS; i < rows * (c + 1) / CHUNKS; ++i)
            rms_norm_backward_row(x + i * stride, weight, inverse[i], grad + i * D, grad_x + i * D, total, int(D));
    }
    for (int64_t i = 0; i < D; ++i) {
        float total = 0;
        for (int c = 0; c < CHUNKS; ++c) total += partial[c * D + i];
        put(grad_weight + i, total);
    }
}

template <class T>
void swiglu_forward(const T* gate_up, T* y, int64_t rows, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i) swiglu_forward_row(gate_up + i * 2 * F, y + i * F, int(F));
}

template <class T>
void swiglu_backward(const T* gate_up, const T* grad, T* grad_gate_up, int64_t rows, int64_t F, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        swiglu_backward_row(gate_up + i * 2 * F, grad + i * F, grad_gate_up + i * 2 * F, int(F));
}

// x [B, T, H, R] with strides, angles [B, T, R/2] with strides, y contiguous.
template <class T>
void rotate(const T* x, const int64_t* x_strides, const float* cosine, const float* sine, const int64_t* angle_strides,
            float direction, int interleave, T* y, int64_t B, int64_t length, int64_t H, int64_t R, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < B * length; ++i) {
        int64_t b = i / length, t = i % length, angle = b * angle_strides[0] + t * angle_strides[1];
        for (int64_t h = 0; h < H; ++h)
            rotate_row(x + b * x_strides[0] + t * x_strides[1] + h * x_strides[2], cosine + angle, sine + angle,
                       direction, interleave != 0, y + (i * H + h) * R, int(R));
    }
}

template <class T>
void logprobs_forward(const T* logits, const int64_t* targets, float* logprobs, float* entropy, float* log_sums,
                      int64_t rows, int64_t W, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        logprob_forward_row(logits + i * W, targets[i], logprobs + i, entropy + i, log_sums + i, int(W));
}

template <class T>
void logprobs_backward(const T* logits, const int64_t* targets, const float* log_sums, const float* grad, T* grad_logits,
                       int64_t rows, int64_t W, int threads) {
#pragma omp parallel for num_threads(threads)
    for (int64_t i = 0; i < rows; ++i)
        logprob_backward_row(logits + i * W, targets[i], log_sums[i], grad[i], grad_logits + i * W, int(W));
}

template <class T>
Heads<T> heads(T* data, const int64_t* strides) {
    return {data, strides[0], strides[1], strides[2]};
}

// strides: [tensor][batch, head, position] in the order of the tensors. `spans` [B, T] is written for the backward pass.
template <class T>
void attention_forward(const T* q, const T* k, const T* v, const T* mask, float scale, T* out, float* log_sums,
                       Span* spans, const int64_t* shape, const int64_t* strides, int threads) {
    const AttentionShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
    find_spans(s.B * s.T, s.S, mask, spans, threads);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < s.B * s.G; ++item)
        attention_forward_item<T>(
            {s, heads(q, strides), heads(k, strides + 3), heads(v, strides + 6), mask, spans, scale, item},
            heads(out, strides + 9), log_sums);
}

template <class T>
void attention_backward(const T* q, const T* k, const T* v, const T* mask, float scale, const T* out, const T* grad,
                        const float* log_sums, const Span* spans, T* grad_q, T* grad_k, T* grad_v, const int64_t* shape,
                        const int64_t* strides, int threads) {
    const AttentionShape s{shape[0], shape[1], shape[2], shape[3], shape[4], shape[5], shape[6]};
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t item = 0; item < s.B * s.G; ++item)
        AttentionBackward<T>(
            {s, heads(q, strides), heads(k, strides + 3), heads(v, strides + 6), mask, spans, scale, item},
            heads(out, strides + 9), heads(grad, strides + 12), log_sums)
            .run(heads(grad_q, strides + 15), heads(grad_k, strides + 18), heads(grad_v, strides + 21));
}

// Weights of all experts laid out for products: `across` sums over a matrix's columns (x W^T), otherwise over its rows.
template <class T>
struct ExpertWeights {
    using unit = typename Unit<T>::type;
    ExpertWeights(const T* data, int64_t E, int64_t rows, int64_t columns, bool across, int threads)
        : numbers(int(across ? columns : rows)), results(int(across ? rows : columns)),
          units(Packed<T>::units(numbers, results)), memory(new unit[units * E]) {
#pragma omp parallel for num_threads(threads)
        for (int64_t e = 0; e < E; ++e) {
            auto row = [&](int i) { return data + (e * rows + i) * columns; };
            if (across) (*this)[int(e)].transpose(results, numbers, row);
            else (*this)[int(e)].stack(numbers, results, row);
        }
    }
    Packed<T> operator[](int e) const { return Packed<T>(memory.get() + e * units, numbers, results); }

    int numbers, results;
    std::size_t units;
    std::unique_ptr<unit[]> memory;
};

template <class T>
void experts_forward(const T* x, const int64_t* ids, const float* weights, const T* gate_up, const T* down, T* y,
                     T* hidden, T* results, int32_t* choice, int32_t* place, int32_t* start, const int64_t* shape,
                     int threads) {
    const ExpertShape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const Plan plan{choice, place, start};
    plan_rows(s, ids, plan);
    const ExpertWeights<T> up(gate_up, s.E, 2 * s.F, s.D, true, threads), out(down, s.E, s.D, s.F, true, threads);
    const int64_t blocks = count_blocks(s, start);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < blocks; ++i) {
        Block block = find_block(start, i);
        experts_forward_block(s, plan, block, x, weights, up[block.expert], out[block.expert], hidden, results);
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < s.T; ++t) join_row(s, place, results, t, y);
}

template <class T>
void experts_backward(const T* x, const float* weights, const T* gate_up, const T* down, const T* hidden,
                      const T* grad, T* grad_x, float* grad_weights, T* grad_gate_up, T* grad_down, T* grad_hidden,
                      T* gated, T* grad_rows, int32_t* choice, int32_t* place, int32_t* start, const int64_t* shape,
                      int threads) {
    const ExpertShape s{shape[0], shape[1], shape[2], shape[3], shape[4]};
    const Plan plan{choice, place, start};
    {
        const ExpertWeights<T> up(gate_up, s.E, 2 * s.F, s.D, false, threads), out(down, s.E, s.D, s.F, false, threads);
        const int64_t blocks = count_blocks(s, start);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
        for (int64_t i = 0; i < blocks; ++i) {
            Block block = find_block(start, i);
            experts_backward_block(s, plan, block, weights, hidden, grad, up[block.expert], out[block.expert],
                                   grad_hidden, gated, grad_weights, grad_rows);
        }
    }
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < s.T; ++t) join_row(s, place, grad_rows, t, grad_x);
#pragma omp parallel for schedule(dynamic) num_threads(threads)
    for (int64_t i = 0; i < 2 * s.E; ++i) {
        const int64_t e = i / 2;
        auto token = [&](int r) { return choice[r] / s.A; };
        if (i % 2 == 0)
            weight_gradient(start[e], start[e + 1], int(2 * s.F), int(s.D),
                            [&](int r) { return grad_hidden + r * 2 * s.F; }, [&](int r) { return x + token(r) * s.D; },
                            grad_gate_up + e * 2 * s.F * s.D);
        else
            weight_gradient(start[e], start[e + 1], int(s.D), int(s.F), [&](int r) { return grad + token(r) * s.D; },
                            [&](int r) { return gated + r * s.F; }, grad_down + e * s.D * s.F);
    }
}

RouteShape route_shape(const int64_t* s, float scaling) {
    return {int(s[0]), int(s[1]), int(s[2]), int(s[3]), s[4] != 0, s[5] != 0, scaling};
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

// Whether this machine can run what this file was compiled for.
EXPORT int glasklar_level() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}

EXPORT void route_forward(const float* logits, const float* bias, int64_t* ids, float* weights, float* scores,
                          int64_t rows, const int64_t* shape, float scaling, int threads) {
    const RouteShape r = route_shape(shape, scaling);
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < rows; ++t)
        route_forward_row(r, logits + t * r.experts, bias, ids + t * r.active, weights + t * r.active, scores + t * r.experts);
}

EXPORT void route_backward(const int64_t* ids, const float* scores, const float* grad_weights, const float* grad_scores,
                           float* grad_logits, int64_t rows, const int64_t* shape, float scaling, int threads) {
    const RouteShape r = route_shape(shape, scaling);
#pragma omp parallel for num_threads(threads)
    for (int64_t t = 0; t < rows; ++t)
        route_backward_row(r, ids + t * r.active, scores + t * r.experts, grad_weights + t * r.active,
                           grad_scores ? grad_scores + t * r.experts : nullptr, grad_logits + t * r.experts);
}

#define EXPORT_FOR(T, suffix)                                                                                            \
    EXPORT void rms_norm_forward_##suffix(const T* x, int64_t stride, const T* w, float eps, T* y, float* inverse,       \
                                          int64_t rows, int64_t D, int threads) {                                        \
        rms_norm_forward(x, stride, w, eps, y, inverse, rows, D, threads);                                               \
    }                                                                                                                    \
    EXPORT void rms_norm_backward_##suffix(const T* x, int64_t stride, const T* w, const float* inverse, const T* g,     \
                                           T* gx, float* partial, T* gw, int64_t rows, int64_t D, int threads) {         \
        rms_norm_backward(x, stride, w, inverse, g, gx, partial, gw, rows, D, threads);                                  \
    }                                                                                                                    \
    EXPORT void swiglu_forward_##suffix(const T* gu, T* y, int64_t rows, int64_t F, int threads) {                       \
        swiglu_forward(gu, y, rows, F, threads);                                                                         \
    }                                                                                                                    \
    EXPORT void swiglu_backward_##suffix(const T* gu, const T* g, T* ggu, int64_t rows, int64_t F, int threads) {        \
        swiglu_backward(gu, g, ggu, rows, F, threads);                                                                   \
    }                                                                                                                    \
    EXPORT void rotate_##suffix(const T* x, const int64_t* xs, const float* c, const float* s, const int64_t* as,        \
                                float direction, int interleave, T* y, int64_t B, int64_t length, int64_t H, int64_t R,  \
                                int threads) {                                                                           \
        rotate(x, xs, c, s, as, direction, interleave, y, B, length, H, R, threads);                                     \
    }                                                                                                                    \
    EXPORT void logprobs_forward_##suffix(const T* logits, const int64_t* targets, float* logprobs, float* entropy,      \
                                          float* log_sums, int64_t rows, int64_t W, int threads) {                       \
        logprobs_forward(logits, targets, logprobs, entropy, log_sums, rows, W, threads);                                \
    }                                                                                                                    \
    EXPORT void logprobs_backward_##suffix(const T* logits, const int64_t* targets, const float* log_sums,               \
                                           const float* grad, T* grad_logits, int64_t rows, int64_t W, int threads) {    \
        logprobs_backward(logits, targets, log_sums, grad, grad_logits, rows, W, threads);                               \
    }                                                                                                                    \
    EXPORT void attention_forward_##suffix(const T* q, const T* k, const T* v, const T* mask, float scale, T* out,       \
                                           float* log_sums, Span* spans, const int64_t* shape, const int64_t* strides,     \
                                           int threads) {                                                                \
        attention_forward(q, k, v, mask, scale, out, log_sums, spans, shape, strides, threads);                          \
    }                                                                                                                    \
    EXPORT void attention_backward_##suffix(const T* q, const T* k, const T* v, const T* mask, float scale,              \
                                            const T* out, const T* g, const float* log_sums, const Span* spans, T* gq,   \
                                            T* gk, T* gv, const int64_t* shape, const int64_t* strides, int threads) {   \
        attention_backward(q, k, v, mask, scale, out, g, log_sums, spans, gq, gk, gv, shape, strides, threads);          \
    }                                                                                                                    \
    EXPORT void experts_forward_##suffix(const T* x, const int64_t* ids, const float* w, const T* gu, const T* d, T* y,  \
                                         T* hidden, T* results, int32_t* choice, int32_t* place, int32_t* start,         \
                                         const int64_t* shape, int threads) {                                            \
        experts_forward(x, ids, w, gu, d, y, hidden, results, choice, place, start, shape, threads);                     \
    }                                                                                                                    \
    EXPORT void experts_backward_##suffix(const T* x, const float* w, const T* gu, const T* d, const T* hidden,          \
                                          const T* g, T* gx, float* gw, T* ggu, T* gd, T* gh, T* gated, T* grows,        \
                                          int32_t* choice, int32_t* place, int32_t* start, const int64_t* shape,         \
                                          int threads) {                                                                 \
        experts_backward(x, w, gu, d, hidden, g, gx, gw, ggu, gd, gh, gated, grows, choice, place, start, shape,         \
                         threads);                                                                                       \
    }

EXPORT_FOR(float, f32)
EXPORT_FOR(bf16, bf16)
