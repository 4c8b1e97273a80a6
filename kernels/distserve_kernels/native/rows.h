// What sampling needs of one row of scores: the largest, masses of exp, the few that matter, and where among these, most
// likely first and equal ones by rising id, a cumulated mass is reached. Nothing is sorted but a last handful.
//
// A score that is not a number counts as minus infinity. Sums are made in one order that depends on the row alone:
// neither the number of rows nor that of threads changes a bit.
#pragma once

#include <algorithm>
#include <cfloat>
#include <limits>

#include "simd.h"

namespace ds {

typedef double vd __attribute__((vector_size(128)));

constexpr float LOWEST = -std::numeric_limits<float>::infinity();
constexpr long GROUP = 256;   // scores that share sixteen maxima
constexpr long BLOCK = 1024;  // scores whose mass is known together

template <class T>
DS_INLINE vf load_row(const T* at, long count) {  // the rest is minus infinity
    if (count >= LANES) return load(at);
    const vf x = load_some(at, count);
    return lanes() < static_cast<int32_t>(count) ? x : splat(LOWEST);
}

DS_INLINE double sum_of(vd x) {
    double part[16];
    std::memcpy(part, &x, sizeof(part));
    for (int step = 8; step > 0; step /= 2)
        for (int i = 0; i < step; ++i) part[i] += part[i + step];
    return part[0];
}

// The first of the largest; 0 when there is none.
template <class T>
inline long argmax(const T* row, long n) {
    vf best = splat(LOWEST);
    vi at{};
    for (long i = 0; i < n; i += LANES) {
        const vf x = load_row(row + i, n - i);
        const vi better = x > best;
        best = better ? x : best;
        at = better ? static_cast<int32_t>(i / LANES) - vi{} : at;
    }
    const float top = largest(best);
    long first = n;
    for (int lane = 0; lane < LANES; ++lane)
        if (best[lane] == top) first = std::min(first, at[lane] * LANES + lane);
    return top > LOWEST ? first : 0;
}

// Sixteen maxima of every GROUP into ``out``; returns the largest of all.
inline float maxima(const float* row, long n, float* out) {
    vf best = splat(LOWEST);
    for (long g = 0; g < n; g += GROUP, out += LANES) {
        vf here = splat(LOWEST);
        for (long i = g; i < std::min(n, g + GROUP); i += LANES) here = max(load_row(row + i, n - i), here);
        store(out, here);
        best = max(here, best);
    }
    return largest(best);
}

inline long count_from(const float* scores, long n, float floor) {
    vi count{};
    for (long i = 0; i < n; i += LANES) count -= load(scores + i) >= floor;
    long all = 0;
    for (int lane = 0; lane < LANES; ++lane) all += count[lane];
    return all;
}

// A score that at least k of the row reach, near the k-th largest, from ``maxima`` (a multiple of 16 of them).
inline float bound_of_rank(const float* maxima, long n, long k, float best) {
    float low = best, high = best;
    for (long i = 0; i < n; ++i) low = maxima[i] > LOWEST ? std::min(low, maxima[i]) : low;
    if (count_from(maxima, n, low) < k) return -FLT_MAX;
    for (int round = 0; round < 16; ++round) {
        const float middle = low * 0.5f + high * 0.5f;
        (count_from(maxima, n, middle) >= k ? low : high) = middle;
    }
    return low;
}

// exp((score - best)·heat), and 0 below ``floor``, which is finite.
struct Softmax {
    float best, heat, floor;

    DS_INLINE vf operator()(vf x) const { return x >= floor ? exp((x - best) * heat) : vf{}; }
};

// The mass of every BLOCK into ``blocks``; returns that of all.
inline double masses(const float* row, long n, const Softmax& weigh, double* blocks) {
    double all = 0;
    for (long b = 0; b < n; b += BLOCK) {
        vd mass{};
        for (long i = b; i < std::min(n, b + BLOCK); i += LANES)
            mass += __builtin_convertvector(weigh(load_row(row + i, n - i)), vd);
        all += *blocks++ = sum_of(mass);
    }
    return all;
}

// The first id at which the mass cumulated by rising id exceeds ``target``; the last of any mass, should none.
inline long crossing_by_id(const float* row, long n, const Softmax& weigh, const double* blocks, double target) {
    const long count = (n + BLOCK - 1) / BLOCK;
    double before = 0;
    long block = 0, last = 0;
    for (; block < count; ++block) {
        if (blocks[block] > 0) last = block;
        if (before + blocks[block] > target) break;
        before += blocks[block];
    }
    if (block == count) block = last, before = std::numeric_limits<double>::lowest();
    long found = block * BLOCK;
    for (long i = block * BLOCK; i < std::min(n, (block + 1) * BLOCK); i += LANES) {
        const vf w = weigh(load_row(row + i, n - i));
        for (int lane = 0; lane < LANES; ++lane) {
            if (!(w[lane] > 0)) continue;
            found = i + lane;
            before += static_cast<double>(w[lane]);
            if (before > target) return found;
        }
    }
    return found;
}

// Some of a row, by rising id. Arrays have room for sixteen more; the last sixteen are filled up with weightless copies.
struct List {
    Buffer<float> score, weight;
    Buffer<int32_t> id;
    long size = 0;

    explicit List(long room) : score(room + 2 * LANES), weight(room + 2 * LANES), id(room + 2 * LANES) {}

