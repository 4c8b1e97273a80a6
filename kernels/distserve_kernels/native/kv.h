// Keys and values of one layer in the paged pool, and what happens to a head's vector before it gets there.
#pragma once

#include "gemm.h"

namespace ds {

constexpr long MOST_HEAD_DIM = 512;

// One layer's KV of the pool.
template <class T>
struct LayerPool {
    T* memory;  // the layer's first row of block 0
    long block_stride, head_stride, value_offset, block_size, dim;

    LayerPool(const Pool& p, const Model& m, long layer)
        : block_stride(m.layers * 2 * m.kv_heads * p.block_size * m.head_dim),
          head_stride(p.block_size * m.head_dim),
          value_offset(m.kv_heads * p.block_size * m.head_dim),
          block_size(p.block_size),
          dim(m.head_dim) {
        memory = static_cast<T*>(p.memory) + layer * 2 * value_offset;
    }
    T* block(long number, long head) const { return memory + number * block_stride + head * head_stride; }
    T* key(const int64_t* table, long position, long head) const {
        return block(table[position / block_size], head) + position % block_size * dim;
    }
};

// The vector of ``head`` (query heads, then key heads) as it enters the scores: normed and rotated where the model does
// that, rounded through T at the same places as the torch path.
template <class T>
DS_INLINE void rotate(const Model& m, const Layer& layer, const T* from, long head, long position, T* to) {
    const long dim = m.head_dim, half = dim / 2;
    alignas(64) T normed[MOST_HEAD_DIM];
    if (layer.qk_norm != nullptr) {
        const T* weight = static_cast<const T*>(layer.qk_norm) + head * dim;
        vf squares{};
        for (long i = 0; i < dim; i += LANES) {
            const vf x = load_some(from + i, dim - i);
            squares += x * x;
        }
        const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(dim) + static_cast<float>(m.eps));
        for (long i = 0; i < dim; i += LANES) {
            const vf x = rounded<T>(load_some(from + i, dim - i) * inverse);
            store_some(normed + i, x * load_some(weight + i, dim - i), dim - i);
        }
        from = normed;
    }
    if (m.cos == nullptr) {
        std::memcpy(to, from, static_cast<size_t>(dim) * sizeof(T));
        return;
    }
    const T* cos = static_cast<const T*>(m.cos) + position * dim;
    const T* sin = static_cast<const T*>(m.sin) + position * dim;  // its first half carries the minus
    for (long i = 0; i < half; i += LANES) {
        const long n = half - i;
        const vf low = load_some(from + i, n), high = load_some(from + half + i, n);
        store_some(to + i, rounded<T>(low * load_some(cos + i, n)) + high * load_some(sin + i, n), n);
        store_some(to + half + i, rounded<T>(high * load_some(cos + half + i, n)) + low * load_some(sin + half + i, n), n);
    }
}

// Write one token's K and V of one head to the pool. ``row``: its Q, K and V.
template <class T>
DS_INLINE void write_kv(const Model& m, const Layer& layer, const LayerPool<T>& pool, const int64_t* table,
                        long position, long head, const T* row) {
    T* to = pool.key(table, position, head);
    rotate(m, layer, row + (m.heads + head) * m.head_dim, m.heads + head, position, to);
    const T* value = row + (m.heads + m.kv_heads + head) * m.head_dim;
    std::memcpy(to + pool.value_offset, value, static_cast<size_t>(m.head_dim) * sizeof(T));
}

}  // namespace ds
