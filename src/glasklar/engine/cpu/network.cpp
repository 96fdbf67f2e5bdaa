// The pass, and the C interface to it: plain pointers, nothing of Python or torch is linked.
#include "network.hpp"

#include "pack.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace glasklar {

Network::Network(const Shape& shape, const Layer* layers, const Embedding& embedding, const float* final_norm, const Matrix& head, const Draft* draft,
                 int threads, const int32_t* cores)
    : shape_(shape), layers_(layers, layers + shape.layers + (draft ? 1 : 0)), embedding_(embedding), head_(head), final_norm_(final_norm), pool_(threads, cores ? std::vector<int>(cores, cores + threads) : std::vector<int>()) {
    const int64_t T = shape.max_tokens, H = shape.heads;
    padded_ = round_up(shape.width, GROUP);
    int hidden = 0, expert_hidden = 0;
    auto bytes = [](const Matrix& w, double share) { return w.data ? int64_t(share * w.copies * w.tiles() * tile_bytes(w.kind, w.inputs)) : 0; };
    for (const Layer& layer : layers_) {
        int64_t& active = &layer - layers_.data() < shape.layers ? active_bytes_ : draft_bytes_;
        for (const Matrix* w : {&layer.q, &layer.kv}) in_.want(w->kind);
        if (layer.q_up.data) q_in_.want(layer.q_up.kind);
        if (latent()) nope_in_.want(layer.k_up.kind), mixed_in_.want(layer.v_up.kind);
        out_in_.want(layer.out.kind);
        if (layer.gate_up.data) feed_in_.want(layer.gate_up.kind), hidden_in_.want(layer.down.kind);
        if (layer.router.data) feed_in_.want(layer.router.kind), feed_in_.want(layer.experts_gate_up.kind), expert_in_.want(layer.experts_down.kind);
        hidden = std::max(hidden, layer.hidden);
        expert_hidden = std::max(expert_hidden, layer.expert_hidden);
        for (const Matrix* w : {&layer.q, &layer.q_up, &layer.kv, &layer.k_up, &layer.v_up, &layer.out, &layer.gate_up, &layer.down, &layer.router}) active += bytes(*w, 1);
        for (const Matrix* w : {&layer.experts_gate_up, &layer.experts_down}) active += bytes(*w, double(shape.active) / std::max(shape.experts, 1));
    }
    head_in_.want(head.kind);
    active_bytes_ += bytes(head, 1);
    if (draft) {
        draft_ = *draft;
        draft_bytes_ += bytes(head, 1) + bytes(draft_.join, 1);
        join_in_.want(draft_.join.kind);
        join_in_.reserve(T, 2 * shape.width);
        both_.resize(T * round_up(2 * shape.width, GROUP));
    }
    far_ = active_bytes_ > 8 << 20;
    in_.reserve(T, shape.width);
    q_in_.reserve(T, std::max(shape.q_latent, 1));
    nope_in_.reserve(latent() ? T * H : 0, std::max(shape.nope, 1));
    mixed_in_.reserve(latent() ? T * H : 0, std::max(shape.latent, 1));
    out_in_.reserve(T, H * shape.value);
    feed_in_.reserve(T, shape.width);
    hidden_in_.reserve(T, std::max(hidden, 1));
    expert_in_.reserve(T * shape.active, std::max(expert_hidden, 1));
    head_in_.reserve(T, shape.width);
    x_.resize(T * padded_);
    normed_.resize(T * padded_);
    q_.resize(T * round_up(H * (shape.nope + shape.rope), GROUP));
    q_latent_.resize(T * round_up(std::max(shape.q_latent, 1), GROUP));
    kv_.resize(T * round_up(kv_width(), GROUP));
    query_.resize(T * H * key_width());
    mixed_.resize(T * H * round_up(mixed_width(), GROUP));
    joined_.resize(T * round_up(H * shape.value, GROUP));
    router_.resize(T * round_up(std::max(shape.experts, 1), TILE));
    for (int64_t i = 0; i < T * std::max<int64_t>({H, shape.active, 1}); ++i) every_.push_back(i);
    by_head_.resize(T * H);
    for (int64_t h = 0; h < H; ++h)
        for (int64_t t = 0; t < T; ++t) by_head_[h * T + t] = t * H + h;
    chosen_.resize(T * shape.active);
    weights_.resize(T * shape.active);
    expert_tokens_.resize(T * shape.active);
    expert_slots_.resize(T * shape.active);
    expert_start_.resize(shape.experts + 1);
    scratch_.resize(threads);
    for (Scratch& s : scratch_) {
        s.products.resize(64 * STREAMS * TILE);
        s.nope.resize(nope_in_.rows.width);
        s.router.resize(shape.experts), s.ranked.resize(shape.experts), s.by_group.resize(shape.groups), s.kept.resize(shape.groups);
        s.scores.resize(SLOTS * SPAN * HEADS / LANES);
        s.values.resize((SLOTS + 1) * HEADS * round_up(mixed_width(), GROUP));
        const Widths w = shape.cache == INT8_CACHE ? widths<Small>() : shape.cache == FLOAT_CACHE ? widths<float>() : widths<Short>();
        shape.cache == FLOAT_CACHE ? s.floats.reserve(w) : s.fixed.reserve(w);
        s.queries.resize(SLOTS * (shape.cache == FLOAT_CACHE ? FloatSpan::query_lines(w) : FixedSpan::query_lines(w)));
    }
}