    void fill_up() {
        for (long i = size; i % LANES != 0; ++i) score[i] = size ? score[size - 1] : 0.0f, weight[i] = 0.0f;
    }
    double mass() const {
        vd all{};
        for (long i = 0; i < size; i += LANES) all += __builtin_convertvector(load(&weight[i]), vd);
        return sum_of(all);
    }
    double mass_from(float floor) const {
        vd all{};
        for (long i = 0; i < size; i += LANES)
            all += __builtin_convertvector(load(&score[i]) >= floor ? load(&weight[i]) : vf{}, vd);
        return sum_of(all);
    }
    void weigh(const Softmax& weigh) {
        for (long i = 0; i < size; i += LANES) store(&weight[i], weigh(load(&score[i])));
        fill_up();
    }
    void weigh_alike() {
        std::fill(weight.begin(), weight.begin() + size, 1.0f);
        fill_up();
    }
};

#if defined(__AVX512F__)
DS_INLINE unsigned from_mask(vf x, float floor) {
    return _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(floor), _CMP_GE_OQ);
}
// The chosen lanes, side by side. Writes sixteen: what is behind them is of no meaning.
DS_INLINE void squeeze(float* to, unsigned mask, vf x) {
    _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(mask), (__m512)x));
}
DS_INLINE void squeeze(int32_t* to, unsigned mask, vi x) {
    _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), (__m512i)x));
}
#else
DS_INLINE unsigned from_mask(vf x, float floor) {
    unsigned mask = 0;
    if (!(largest(x) >= floor)) return 0;
    for (int lane = 0; lane < LANES; ++lane) mask |= static_cast<unsigned>(x[lane] >= floor) << lane;
    return mask;
}
template <class T, class V>
DS_INLINE void squeeze(T* to, unsigned mask, V x) {
    for (int lane = 0; lane < LANES; ++lane) {
        *to = x[lane];
        to += mask >> lane & 1;
    }
}
#endif

// The scores from ``floor`` on, which is finite.
inline void collect(const float* row, long n, float floor, List& to) {
    long size = 0;
    for (long i = 0; i < n; i += LANES) {
        vf x = load_row(row + i, n - i);
        x = x == x ? x : splat(LOWEST);
        const unsigned mask = from_mask(x, floor);
        if (mask == 0) continue;
        squeeze(&to.score[size], mask, x);
        squeeze(&to.id[size], mask, lanes() + static_cast<int32_t>(i));
        size += __builtin_popcount(mask);
    }
    to.size = size;
}

// Those of ``from`` whose score reaches ``floor``, or (``below``) the others. ``to`` may be ``from``.
inline void part(const List& from, float floor, bool below, List& to) {
    const long n = from.size;
    long size = 0;
    for (long i = 0; i < n; i += LANES) {
        const vf score = load(&from.score[i]), weight = load(&from.weight[i]);
        vi id;
        std::memcpy(&id, &from.id[i], sizeof(id));
        unsigned mask = from_mask(score, floor) ^ (below ? 0xffffu : 0u);
        if (n - i < LANES) mask &= (1u << (n - i)) - 1;
        squeeze(&to.score[size], mask, score);
        squeeze(&to.weight[size], mask, weight);
        squeeze(&to.id[size], mask, id);
        size += __builtin_popcount(mask);
    }
    to.size = size;
    to.fill_up();
}

struct Place {
    float score;
    int32_t id;
    double mass;  // up to and with this one

    bool after(const Place& other) const { return score < other.score || (score == other.score && id > other.id); }
};

// As ``crossing`` below, of a few that come behind a mass of ``before``.
inline Place crossing_of_few(const List& list, double target, double before) {
    int order[2 * LANES];
    for (int i = 0; i < list.size; ++i) {
        int j = i;
        for (; j > 0 && list.score[order[j - 1]] < list.score[i]; --j) order[j] = order[j - 1];
        order[j] = i;
    }
    Place place{};
    for (int i = 0; i < list.size; ++i) {
        before += static_cast<double>(list.weight[order[i]]);
        place = {list.score[order[i]], list.id[order[i]], before};
        if (before > target) break;
    }
    return place;
}

// The first of ``list``, by falling score and rising id, at which the cumulated weight exceeds ``target``; the last one,
// should none. Equal scores have equal weights. ``list`` is not empty and not changed, ``work`` is.
inline Place crossing(const List& list, double target, List& work) {
    const List* left = &list;
    double above = 0;
    for (;;) {
        if (left->size <= 2 * LANES) return crossing_of_few(*left, target, above);
        vf low = load(&left->score[0]), high = low;
        for (long i = LANES; i < left->size; i += LANES) {
            const vf x = load(&left->score[i]);
            low = x < low ? x : low;
            high = max(x, high);
        }
        const float least = -largest(-low), most = largest(high);
        if (least == most) {
            const double each = static_cast<double>(left->weight[0]), nth = each > 0 ? (target - above) / each : 0;
            const long at = static_cast<long>(std::min(std::max(nth, 0.0), static_cast<double>(left->size - 1)));
            return {most, left->id[at], above + each * static_cast<double>(at + 1)};
        }
        float middle = least * 0.5f + most * 0.5f;
        if (!(middle > least && middle <= most)) middle = most;
        const double mass = left->mass_from(middle);
        const bool below = above + mass <= target;
        if (below) above += mass;
        part(*left, middle, below, work);
        left = &work;
    }
}

// Drop what comes behind ``last``.
inline void cut_behind(List& list, const Place& last) {
    part(list, last.score, false, list);
    long size = 0;
    for (long i = 0; i < list.size; ++i) {
        const bool kept = list.score[i] > last.score || list.id[i] <= last.id;
        list.score[size] = list.score[i], list.weight[size] = list.weight[i], list.id[size] = list.id[i];
        size += kept;
    }
    list.size = size;
    list.fill_up();
}

}  // namespace ds
