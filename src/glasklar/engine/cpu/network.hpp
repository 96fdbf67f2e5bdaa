// One pass of the network over tokens of any number of sequences: prompts, single tokens and drafts side by side.
//
// Every value of a token is computed from that token's row and the cache alone, in an order that its position fixes: its
// logits are the same bits whatever else is in the pass. Equations: DeepSeek-V2 (arXiv 2405.04434) eq. 9-19 with the
// up-projections absorbed, DeepSeek-V3 (arXiv 2412.19437) eq. 12-16. Shape suffixes: see model/config.py.
#pragma once

#include <new>
#include <utility>
#include <vector>

#include "attention.hpp"
#include "product.hpp"
#include "pool.hpp"
#include "sample.hpp"

namespace glasklar {

enum CacheKind { SHORT_CACHE = 0, FLOAT_CACHE = 1, INT8_CACHE = 2 };

// The structs below are mirrored in engine/cpu/library.py.
struct Shape {
    int32_t layers, width, heads, kv_heads, latent, q_latent, nope, rope, value, vocabulary;
    int32_t experts, active, groups, groups_kept, sigmoid, normalise;
    int32_t interleave, page, cache, max_tokens;  // cache: a CacheKind
    float scaling, eps, latent_eps, softmax_scale, swiglu_alpha, swiglu_limit;  // limit 0: plain SwiGLU

    // Attention is cut by up to eight heads that share their keys.
    int attention_tasks() const {
        const int groups_of_heads = latent ? 1 : kv_heads, shared = heads / groups_of_heads;
        return groups_of_heads * ((shared + HEADS - 1) / HEADS);
    }
};

struct Layer {
    const float *attention_norm, *feed_norm, *q_latent_norm, *latent_norm, *q_norm, *k_norm, *sinks, *router_bias;
    Matrix q, q_up, kv, k_up, v_up, out;      // grouped-query attention: q, kv (keys, then values), out
    Matrix gate_up, down;                     // dense feed-forward or shared experts
    Matrix router, experts_gate_up, experts_down;
    int32_t window, hidden, expert_hidden, unused;  // hidden widths are padded to whole groups
};

// The module of multi-token prediction (V3 eq. 21-23), beside its block: it joins a token's embedding with the state before.
struct Draft {
    const float *embedding_norm, *state_norm, *final_norm;
    Matrix join;
};

// One row a token, as in the checkpoint.
struct Embedding {
    const void* rows;
    int64_t narrow;  // bf16, else float
};

// A pass. Token t stands at positions[t] of sequence sequences[t], whose cache pages are tables[sequence].
struct Pass {
    int32_t tokens, outputs;
    const int32_t *ids, *positions, *sequences;
    const int32_t* const* tables;
    uint8_t* cache;            // [layers, pages, page, cache width]
    int64_t layer_stride;      // bytes of one layer's pages
    const float *cosine, *sine;  // [positions, rope / 2]
    const int32_t* output_tokens;  // tokens whose logits are wanted
    float* logits;             // [outputs, padded vocabulary]
    const float* temperatures;
    const double* uniforms;
    int32_t* chosen;
    float* logprobs;
    const float* states;       // [tokens, width] or null: a pass of the draft module over tokens and the states before them
    float* hidden;             // [tokens, width] or null: where the normalised states of all tokens go
};

// Memory whose pages the system gives, zeroed, when they are first met: one token touches little of what 512 need. Begins at a line
// of the caches.
template <class T>
struct Lazy {
    typedef T value_type;
    Lazy() = default;
    template <class U>
    Lazy(const Lazy<U>&) {}
    T* allocate(size_t count) {
        char* memory = static_cast<char*>(std::calloc(1, count * sizeof(T) + sizeof(void*) + 64));
        if (!memory) throw std::bad_alloc();
        const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + sizeof(void*) + 63) / 64 * 64;
        reinterpret_cast<void**>(begin)[-1] = memory;
        return reinterpret_cast<T*>(begin);
    }
    void deallocate(T* begin, size_t) { std::free(reinterpret_cast<void**>(begin)[-1]); }
    // What a vector grows by is zero already.
    template <class U>
    void construct(U*) {}
    template <class U, class... Values>
    void construct(U* place, Values&&... values) {
        new (place) U(std::forward<Values>(values)...);
    }
    bool operator==(const Lazy&) const { return true; }
    bool operator!=(const Lazy&) const { return false; }
};

template <class T>
using Buffer = std::vector<T, Lazy<T>>;

