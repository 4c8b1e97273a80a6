// Paged attention: o = softmax(q·Kᵀ·scale + causal)·V, straight from the blocks of the pool.
//
// A task is a run of queries of one sequence on one KV head, over a run of keys; the query heads that share the KV head
// are rows of the same products. Keys go by in tiles of 64, counted from position 0 (online softmax, arXiv 1805.02867),
// each repacked in the first-level cache for the tiles of gemm.h. How a row is computed follows from its position alone:
// neither batch mates nor chunks nor the block size change its result.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "gemm.h"
#include "kv.h"

namespace ds {

constexpr long KEYS = 64;          // of a tile
constexpr long QUERY_ROWS = 96;    // of a prefill task: queries times heads of a group
constexpr long SPLIT_KEYS = 1024;  // a single query's context is cut here, so that threads share it

struct AttentionTask {
    long segment, first_query, queries;
    long first_key, end_key;
    long split, splits;  // a single query's context in parts
    long partial;        // where split 0 of it keeps its partial result, counted per KV head
};

// What the threads of a team leave for the last of a query's splits to join: [partial][kv_head] of rows × (sums, peak,
// total).
struct Partials {
    long row_floats = 0, rows = 0, kv_heads = 0;
    Buffer<float> memory;
    std::vector<std::atomic<int>> done;

    void reserve(long count, const Model& m) {
        row_floats = round_up(m.head_dim, PANEL) + 2;
        rows = m.heads / m.kv_heads;
        kv_heads = m.kv_heads;
        const size_t slots = static_cast<size_t>(count * kv_heads);
        if (done.size() >= slots) return;
        memory.resize(slots * rows * row_floats);
        done = std::vector<std::atomic<int>>(slots);
    }
    float* of(long partial, long head) { return memory.data() + (partial * kv_heads + head) * rows * row_floats; }
};

// One thread's working memory.
template <class T>
struct Scratch {
    long dim, row_units, value_units;
    Buffer<uint32_t> q, keys, values;
    Buffer<float> scores, out, peak, total;
    Buffer<T> weights, zeros;

    explicit Scratch(const Model& m)
        : dim(m.head_dim), row_units(units_of<T>(dim)), value_units(round_up(dim, PANEL)) {
        const long rows = std::max<long>(QUERY_ROWS, m.heads / m.kv_heads);
        q.resize(rows * row_units);
        keys.resize(round_up(row_units, LANES) * KEYS);
        values.resize(KEYS * value_units);
        scores.resize(rows * KEYS);
        out.resize(rows * value_units);
        weights.resize(rows * KEYS);
        zeros.resize(value_units * PER_UNIT<T>);
        peak.resize(rows);
        total.resize(rows);
    }
};

// Where the keys of a tile lie: of ``count`` positions, then zeros up to 32 or 64.
template <class T>
struct Located {
    const T *key[KEYS], *value[KEYS];
    long count = 0;

