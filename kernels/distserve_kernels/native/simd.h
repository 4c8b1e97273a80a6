// Vectors of 64 bytes, written once in the compiler's own vector extension and so usable on any processor: a register on
// AVX-512, two on AVX2, four on NEON or SSE. Only the bfloat16 dot product and conversion are spelled per processor.
//
// A "unit" is 32 bits of a row along the inner dimension of a product: one float, or two neighbouring bfloat16.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <vector>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define DS_INLINE inline __attribute__((always_inline))

namespace ds {

constexpr long LANES = 16;

typedef float vf __attribute__((vector_size(64)));
typedef int32_t vi __attribute__((vector_size(64)));
typedef uint32_t vu __attribute__((vector_size(64)));
typedef uint16_t vh __attribute__((vector_size(32)));
typedef float vf_any __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(32), aligned(2), may_alias));

struct bf16 {
    uint16_t bits;
};

template <class T>
struct Traits;
template <>
struct Traits<float> {
    static constexpr long PER_UNIT = 1;
};
template <>
struct Traits<bf16> {
    static constexpr long PER_UNIT = 2;
};
template <class T>
constexpr long PER_UNIT = Traits<T>::PER_UNIT;

// Memory that begins on a cache line, so that no vector straddles two.
template <class T>
struct OnCacheLine {
    using value_type = T;
    OnCacheLine() = default;
    template <class U>
    OnCacheLine(const OnCacheLine<U>&) {}
    T* allocate(size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), std::align_val_t{64})); }
    void deallocate(T* at, size_t) { ::operator delete(at, std::align_val_t{64}); }
    bool operator==(const OnCacheLine&) const { return true; }
};
template <class T>
using Buffer = std::vector<T, OnCacheLine<T>>;

DS_INLINE long round_up(long n, long to) { return (n + to - 1) / to * to; }

DS_INLINE vf splat(float x) { return x - vf{}; }
DS_INLINE vu splat(uint32_t x) { return x - vu{}; }
DS_INLINE vi lanes() { return vi{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}; }
DS_INLINE vf max(vf a, vf b) { return a > b ? a : b; }

DS_INLINE vf load(const float* at) { return *reinterpret_cast<const vf_any*>(at); }
DS_INLINE void store(float* at, vf x) { *reinterpret_cast<vf_any*>(at) = x; }

DS_INLINE vu load_units(const void* at) { return *static_cast<const vu_any*>(at); }
DS_INLINE vu load_units(const void* at, long count) {  // the rest is 0
    if (count >= LANES) return load_units(at);
    vu x{};
    if (count > 0) std::memcpy(&x, at, static_cast<size_t>(count) * 4);
    return x;
}

DS_INLINE float to_float(float x) { return x; }
DS_INLINE float to_float(bf16 x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float y;
    std::memcpy(&y, &bits, 4);
    return y;
}

