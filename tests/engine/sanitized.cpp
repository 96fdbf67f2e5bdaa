// The C++ pass under the sanitizers of address and undefined behaviour: a program of its own, built and run by
// test_sanitized.py for each kind of CPU. All memory is exactly as large as the interface asks for.
#include "../../src/glasklar/engine/cpu/network.cpp"

#include <cstdio>
#include <cstdlib>
#include <deque>
#include <random>
#include <tuple>

#define CHECK(what) \
    if (!(what)) std::printf("%s:%d: %s\n", __FILE__, __LINE__, #what), std::exit(1)

std::mt19937 generator(7);

std::vector<float> numbers(int64_t count, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> v(count);
    for (float& x : v) x = normal(generator);
    return v;
}

// Owns what the structs point to.
struct Owned {
    std::deque<std::vector<uint8_t>> tiles;
    std::deque<std::vector<float>> vectors;

    const float* vector(std::vector<float> v) {
        vectors.push_back(std::move(v));
        return vectors.back().data();
    }
    const float* norm(int count) { return vector(std::vector<float>(count, 1.0f)); }
    Matrix matrix(int kind, int outputs, int inputs, int copies = 1, bool bias = false) {
        Matrix w{nullptr, nullptr, kind, outputs, inputs, copies};
        std::vector<uint8_t> data(copies * w.tiles() * tile_bytes(kind, inputs));
        for (int c = 0; c < copies; ++c) {
            std::vector<float> source = numbers(int64_t(outputs) * inputs, 0.2f);
            glasklar_pack(kind, 0, source.data(), inputs, outputs, inputs, 0, w.tiles(), data.data() + c * w.tiles() * tile_bytes(kind, inputs));
        }
        tiles.push_back(std::move(data));
        w.data = tiles.back().data();
        if (bias) w.bias = vector(numbers(int64_t(copies) * outputs));
        return w;
    }
};

void products() {
    const double most[] = {1e-6, 0.003, 0.01, 0.01};  // of the sum of magnitudes: fp32, bf16, and activations of 8 bits; a lost input is 1/70
    for (int kind : {FLOAT, BF16, INT8, INT4})
        for (auto [outputs, inputs] : {std::pair{1, 1}, {16, 32}, {37, 70}, {100, 33}, {31, 320}, {330, 40}})
            for (int rows = 1; rows <= 64; rows = rows < 20 ? rows + 1 : rows + 11) {
                Owned own;
                const Matrix w = own.matrix(kind, outputs, inputs, 2, rows % 2);
                const int width = round_up(inputs, GROUP), columns = w.tiles() * TILE;
                std::vector<float> x(int64_t(rows) * width), y(int64_t(rows) * columns), seen(int64_t(outputs) * inputs);
                for (int r = 0; r < rows; ++r) {
                    std::vector<float> row = numbers(inputs);
                    std::copy(row.begin(), row.end(), x.begin() + int64_t(r) * width);
                }
                glasklar_multiply(&w, 1, rows % 3 == 0, x.data(), rows, y.data());
                glasklar_unpack(&w, 1, seen.data());
                for (int r = 0; r < rows; ++r)
                    for (int o = 0; o < outputs; ++o) {
                        double exact = w.bias ? w.bias[outputs + o] : 0, size = 1;
                        for (int i = 0; i < inputs; ++i) exact += double(x[r * width + i]) * seen[o * inputs + i], size += std::fabs(x[r * width + i] * seen[o * inputs + i]);
                        CHECK(std::fabs(y[r * columns + o] - exact) < most[kind] * size);
                    }
            }
}

// What a part of a cached row holds of `v`: 16-bit integers are wrong by half a step at most, and by one where they hold a bit of the
// scale; int8 by half a step of its group.
std::vector<double> kept(const std::vector<float>& v, const Short* row) {
    std::vector<double> found;
    const double scale = scale_of(row);
    double length = 0;
    for (float x : v) length += double(x) * x;
    CHECK(std::fabs(scale * REACH / std::sqrt(length) - 1) < 1e-5);
    for (size_t i = 0; i < v.size(); ++i) {
        found.push_back(row[i].bits * scale);
        CHECK(std::fabs(found[i] - v[i]) < (i < 32 ? 1.51 : 0.51) * scale);
    }
    return found;
}
std::vector<double> kept(const std::vector<float>& v, const Small* row) {
    std::vector<double> found;
    const Small* after = row + round_up(int(v.size()), 4);
    float scale, top = 0;
    std::memcpy(&scale, after, 4);
    for (size_t i = 0; i < v.size(); ++i) {
        if (i % 32 == 0) {
            top = 0;
            for (size_t k = i; k < std::min(i + 32, v.size()); ++k) top = std::max(top, std::fabs(v[k]));
        }
        const double step = double(scale) * (1 << after[4 + i / 32].bits);
        found.push_back(row[i].bits * step);
        CHECK(std::fabs(found[i] - v[i]) < 0.501 * step && (step < top / 63 || after[4 + i / 32].bits == 0));
    }
    return found;
}

// Attention of a block of heads over keys [from, to) of one span, against sums in double over what the cache holds; returns the
// error of the results, relative to their size. One column stands out, as columns of real caches do.
template <class T, int H>
double attention_error(const Widths& widths, int heads, int from, int to, float sharp) {
    const int group = part_size<T>(widths.key) + (widths.within() ? 0 : part_size<T>(widths.value));
    std::vector<T> cache(SPAN * group);
    std::vector<std::vector<double>> keys, values;
    const T* rows[SPAN];
    for (int s = 0; s < SPAN; ++s) {
        T* row = cache.data() + s * group;
        rows[s] = row;
        std::vector<float> key = numbers(widths.key), value = widths.within() ? key : numbers(widths.value);
        key[widths.key / 2] *= 20;
        if (widths.within()) value = key;
        store_part(key.data(), widths.key, row);
        if (!widths.within()) store_part(value.data(), widths.value, row + widths.value_at);
        keys.push_back(kept(key, row)), values.push_back(kept(value, row + widths.value_at));
    }
    std::vector<float> queries = numbers(int64_t(heads) * widths.key, sharp / std::sqrt(float(widths.key)));
    for (int h = 0; h < heads; ++h) queries[h * widths.key + widths.key / 2] /= 20;
    FixedSpan span;
    span.reserve(widths);
    std::vector<Line> lines(FixedSpan::query_lines(widths));
    std::vector<Floats> scores(SPAN * HEADS / LANES);
    float scales[LANES];
    const int width = round_up(widths.value, 32);
    std::vector<float> found(HEADS * width);
    Mixed out{{}, {}, found.data(), width};
    span.template take_queries<H>(queries.data(), heads, lines.data(), scales);
    for (int a = from; a < to; a = a / LANES * LANES + LANES) {
        const int b = std::min(to, a / LANES * LANES + LANES);
        span.take(rows, a, b, to, 1);
        span.template score<H>(lines.data(), scales, a, b, 1.0f, scores.data());
    }
    span.template mix<H>(scores.data(), from, to, out);
    double error = 0, size = 0;
    for (int h = 0; h < heads; ++h) {
        std::vector<double> weights, exact(widths.value);
        double top = -1e300, total = 0;
        for (int s = from; s < to; ++s) {
            double score = 0;
            for (int k = 0; k < widths.key; ++k) score += double(queries[h * widths.key + k]) * keys[s][k];
            weights.push_back(score), top = std::max(top, score);
        }
        for (double& w : weights) total += w = std::exp(w - top);
        for (int s = from; s < to; ++s)
            for (int c = 0; c < widths.value; ++c) exact[c] += weights[s - from] / total * values[s][c];
        for (int c = 0; c < widths.value; ++c) {
            error += std::pow(found[h * width + c] / out.total[h] - exact[c], 2), size += exact[c] * exact[c];
        }
    }
    return std::sqrt(error / size);
}

template <class T>
void attention(double most) {
    for (auto [key, value, within] : {std::tuple{576, 512, true}, {80, 64, true}, {49, 33, true}, {128, 128, false}, {24, 20, false}, {7, 3, false}})
        for (auto [from, to] : {std::pair{0, 256}, {0, 1}, {37, 112}, {255, 256}, {3, 250}})
            for (float sharp : {0.1f, 1.0f, 6.0f}) {
                const int at = within ? 0 : part_size<T>(key);
                const Widths widths{key, value, at, part_size<T>(key) + (within ? 0 : part_size<T>(value))};
                CHECK((attention_error<T, 8>(widths, 8, from, to, sharp) < most));
                CHECK((attention_error<T, 8>(widths, 5, from, to, sharp) < most));
                CHECK((attention_error<T, 4>(widths, 3, from, to, sharp) < most));
                CHECK((attention_error<T, 2>(widths, 2, from, to, sharp) < most));
                CHECK((attention_error<T, 1>(widths, 1, from, to, sharp) < most));
            }
}

struct Model {
    Owned own;
    Shape shape{};
    std::vector<Layer> layers;
    std::vector<float> table;
    const float* final_norm;
    Matrix head;
    Draft draft{};

    Model(bool latent, int kind, int cache) {
        Shape& s = shape;
        s.layers = 3, s.width = 72, s.heads = 5, s.kv_heads = 5, s.nope = 24, s.rope = 8, s.value = 20, s.vocabulary = 97;
        s.experts = 8, s.active = 3, s.groups = 4, s.groups_kept = 2, s.sigmoid = 1, s.normalise = 1, s.interleave = 1, s.page = 16;
        s.cache = cache, s.max_tokens = 512, s.scaling = 1.5f, s.eps = s.latent_eps = 1e-6f, s.softmax_scale = 0.18f;
        if (latent) s.latent = 40, s.q_latent = 36;
        else s.heads = 12, s.kv_heads = 2, s.nope = 8, s.interleave = 0;
        for (int i = 0; i <= s.layers; ++i) layers.push_back(layer(i, kind));
        table = numbers(int64_t(s.vocabulary) * s.width);
        final_norm = own.norm(s.width);
        head = own.matrix(kind, s.vocabulary, s.width);
        draft = {own.norm(s.width), own.norm(s.width), own.norm(s.width), own.matrix(kind, s.width, 2 * s.width)};
    }
    Layer layer(int index, int kind) {
        const Shape& s = shape;
        const int K = s.nope + s.rope, F = 52, padded = round_up(F, GROUP);
        Layer l{};
        l.attention_norm = own.norm(s.width), l.feed_norm = own.norm(s.width);
        if (s.latent) {
            l.q = own.matrix(kind, s.q_latent, s.width, 1, true), l.q_up = own.matrix(kind, s.heads * K, s.q_latent);
            l.kv = own.matrix(kind, s.latent + s.rope, s.width, 1, true);
            l.q_latent_norm = own.norm(s.q_latent), l.latent_norm = own.norm(s.latent);
            l.k_up = own.matrix(kind, s.latent, s.nope, s.heads), l.v_up = own.matrix(kind, s.value, s.latent, s.heads);
        } else {
            l.q = own.matrix(kind, s.heads * K, s.width, 1, true), l.kv = own.matrix(kind, s.kv_heads * (K + s.value), s.width);
            l.q_norm = own.norm(K), l.k_norm = own.norm(K), l.sinks = own.vector(numbers(s.heads));
            l.window = index % 2 ? 70 : 0;
        }
        l.out = own.matrix(kind, s.width, s.heads * s.value);
        l.gate_up = own.matrix(kind, 2 * padded, s.width), l.down = own.matrix(kind, s.width, F), l.hidden = padded;
        if (!index) return l;
        l.router = own.matrix(FLOAT, s.experts, s.width), l.router_bias = own.vector(numbers(s.experts, 0.1f));
        l.experts_gate_up = own.matrix(kind, 2 * padded, s.width, s.experts), l.experts_down = own.matrix(kind, s.width, F, s.experts);
        l.expert_hidden = padded;
        return l;
    }
};

// Logits of all tokens of sequences that advance together by `chunk` tokens; states of the main pass feed the draft module.
std::vector<std::vector<float>> logits(Model& model, const std::vector<int>& lengths, int first_id, int chunk, int threads) {
    const Shape& s = model.shape;
    const Embedding embedding{model.table.data(), 0};
    Network* network = glasklar_network(&s, model.layers.data(), &embedding, model.final_norm, &model.head, &model.draft, threads, nullptr);
    const int pages = 24, most = pages * s.page;
    const int64_t stride = int64_t(lengths.size()) * most * glasklar_row_bytes(network);
    std::vector<uint8_t> cache(stride * s.layers), draft_cache(stride);
    std::vector<float> cosine(most * s.rope / 2, 0.8f), sine(most * s.rope / 2, 0.6f);
    std::vector<std::vector<int32_t>> tables(lengths.size());
    std::vector<const int32_t*> rows;
    for (size_t i = 0; i < lengths.size(); ++i) {
        for (int p = 0; p < pages; ++p) tables[i].push_back(int32_t(((p * 7) % pages) * lengths.size() + i));
        rows.push_back(tables[i].data());
    }
    std::vector<std::vector<float>> found(lengths.size());
    const int longest = *std::max_element(lengths.begin(), lengths.end());
    for (int start = 0; start < longest; start += chunk) {
        std::vector<int32_t> ids, positions, sequences, outputs;
        for (size_t i = 0; i < lengths.size(); ++i)
            for (int p = start; p < std::min(start + chunk, lengths[i]); ++p) {
                ids.push_back(int32_t((first_id + i * 31 + p * 13) % s.vocabulary)), positions.push_back(p), sequences.push_back(int32_t(i));
                outputs.push_back(int32_t(outputs.size()));
            }
        const size_t count = ids.size();
        const int padded = network->padded_vocabulary();
        std::vector<float> out(count * padded), temperatures(count, 0.7f), logprobs(count), hidden(count * s.width);
        std::vector<double> uniforms(count, 0.4);
        std::vector<int32_t> chosen(count);
        Pass pass{int(count), int(count), ids.data(), positions.data(), sequences.data(), rows.data(), cache.data(), stride, cosine.data(), sine.data(),
                  outputs.data(), out.data(), temperatures.data(), uniforms.data(), chosen.data(), logprobs.data(), nullptr, hidden.data()};
        glasklar_pass(network, &pass);
        for (size_t t = 0; t < count; ++t) {
            CHECK(chosen[t] >= 0 && chosen[t] < s.vocabulary);
            auto& row = found[sequences[t]];
            row.insert(row.end(), out.begin() + t * padded, out.begin() + t * padded + s.vocabulary);
        }
        pass.states = hidden.data(), pass.cache = draft_cache.data(), pass.hidden = nullptr;
        glasklar_pass(network, &pass);
    }
    glasklar_free(network);
    return found;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) { return a.size() == b.size() && !std::memcmp(a.data(), b.data(), 4 * a.size()); }

void passes() {
    for (bool latent : {true, false})
        for (int kind : {FLOAT, BF16, INT8, INT4}) {
            Model model(latent, kind, kind == FLOAT ? FLOAT_CACHE : kind == INT4 ? INT8_CACHE : SHORT_CACHE);
            const auto together = logits(model, {3, 300, 40}, 5, 170, 2);
            for (const auto& row : together)
                for (float x : row) CHECK(std::isfinite(x));
            CHECK(same(logits(model, {3}, 5, 1, 1)[0], together[0]));
            const auto pieces = logits(model, {3, 300, 40}, 5, 64, 3);
            for (int i = 0; i < 3; ++i) CHECK(same(pieces[i], together[i]));
            // A row that is no number stays with itself.
            model.table[int64_t(5) * model.shape.width] = std::nanf("");
            const auto damaged = logits(model, {1, 2}, 5, 8, 2);
            CHECK(std::isnan(damaged[0][0]) && std::isfinite(damaged[1][0]));
        }
}

void digests() {
    std::vector<uint8_t> bytes(333);
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = uint8_t(i * 37);
    for (int size = 0; size < 333; size += 3) {
        const std::vector<uint8_t> part(bytes.begin(), bytes.begin() + size);
        const uint64_t wanted = glasklar_digest(part.data(), size);
        for (int i = 0; i < size; ++i) {
            std::vector<uint8_t> other = part;
            other[i] ^= uint8_t(1 << i % 8);
            CHECK(glasklar_digest(other.data(), size) != wanted);
        }
    }
}

int main() {
    digests();
    products();
    attention<Short>(0.02);
    attention<Small>(0.02);
    passes();
    std::puts("sound");
}