    void find(const LayerPool<T>& pool, const int64_t* table, long head, long first, long end, const T* zeros) {
        count = std::min(KEYS, end - first);
        long block = first / pool.block_size, offset = first % pool.block_size;
        for (long i = 0; i < count; ++block, offset = 0) {
            const T* at = pool.block(table[block], head) + offset * pool.dim;
            const long n = std::min(count - i, pool.block_size - offset);
            for (const long stop = i + n; i < stop; ++i, at += pool.dim) {
                key[i] = at;
                value[i] = at + pool.value_offset;
            }
        }
        for (long i = count; i < round_up(count, PANEL); ++i) key[i] = value[i] = zeros;
    }
};

// to[d] = the unit of V at one (float) or two (bfloat16) neighbouring positions.
DS_INLINE void zip_values(const float* v, const float*, long d, long dim, uint32_t* to) {
    *reinterpret_cast<vu_any*>(to + d) = load_units(v + d, dim - d);
}
DS_INLINE void zip_values(const bf16* v, const bf16* next, long d, long dim, uint32_t* to) {
    const vu low = (vu)load_some(v + d, dim - d) >> 16, high = (vu)load_some(next + d, dim - d);
    *reinterpret_cast<vu_any*>(to + d) = low | high;
}

// Lay out a tile's keys and values for the products, and fetch the lines of the tile that comes after it: blocks lie
// scattered, where no hardware prefetcher finds them.
template <class T>
void gather(const Located<T>& tile, const Located<T>& after, Scratch<T>& s) {
    const long padded = round_up(tile.count, PANEL);
    for (long i = 0; i < padded; i += LANES)
        for (long unit = 0; unit < s.row_units; unit += LANES) {
            vu square[LANES];
#pragma GCC unroll 16
            for (long j = 0; j < LANES; ++j) {
                square[j] = load_units(tile.key[i + j] + unit * PER_UNIT<T>, s.row_units - unit);
                if (i + j < after.count) __builtin_prefetch(after.key[i + j] + unit * PER_UNIT<T>);
            }
            transpose(square);
#pragma GCC unroll 16
            for (long j = 0; j < LANES; ++j)
                *reinterpret_cast<vu_any*>(s.keys.data() + (unit + j) * KEYS + i) = square[j];
        }
    for (long i = 0; i < padded; i += PER_UNIT<T>)
        for (long d = 0; d < s.dim; d += LANES) {
            uint32_t* to = s.values.data() + i / PER_UNIT<T> * s.value_units;
            zip_values(tile.value[i], tile.value[i + PER_UNIT<T> - 1], d, s.dim, to);
            const long ahead = i + d / LANES % PER_UNIT<T>;  // each line of the tile after, once
            if (ahead < after.count) __builtin_prefetch(after.value[ahead] + d / PER_UNIT<T> / LANES * LANES * PER_UNIT<T>);
        }
}

// One row's scores [64] of a tile → weights [64] T, and its sums so far faded to the new peak. ``seen``: keys it may see.
// Scores and peaks are in units of log 2: ``scale`` includes log2(e).
template <class T>
DS_INLINE void soften(const float* scores, float scale, long seen, T* weights, float* out, long width, float& peak,
                      float& total) {
    constexpr int VECTORS = KEYS / LANES;
    const bool whole = seen >= KEYS;
    vf x[VECTORS];
    vf most = splat(peak);
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
        x[i] = load(scores + i * LANES) * scale;
        if (!whole) x[i] = lanes() + static_cast<int>(i * LANES) < static_cast<int>(seen) ? x[i] : splat(-INFINITY);
        most = max(most, x[i]);
    }
    const float next = largest(most);
    vf sums{};
#pragma GCC unroll 4
    for (int i = 0; i < VECTORS; ++i) {
        vf p = exp2_below(x[i] - next);
        if (!whole) p = x[i] == -INFINITY ? vf{} : p;
        sums += p;
        store(weights + i * LANES, p);
    }
    const float fade = next == peak ? 1.0f : std::exp2(peak - next);  // 0 before the first tile: peak is -inf
    total = total * fade + sum(sums);
    if (fade != 1.0f)
        for (long d = 0; d < width; d += LANES) store(out + d, load(out + d) * fade);
    peak = next;
}

// Add the tile of ``count`` keys from ``key`` on, already gathered, to the sums of every row.
template <class T>
void add_tile(const Model& m, const AttentionTask& t, long first_position, long key, long count, Scratch<T>& s) {
    const long group = m.heads / m.kv_heads, rows = t.queries * group;
    for (long k = 0; k < count; k += PANEL)
        tiles<T>(s.q.data(), s.row_units, rows, s.keys.data() + k, KEYS, s.row_units, 0, s.scores.data() + k, KEYS, false);
    for (long r = 0; r < rows; ++r) {
        const long seen = std::min(count, first_position + r / group + 1 - key);
        T* weights = s.weights.data() + r * KEYS;
        if (seen <= 0)
            std::fill(weights, weights + KEYS, T{});
        else
            soften(s.scores.data() + r * KEYS, static_cast<float>(m.scale * M_LOG2E), seen, weights,
                   s.out.data() + r * s.value_units, s.value_units, s.peak[r], s.total[r]);
    }
    const uint32_t* weights = reinterpret_cast<const uint32_t*>(s.weights.data());
    for (long d = 0; d < s.value_units; d += PANEL)
        tiles<T>(weights, KEYS / PER_UNIT<T>, rows, s.values.data() + d, s.value_units, units_of<T>(count), 0,
                 s.out.data() + d, s.value_units, true);
}

// Leave this split's sums; the last split of the query to come joins them all, in the order of the context.
template <class T>
void join(const AttentionTask& t, long head, Partials& partials, long group, long dim, Scratch<T>& s, T* out) {
    const long width = s.value_units, floats = partials.row_floats;
    float* own = partials.of(t.partial + t.split, head);
    for (long r = 0; r < group; ++r) {
        std::copy_n(s.out.data() + r * width, width, own + r * floats);
        own[r * floats + width] = s.peak[r];
        own[r * floats + width + 1] = s.total[r];
    }
    std::atomic<int>& done = partials.done[static_cast<size_t>(t.partial * partials.kv_heads + head)];
    if (done.fetch_add(1, std::memory_order_acq_rel) + 1 < t.splits) return;
    done.store(0, std::memory_order_relaxed);
    for (long r = 0; r < group; ++r) {
        float peak = -INFINITY, total = 0;
        for (long i = 0; i < t.splits; ++i) peak = std::max(peak, partials.of(t.partial + i, head)[r * floats + width]);
        float* sums = s.out.data() + r * width;
        std::fill_n(sums, width, 0.0f);
        for (long i = 0; i < t.splits; ++i) {
            const float* part = partials.of(t.partial + i, head) + r * floats;
            const float share = std::exp2(part[width] - peak);
            total += part[width + 1] * share;
            for (long d = 0; d < width; ++d) sums[d] += part[d] * share;
        }
        for (long d = 0; d < dim; d += LANES) store_some(out + r * dim + d, load(sums + d) / total, dim - d);
    }
}