void Network::run(const Pass& pass) {
    pass_ = pass;
    const int blocks = shape_.attention_tasks();
    int longest = 0;
    for (int t = 0; t < pass.tokens; ++t) longest = std::max(longest, pass.positions[t] + 1);
    // Few queries over many keys: the spans of a query are shared among the threads.
    spans_ = pass.tokens * blocks < 8 && longest > SPAN ? (longest + SPAN - 1) / SPAN : 0;
    // Tokens that follow each other share the rows that a task has in its near cache.
    const int together = spans_ ? 1 : std::min(TOKENS, std::max(1, pass.tokens * blocks / 16));
    // Blocks of heads that share their keys are one task where that leaves enough of them: the keys are read once.
    const int shared = latent() ? blocks : blocks / shape_.kv_heads;
    blocks_ = 1;
    for (int each = 2; each * together <= SLOTS; ++each)
        if (shared % each == 0 && pass.tokens / together * (blocks / each) * std::max(1, spans_) >= 8 * pool_.threads()) blocks_ = each;
    queries_.clear();
    for (int t = 0; t < pass.tokens; ++t) {
        const bool next = t && pass.sequences[t] == pass.sequences[t - 1] && pass.positions[t] == pass.positions[t - 1] + 1;
        if (next && queries_.back().count < together) ++queries_.back().count;
        else queries_.push_back({t, 1});
    }
    if (spans_) {
        const int width = round_up(mixed_width(), GROUP);
        const int64_t all = int64_t(pass.tokens) * blocks * spans_;
        if (int64_t(span_.size()) < all) span_.resize(all), span_values_.resize(all * HEADS * width);
        for (int64_t i = 0; i < all; ++i) span_[i].values = &span_values_[i * HEADS * width], span_[i].width = width;
    }
    const bool alone = double(pass.tokens) * (pass.states ? draft_bytes_ : active_bytes_) < 2e6;
    // Which phases there are is settled here: a straggler may look at `pass_` when the next pass has begun.
    auto body_of = [this, drafting = pass.states != nullptr](Worker& me) {
        FlushTiny tiny;
        if (shape_.cache == FLOAT_CACHE) body<float>(me, drafting);
        else if (shape_.cache == INT8_CACHE) body<Small>(me, drafting);
        else body<Short>(me, drafting);
    };
    pool_.run(std::max(shape_.layers, 2) * 16 + 8, alone, body_of);
}

void Network::norm(const float* x, int64_t width, const float* weight, float eps, float* out) {
    const int64_t whole = width / LANES * LANES;
    alignas(64) float squares[LANES];
    for (int part = 0; part < LANES; part += NEAR) {
        Near sums{};
        for (int64_t i = part; i < whole; i += LANES) sums = fma(near_at(x + i), near_at(x + i), sums);
        put(squares + part, sums);
    }
    float total = sum_at(squares);
    for (int64_t i = whole; i < width; ++i) total += x[i] * x[i];
    const float inverse = 1 / std::sqrt(total / float(width) + eps);
    for (int64_t i = 0; i < whole; i += NEAR) put(out + i, near_at(x + i) * inverse * near_at(weight + i));
    for (int64_t i = whole; i < width; ++i) out[i] = x[i] * inverse * weight[i];
}

void Network::rotate(float* x, int position) const {
    const int half = shape_.rope / 2;
    const float *cosine = pass_.cosine + int64_t(position) * half, *sine = pass_.sine + int64_t(position) * half;
    for (int i = 0; i < half; ++i) {
        float& a = shape_.interleave ? x[2 * i] : x[i];
        float& b = shape_.interleave ? x[2 * i + 1] : x[i + half];
        const float first = a * cosine[i] - b * sine[i];
        b = b * cosine[i] + a * sine[i];
        a = first;
    }
}

template <class Emit>
void Network::tiles(const Matrix& w, int copy, int first, int last, const Rows& in, const int64_t* row_list, int count, Emit emit, const uint8_t* after) {
    // Blocks of rows stay in the near cache while the tiles pass by.
    for (int row = 0; row < count; row += 64)
        multiply_all(w, copy, first, last, after, far_, in, row_list + row, std::min(64, count - row), [&](int i, int t, Floats v) { emit(row + i, t * TILE, v); });
}

template <class Emit>
void Network::dense(const Matrix& w, int task, const Rows& in, Emit emit) {
    const int run = run_length(w), each = tasks(w) / w.copies, next = next_task(task);
    const int copy = task / each, first = task % each * run;
    tiles(w, copy, first, std::min(first + run, w.tiles()), in, w.copies > 1 ? &by_head_[int64_t(copy) * shape_.max_tokens] : every_.data(), pass_.tokens,
          [&](int t, int column, Floats v) { emit(copy, t, column, v); }, w.tile(next / each, next % each * run));
}