// Rows of activations in the forms that some matrices ask for.
struct Prepared {
    Buffer<float> wide;
    Buffer<Narrow> narrow;
    Buffer<Eights> eights;
    Buffer<Sixteens> sixteens;
    Rows rows;

    void want(int kind) { kinds_ |= 1 << kind; }
    void reserve(int64_t count, int values) {
        rows.width = round_up(values, GROUP);
        int64_t all = count * rows.width;
        if (kinds_ & 1 << FLOAT) wide.resize(all), rows.wide = wide.data();
        if (kinds_ & 1 << BF16) narrow.resize(all), rows.narrow = narrow.data();
        if (kinds_ & (1 << INT4 | EIGHTS_FOR_INT8 << INT8)) eights.resize(all / GROUP), rows.eights = eights.data();
        if (kinds_ & (!EIGHTS_FOR_INT8 << INT8)) sixteens.resize(all / GROUP), rows.sixteens = sixteens.data();
    }

   private:
    int kinds_ = 0;
};

class Network {
   public:
    // With a draft module its block follows the other layers.
    Network(const Shape& shape, const Layer* layers, const Embedding& embedding, const float* final_norm, const Matrix& head, const Draft* draft,
            int threads, const int32_t* cores);
    void run(const Pass& pass);
    int row_bytes() const {
        return shape_.cache == INT8_CACHE ? row_size<Small>() : shape_.cache == FLOAT_CACHE ? 4 * row_size<float>() : 2 * row_size<Short>();
    }
    int padded_vocabulary() const { return head_.tiles() * TILE; }

   private:
    struct Scratch {
        Buffer<float> products, values;
        Buffer<float> nope;                      // one head's, padded
        Buffer<float> router, ranked, by_group;  // of one token
        Buffer<uint8_t> kept;
        Buffer<Line> queries;  // of SLOTS blocks of heads
        Buffer<Floats> scores;
        FloatSpan floats;
        FixedSpan fixed;
        FloatSpan& span(const float*) { return floats; }
        FixedSpan& span(const Short*) { return fixed; }
        FixedSpan& span(const Small*) { return fixed; }
    };
    bool latent() const { return shape_.latent > 0; }
    int key_width() const { return latent() ? shape_.latent + shape_.rope : shape_.nope + shape_.rope; }
    int mixed_width() const { return latent() ? shape_.latent : shape_.value; }
    int kv_width() const { return latent() ? key_width() : shape_.kv_heads * (key_width() + shape_.value); }
    // In units of T: what a group of heads has in a row, and a row.
    template <class T> int group_size() const { return part_size<T>(key_width()) + (latent() ? 0 : part_size<T>(shape_.value)); }
    template <class T> int row_size() const { return latent() ? group_size<T>() : shape_.kv_heads * group_size<T>(); }
    template <class T> Widths widths() const { return {key_width(), mixed_width(), latent() ? 0 : part_size<T>(key_width()), row_size<T>()}; }

    template <class T> void body(Worker& me, bool drafting);
    void embed(int token);
    void join(Worker& me);
    template <class T> void attention(Worker& me, const Layer& layer, int index);
    template <class T> void store_latents(const Layer& layer, int index, int token);
    template <class T> void store_keys(const Layer& layer, int index, int token);
    template <class T> void attend_task(Worker& me, const Layer& layer, int index, int task);
    template <class T> void cache_rows(int layer, int token, int from, int to, int offset, const T** rows) const;
    template <class T> const T* cache_row(int layer, int token, int position) const {
        const int page = pass_.tables[pass_.sequences[token]][position / shape_.page];
        const uint8_t* rows = pass_.cache + layer * pass_.layer_stride;
        return reinterpret_cast<const T*>(rows) + (int64_t(page) * shape_.page + position % shape_.page) * row_size<T>();
    }
    // Up to HEADS heads that share their keys, those of `group`.
    struct HeadRange {
        int group, first, count;
    };
    HeadRange heads_of(int block) const;
    void begin_mix(const Layer& layer, const HeadRange& heads, Mixed& all) const;
    void finish_mix(const Mixed& all, int token, const HeadRange& heads);
    void join_spans(const Layer& layer, int token, int block);
    void add_to(int token, int column, Floats v) {
        float* x = &x_[int64_t(token) * padded_ + column];
        store(x, load(x) + v);
    }
    void feed_forward(Worker& me, const Layer& layer);
    void output(Worker& me, bool drafting);
    void route(const Layer& layer, int token, Scratch& scratch);
    void group_by_expert();

