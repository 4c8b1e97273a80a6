// Copies between a pool and staging that also sum bytes up, in one pass over memory: what is read for the copy is in a
// register anyway, and while a copy waits for memory there is time to sum. Called with one thread at a time per staging.
#include <cstring>

#include "xxh3.h"

using ds::words;
using ds::words_any;
using ds::Xxh3;

namespace {

typedef unsigned char byte;

constexpr long AHEAD = 2048;  // bytes: what is summed up leaves the processor less room to look ahead by itself

// A run of bytes of the pool. All but the last of a call are of whole kibibytes.
struct Span {
    int64_t offset, count;
};

inline void copy_block(byte* to, const byte* from) {
    for (long i = 0; i < Xxh3::BLOCK; i += Xxh3::STRIPE) *reinterpret_cast<words_any*>(to + i) = Xxh3::at(from + i);
}

// The pool is not read soon: past the caches, so that the line need not be fetched first.
inline void store_block(byte* to, const byte* from) {
#if defined(__AVX512F__)
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        for (long i = 0; i < Xxh3::BLOCK; i += Xxh3::STRIPE)
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i), (__m512i)Xxh3::at(from + i));
        return;
    }
#endif
    copy_block(to, from);
}

// As ``store_block``, and feeds a block of what is to be stored next.
inline void store_and_feed(byte* to, const byte* from, const byte* ahead, Xxh3& sum) {
#if defined(__AVX512F__)
    if (reinterpret_cast<uintptr_t>(to) % 64 == 0) {
        sum.block([to, from, ahead](long i) {
            _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * Xxh3::STRIPE),
                                (__m512i)Xxh3::at(from + i * Xxh3::STRIPE));
            return Xxh3::at(ahead + i * Xxh3::STRIPE);
        });
        return;
    }
#endif
    copy_block(to, from);
    sum.block(ahead);
}

}  // namespace

extern "C" {

// Copy ``spans`` of the pool to ``out``, one after another; returns the XXH3-64 of all, which is at least 241 bytes.
uint64_t ds_gather(const void* pool, const int64_t* spans, int64_t count, void* out, uint64_t seed) {
    const Span* span = reinterpret_cast<const Span*>(spans);
    long total = 0;
    for (int64_t s = 0; s < count; ++s) total += span[s].count;
    Xxh3 sum(seed);
    byte* to = static_cast<byte*>(out);
    long left = Xxh3::whole_blocks(total);
    for (int64_t s = 0; s < count; ++s) {
        const byte* from = static_cast<const byte*>(pool) + span[s].offset;
        const byte* end = from + span[s].count;
        for (; left > 0 && end - from >= Xxh3::BLOCK; --left, from += Xxh3::BLOCK, to += Xxh3::BLOCK) {
            sum.block([from, to](long i) {
                __builtin_prefetch(from + i * Xxh3::STRIPE + AHEAD);
                const words data = Xxh3::at(from + i * Xxh3::STRIPE);
                *reinterpret_cast<words_any*>(to + i * Xxh3::STRIPE) = data;
                return data;
            });
        }
        std::memcpy(to, from, static_cast<size_t>(end - from));
        to += end - from;
    }
    return sum.finish(static_cast<const byte*>(out), total);
}

// Copy ``staged`` to ``spans`` of the pool, one after another; meanwhile sum up ``ahead``, at least 241 bytes, which is
// to be stored next, and return its XXH3-64. Without ``ahead`` (null) 0.
uint64_t ds_scatter(void* pool, const int64_t* spans, int64_t count, const void* staged, const void* ahead,
                    int64_t ahead_count, uint64_t seed) {
    const Span* span = reinterpret_cast<const Span*>(spans);
    const byte *from = static_cast<const byte*>(staged), *next = static_cast<const byte*>(ahead);
    Xxh3 sum(seed);
    long left = ahead != nullptr ? Xxh3::whole_blocks(ahead_count) : 0;
    for (int64_t s = 0; s < count; ++s) {
        byte* to = static_cast<byte*>(pool) + span[s].offset;
        byte* end = to + span[s].count;
        for (; end - to >= Xxh3::BLOCK; to += Xxh3::BLOCK, from += Xxh3::BLOCK) {
            if (left == 0) {
                store_block(to, from);
                continue;
            }
            store_and_feed(to, from, next, sum);
            next += Xxh3::BLOCK;
            --left;
        }
        std::memcpy(to, from, static_cast<size_t>(end - to));
        from += end - to;
    }
#if defined(__AVX512F__)
    _mm_sfence();  // whoever is told of the bytes must see them
#endif
    if (ahead == nullptr) return 0;
    for (; left > 0; --left, next += Xxh3::BLOCK) sum.block(next);
    return sum.finish(static_cast<const byte*>(ahead), ahead_count);
}

}  // extern "C"