template <class T>
void Network::body(Worker& me, bool drafting) {
    if (drafting) {
        join(me);
        attention<T>(me, layers_.back(), 0);
        feed_forward(me, layers_.back());
    } else {
        each_token(me, [&](int t) { embed(t); });
        for (int i = 0; i < shape_.layers; ++i) {
            attention<T>(me, layers_[i], i);
            feed_forward(me, layers_[i]);
        }
    }
    output(me, drafting);
}

void Network::embed(int token) {
    const int64_t from = int64_t(pass_.ids[token]) * shape_.width;
    for (int i = 0; i < shape_.width; ++i)
        x_[int64_t(token) * padded_ + i] = embedding_.narrow ? value(static_cast<const bf16*>(embedding_.rows)[from + i])
                                                             : static_cast<const float*>(embedding_.rows)[from + i];
}

// V3 eq. 21: M [norm(Emb(t)); norm(h)].
void Network::join(Worker& me) {
    const int64_t D = shape_.width, row_size = round_up(2 * D, GROUP);
    each_token(me, [&, D, row_size](int t) {
        float *row = &both_[t * row_size], *x = &x_[int64_t(t) * padded_];
        embed(t);
        norm(x, D, draft_.embedding_norm, shape_.eps, row);
        norm(pass_.states + t * D, D, draft_.state_norm, shape_.eps, row + D);
        prepare(row, join_in_.rows, t);
    });
    me.parallel([this] { return tasks(draft_.join); }, [&, D](int i) {
        dense(draft_.join, i, join_in_.rows, [&, D](int, int t, int column, Floats v) {
            store_first(&x_[int64_t(t) * padded_ + column], v, D - column);
        });
    });
}

template <class T>
void Network::attention(Worker& me, const Layer& layer, int index) {
    const Shape& s = shape_;
    const int H = s.heads, K = s.nope + s.rope, KEY = key_width(), MIXED = round_up(mixed_width(), GROUP);
    const int64_t q_row = round_up(H * K, GROUP), latent_row = round_up(std::max(s.q_latent, 1), GROUP), kv_row = round_up(kv_width(), GROUP);
    auto into = [](Buffer<float>& buffer, int64_t row_size, int limit) {
        return [&buffer, row_size, limit](int, int t, int column, Floats v) { store_first(&buffer[t * row_size + column], v, limit - column); };
    };
    float* query = query_.data();

    each_token(me, [&](int t) {
        norm(&x_[int64_t(t) * padded_], s.width, layer.attention_norm, s.eps, &normed_[int64_t(t) * padded_]);
        prepare(&normed_[int64_t(t) * padded_], in_.rows, t);
    });
    Buffer<float>& first_q = layer.q_up.data ? q_latent_ : q_;
    me.parallel([&] { return tasks(layer.q) + tasks(layer.kv); }, [&](int i) {
        if (i < tasks(layer.q)) dense(layer.q, i, in_.rows, into(first_q, layer.q_up.data ? latent_row : q_row, layer.q.outputs));
        else dense(layer.kv, i - tasks(layer.q), in_.rows, into(kv_, kv_row, layer.kv.outputs));
    });
    each_token(me, [&](int t) {
        if (layer.q_up.data) {
            float* row = &q_latent_[t * latent_row];
            norm(row, s.q_latent, layer.q_latent_norm, s.latent_eps, row);
            prepare(row, q_in_.rows, t);
        }
        latent() ? store_latents<T>(layer, index, t) : store_keys<T>(layer, index, t);
    });
    if (layer.q_up.data)
        me.parallel([&] { return tasks(layer.q_up); }, [&](int i) { dense(layer.q_up, i, q_in_.rows, into(q_, q_row, layer.q_up.outputs)); });
    each_token(me, [&](int t) {
        for (int h = 0; h < H; ++h) {
            float* q = &q_[t * q_row + h * K];
            float* to = query + (int64_t(t) * H + h) * KEY;
            if (layer.q_norm) norm(q, K, layer.q_norm, s.eps, q);
            rotate(q + s.nope, pass_.positions[t]);
            if (!latent()) {
                std::copy(q, q + K, to);
                continue;
            }
            std::copy(q + s.nope, q + K, to + s.latent);
            float* padded = scratch_[me.thread()].nope.data();
            std::copy(q, q + s.nope, padded);  // zeros follow
            prepare(padded, nope_in_.rows, int64_t(t) * H + h);
        }
    });
    if (latent())  // q_nope . W_UK: queries move into the space of the latents
        me.parallel([&] { return tasks(layer.k_up); }, [&](int i) {
            dense(layer.k_up, i, nope_in_.rows, [&](int h, int t, int column, Floats v) { store_first(query + (int64_t(t) * H + h) * KEY + column, v, s.latent - column); });
        });
    me.parallel([&] { return int(queries_.size()) * s.attention_tasks() / blocks_ * std::max(1, spans_); }, [&](int i) { attend_task<T>(me, layer, index, i); });
    me.parallel([&] { return pass_.tokens * (spans_ ? s.attention_tasks() : 1); }, [&](int i) {
        const int each = spans_ ? s.attention_tasks() : 1, t = i / each;
        HeadRange range = spans_ ? heads_of(i % each) : HeadRange{0, 0, H};
        if (spans_) join_spans(layer, t, i % each);
        for (int h = range.first; latent() && h < range.first + range.count; ++h) prepare(&mixed_[(int64_t(t) * H + h) * MIXED], mixed_in_.rows, int64_t(t) * H + h);
    });
    const int64_t joined_row = round_up(H * s.value, GROUP);
    if (latent())
        me.parallel([&] { return tasks(layer.v_up); }, [&](int i) {
            dense(layer.v_up, i, mixed_in_.rows,
                  [&](int h, int t, int column, Floats v) { store_first(&joined_[t * joined_row + h * s.value + column], v, s.value - column); });
        });
    each_token(me, [&](int t) {
        if (!latent())
            for (int h = 0; h < H; ++h) std::memcpy(&joined_[t * joined_row + h * s.value], &mixed_[(int64_t(t) * H + h) * MIXED], 4 * s.value);
        prepare(&joined_[t * joined_row], out_in_.rows, t);
    });
    me.parallel([&] { return tasks(layer.out); }, [&](int i) {
        dense(layer.out, i, out_in_.rows, [&](int, int t, int column, Floats v) { add_to(t, column, v); });
    });
}

