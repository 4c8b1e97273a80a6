// XXH3-64 with a seed, of inputs longer than 240 bytes, fed in blocks of 1 KiB: so that bytes can be summed up while they
// are copied. The algorithm is public (xxHash, version 0.8); what it yields is compared with the ``xxhash`` package.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace ds {

typedef uint64_t words __attribute__((vector_size(64)));
typedef uint64_t words_any __attribute__((vector_size(64), aligned(1), may_alias));

class Xxh3 {
   public:
    static constexpr long STRIPE = 64, STRIPES = 16, BLOCK = STRIPE * STRIPES, SHORTEST = 241;

    explicit Xxh3(uint64_t seed) {
        for (int i = 0; i < SECRET_BYTES; i += 16) {
            put(secret_ + i, word(SECRET + i) + seed);
            put(secret_ + i + 8, word(SECRET + i + 8) - seed);
        }
    }

    // Feed a block, whose stripe number i is ``stripe(i)``. The sums stay in a register meanwhile: bytes that are stored
    // between two stripes could be anybody's, and the compiler would store and load the sums each time.
    template <class Stripe>
    inline __attribute__((always_inline)) void block(Stripe stripe) {
        words sums = sums_;
        for (long i = 0; i < STRIPES; ++i) sums = added(sums, stripe(i), secret_ + 8 * i);
        sums_ = ((sums ^ (sums >> 47)) ^ at(secret_ + SECRET_BYTES - STRIPE)) * PRIME32_1;
    }
    void block(const unsigned char* from) {
        block([from](long i) { return at(from + STRIPE * i); });
    }

    // Blocks of ``count`` bytes that are to be fed before ``finish``.
    static long whole_blocks(long count) { return (count - 1) / BLOCK; }

    // The checksum of all ``count`` bytes, of which the whole blocks were fed; the others are read here.
    uint64_t finish(const unsigned char* all, long count) {
        const long fed = whole_blocks(count) * BLOCK;
        for (long i = 0; i < (count - 1 - fed) / STRIPE; ++i)
            sums_ = added(sums_, at(all + fed + STRIPE * i), secret_ + 8 * i);
        sums_ = added(sums_, at(all + count - STRIPE), secret_ + SECRET_BYTES - STRIPE - 7);
        uint64_t sum = static_cast<uint64_t>(count) * PRIME64_1;
        for (int i = 0; i < 4; ++i)
            sum += fold(sums_[2 * i] ^ word(secret_ + 11 + 16 * i), sums_[2 * i + 1] ^ word(secret_ + 19 + 16 * i));
        sum ^= sum >> 37;
        sum *= 0x165667919E3779F9ull;
        return sum ^ (sum >> 32);
    }

    static inline __attribute__((always_inline)) words at(const unsigned char* p) {
        return *reinterpret_cast<const words_any*>(p);
    }

   private:
    static constexpr int SECRET_BYTES = 192;
    static constexpr uint64_t PRIME32_1 = 0x9E3779B1u, PRIME32_2 = 0x85EBCA77u, PRIME32_3 = 0xC2B2AE3Du;
    static constexpr uint64_t PRIME64_1 = 0x9E3779B185EBCA87ull, PRIME64_2 = 0xC2B2AE3D27D4EB4Full,
                              PRIME64_3 = 0x165667B19E3779F9ull, PRIME64_4 = 0x85EBCA77C2B2AE63ull,
                              PRIME64_5 = 0x27D4EB2F165667C5ull;

    static uint64_t word(const unsigned char* p) {
        uint64_t x;
        std::memcpy(&x, p, 8);
        return x;
    }
    static void put(unsigned char* p, uint64_t x) { std::memcpy(p, &x, 8); }
    static uint64_t fold(uint64_t a, uint64_t b) {
        const unsigned __int128 product = static_cast<unsigned __int128>(a) * b;
        return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
    }

    // The product of the halves of each word.
    static inline __attribute__((always_inline)) words halves(words x) {
#if defined(__AVX512F__)
        return (words)_mm512_mul_epu32((__m512i)x, _mm512_srli_epi64((__m512i)x, 32));
#elif defined(__AVX2__)
        union {
            words all;
            __m256i half[2];
        } u = {x};
        for (__m256i& h : u.half) h = _mm256_mul_epu32(h, _mm256_srli_epi64(h, 32));
        return u.all;
#else
        return (x & 0xFFFFFFFFu) * (x >> 32);
#endif
    }

    static inline __attribute__((always_inline)) words added(words sums, words data, const unsigned char* key) {
        return sums + __builtin_shuffle(data, words{1, 0, 3, 2, 5, 4, 7, 6}) + halves(data ^ at(key));
    }

    static constexpr unsigned char SECRET[SECRET_BYTES] = {
    0xb8, 0xfe, 0x6c, 0x39, 0x23, 0xa4, 0x4b, 0xbe, 0x7c, 0x01, 0x81, 0x2c, 0xf7, 0x21, 0xad, 0x1c,
    0xde, 0xd4, 0x6d, 0xe9, 0x83, 0x90, 0x97, 0xdb, 0x72, 0x40, 0xa4, 0xa4, 0xb7, 0xb3, 0x67, 0x1f,
    0xcb, 0x79, 0xe6, 0x4e, 0xcc, 0xc0, 0xe5, 0x78, 0x82, 0x5a, 0xd0, 0x7d, 0xcc, 0xff, 0x72, 0x21,
    0xb8, 0x08, 0x46, 0x74, 0xf7, 0x43, 0x24, 0x8e, 0xe0, 0x35, 0x90, 0xe6, 0x81, 0x3a, 0x26, 0x4c,
    0x3c, 0x28, 0x52, 0xbb, 0x91, 0xc3, 0x00, 0xcb, 0x88, 0xd0, 0x65, 0x8b, 0x1b, 0x53, 0x2e, 0xa3,
    0x71, 0x64, 0x48, 0x97, 0xa2, 0x0d, 0xf9, 0x4e, 0x38, 0x19, 0xef, 0x46, 0xa9, 0xde, 0xac, 0xd8,
    0xa8, 0xfa, 0x76, 0x3f, 0xe3, 0x9c, 0x34, 0x3f, 0xf9, 0xdc, 0xbb, 0xc7, 0xc7, 0x0b, 0x4f, 0x1d,
    0x8a, 0x51, 0xe0, 0x4b, 0xcd, 0xb4, 0x59, 0x31, 0xc8, 0x9f, 0x7e, 0xc9, 0xd9, 0x78, 0x73, 0x64,
    0xea, 0xc5, 0xac, 0x83, 0x34, 0xd3, 0xeb, 0xc3, 0xc5, 0x81, 0xa0, 0xff, 0xfa, 0x13, 0x63, 0xeb,
    0x17, 0x0d, 0xdd, 0x51, 0xb7, 0xf0, 0xda, 0x49, 0xd3, 0x16, 0x55, 0x26, 0x29, 0xd4, 0x68, 0x9e,
    0x2b, 0x16, 0xbe, 0x58, 0x7d, 0x47, 0xa1, 0xfc, 0x8f, 0xf8, 0xb8, 0xd1, 0x7a, 0xd0, 0x31, 0xce,
    0x45, 0xcb, 0x3a, 0x8f, 0x95, 0x16, 0x04, 0x28, 0xaf, 0xd7, 0xfb, 0xca, 0xbb, 0x4b, 0x40, 0x7e};

    unsigned char secret_[SECRET_BYTES];
    words sums_ = {PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1};
};

}  // namespace ds
