// One forward pass of a decoder: every thread of the team walks the same phases and meets the others between them.
//
// Owns the activations, which grow to the largest step seen and are then reused. Rounds activations to T where the torch
// path does; everything in between is float32.
#pragma once

#include "attention.h"

namespace ds {

constexpr int OUT_OF_RANGE = -1, NO_MEMORY = -2, GIVEN_UP = -3, SUM_FAILED = -4;  // what a run returns if not 0
constexpr long OWN_NORM_ROWS = 4;  // up to here each thread norms all rows itself: cheaper than meeting once more

template <class T>
class Forward {
   public:
    Forward(const Model& model, int threads, const int64_t* cores)
        : m_(model),
          layers_(model.layer, model.layer + model.layers),
          team_(threads, cores),
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
    // tokens is written in some layers or in none, the logits are not to be read. SUM_FAILED: likewise, for the sum over
    // the lanes could not be had.
    int run(const Step& step, const Pool& pool) {
        if (!sound(step, pool)) return OUT_OF_RANGE;
        reserve(step.rows, step.samples);
        partials_.reserve(plan_attention(m_, step, tasks_), m_);
        plan_writes(step);
        step_ = &step;
        pool_ = &pool;
        sum_failed_ = false;
        team_.run([](void* self, int thread) { static_cast<Forward*>(self)->pass(thread); },
                  [](void* self) { return static_cast<Forward*>(self)->given_up(); }, this);
        if (sum_failed_) return SUM_FAILED;
        return team_.stopped() ? GIVEN_UP : 0;
    }

   private:
    bool sound(const Step& s, const Pool& pool) const {
        if (s.before == nullptr ? m_.embedded == 0 : s.after == nullptr && m_.head.packed == nullptr) return false;
        if (s.samples > 0 && m_.head.packed == nullptr) return false;
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
        if (sum_failed_) return true;
        return step_->given_up != nullptr && __atomic_load_n(step_->given_up, __ATOMIC_RELAXED) == step_->number;
    }

    // Between any two products the step may be given up: one of a long prompt can take a good part of a second.
    void pass(int thread) {
        enter(thread);
        for (long i = 0; i < m_.layers && !team_.stopped(); ++i) {
            const Layer& layer = layers_[i];
            const LayerPool<T> kv(*pool_, m_, i);
            const T* x = normalize(residual_, layer.norm1, layer.norm1_bias, thread);
            product(team_, thread, x, ldh_, step_->rows, layer.qkv, Keep{qkv_.data(), ldqkv_, layer.qkv.bias, false});
            team_.meet();
            if (team_.stopped()) return;
            attention(layer, kv, thread);
            if (team_.stopped()) return;
            add_product(mixed_.data(), ldo_, layer.out, thread);
            if (team_.stopped()) return;
            x = normalize(residual_, layer.norm2, layer.norm2_bias, thread);
            if (m_.gated)
                product(team_, thread, x, ldh_, step_->rows, layer.up, Gate{wide_.data(), ldw_, layer.up.bias});
            else
                product(team_, thread, x, ldh_, step_->rows, layer.up, Keep{wide_.data(), ldw_, layer.up.bias, true});
            team_.meet();
            if (team_.stopped()) return;
            add_product(wide_.data(), ldw_, layer.down, thread);
        }
        if (team_.stopped()) return;
        if (step_->after != nullptr) leave(thread);
        if (step_->samples > 0) head(thread);
    }

    // What the first layer reads: the embeddings of the tokens, each of which one lane holds, or what a stage before left.
    void enter(int thread) {
        const bool summed = step_->before == nullptr && m_.sum != nullptr;
        each_row(thread, [&](const Segment& segment, long i) {
            const long row = segment.first + i;
            T* to = residual_.data() + row * ldh_;
            if (step_->before != nullptr) {
                std::memcpy(to, static_cast<const T*>(step_->before) + row * m_.hidden, m_.hidden * sizeof(T));
            } else if (summed) {
                look_up(step_->tokens[row], sums() + row * ldh_);
            } else {
                look_up(step_->tokens[row], to);
                add_position(segment.start + i, to);
            }
        });
        if (!summed) return;
        sum_lanes(thread);
        each_row(thread, [&](const Segment& segment, long i) {
            const long row = segment.first + i;
            T* to = residual_.data() + row * ldh_;
            std::memcpy(to, sums() + row * ldh_, ldh_ * sizeof(T));
            add_position(segment.start + i, to);
        });
    }

    // visit(segment, row within it) for every row of the step; segments are shared out among the threads, which then meet.
    template <class Visit>
    void each_row(int thread, const Visit& visit) {
        for (long g; (g = team_.take(step_->segments, thread)) >= 0;)
            for (long i = 0; i < step_->segment[g].length; ++i) visit(step_->segment[g], i);
        team_.meet();
    }

    // A token's row of the embedding; 0 where another lane holds it.
    void look_up(int64_t token, T* to) const {
        const int64_t at = token - m_.first_token;
        std::fill_n(to, ldh_, T{});
        if (at < 0 || at >= m_.embedded) return;
        if (m_.embedding == nullptr)
            unpack_row(m_.head, at, to);
        else
            std::memcpy(to, static_cast<const T*>(m_.embedding) + at * m_.hidden, m_.hidden * sizeof(T));
    }

    void add_position(long position, T* to) const {
        if (m_.positions == nullptr) return;
        const T* at = static_cast<const T*>(m_.positions) + position * m_.hidden;
        for (long d = 0; d < m_.hidden; ++d) put(to + d, to_float(to[d]) + to_float(at[d]));
    }

    // residual += x·Wᵀ, of all lanes together; every lane adds the same sum, rounded to T as each summand was.
    void add_product(const T* x, long ldx, const Linear& weight, int thread) {
        if (m_.sum == nullptr) {
            product(team_, thread, x, ldx, step_->rows, weight, Add{residual_.data(), ldh_, weight.bias});
            return team_.meet();
        }
        product(team_, thread, x, ldx, step_->rows, weight, Keep{sums(), ldh_, weight.bias, false});
        team_.meet();
        if (team_.stopped()) return;
        sum_lanes(thread);
        if (team_.stopped()) return;
        for (long row; (row = team_.take(step_->rows, thread)) >= 0;)
            for (long i = 0; i < ldh_; i += LANES) {
                T* at = residual_.data() + row * ldh_ + i;
                store(at, load(at) + load(sums() + row * ldh_ + i));
            }
        team_.meet();
    }

    // Between two meetings: step_->sums becomes the sum over all lanes. The team stops when it cannot be had.
    void sum_lanes(int thread) {
        if (thread == 0) sum_failed_ = m_.sum(m_.context, step_->sums, step_->rows * ldh_) != 0;
        team_.meet();
    }

    T* sums() const { return static_cast<T*>(step_->sums); }

    // What the last layer here leaves to the stage after.
    void leave(int thread) {
        each_row(thread, [&](const Segment& segment, long i) {
            const long row = segment.first + i;
            T* to = static_cast<T*>(step_->after) + row * m_.hidden;
            std::memcpy(to, residual_.data() + row * ldh_, m_.hidden * sizeof(T));
        });
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
        product(team_, thread, to, ldh_, count, m_.head, Score{step_->logits, m_.head.outputs});
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
    bool sum_failed_ = false;
};

}  // namespace ds