// The token's latent, normalised, and its turned key go into the cache (V2 eq. 9, 14-15).
template <class T>
void Network::store_latents(const Layer& layer, int index, int token) {
    float* row = &kv_[int64_t(token) * round_up(kv_width(), GROUP)];
    norm(row, shape_.latent, layer.latent_norm, shape_.latent_eps, row);
    rotate(row + shape_.latent, pass_.positions[token]);
    T* to = const_cast<T*>(cache_row<T>(index, token, pass_.positions[token]));
    store_part(row, key_width(), to);
}

template <class T>
void Network::store_keys(const Layer& layer, int index, int token) {
    const int K = key_width(), V = shape_.value;
    float* row = &kv_[int64_t(token) * round_up(kv_width(), GROUP)];
    T* to = const_cast<T*>(cache_row<T>(index, token, pass_.positions[token]));
    for (int g = 0; g < shape_.kv_heads; ++g) {
        float *key = row + g * K, *values = row + shape_.kv_heads * K + g * V;
        if (layer.k_norm) norm(key, K, layer.k_norm, shape_.eps, key);
        rotate(key + shape_.nope, pass_.positions[token]);
        store_part(key, K, to + g * group_size<T>());
        store_part(values, V, to + g * group_size<T>() + part_size<T>(K));
    }
}

// The rows of positions [from, to) of a token's sequence.
template <class T>
void Network::cache_rows(int layer, int token, int from, int to, int offset, const T** rows) const {
    for (int p = from; p < to;) {
        const T* row = cache_row<T>(layer, token, p) + offset;
        for (const int end = std::min(to, (p / shape_.page + 1) * shape_.page); p < end; ++p, row += row_size<T>()) *rows++ = row;
    }
}

// A few tokens of one sequence, a block of heads or several that share their keys, and one span or all of them.
template <class T>
void Network::attend_task(Worker& me, const Layer& layer, int index, int task) {
    const Shape& s = shape_;
    const int blocks = s.attention_tasks(), first_block = task % (blocks / blocks_) * blocks_, rest = task / (blocks / blocks_);
    const Query& some = queries_[rest / std::max(1, spans_)];
    const int KEY = key_width(), width = round_up(mixed_width(), GROUP), last = some.first + some.count - 1;
    const int offset = latent() ? 0 : heads_of(first_block).group * group_size<T>();
    Scratch& scratch = scratch_[me.thread()];
    auto& span = scratch.span(static_cast<const T*>(nullptr));
    auto begin = [&](int t) { return layer.window ? std::max(0, pass_.positions[t] + 1 - layer.window) : 0; };
    auto end = [&](int t) { return pass_.positions[t] + 1; };
    // A block of heads of one token.
    struct Slot {
        int token;
        HeadRange heads;
        Line* queries;
        Floats* scores;
        float scales[LANES];
        Mixed all;
    } slots[SLOTS];
    const int count = some.count * blocks_;
    for (int i = 0; i < count; ++i) {
        Slot& slot = slots[i];
        slot.token = some.first + i / blocks_, slot.heads = heads_of(first_block + i % blocks_);
        slot.queries = &scratch.queries[i * int64_t(scratch.queries.size() / SLOTS)], slot.scores = &scratch.scores[i * SPAN * HEADS / LANES];
        with_heads(slot.heads.count, [&](auto size) {
            span.template take_queries<size>(&query_[(int64_t(slot.token) * s.heads + slot.heads.first) * KEY], slot.heads.count, slot.queries, slot.scales);
        });
    }
    // All slots' queries over the span that begins at `first`; emit(slot) for those that have keys in it. Keys are taken some at a
    // time, and multiplied before the next ones come from memory.
    auto over = [&](int first, auto out_of, auto emit) {
        const T* rows[SPAN];
        const int at = std::max(first, begin(some.first)) - first, stop = std::min(SPAN, end(last) - first);
        cache_rows<T>(index, last, first + at, first + stop, offset, rows + at);
        auto for_slots = [&](int from, int to, auto f) {
            for (int i = 0; i < count; ++i) {
                Slot& slot = slots[i];
                const int mine = std::max(from, begin(slot.token) - first), end_of = std::min(to, end(slot.token) - first);
                if (mine < end_of) with_heads(slot.heads.count, [&](auto size) { f(i, slot, mine, end_of, size); });
            }
        };
        for (int from = at, to; from < stop; from = to) {
            to = std::min(stop, from / LANES * LANES + LANES);
            span.take(rows, from, to, stop, count);
            for_slots(from, to, [&](int, Slot& slot, int a, int b, auto size) {
                span.template score<size>(slot.queries, slot.scales, a, b, s.softmax_scale, slot.scores);
            });
        }
        for_slots(at, stop, [&](int i, Slot& slot, int a, int b, auto size) {
            Mixed& out = out_of(i);
            span.template mix<size>(slot.scores, a, b, out);
            emit(slot, out);
        });
    };
    if (spans_) {
        auto out_of = [&](int i) -> Mixed& { return span_[int64_t(rest) * blocks + first_block + i]; };
        const int first = rest % spans_ * SPAN;
        if (first < end(last) && first + SPAN > begin(last)) over(first, out_of, [](const Slot&, const Mixed&) {});
        else
            for (int i = 0; i < count; ++i) out_of(i).clear();
        return;
    }
    Mixed next{{}, {}, scratch.values.data() + SLOTS * HEADS * width, width};
    for (int i = 0; i < count; ++i) {
        slots[i].all.values = scratch.values.data() + i * HEADS * width, slots[i].all.width = width;
        begin_mix(layer, slots[i].heads, slots[i].all);
    }
    for (int first = begin(some.first) / SPAN * SPAN; first < end(last); first += SPAN)
        over(first, [&](int) -> Mixed& { return next; }, [](Slot& slot, const Mixed& found) { slot.all.join(found, slot.heads.count); });
    for (int i = 0; i < count; ++i) finish_mix(slots[i].all, slots[i].token, slots[i].heads);
}

