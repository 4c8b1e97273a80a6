// Products of a few rows with a packed weight: y = x·Wᵀ, accumulated in float32.
//
// packed weight: panels of 32 outputs; in a panel, for each unit of the inner dimension, the units of its 32 outputs side
// by side. One panel is one run of memory, read once for up to 12 rows; more rows find it in the cache.
//
// Every output is accumulated in one register over the inner dimension, first to last, whatever the number of rows: a
// row's result does not depend on its batch mates, bit for bit.
#pragma once

#include "model.h"
#include "simd.h"
#include "team.h"

namespace ds {

constexpr long PANEL = 32;
constexpr int PANEL_VECTORS = PANEL / LANES;
#if defined(__AVX512F__)
constexpr int TILE_ROWS = 12;  // 24 sums, the weights and a broadcast fill 27 of 32 registers
#else
constexpr int TILE_ROWS = 2;
#endif
constexpr long BLOCK_ROWS = 96;  // rows of activations that stay in the second-level cache while panels pass by
constexpr long AHEAD = 256 * PANEL;  // units that weights are fetched ahead of their use

// c[ROWS][32] (+)= x[ROWS]·w. x, w, ldx (of x), stride (from step to step of w) and ahead are in units.
template <class T, int ROWS>
void tile(const uint32_t* x, long ldx, const uint32_t* w, long stride, long steps, long ahead, float* c, long ldc,
          bool accumulate) {
    vf acc[ROWS][PANEL_VECTORS];
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; ++v) acc[r][v] = accumulate ? load(c + r * ldc + v * LANES) : vf{};
    for (long k = 0; k < steps; ++k, w += stride) {
        const vu low = load_units(w), high = load_units(w + LANES);
        __builtin_prefetch(w + ahead);
        __builtin_prefetch(w + ahead + LANES);
#pragma GCC unroll 16
        for (int r = 0; r < ROWS; ++r) {
            const uint32_t xr = x[r * ldx + k];
            acc[r][0] = dot<T>(acc[r][0], low, xr);
            acc[r][1] = dot<T>(acc[r][1], high, xr);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < PANEL_VECTORS; ++v) store(c + r * ldc + v * LANES, acc[r][v]);
}

using Tile = void (*)(const uint32_t*, long, const uint32_t*, long, long, long, float*, long, bool);

template <class T, int ROWS = TILE_ROWS>
DS_INLINE Tile tile_of(long rows) {
    if constexpr (ROWS == 1)
        return tile<T, 1>;
    else
        return rows == ROWS ? tile<T, ROWS> : tile_of<T, ROWS - 1>(rows);
}

// c[rows][32] (+)= x·w for any number of rows, cut as evenly as possible: 16 are 8 and 8, not 12 and 4.
template <class T>
void tiles(const uint32_t* x, long ldx, long rows, const uint32_t* w, long stride, long steps, long ahead, float* c,
           long ldc, bool accumulate) {
    const long count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    for (long i = 0, at = 0; i < count; ++i) {
        const long n = (rows - at) / (count - i);
        tile_of<T>(n)(x + at * ldx, ldx, w, stride, steps, ahead, c + at * ldc, ldc, accumulate);
        at += n;
    }
}

template <class T>
DS_INLINE long units_of(long elements) {
    return (elements + PER_UNIT<T> - 1) / PER_UNIT<T>;
}

// y = x·Wᵀ for all rows, by the whole team. finish(first row, rows, first output, c) takes the sums [rows][32] of each tile.
template <class T, class Finish>
void product(Team& team, int thread, const T* x, long ldx, long rows, const Linear& weight, const Finish& finish) {
    alignas(64) float c[BLOCK_ROWS * PANEL];
    const uint32_t* packed = static_cast<const uint32_t*>(weight.packed);
    const long steps = units_of<T>(weight.inputs), panels = (weight.outputs + PANEL - 1) / PANEL;
    const long blocks = (rows + BLOCK_ROWS - 1) / BLOCK_ROWS;
    for (long piece; (piece = team.take(panels * blocks, thread)) >= 0;) {
        const long block = piece / panels, panel = piece % panels;
        const long first = block * rows / blocks, n = (block + 1) * rows / blocks - first;
        const uint32_t* from = reinterpret_cast<const uint32_t*>(x + first * ldx);
        tiles<T>(from, ldx / PER_UNIT<T>, n, packed + panel * steps * PANEL, PANEL, steps, AHEAD, c, PANEL, false);
        finish(first, n, panel * PANEL, c);
    }
}

// Pack rows [outputs, inputs] of T. ``second``: another matrix of the same shape whose outputs alternate with the first's
// in groups of 16 (gate and up), or null. Both ends of both dimensions are padded with 0.
template <class T>
void pack(const T* first, const T* second, long outputs, long inputs, T* packed) {
    const long steps = units_of<T>(inputs), per = PER_UNIT<T>;
    const long total = second == nullptr ? round_up(outputs, PANEL) : 2 * round_up(outputs, LANES);
    for (long n = 0; n < total; ++n) {
        const T* matrix = second == nullptr || n / LANES % 2 == 0 ? first : second;
        const long row = second == nullptr ? n : n / (2 * LANES) * LANES + n % LANES;
        T* to = packed + (n / PANEL * steps * PANEL + n % PANEL) * per;
        const T* from = matrix + row * inputs;
        for (long k = 0; k < steps; ++k)
            for (long i = 0; i < per; ++i) {
                const long at = k * per + i;
                to[k * PANEL * per + i] = row < outputs && at < inputs ? from[at] : T{};
            }
    }
}

// One row of the plain matrix back from the packed one.
template <class T>
void unpack_row(const Linear& weight, long row, T* out) {
    const long steps = units_of<T>(weight.inputs), per = PER_UNIT<T>;
    const T* from = static_cast<const T*>(weight.packed) + (row / PANEL * steps * PANEL + row % PANEL) * per;
    for (long at = 0; at < weight.inputs; ++at) out[at] = from[at / per * PANEL * per + at % per];
}

}  // namespace ds