    // f(token), for all of the pass: of many tokens some at a time.
    template <class F>
    void each_token(Worker& me, F f) {
        auto some = [this] { return std::clamp(pass_.tokens / (4 * pool_.threads()), 1, 4); };
        me.parallel([&] { return (pass_.tokens + some() - 1) / some(); }, [&](int i) {
            for (int t = i * some(); t < std::min(pass_.tokens, (i + 1) * some()); ++t) f(t);
        });
    }

    static void norm(const float* x, int64_t width, const float* weight, float eps, float* out);
    void rotate(float* x, int position) const;
    // Products with all tiles [first, last) of a copy; rows are row_list[0..count) of `in`; emit(i, column, values).
    template <class Emit>
    void tiles(const Matrix& w, int copy, int first, int last, const Rows& in, const int64_t* row_list, int count, Emit emit,
               const uint8_t* after = nullptr);
    // Tiles of a matrix that meets the rows of all tokens, or of its copy for one head: emit(copy, token, column, values).
    template <class Emit>
    void dense(const Matrix& w, int task, const Rows& in, Emit emit);
    template <class V>
    V gated(V gate, V up) const {
        if (shape_.swiglu_limit == 0) return silu(gate) * up;
        // gpt-oss: gate sigmoid(alpha gate) (up + 1), both cut off
        const V limit = spread_as<V>(shape_.swiglu_limit);
        gate = smaller(gate, limit);
        return gate / (1.0f + exp(gate * -shape_.swiglu_alpha)) * (larger(smaller(up, limit), -limit) + 1.0f);
    }
    // Gated hidden values [first, last) of a copy, in units of 32.
    struct Units {
        int copy, first, last;
    };
    void hidden_task(const Matrix& w, Units units, Units next, const Rows& in, const int64_t* row_list, int count, const Rows& out, int64_t out_first,
                     Scratch& scratch);
    // Tiles of one task where `rows` meet the matrix: enough to stream (a start costs as much as some kilobytes), as many as are read
    // side by side where the matrix has enough of them, and few enough to share out evenly: with many rows a tile is more work.
    int run_length(const Matrix& w, int rows) const {
        if (!w.data) return 1;
        const int64_t work = std::max(1, rows / 4) * tile_bytes(w.kind, w.inputs);
        const int least = std::max(rows < 8 ? 2 : TASK_TILES, int((64 << 10) / work) * (rows < 8 ? 2 : 1));
        return least < STREAMS && w.tiles() * w.copies >= 8 * STREAMS * pool_.threads() ? STREAMS : least;
    }
    int run_length(const Matrix& w) const { return run_length(w, pass_.tokens); }
    int tasks(const Matrix& w, int rows) const { return w.data ? (w.tiles() + run_length(w, rows) - 1) / run_length(w, rows) * w.copies : 0; }
    int tasks(const Matrix& w) const { return tasks(w, pass_.tokens); }
    // What a thread that takes task `i` will probably take next, the others taking theirs meanwhile.
    int next_task(int i) const { return i + pool_.threads(); }

    Shape shape_;
    std::vector<Layer> layers_;
    Embedding embedding_;
    Matrix head_;
    const float* final_norm_;
    Draft draft_{};
    Pass pass_{};
    int64_t active_bytes_ = 0, draft_bytes_ = 0;  // that a token passes
    bool far_ = false;                            // more than a core's caches keep from one pass to the next

    int padded_ = 0;  // width, in whole groups
    Buffer<float> x_, normed_, both_, q_, q_latent_, kv_, mixed_, joined_, router_;
    Buffer<float> query_, span_values_;
    Buffer<Mixed> span_;
    // Tokens first .. first + count - 1 of the pass follow each other in one sequence.
    struct Query {
        int32_t first, count;
    };
    // Blocks of heads, of all its tokens, that a task takes at most.
    static constexpr int TOKENS = 8, SLOTS = 16;
    Buffer<Query> queries_;
    Prepared join_in_, in_, q_in_, nope_in_, mixed_in_, out_in_, feed_in_, hidden_in_, expert_in_, head_in_;
    Buffer<int64_t> every_, by_head_, expert_tokens_, expert_slots_;
    Buffer<int32_t> chosen_, expert_start_, busy_;
    Buffer<float> weights_;
    std::vector<Scratch> scratch_;
    int spans_ = 0;   // spans a query is cut into for parallel work; 0: a task takes all of them
    int blocks_ = 1;  // blocks of heads a task takes
    Pool pool_;       // the last: its threads end before what they may still look at
};

}  // namespace glasklar