Network::HeadRange Network::heads_of(int block) const {
    const int groups = latent() ? 1 : shape_.kv_heads, shared = shape_.heads / groups, each = shape_.attention_tasks() / groups, group = block / each;
    const int first = group * shared + block % each * HEADS;
    return {group, first, std::min(HEADS, group * shared + shared - first)};
}

void Network::begin_mix(const Layer& layer, const HeadRange& heads, Mixed& all) const {
    all.clear();
    // A sink is a score without a value (arXiv 2309.17453; gpt-oss).
    for (int h = 0; layer.sinks && h < heads.count; ++h) all.top[h] = layer.sinks[heads.first + h], all.total[h] = 1;
}

void Network::finish_mix(const Mixed& all, int token, const HeadRange& heads) {
    const int row = round_up(mixed_width(), GROUP);
    for (int h = 0; h < heads.count; ++h) all.finish(h, &mixed_[(int64_t(token) * shape_.heads + heads.first + h) * row], mixed_width());
}

void Network::join_spans(const Layer& layer, int token, int block) {
    const int end = pass_.positions[token] + 1, begin = layer.window ? std::max(0, end - layer.window) : 0;
    const int width = round_up(mixed_width(), GROUP);
    const HeadRange heads = heads_of(block);
    Buffer<float> values(HEADS * width);
    Mixed all{{}, {}, values.data(), width};
    begin_mix(layer, heads, all);
    for (int span = begin / SPAN; span * SPAN < end; ++span) all.join(span_[(int64_t(token) * spans_ + span) * shape_.attention_tasks() + block], heads.count);
    finish_mix(all, token, heads);
}

