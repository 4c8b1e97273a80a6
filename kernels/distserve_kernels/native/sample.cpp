// One token for each row of logits, by the rules of ``distserve.engine.sampler``. A row is the work of one thread from
// its logits to its token, and rests in that thread's cache meanwhile: bans, biases, penalties, truncation and the draw
// are a few passes over it. Called through ctypes; nothing throws across the boundary.
#include <memory>
#include <type_traits>

#include "rows.h"
#include "team.h"

using ds::bf16;
using ds::Buffer;
using ds::List;
using ds::Place;
using ds::Softmax;

extern "C" {

// What one row asks for; packed by sampler.py. Ids of a row stand one behind another in Rows.ids: banned, biased, prompt,
// output.
struct Ask {
    double temperature, top_p, min_p, repetition, presence, frequency;
    uint64_t seed;
    int64_t index;  // of the output token
    int64_t top_k;
    int64_t logprobs;  // negative: none; else so many of the most likely beside the chosen one's
    int64_t first;     // in Rows.ids
    int64_t banned, biased, prompt, output;
    int64_t amount;  // of the first bias, in Rows.amounts
};

struct Rows {
    const void* logits;  // [rows, vocab] T, ``stride`` elements from row to row
    int64_t dtype;       // 0: float, 1: bfloat16
    int64_t stride;
    int64_t rows;
    const Ask* asks;  // [rows]; null: all greedy
    const int64_t* ids;
    int64_t id_count;
    const double* amounts;
    int64_t* chosen;    // [rows]
    double* logprob;    // [rows], where asked for
    int64_t most;       // of the most likely, of one row
    int64_t* top_ids;   // [rows, most], -1 where there are no more
    double* top;        // [rows, most]
};

}  // extern "C"