DS_INLINE void put(float* at, float x) { *at = x; }
DS_INLINE void put(bf16* at, float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    at->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

DS_INLINE vf load(const bf16* at) {
    const vh half = *reinterpret_cast<const vh_any*>(at);
    return (vf)(__builtin_convertvector(half, vu) << 16);
}
DS_INLINE void store(bf16* at, vf x) {
#if defined(__AVX512BF16__)
    *reinterpret_cast<vh_any*>(at) = (vh)_mm512_cvtneps_pbh((__m512)x);
#else
    const vu bits = (vu)x;
    const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    *reinterpret_cast<vh_any*>(at) = __builtin_convertvector(x != x ? splat(0x7fc0u) : rounded, vh);
#endif
}

// What a float becomes when it passes through a T.
template <class T>
DS_INLINE vf rounded(vf x);
template <>
DS_INLINE vf rounded<float>(vf x) {
    return x;
}
template <>
DS_INLINE vf rounded<bf16>(vf x) {
    bf16 held[LANES];
    store(held, x);
    return load(held);
}

// Loads and stores of the first ``count`` (at most 16) elements; the rest of a load is 0.
template <class T>
DS_INLINE vf load_some(const T* at, long count) {
    if (count >= LANES) return load(at);
    T held[LANES] = {};
    std::memcpy(held, at, static_cast<size_t>(count) * sizeof(T));
    return load(held);
}
template <class T>
DS_INLINE void store_some(T* at, vf x, long count) {
    if (count >= LANES) return store(at, x);
    T held[LANES];
    store(held, x);
    std::memcpy(at, held, static_cast<size_t>(count) * sizeof(T));
}

// acc + the products of each lane's unit of ``w`` with the unit ``x``.
template <class T>
DS_INLINE vf dot(vf acc, vu w, uint32_t x);
template <>
DS_INLINE vf dot<float>(vf acc, vu w, uint32_t x) {
    return acc + (vf)w * (vf)splat(x);
}
template <>
DS_INLINE vf dot<bf16>(vf acc, vu w, uint32_t x) {
#if defined(__AVX512BF16__)
    return (vf)_mm512_dpbf16_ps((__m512)acc, (__m512bh)w, (__m512bh)splat(x));
#else
    acc += (vf)(w << 16) * (vf)splat(x << 16);
    return acc + (vf)(w & 0xffff0000u) * (vf)splat(x & 0xffff0000u);
#endif
}

// Always summed in the same tree, so that a sum depends on nothing but its terms.
DS_INLINE float sum(vf x) {
    for (int step = 8; step > 0; step /= 2) x += __builtin_shuffle(x, (lanes() + step) & 15);
    return x[0];
}
DS_INLINE float largest(vf x) {
    for (int step = 8; step > 0; step /= 2) x = max(x, __builtin_shuffle(x, (lanes() + step) & 15));
    return x[0];
}

// e^x to about one unit in the last place; below -87 it is as good as 0.
DS_INLINE vf exp(vf x) {
    x = x < -87.0f ? splat(-87.0f) : x;
    x = x > 88.0f ? splat(88.0f) : x;
    const vf magic = splat(12582912.0f);  // adding it leaves the nearest integer in the low bits
    const vf shifted = x * 1.44269504f + magic;
    const vf n = shifted - magic;
    const vf r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    vf p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
}

// 2^x for x <= 0, to about one unit in the last place; below -126 it is as good as 0.
DS_INLINE vf exp2_below(vf x) {
    x = max(x, splat(-126.0f));
    const vf magic = splat(12582912.0f);
    const vf shifted = x + magic;
    const vf r = x - (shifted - magic);
    vf p = splat(1.535336188e-4f);
    p = p * r + 1.339887440e-3f;
    p = p * r + 9.618437357e-3f;
    p = p * r + 5.550332471e-2f;
    p = p * r + 2.402264791e-1f;
    p = p * r + 6.931472028e-1f;
    p = p * r + 1.0f;
    return (vf)((vi)p + ((vi)shifted << 23));
}

// Transpose 16 x 16 units in place (Eklundh: swap off-diagonal squares of 1, 2, 4, 8).
template <int STEP>
DS_INLINE void swap_squares(vu (&rows)[16]) {
    const vi at = lanes();
    const vi low = (at & STEP) == 0 ? at : at + (16 - STEP);
    const vi high = (at & STEP) == 0 ? at + STEP : at + 16;
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) {
        if (i & STEP) continue;
        const vu a = rows[i], b = rows[i + STEP];
        rows[i] = __builtin_shuffle(a, b, (vu)low);
        rows[i + STEP] = __builtin_shuffle(a, b, (vu)high);
    }
}
DS_INLINE void transpose(vu (&rows)[16]) {
    swap_squares<1>(rows);
    swap_squares<2>(rows);
    swap_squares<4>(rows);
    swap_squares<8>(rows);
}

}  // namespace ds
