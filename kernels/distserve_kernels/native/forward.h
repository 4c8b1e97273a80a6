// One forward pass of a decoder: every thread of the team walks the same phases and meets the others between them.
//
// Owns the activations, which grow to the largest step seen and are then reused. Rounds activations to T where the torch
// path does; everything in between is float32.
#pragma once

#include "attention.h"

namespace ds {

constexpr int OUT_OF_RANGE = -1, NO_MEMORY = -2, GIVEN_UP = -3;  // what a run returns if not 0
constexpr long OWN_NORM_ROWS = 4;  // up to here each thread norms all rows itself: cheaper than meeting once more

template <class T>
class Forward {
   public:
    Forward(const Model& model, int threads)
        : m_(model),
          layers_(model.layer, model.layer + model.layers),
          team_(threads),
          ldh_(round_up(m_.hidden, PANEL)),
          ldqkv_(round_up((m_.heads + 2 * m_.kv_heads) * m_.head_dim, PANEL)),
          ldo_(round_up(m_.heads * m_.head_dim, PANEL)),
          ldw_(round_up(m_.intermediate, PANEL)) {
        for (int i = 0; i < threads; ++i) {
            scratch_.emplace_back(m_);
            own_norm_.emplace_back(OWN_NORM_ROWS * ldh_);
        }
    }

    // 0, or OUT_OF_RANGE: a token, a block or a row is; nothing was computed. GIVEN_UP: on the way; the KV of the step's
    // tokens is written in some layers or in none, the logits are not to be read.
    int run(const Step& step, const Pool& pool) {
        if (!sound(step, pool)) return OUT_OF_RANGE;
        reserve(step.rows, step.samples);
        partials_.reserve(plan_attention(m_, step, tasks_), m_);
        plan_writes(step);
        step_ = &step;
        pool_ = &pool;
        team_.run([](void* self, int thread) { static_cast<Forward*>(self)->pass(thread); },
                  [](void* self) { return static_cast<Forward*>(self)->given_up(); }, this);
        return team_.stopped() ? GIVEN_UP : 0;
    }

   private:
    bool sound(const Step& s, const Pool& pool) const {
        for (long i = 0; i < s.rows; ++i)
            if (s.tokens[i] < 0 || s.tokens[i] >= m_.vocab) return false;
        for (long i = 0; i < s.samples; ++i)
            if (s.sample_rows[i] < 0 || s.sample_rows[i] >= s.rows) return false;
        long rows = 0;
        for (long i = 0; i < s.segments; ++i) {
            const Segment& g = s.segment[i];
            if (g.first != rows || g.length < 1 || g.start < 0 || g.start + g.length > m_.max_length) return false;
            rows += g.length;
            if (g.blocks * pool.block_size < g.start + g.length) return false;
            for (long b = 0; b < g.blocks; ++b)
                if (s.tables[g.table + b] < 0 || s.tables[g.table + b] >= pool.blocks) return false;
        }
        return rows == s.rows;
    }

    void plan_writes(const Step& step) {
        written_.clear();
        for (long g = 0; g < step.segments; ++g)
            for (long at = 0; step.segment[g].length > 1 && at < step.segment[g].length; at += WRITTEN_RUN)
                written_.push_back({g, at});
    }

    void reserve(long rows, long samples) {
        if (samples > sample_room_) picked_.resize((sample_room_ = std::max(samples, 2 * sample_room_)) * ldh_);
        if (rows <= room_) return;
        room_ = std::max(rows, 2 * room_);
        residual_.resize(room_ * ldh_);
        normed_.resize(room_ * ldh_);
        qkv_.resize(room_ * ldqkv_);
        mixed_.resize(room_ * ldo_);
        wide_.resize(room_ * ldw_);
    }

    bool given_up() const {
        return step_->given_up != nullptr && __atomic_load_n(step_->given_up, __ATOMIC_RELAXED) == step_->number;
    }