// A step's attention in one layer, as its tasks see it. qkv, out: the rows of the step.
template <class T>
struct AttentionInput {
    const Model& model;
    const Layer& layer;
    const LayerPool<T>& pool;
    const Step& step;
    const std::vector<AttentionTask>& tasks;
    const T* qkv;
    long ldqkv;
    T* out;
    long ldout;

    // The first tile of piece ``index``: a task on a KV head.
    void locate(long index, Located<T>& tile, const T* zeros) const {
        if (index >= static_cast<long>(tasks.size()) * model.kv_heads) return;
        const AttentionTask& t = tasks[index / model.kv_heads];
        const int64_t* table = step.tables + step.segment[t.segment].table;
        tile.find(pool, table, index % model.kv_heads, t.first_key, t.end_key, zeros);
    }
};

// One task on one KV head. A single token's own K and V are written to the pool on the way.
template <class T>
void attend(const AttentionInput<T>& in, long index, Partials& partials, Scratch<T>& s) {
    const Model& m = in.model;
    const AttentionTask& t = in.tasks[index / m.kv_heads];
    const Segment& segment = in.step.segment[t.segment];
    const int64_t* table = in.step.tables + segment.table;
    const long head = index % m.kv_heads, group = m.heads / m.kv_heads, dim = m.head_dim, rows = t.queries * group;
    const long row = segment.first + t.first_query, position = segment.start + t.first_query;
    const T* qkv = in.qkv + row * in.ldqkv;
    if (segment.length == 1 && t.split + 1 == t.splits)
        write_kv(m, in.layer, in.pool, table, position, head, qkv);
    T* q = reinterpret_cast<T*>(s.q.data());
    for (long r = 0; r < rows; ++r) {
        const long of = head * group + r % group;
        rotate(m, in.layer, qkv + r / group * in.ldqkv + of * dim, of, position + r / group, q + r * dim);
    }
    std::fill_n(s.out.data(), rows * s.value_units, 0.0f);
    std::fill_n(s.peak.data(), rows, -INFINITY);
    std::fill_n(s.total.data(), rows, 0.0f);
    Located<T> tiles[2];
    tiles[0].find(in.pool, table, head, t.first_key, t.end_key, s.zeros.data());
    for (long key = t.first_key, i = 0; key < t.end_key; key += KEYS, i ^= 1) {
        Located<T>& after = tiles[i ^ 1];
        after.count = 0;
        if (key + KEYS < t.end_key)
            after.find(in.pool, table, head, key + KEYS, t.end_key, s.zeros.data());
        else
            in.locate(index + 1, after, s.zeros.data());
        gather(tiles[i], after, s);
        add_tile(m, t, position, key, tiles[i].count, s);
    }
    T* to = in.out + row * in.ldout + head * group * dim;
    if (t.splits > 1) return join(t, head, partials, group, dim, s, to);
    for (long r = 0; r < rows; ++r) {
        const float* sums = s.out.data() + r * s.value_units;
        T* at = to + r / group * in.ldout + r % group * dim;
        for (long d = 0; d < dim; d += LANES) store_some(at + d, load(sums + d) / s.total[r], dim - d);
    }
}

// The tasks of a step, for each KV head alike; the long ones first.
inline long plan_attention(const Model& m, const Step& step, std::vector<AttentionTask>& tasks) {
    const long queries = std::max<long>(1, QUERY_ROWS / (m.heads / m.kv_heads));
    long partials = 0;
    tasks.clear();
    for (long i = 0; i < step.segments; ++i) {
        const Segment& s = step.segment[i];
        if (s.length > 1) {
            for (long at = (s.length - 1) / queries * queries; at >= 0; at -= queries) {
                const long n = std::min(queries, s.length - at);
                tasks.push_back({i, at, n, 0, s.start + at + n, 0, 1, 0});
            }
            continue;
        }
        const long splits = s.start / SPLIT_KEYS + 1;
        for (long k = 0; k < splits; ++k) {
            const long end = std::min(s.start + 1, (k + 1) * SPLIT_KEYS);
            tasks.push_back({i, 0, 1, k * SPLIT_KEYS, end, k, splits, partials});
        }
        if (splits > 1) partials += splits;
    }
    return partials;
}

}  // namespace ds
