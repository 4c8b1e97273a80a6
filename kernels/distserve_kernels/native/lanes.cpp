// Sums over the lanes of a stage whose ranks share a machine, through memory that all of them map: no message, no copy in
// the kernel, and every lane adds up in the same order.
//
// Each lane has two slots. In round n it leaves its part in slot n % 2, says so, and reads the others' parts once they are
// there. Whoever begins round n + 2 has seen all others say n + 1, and so leave the slot that it writes then.
//
//   lane 0   write 0 │ read all │ write 1 │ read all │ write 0 …
//   lane 1     write 0 │ read all │ write 1  │ read all …
//
// A lane that waits spins briefly, for the others do the same work at the same time, and then sleeps in the kernel.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <new>

#include "simd.h"

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

using ds::bf16;

namespace {

constexpr int64_t HEADER = 4096;  // bytes before the slots: one that proves whose memory this is, then a line for each lane
constexpr int TIMED_OUT = -1;

struct alignas(64) Said {
    std::atomic<uint32_t> round;     // that the lane has written
    std::atomic<uint32_t> sleepers;  // who waits for it in the kernel
};
static_assert(std::atomic<uint32_t>::is_always_lock_free && sizeof(Said) == 64);

class Lanes {
   public:
    Lanes(char* memory, long lane, long count, long slot_bytes, double timeout_s, long spins)
        : said_(reinterpret_cast<Said*>(memory) + 1),
          slots_(memory + HEADER),
          lane_(lane),
          count_(count),
          slot_bytes_(slot_bytes),
          timeout_s_(timeout_s),
          spins_(spins) {}

    template <class T>
    int sum(T* x, long elements) {
        const long most = slot_bytes_ / static_cast<long>(sizeof(T));
        for (long at = 0; at < elements; at += most) {
            const long n = std::min(most, elements - at);
            if (!meet(x + at, n * static_cast<long>(sizeof(T)))) return TIMED_OUT;
            for (long i = 0; i < n; i += ds::LANES) {
                ds::vf all = ds::load_some(reinterpret_cast<const T*>(slot(0)) + i, n - i);
                for (long lane = 1; lane < count_; ++lane)
                    all += ds::load_some(reinterpret_cast<const T*>(slot(lane)) + i, n - i);
                ds::store_some(x + at + i, all, n - i);
            }
        }
        return 0;
    }

    // own: [rows, width] bytes → all: [rows, lanes, width] bytes
    int gather(const char* own, char* all, long rows, long width) {
        for (long at = 0; at < rows * width; at += slot_bytes_) {
            const long n = std::min(slot_bytes_, rows * width - at);
            if (!meet(own + at, n)) return TIMED_OUT;
            for (long done = 0, run; done < n; done += run) {
                const long row = (at + done) / width, column = (at + done) % width;
                run = std::min(n - done, width - column);
                for (long lane = 0; lane < count_; ++lane)
                    std::memcpy(all + (row * count_ + lane) * width + column, slot(lane) + done, run);
            }
        }
        return 0;
    }

   private:
    using Clock = std::chrono::steady_clock;

    // Leave our part and wait for the others'; false when one does not come in time.
    bool meet(const void* part, long bytes) {
        ++round_;
        std::memcpy(slot(lane_), part, static_cast<size_t>(bytes));
        Said& own = said_[lane_];
        own.round.store(round_, std::memory_order_seq_cst);
        if (own.sleepers.load(std::memory_order_seq_cst) != 0) wake(own.round);
        for (long lane = 0; lane < count_; ++lane)
            if (lane != lane_ && !come(said_[lane])) return false;
        return true;
    }

    bool reached(const Said& other) const {
        return static_cast<int32_t>(other.round.load(std::memory_order_acquire) - round_) >= 0;
    }

    bool come(Said& other) const {
        for (long i = 0; i < spins_; ++i) {
            if (reached(other)) return true;
            pause();
        }
        const Clock::time_point end = Clock::now() + std::chrono::duration_cast<Clock::duration>(
                                                         std::chrono::duration<double>(timeout_s_));
        other.sleepers.fetch_add(1, std::memory_order_seq_cst);
        bool here;
        for (;;) {
            const uint32_t seen = other.round.load(std::memory_order_seq_cst);
            const std::chrono::duration<double> left = end - Clock::now();
            if ((here = static_cast<int32_t>(seen - round_) >= 0) || left.count() <= 0) break;
            sleep(other.round, seen, left.count());
        }
        other.sleepers.fetch_sub(1, std::memory_order_seq_cst);
        return here;
    }

    char* slot(long lane) const { return slots_ + (lane * 2 + round_ % 2) * slot_bytes_; }

    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }

#if defined(__linux__)
    static void wake(std::atomic<uint32_t>& word) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
    }
    static void sleep(std::atomic<uint32_t>& word, uint32_t seen, double seconds) {
        const timespec most{static_cast<time_t>(seconds), static_cast<long>((seconds - std::floor(seconds)) * 1e9)};
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&word), FUTEX_WAIT, seen, &most, nullptr, 0);
    }
#else
    static void wake(std::atomic<uint32_t>&) {}
    static void sleep(std::atomic<uint32_t>&, uint32_t, double) {}
#endif

    Said* const said_;
    char* const slots_;
    const long lane_, count_, slot_bytes_;
    const double timeout_s_;
    const long spins_;
    uint32_t round_ = 0;
};

}  // namespace

extern "C" {

// Bytes of memory for so many lanes; 0 where lanes cannot meet in memory: too many, or a system without futexes.
int64_t ds_lanes_bytes(int64_t count, int64_t slot_bytes) {
#if defined(__linux__)
    if ((count + 1) * static_cast<int64_t>(sizeof(Said)) <= HEADER) return HEADER + count * 2 * slot_bytes;
#endif
    return 0;
}

// This lane's end of ``memory``, which begins as zeros but for its first 64 bytes; null when memory is wanting. The memory
// stays the caller's and must outlive the handle. A wait of more than ``timeout_s`` ends in a number that is not 0.
void* ds_lanes_open(void* memory, int64_t lane, int64_t count, int64_t slot_bytes, double timeout_s, int64_t spins) {
    return new (std::nothrow) Lanes(static_cast<char*>(memory), lane, count, slot_bytes, timeout_s, spins);
}

void ds_lanes_close(void* lanes) { delete static_cast<Lanes*>(lanes); }

// Two of these are ``Model.sum``. All lanes make the same calls in the same order; one call at a time for a handle.
int64_t ds_lanes_sum_float32(void* lanes, void* x, int64_t elements) {
    return static_cast<Lanes*>(lanes)->sum(static_cast<float*>(x), elements);
}
int64_t ds_lanes_sum_bfloat16(void* lanes, void* x, int64_t elements) {
    return static_cast<Lanes*>(lanes)->sum(static_cast<bf16*>(x), elements);
}

// own: [rows, width] bytes → all: [rows, lanes, width] bytes
int64_t ds_lanes_gather(void* lanes, const void* own, void* all, int64_t rows, int64_t width) {
    return static_cast<Lanes*>(lanes)->gather(static_cast<const char*>(own), static_cast<char*>(all), rows, width);
}

}  // extern "C"