    // Between any two products the step may be given up: one of a long prompt can take a good part of a second.
    void pass(int thread) {
        embed(thread);
        for (long i = 0; i < m_.layers && !team_.stopped(); ++i) {
            const Layer& layer = layers_[i];
            const LayerPool<T> kv(*pool_, m_, i);
            const T* x = normalize(residual_, layer.norm1, layer.norm1_bias, thread);
            product(team_, thread, x, ldh_, step_->rows, layer.qkv, Keep{qkv_.data(), ldqkv_, layer.qkv.bias, false});
            team_.meet();
            if (team_.stopped()) return;
            attention(layer, kv, thread);
            if (team_.stopped()) return;
            product(team_, thread, mixed_.data(), ldo_, step_->rows, layer.out, Add{residual_.data(), ldh_, layer.out.bias});
            team_.meet();
            if (team_.stopped()) return;
            x = normalize(residual_, layer.norm2, layer.norm2_bias, thread);
            if (m_.gated)
                product(team_, thread, x, ldh_, step_->rows, layer.up, Gate{wide_.data(), ldw_, layer.up.bias});
            else
                product(team_, thread, x, ldh_, step_->rows, layer.up, Keep{wide_.data(), ldw_, layer.up.bias, true});
            team_.meet();
            if (team_.stopped()) return;
            product(team_, thread, wide_.data(), ldw_, step_->rows, layer.down, Add{residual_.data(), ldh_, layer.down.bias});
            team_.meet();
        }
        if (step_->samples > 0 && !team_.stopped()) head(thread);
    }

    void embed(int thread) {
        const T* positions = static_cast<const T*>(m_.positions);
        for (long g; (g = team_.take(step_->segments, thread)) >= 0;) {
            const Segment& segment = step_->segment[g];
            for (long i = 0; i < segment.length; ++i) {
                T* to = residual_.data() + (segment.first + i) * ldh_;
                const int64_t token = step_->tokens[segment.first + i];
                if (m_.embedding == nullptr)
                    unpack_row(m_.head, token, to);
                else
                    std::memcpy(to, static_cast<const T*>(m_.embedding) + token * m_.hidden, m_.hidden * sizeof(T));
                if (positions == nullptr) continue;
                const T* at = positions + (segment.start + i) * m_.hidden;
                for (long d = 0; d < m_.hidden; ++d) put(to + d, to_float(to[d]) + to_float(at[d]));
            }
        }
        team_.meet();
    }

    // The rows of a matrix, normed: into a buffer that all share, or, when they are few, into the thread's own.
    const T* normalize(const Buffer<T>& rows, const void* weight, const void* bias, int thread) {
        const long count = step_->rows;
        const bool own = count <= OWN_NORM_ROWS;
        T* to = own ? own_norm_[thread].data() : normed_.data();
        if (own) {
            for (long i = 0; i < count; ++i) norm_row(rows.data() + i * ldh_, weight, bias, to + i * ldh_);
            return to;
        }
        constexpr long RUN = 8;
        for (long run; (run = team_.take((count + RUN - 1) / RUN, thread)) >= 0;)
            for (long i = run * RUN; i < std::min(count, (run + 1) * RUN); ++i)
                norm_row(rows.data() + i * ldh_, weight, bias, to + i * ldh_);
        team_.meet();
        return to;
    }

    // RMS norm, or LayerNorm where there is a bias. Rows are padded with 0.
    void norm_row(const T* x, const void* weight, const void* bias, T* y) const {
        const long n = m_.hidden;
        const T *w = static_cast<const T*>(weight), *b = static_cast<const T*>(bias);
        float mean = 0;
        if (b != nullptr) {
            vf all{};
            for (long i = 0; i < n; i += LANES) all += load_some(x + i, n - i);
            mean = sum(all) / static_cast<float>(n);
        }
        vf squares{};
        for (long i = 0; i < n; i += LANES) {
            vf d = load_some(x + i, n - i) - mean;
            if (n - i < LANES) d = lanes() < static_cast<int>(n - i) ? d : vf{};
            squares += d * d;
        }
        const float inverse = 1.0f / std::sqrt(sum(squares) / static_cast<float>(n) + static_cast<float>(m_.eps));
        for (long i = 0; i < n; i += LANES) {
            vf z = (load_some(x + i, n - i) - mean) * inverse * load_some(w + i, n - i);
            if (b != nullptr) z += load_some(b + i, n - i);
            store_some(y + i, z, n - i);
        }
    }

    void attention(const Layer& layer, const LayerPool<T>& kv, int thread) {
        write_prefill(layer, kv, thread);
        const AttentionInput<T> in{m_, layer, kv, *step_, tasks_, qkv_.data(), ldqkv_, mixed_.data(), ldo_};
        for (long i; (i = team_.take(static_cast<long>(tasks_.size()) * m_.kv_heads, thread)) >= 0;)
            attend(in, i, partials_, scratch_[thread]);
        team_.meet();
    }

