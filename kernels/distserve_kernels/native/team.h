// A team of threads that runs one function at a time, together with the thread that asks.
//
// Between two calls the threads sleep in the kernel: an idle team uses no processor. Inside a call they meet at
// barriers, where a thread spins briefly (the others are nearly done) and then sleeps, so that a neighbour who needs the
// core gets it. Of numbered pieces of work each thread takes those of its own stretch, one by one (adjacent pieces read
// adjacent memory), and then what is left of the others': a thread that was interrupted holds back one piece, not its share.
// Each thread but the caller may keep to a core of its own (cores.py says why).
// At every meeting the last one to come asks, for all, whether to stop: until the next one all see the same answer.
#pragma once

#if defined(__linux__)
#include <sched.h>
#endif

#include <atomic>
#include <thread>
#include <vector>

#include "simd.h"

namespace ds {

class Team {
   public:
    using Work = void (*)(void* context, int thread);
    using Stop = bool (*)(void* context);

    // ``cores``: one for each thread, of which the caller's is not used; null: any. A wish.
    explicit Team(int size, const int64_t* cores = nullptr)
        : size_(size < 1 ? 1 : size), taken_(static_cast<size_t>(size_)) {
        for (int i = 1; i < size_; ++i)
            threads_.emplace_back([this, i, core = cores ? cores[i] : -1] {
                keep_to(core);
                live(i);
            });
    }
    ~Team() {
        ending_ = true;
        begin();
        for (std::thread& t : threads_) t.join();
    }
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    int size() const { return size_; }

    // Run work(context, thread) on every thread of the team; returns when all are done. One caller at a time. From when
    // stop(context) was true on, ``stopped`` is; it is up to the work to end then.
    void run(Work work, Stop stop, void* context) {
        work_ = work;
        stop_ = stop;
        context_ = context;
        stopped_ = false;
        start_over();
        begin();
        work(context, 0);
        meet();
    }

    // Whether the work is to end: the same for all threads between two meetings. After ``run``: whether it was.
    bool stopped() const { return stopped_; }

    // Wait for the whole team; afterwards all pieces are untaken again. Only inside ``run``.
    void meet() {
        if (size_ == 1) return start_over();
        const uint32_t round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
            arrived_.store(0, std::memory_order_relaxed);
            start_over();
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();
            return;
        }
        for (int i = 0; i < SPINS; ++i) {
            if (round_.load(std::memory_order_acquire) != round) return;
            pause();
        }
        round_.wait(round, std::memory_order_acquire);
    }

    // A piece of work 0 .. pieces - 1 that no other thread has; -1 when none is left. Every thread gives the same number
    // of pieces until they meet.
    long take(long pieces, int thread) {
        for (int i = 0; i < size_; ++i) {
            const int owner = (thread + i) % size_;
            const long first = pieces * owner / size_, end = pieces * (owner + 1) / size_;
            const long piece = first + taken_[owner].count.fetch_add(1, std::memory_order_relaxed);
            if (piece < end) return piece;
        }
        return -1;
    }

   private:
    static constexpr int SPINS = 2000;  // some 30 microseconds

    static DS_INLINE void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

    static void keep_to([[maybe_unused]] int64_t core) {
#if defined(__linux__)
        if (core < 0 || core >= CPU_SETSIZE) return;
        cpu_set_t one;
        CPU_ZERO(&one);
        CPU_SET(static_cast<int>(core), &one);
        sched_setaffinity(0, sizeof one, &one);
#endif
    }

    struct alignas(64) Taken {
        std::atomic<long> count{0};
    };

    void start_over() {
        for (Taken& t : taken_) t.count.store(0, std::memory_order_relaxed);
        stopped_ = stopped_ || stop_(context_);
    }

    void begin() {
        if (size_ == 1) return;
        call_.fetch_add(1, std::memory_order_release);
        call_.notify_all();
    }

    void live(int thread) {
        for (uint32_t seen = 0;;) {
            call_.wait(seen, std::memory_order_acquire);
            seen = call_.load(std::memory_order_acquire);
            if (ending_) return;
            work_(context_, thread);
            meet();
        }
    }

    const int size_;
    std::vector<std::thread> threads_;
    Work work_ = nullptr;
    Stop stop_ = nullptr;
    void* context_ = nullptr;
    bool stopped_ = false;
    bool ending_ = false;
    alignas(64) std::atomic<uint32_t> call_{0};
    alignas(64) std::atomic<uint32_t> round_{0};
    alignas(64) std::atomic<int> arrived_{0};
    std::vector<Taken> taken_;
};

}  // namespace ds