void Network::feed_forward(Worker& me, const Layer& layer) {
    const Shape& s = shape_;
    each_token(me, [&](int t) {
        norm(&x_[int64_t(t) * padded_], s.width, layer.feed_norm, s.eps, &normed_[int64_t(t) * padded_]);
        prepare(&normed_[int64_t(t) * padded_], feed_in_.rows, t);
    });
    const int router_row = round_up(std::max(s.experts, 1), TILE);
    // Tasks of the gated hidden values of one copy, and what task i covers.
    auto run = [this](const Matrix& w) { return std::max(1, run_length(w) / 4); };
    auto runs = [&](const Matrix& w) { return w.data ? (w.tiles() / 4 + run(w) - 1) / run(w) : 0; };
    auto units = [&](const Matrix& w, int copy, int i) { return Units{copy, i * run(w), std::min((i + 1) * run(w), w.tiles() / 4)}; };
    me.parallel([&] { return tasks(layer.router) + runs(layer.gate_up); }, [&](int i) {
        if (i < tasks(layer.router))
            return dense(layer.router, i, feed_in_.rows, [&](int, int t, int column, Floats v) { store(&router_[int64_t(t) * router_row + column], v); });
        const Matrix& w = layer.gate_up;
        const int part = i - tasks(layer.router);
        hidden_task(w, units(w, 0, part), units(w, 0, next_task(part)), feed_in_.rows, every_.data(), pass_.tokens, hidden_in_.rows, 0, scratch_[me.thread()]);
    });
    if (layer.router.data) {
        each_token(me, [&](int t) { route(layer, t, scratch_[me.thread()]); });
        me.once([&] { group_by_expert(); });
        me.parallel([&] { return int(busy_.size()) * runs(layer.experts_gate_up); }, [&](int i) {
            const Matrix& w = layer.experts_gate_up;
            auto part = [&](int i) { return units(w, busy_[std::min<size_t>(i / runs(w), busy_.size() - 1)], i % runs(w)); };
            const Units mine = part(i);
            const int start = expert_start_[mine.copy];
            hidden_task(w, mine, part(next_task(i)), feed_in_.rows, &expert_tokens_[start], expert_start_[mine.copy + 1] - start, expert_in_.rows, start,
                        scratch_[me.thread()]);
        });
    }
    // A task adds up all experts' parts of some tiles: as many as are read side by side, if that leaves enough tasks. The last ones
    // are shorter, so that threads end together.
    struct Cut {
        int each, whole, rest;
        int first(int i) const { return std::min(i, whole) * each + std::max(0, i - whole) * rest; }
    };
    const int64_t bytes = (layer.down.data ? tile_bytes(layer.down.kind, layer.down.inputs) : 0) +
                          (layer.router.data ? int64_t(s.active) * tile_bytes(layer.experts_down.kind, layer.experts_down.inputs) : 0);
    const int all = padded_ / TILE, fair = std::min(STREAMS, all / (8 * pool_.threads())) / 2 * 2;
    auto cut = [&] {
        const int each = std::max<int>(fair, pass_.tokens > 4 ? 2 : 2 * std::max<int64_t>(1, (32 << 10) / bytes));
        return each >= 4 ? Cut{each, all * 3 / 4 / each, each / 2} : Cut{each, 0, each};
    };
    auto count = [&] {
        const Cut c = cut();
        return c.whole + (all - c.whole * c.each + c.rest - 1) / c.rest;
    };
    me.parallel(count, [&](int i) {
        const Cut c = cut();
        const int first = c.first(i), last = std::min(first + (i < c.whole ? c.each : c.rest), (s.width + TILE - 1) / TILE), next = c.first(next_task(i));
        auto expert_tiles = [&](size_t n) {
            if (layer.router.data && n < busy_.size()) return layer.experts_down.tile(busy_[n], first);
            return layer.down.data ? layer.down.tile(0, next) : layer.experts_down.tile(busy_[0], next);
        };
        if (layer.down.data)
            tiles(layer.down, 0, first, last, hidden_in_.rows, every_.data(), pass_.tokens, [&](int t, int column, Floats v) { add_to(t, column, v); },
                  expert_tiles(0));
        if (!layer.router.data) return;
        for (size_t n = 0; n < busy_.size(); ++n) {  // ascending, so that a token's experts are added in a fixed order
            const int e = busy_[n], start = expert_start_[e];
            tiles(layer.experts_down, e, first, last, expert_in_.rows, &every_[start], expert_start_[e + 1] - start, [&](int r, int column, Floats v) {
                add_to(int(expert_tokens_[start + r]), column, v * weights_[expert_slots_[start + r]]);
            }, expert_tiles(n + 1));
        }
    });
}

// The gated hidden values, silu(gate) * up, for units of 32 hidden values, made ready for the next product. Tiles: all of the gate, then all of up.
void Network::hidden_task(const Matrix& w, Units units, Units next, const Rows& in, const int64_t* row_list, int count, const Rows& out, int64_t out_first,
                          Scratch& scratch) {
    constexpr int UNITS = STREAMS / 4;
    float* products = scratch.products.data();
    auto tile = [&](int first, int j) { return 2 * (first + j / 4) + j % 2 + j % 4 / 2 * (w.tiles() / 2); };
    for (int row = 0; row < count; row += 64) {
        const int rows = std::min(64, count - row);
        for (int first = units.first; first < units.last; first += UNITS) {
            const int some = std::min(UNITS, units.last - first);
            const Units then = first + UNITS < units.last ? Units{units.copy, first + UNITS, units.last} : next;
            Tiles tiles;
            for (int j = 0; j < 4 * some; ++j) tiles.add(tile(first, j), w.tile(units.copy, tile(first, j)), w.tile(then.copy, tile(then.first, j)));
            multiply(w, units.copy, tiles, far_, in, row_list + row, rows, [&](int i, int j, Floats v) { store(products + (i * STREAMS + j) * TILE, v); });
            for (int i = 0; i < rows; ++i)
                for (int unit = 0; unit < some; ++unit) {
                    float* p = products + (i * STREAMS + 4 * unit) * TILE;
                    for (int j = 0; j < 2 * TILE; j += NEAR) put(p + j, gated(near_at(p + j), near_at(p + 2 * TILE + j)));
                    prepare_group(p, out, out_first + row + i, first + unit);
                }
        }
    }
}