    // K and V of all tokens that later ones of the same step will look at.
    void write_prefill(const Layer& layer, const LayerPool<T>& kv, int thread) {
        if (written_.empty()) return;
        for (long i; (i = team_.take(static_cast<long>(written_.size()), thread)) >= 0;) {
            const Segment& s = step_->segment[written_[i].segment];
            const long end = std::min<long>(s.length, written_[i].first + WRITTEN_RUN);
            for (long t = written_[i].first; t < end; ++t)
                for (long h = 0; h < m_.kv_heads; ++h)
                    write_kv(m_, layer, kv, step_->tables + s.table, s.start + t, h,
                             qkv_.data() + (s.first + t) * ldqkv_);
        }
        team_.meet();
    }

    void head(int thread) {
        const long count = step_->samples;
        const bool own = count <= OWN_NORM_ROWS;
        T* to = own ? own_norm_[thread].data() : picked_.data();
        for (long i = 0; (i = own ? i : team_.take(count, thread)) >= 0 && i < count; ++i) {
            const T* from = residual_.data() + step_->sample_rows[i] * ldh_;
            if (m_.final_norm != nullptr)
                norm_row(from, m_.final_norm, m_.final_norm_bias, to + i * ldh_);
            else
                std::copy_n(from, ldh_, to + i * ldh_);
        }
        if (!own) team_.meet();
        product(team_, thread, to, ldh_, count, m_.head, Score{step_->logits, m_.vocab});
    }

    // What becomes of a tile of sums. ``bias`` is as wide as the panels.
    struct Keep {
        T* to;
        long ld;
        const float* bias;
        bool relu;
        void operator()(long row, long rows, long out, const float* c) const {
            for (long r = 0; r < rows; ++r)
                for (long i = 0; i < PANEL; i += LANES) {
                    vf y = load(c + r * PANEL + i);
                    if (bias != nullptr) y += load(bias + out + i);
                    if (relu) y = max(y, vf{});
                    store(to + (row + r) * ld + out + i, y);
                }
        }
    };
    struct Add {
        T* to;
        long ld;
        const float* bias;
        void operator()(long row, long rows, long out, const float* c) const {
            for (long r = 0; r < rows; ++r)
                for (long i = 0; i < PANEL; i += LANES) {
                    vf y = load(c + r * PANEL + i);
                    if (bias != nullptr) y += load(bias + out + i);
                    T* at = to + (row + r) * ld + out + i;
                    store(at, load(at) + rounded<T>(y));
                }
        }
    };
    struct Gate {
        T* to;
        long ld;
        const float* bias;
        void operator()(long row, long rows, long out, const float* c) const {
            for (long r = 0; r < rows; ++r)
                for (long i = 0; i < PANEL; i += 2 * LANES) {
                    vf gate = load(c + r * PANEL + i), up = load(c + r * PANEL + i + LANES);
                    if (bias != nullptr) {
                        gate += load(bias + out + i);
                        up += load(bias + out + i + LANES);
                    }
                    gate = rounded<T>(gate);
                    gate = rounded<T>(gate / (1.0f + exp(-gate)));
                    store(to + (row + r) * ld + (out + i) / 2, gate * rounded<T>(up));
                }
        }
    };
    struct Score {
        float* to;
        long width;
        void operator()(long row, long rows, long out, const float* c) const {
            for (long r = 0; r < rows; ++r)
                for (long i = 0; i < PANEL && out + i < width; i += LANES)
                    store_some(to + (row + r) * width + out + i, load(c + r * PANEL + i), width - out - i);
        }
    };

    // A run of tokens whose K and V are written before the step's attention.
    struct Written {
        long segment, first;
    };
    static constexpr long WRITTEN_RUN = 16;

    const Model m_;
    const std::vector<Layer> layers_;
    Team team_;
    const long ldh_, ldqkv_, ldo_, ldw_;
    long room_ = 0, sample_room_ = 0;
    Buffer<T> residual_, normed_, qkv_, mixed_, wide_, picked_;
    std::vector<AttentionTask> tasks_;
    std::vector<Written> written_;
    Partials partials_;
    std::vector<Scratch<T>> scratch_;
    std::vector<Buffer<T>> own_norm_;
    const Step* step_ = nullptr;
    const Pool* pool_ = nullptr;
};

}  // namespace ds
