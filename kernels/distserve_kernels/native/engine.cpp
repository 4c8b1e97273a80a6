// The C interface: pack weights, make a model, run steps. Called through ctypes, so that the interpreter's lock is free
// for the whole call. Nothing here throws across the boundary: a failure is a number.
#include <new>

#include "forward.h"

using ds::bf16;

namespace {

struct Handle {
    int64_t dtype;
    void* forward;
};

}  // namespace

extern "C" {

// What this build uses, for the log.
const char* ds_describe() {
#if defined(__AVX512BF16__)
    return "AVX-512 with bfloat16 products";
#elif defined(__AVX512F__)
    return "AVX-512";
#elif defined(__AVX2__)
    return "AVX2";
#else
    return "portable";
#endif
}

// Sizes of the structures as this build sees them: the caller compares them with its own.
void ds_sizes(int64_t* sizes) {
    sizes[0] = sizeof(Model);
    sizes[1] = sizeof(Layer);
    sizes[2] = sizeof(Step);
    sizes[3] = sizeof(Segment);
    sizes[4] = sizeof(Pool);
}

// Outputs of a packed matrix, padding included. ``pair``: of two matrices alternating in groups of 16.
int64_t ds_packed_outputs(int64_t outputs, int64_t pair) {
    return pair ? 2 * ds::round_up(outputs, ds::LANES) : ds::round_up(outputs, ds::PANEL);
}

// Pack [outputs, inputs] of T; packed holds ds_packed_outputs × inputs (rounded up to even) elements.
void ds_pack(int64_t dtype, const void* first, const void* second, int64_t outputs, int64_t inputs, void* packed) {
    if (dtype == 0)
        ds::pack(static_cast<const float*>(first), static_cast<const float*>(second), outputs, inputs,
                 static_cast<float*>(packed));
    else
        ds::pack(static_cast<const bf16*>(first), static_cast<const bf16*>(second), outputs, inputs,
                 static_cast<bf16*>(packed));
}

// A model ready to run with a team of ``threads``, on ``cores`` as ``Team`` takes them; null when memory or threads are
// wanting. The memory that ``model`` points to stays the caller's and must outlive the handle; the structures themselves
// are copied.
void* ds_create(const Model* model, int64_t threads, const int64_t* cores) {
    try {
        const int count = static_cast<int>(threads);
        void* forward = model->dtype == 0 ? static_cast<void*>(new ds::Forward<float>(*model, count, cores))
                                          : static_cast<void*>(new ds::Forward<bf16>(*model, count, cores));
        return new Handle{model->dtype, forward};
    } catch (...) {
        return nullptr;
    }
}

void ds_destroy(void* handle) {
    Handle* h = static_cast<Handle*>(handle);
    if (h->dtype == 0)
        delete static_cast<ds::Forward<float>*>(h->forward);
    else
        delete static_cast<ds::Forward<bf16>*>(h->forward);
    delete h;
}

// Run one step: write its KV to the pool and the wanted logits. One call at a time for a handle. 0, or a negative number.
int64_t ds_run(void* handle, const Step* step, const Pool* pool) {
    Handle* h = static_cast<Handle*>(handle);
    try {
        return h->dtype == 0 ? static_cast<ds::Forward<float>*>(h->forward)->run(*step, *pool)
                             : static_cast<ds::Forward<bf16>*>(h->forward)->run(*step, *pool);
    } catch (const std::bad_alloc&) {
        return ds::NO_MEMORY;
    }
}

}  // extern "C"