// V3 eq. 12-16. Ties go to the lower index.
void Network::route(const Layer& layer, int token, Scratch& scratch) {
    const int E = shape_.experts, A = shape_.active, G = shape_.groups, each = E / G;
    const float* logits = &router_[int64_t(token) * round_up(E, TILE)];
    float *scores = scratch.router.data(), *ranked = scratch.ranked.data();
    if (shape_.sigmoid) {
        for (int e = 0; e < E; ++e) scores[e] = 1 / (1 + exp1(-logits[e]));
    } else {
        float top = *std::max_element(logits, logits + E), total = 0;
        for (int e = 0; e < E; ++e) total += scores[e] = exp1(logits[e] - top);
        for (int e = 0; e < E; ++e) scores[e] /= total;
    }
    for (int e = 0; e < E; ++e) ranked[e] = scores[e] + (layer.router_bias ? layer.router_bias[e] : 0);
    auto take_best = [](float* from, int count) {
        int best = 0;
        for (int i = 1; i < count; ++i)
            if (from[i] > from[best]) best = i;
        return best;
    };
    if (G > 1) {
        float* by_group = scratch.by_group.data();
        for (int g = 0; g < G; ++g) {
            const float* r = ranked + g * each;
            float first = -INFINITY, second = -INFINITY;
            for (int i = 0; i < each; ++i) {
                if (r[i] > first) second = first, first = r[i];
                else if (r[i] > second) second = r[i];
            }
            by_group[g] = shape_.sigmoid ? first + second : first;
        }
        std::fill(scratch.kept.begin(), scratch.kept.end(), 0);
        for (int i = 0; i < shape_.groups_kept; ++i) {
            int best = take_best(by_group, G);
            scratch.kept[best] = 1;
            by_group[best] = -INFINITY;
        }
        for (int e = 0; e < E; ++e)
            if (!scratch.kept[e / each]) ranked[e] = -INFINITY;
    }
    int32_t* chosen = &chosen_[int64_t(token) * A];
    float* weights = &weights_[int64_t(token) * A];
    float total = 0;
    for (int a = 0; a < A; ++a) {
        chosen[a] = take_best(ranked, E);
        ranked[chosen[a]] = -INFINITY;
        total += weights[a] = scores[chosen[a]];
    }
    for (int a = 0; a < A; ++a) weights[a] = (shape_.normalise ? weights[a] / (total + 1e-20f) : weights[a]) * shape_.scaling;
}

// Rows of the expert buffers: expert by expert, within one in the order of the tokens.
void Network::group_by_expert() {
    const int A = shape_.active, slots = pass_.tokens * A;
    std::fill(expert_start_.begin(), expert_start_.end(), 0);
    for (int i = 0; i < slots; ++i) ++expert_start_[chosen_[i] + 1];
    busy_.clear();
    for (int e = 0; e < shape_.experts; ++e) {
        if (expert_start_[e + 1]) busy_.push_back(e);
        expert_start_[e + 1] += expert_start_[e];
    }
    Buffer<int32_t> next(expert_start_.begin(), expert_start_.end() - 1);
    for (int i = 0; i < slots; ++i) {
        const int row = next[chosen_[i]]++;
        expert_tokens_[row] = i / A;
        expert_slots_[row] = i;
    }
}

void Network::output(Worker& me, bool drafting) {
    const float* weight = drafting ? draft_.final_norm : final_norm_;
    me.parallel([this] { return pass_.hidden ? pass_.tokens : 0; }, [&](int t) {
        norm(&x_[int64_t(t) * padded_], shape_.width, weight, shape_.eps, pass_.hidden + int64_t(t) * shape_.width);
    });
    me.parallel([this] { return pass_.outputs; }, [&](int i) {
        float* row = &normed_[int64_t(i) * padded_];
        norm(&x_[int64_t(pass_.output_tokens[i]) * padded_], shape_.width, weight, shape_.eps, row);
        prepare(row, head_in_.rows, i);
    });
    me.parallel([&] { return pass_.outputs ? tasks(head_, pass_.outputs) : 0; }, [&](int i) {
        const int run = run_length(head_, pass_.outputs), first = i * run;
        tiles(head_, 0, first, std::min(first + run, head_.tiles()), head_in_.rows, every_.data(), pass_.outputs,
              [&](int r, int column, Floats v) { store(pass_.logits + int64_t(r) * padded_vocabulary() + column, v); }, head_.tile(0, next_task(i) * run));
    });
    me.parallel([this] { return pass_.outputs; }, [&](int i) {
        Choice c = choose(pass_.logits + int64_t(i) * padded_vocabulary(), shape_.vocabulary, pass_.temperatures[i], pass_.uniforms[i]);
        pass_.chosen[i] = c.token;
        pass_.logprobs[i] = c.logprob;
    });
}

}  // namespace glasklar

using namespace glasklar;

#define EXPORT extern "C" __attribute__((visibility("default")))

// The fastest build that this CPU runs: 3 for AVX-512 with VNNI and BF16, 2 for AVX-512 with VNNI, 1 for AVX2, 0 for plain C++.
EXPORT int glasklar_tier() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512vnni");
    if (wide) return __builtin_cpu_supports("avx512bf16") ? 3 : 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("bmi2")) return 1;
#endif
    return 0;
}