namespace {

constexpr double NEVER = 80;  // e^-80 is never drawn
constexpr long WORTH_A_TEAM = 1 << 18;

uint64_t splitmix(uint64_t state) {
    uint64_t z = state + 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

double uniform(uint64_t seed, int64_t index) {
    const uint64_t mixed = splitmix(splitmix(seed) + static_cast<uint64_t>(index) * 0x9E3779B97F4A7C15u);
    return static_cast<double>(mixed >> 11) * 0x1p-53;
}

float above_lowest(double x) { return static_cast<float>(std::max(x, -static_cast<double>(FLT_MAX))); }

// One thread's: what it makes of a row.
struct Bench {
    explicit Bench(long vocab)
        : row(ds::round_up(vocab, ds::LANES)), maxima(ds::round_up(vocab, ds::GROUP) / ds::LANES),
          blocks((vocab + ds::BLOCK - 1) / ds::BLOCK), counts(vocab), held(vocab), work(vocab), n(vocab) {}

    Buffer<float> row, maxima;
    Buffer<double> blocks;
    Buffer<int32_t> counts;  // all 0 between two rows
    List held, work;
    long n;

    template <class T>
    const float* copy(const T* from) {
        for (long i = 0; i < n; i += ds::LANES) ds::store(&row[i], ds::load_row(from + i, n - i));
        return row.data();
    }

    // Where something is infinitely likely, that alone counts.
    const float* only_infinite(const float* from) {
        const float infinite = std::numeric_limits<float>::infinity();
        for (long i = 0; i < n; ++i) row[i] = from[i] == infinite ? 0.0f : ds::LOWEST;
        return row.data();
    }

    void edit(const Ask& ask, const Rows& rows);
    int64_t draw(const float* scores, const Ask& ask);
    int64_t draw_ranked(const float* scores, const Ask& ask, Softmax weigh, double point);
    double describe(const float* scores, const Ask& ask, int64_t* ids, double* top, int64_t most);
};

// Bans, biases and penalties on ``row``.
void Bench::edit(const Ask& ask, const Rows& rows) {
    const int64_t* at = rows.ids + ask.first;
    for (int64_t i = 0; i < ask.banned; ++i) row[*at++] = ds::LOWEST;
    for (int64_t i = 0; i < ask.biased; ++i) row[*at++] += static_cast<float>(rows.amounts[ask.amount + i]);
    const int64_t *prompt = at, *output = at + ask.prompt, *end = output + ask.output;
    if (ask.repetition != 1.0) {
        const float penalty = static_cast<float>(ask.repetition);
        for (at = prompt; at < end; ++at) {
            if (counts[*at]++ == 0) row[*at] = row[*at] > 0 ? row[*at] / penalty : row[*at] * penalty;
        }
        for (at = prompt; at < end; ++at) counts[*at] = 0;
    }
    if (ask.presence != 0 || ask.frequency != 0) {
        for (at = output; at < end; ++at) ++counts[*at];
        for (at = output; at < end; ++at) {
            if (counts[*at] > 0) row[*at] -= static_cast<float>(ask.presence + ask.frequency * counts[*at]);
            counts[*at] = 0;
        }
    }
}

int64_t Bench::draw(const float* scores, const Ask& ask) {
    if (ask.temperature == 0) return ds::argmax(scores, n);
    float best = ds::maxima(scores, n, maxima.data());
    if (!(best > ds::LOWEST)) return 0;
    if (best > FLT_MAX) {
        scores = only_infinite(scores);
        best = ds::maxima(scores, n, maxima.data());
    }
    const float heat = static_cast<float>(std::min(1.0 / ask.temperature, 1e38));
    const double least = ask.min_p > 0 ? std::max(std::log(ask.min_p), -NEVER) : -NEVER;
    const Softmax weigh{best, heat, std::min(best, above_lowest(best + least * ask.temperature))};
    const double point = uniform(ask.seed, ask.index);
    if (ask.top_k > 0 || ask.top_p < 1) return draw_ranked(scores, ask, weigh, point);
    const double mass = ds::masses(scores, n, weigh, blocks.data());
    return ds::crossing_by_id(scores, n, weigh, blocks.data(), point * mass);
}

// Only scores that may be drawn are collected: of top-k those from a bound on, near the k-th; of top-p those that all
// together weigh more than it keeps, for n others weigh less than n times a bound.
int64_t Bench::draw_ranked(const float* scores, const Ask& ask, Softmax weigh, double point) {
    float floor = weigh.floor;
    double mass = 0;
    if (ask.top_k > 0 && ask.top_k < n) {
        const long count = static_cast<long>(maxima.size());
        floor = std::max(floor, ds::bound_of_rank(maxima.data(), count, ask.top_k, weigh.best));
    } else if (ask.top_k <= 0) {
        mass = ds::masses(scores, n, weigh, blocks.data());
        const double bound = 0.5 * (1 - ask.top_p) * mass / static_cast<double>(n);
        floor = std::max(floor, above_lowest(weigh.best + std::log(bound) * ask.temperature));
    }
    ds::collect(scores, n, std::min(floor, weigh.best), held);
    if (ask.top_k > 0 && held.size > ask.top_k) {
        held.weigh_alike();
        ds::cut_behind(held, ds::crossing(held, static_cast<double>(ask.top_k) - 0.5, work));
    }
    held.weigh(weigh);
    if (ask.top_k > 0) mass = held.mass();
    if (ask.top_p >= 1) return ds::crossing(held, point * mass, work).id;
    const double wanted = std::max(ask.top_p, 0.0) * mass;  // a token is kept where less comes before it
    const Place last = ds::crossing(held, std::nextafter(wanted, -1.0), work);
    const Place found = ds::crossing(held, point * last.mass, work);
    return found.after(last) ? last.id : found.id;  // the two searches may sum in different orders
}

// log Σ exp(score), and the log-probabilities of the most likely.
double Bench::describe(const float* scores, const Ask& ask, int64_t* ids, double* top, int64_t most) {
    std::fill(ids, ids + most, -1);
    float best = ds::maxima(scores, n, maxima.data());
    if (!(best > ds::LOWEST && best <= FLT_MAX)) return best;
    const Softmax weigh{best, 1.0f, above_lowest(best - NEVER)};
    const double total = best + std::log(ds::masses(scores, n, weigh, blocks.data()));
    if (ask.logprobs == 0) return total;
    const long count = static_cast<long>(maxima.size());
    const float floor = ask.logprobs < n ? ds::bound_of_rank(maxima.data(), count, ask.logprobs, best) : -FLT_MAX;
    ds::collect(scores, n, floor, held);
    if (held.size > ask.logprobs) {
        held.weigh_alike();
        ds::cut_behind(held, ds::crossing(held, static_cast<double>(ask.logprobs) - 0.5, work));
    }
    for (long i = 0; i < held.size; ++i) held.weight[i] = static_cast<float>(i);
    std::sort(held.weight.begin(), held.weight.begin() + held.size, [this](float a, float b) {
        const float one = held.score[static_cast<long>(a)], other = held.score[static_cast<long>(b)];
        return one > other || (one == other && a < b);
    });
    for (long i = 0; i < held.size; ++i) {
        const long at = static_cast<long>(held.weight[i]);
        ids[i] = held.id[at];
        top[i] = held.score[at] - total;
    }
    return total;
}

struct Sampler {
    Sampler(long vocab, int threads, const int64_t* cores) : vocab(vocab), team(threads, cores) {
        for (int i = 0; i < team.size(); ++i) benches.push_back(std::make_unique<Bench>(vocab));
    }

    long vocab;
    ds::Team team;
    std::vector<std::unique_ptr<Bench>> benches;
    const Rows* rows = nullptr;

    template <class T>
    void choose(long i, Bench& bench) const {
        const T* logits = static_cast<const T*>(rows->logits) + i * rows->stride;
        if (rows->asks == nullptr) {
            rows->chosen[i] = ds::argmax(logits, vocab);
            return;
        }
        const Ask& ask = rows->asks[i];
        const bool edited = ask.banned || ask.biased || ask.prompt || ask.output;
        if (ask.temperature == 0 && !edited && ask.logprobs < 0) {
            rows->chosen[i] = ds::argmax(logits, vocab);
            return;
        }
        const float* scores = nullptr;
        if constexpr (std::is_same_v<T, float>) scores = edited ? bench.copy(logits) : logits;
        else scores = bench.copy(logits);
        const int64_t at = i * rows->most;
        const double total =
            ask.logprobs >= 0 ? bench.describe(scores, ask, rows->top_ids + at, rows->top + at, rows->most) : 0;
        if (edited) bench.edit(ask, *rows);
        const int64_t id = bench.draw(scores, ask);
        rows->chosen[i] = id;
        if (ask.logprobs < 0) return;
        const double raw = static_cast<double>(ds::to_float(logits[id]));
        rows->logprob[i] = raw == total ? 0.0 : raw < total ? raw - total : ds::LOWEST;
    }

    void work(int thread) {
        const bool half = rows->dtype == 1;
        for (long i; (i = team.take(rows->rows, thread)) >= 0;) {
            Bench& bench = *benches[static_cast<size_t>(thread)];
            half ? choose<bf16>(i, bench) : choose<float>(i, bench);
        }
    }
};

}  // namespace

extern "C" {

// For rows of ``vocab`` logits, with a team as ``ds_create``'s; null when memory or threads are wanting.
void* ds_sampler_create(int64_t vocab, int64_t threads, const int64_t* cores) {
    try {
        return new Sampler(vocab, static_cast<int>(threads), cores);
    } catch (...) {
        return nullptr;
    }
}

void ds_sampler_destroy(void* sampler) { delete static_cast<Sampler*>(sampler); }

int64_t ds_sampler_ask_size() { return sizeof(Ask); }

// Choose. One call at a time for a sampler. 0, or -1 when an id is none of the vocabulary: then nothing was done.
int64_t ds_sample(void* sampler, const Rows* rows) {
    Sampler& s = *static_cast<Sampler*>(sampler);
    for (int64_t i = 0; i < rows->id_count; ++i)
        if (rows->ids[i] < 0 || rows->ids[i] >= s.vocab) return -1;
    s.rows = rows;
    if (s.team.size() > 1 && rows->rows > 1 && rows->rows * s.vocab >= WORTH_A_TEAM) {
        s.team.run([](void* at, int thread) { static_cast<Sampler*>(at)->work(thread); },
                   [](void*) { return false; }, &s);
        return 0;
    }
    for (long i = 0; i < rows->rows; ++i)
        rows->dtype == 1 ? s.choose<bf16>(i, *s.benches[0]) : s.choose<float>(i, *s.benches[0]);
    return 0;
}

}  // extern "C"