// What the caller's declarations must agree with: VERSION, to be raised when the same bytes come to mean something else or make
// other numbers; which CPU this build is for, as in glasklar_tier; sizes of the structs.
#if defined(__AVX512BF16__)
#define BUILT_FOR 3
#elif defined(__AVX512F__)
#define BUILT_FOR 2
#elif defined(__AVX2__)
#define BUILT_FOR 1
#else
#define BUILT_FOR 0
#endif
constexpr int32_t VERSION = 5;
EXPORT void glasklar_layout(int32_t* layout) {
    const int32_t found[] = {VERSION, BUILT_FOR, sizeof(Matrix), sizeof(Embedding), sizeof(Shape), sizeof(Layer), sizeof(Draft), sizeof(Pass)};
    std::memcpy(layout, found, sizeof found);
}

// `cores`: where each thread runs, or null. Null where the system gives neither the memory nor the threads.
EXPORT Network* glasklar_network(const Shape* shape, const Layer* layers, const Embedding* embedding, const float* final_norm, const Matrix* head,
                                 const Draft* draft, int threads, const int32_t* cores) {
    try {
        return new Network(*shape, layers, *embedding, final_norm, *head, draft, threads, cores);
    } catch (const std::exception&) {  // std::bad_alloc, std::system_error; none may leave C
        return nullptr;
    }
}
EXPORT void glasklar_free(Network* network) { delete network; }
EXPORT void glasklar_pass(Network* network, const Pass* pass) { network->run(*pass); }

// Bytes of a token's row in one layer's cache.
EXPORT int glasklar_row_bytes(const Network* network) { return network->row_bytes(); }

EXPORT int64_t glasklar_tile_bytes(int kind, int inputs) { return tile_bytes(kind, inputs); }

// For a mapped file of which single rows are read, anywhere: the system reads the page that is asked for. Else each row that is not in
// memory brings its surroundings, megabytes of them on some machines.
EXPORT void glasklar_read_singly(const uint8_t* data, int64_t size) {
#if defined(__linux__)
    const int64_t before = reinterpret_cast<uintptr_t>(data) % sysconf(_SC_PAGESIZE);
    madvise(const_cast<uint8_t*>(data) - before, size + before, MADV_RANDOM);
#else
    (void)data, (void)size;
#endif
}

// A number that any damage to the bytes changes: finds bad disks and half-written files, at the speed of memory.
EXPORT uint64_t glasklar_digest(const uint8_t* data, int64_t size) {
    typedef uint64_t Longs __attribute__((vector_size(64)));
    Longs state = {0x9e3779b97f4a7c15, 0xbf58476d1ce4e5b9, 0x94d049bb133111eb, 0xd6e8feb86659fd93,
                   0xa0761d6478bd642f, 0xe7037ed1a0b428db, 0x8ebc6af09c88c6e3, 0x589965cc75374cc3};
    auto take = [&](const uint8_t* p) {
        const Longs w = load_as<Longs>(p), mixed = w ^ state;
        state = (state << 7 | state >> 57) + w + (mixed & 0xffffffff) * (mixed >> 32);
    };
    int64_t at = 0;
    for (; at + 64 <= size; at += 64) take(data + at);
    uint8_t rest[64] = {};
    if (at < size) std::memcpy(rest, data + at, size - at);
    take(rest);
    uint64_t digest = uint64_t(size);
    for (int i = 0; i < 8; ++i) {
        digest = (digest ^ state[i]) * 0x9fb21c651e98df25;
        digest ^= digest >> 31;
    }
    return digest;
}

// Tiles [first, last) of one matrix; `narrow`: the source is bf16, else float.
EXPORT void glasklar_pack(int kind, int narrow, const void* source, int64_t stride, int outputs, int inputs, int first, int last, uint8_t* to) {
    for (int t = first; t < last; ++t, to += tile_bytes(kind, inputs)) {
        if (narrow) pack_tile(kind, static_cast<const bf16*>(source), stride, t * TILE, outputs, inputs, to);
        else pack_tile(kind, static_cast<const float*>(source), stride, t * TILE, outputs, inputs, to);
    }
}

EXPORT void glasklar_unpack(const Matrix* w, int copy, float* to) {
    for (int row = 0; row < w->outputs; ++row)
        for (int i = 0; i < w->inputs; ++i) to[int64_t(row) * w->inputs + i] = unpacked(*w, copy, row, i);
}

// y [rows, outputs rounded up to 16] = x [rows, inputs rounded up to 32] times the matrix, as the pass multiplies; for tests and benches.
EXPORT void glasklar_multiply(const Matrix* w, int copy, int far, const float* x, int rows, float* y) {
    FlushTiny tiny;
    Prepared in;
    in.want(w->kind);
    in.reserve(rows, w->inputs);
    std::vector<int64_t> list(rows);
    for (int i = 0; i < rows; ++i) prepare(x + int64_t(i) * in.rows.width, in.rows, list[i] = i);
    multiply_all(*w, copy, 0, w->tiles(), nullptr, far, in.rows, list.data(), rows,
                 [&](int i, int t, Floats v) { store(y + (int64_t(i) * w->tiles() + t) * TILE, v); });
}
