// What the caller hands over, mirrored field by field in abi.py. Plain pointers: the memory belongs to the caller and
// outlives the call (a model: the handle). "T" is the model's dtype: float (dtype 0) or bfloat16 (dtype 1).
#pragma once

#include <cstdint>

extern "C" {

struct Linear {
    const void* packed;  // see gemm.h
    const float* bias;   // [outputs rounded up to 32] or null
    int64_t inputs;
    int64_t outputs;
};

struct Layer {
    Linear qkv;   // Q heads, K heads, V heads
    Linear out;
    Linear up;    // gated: gate and up in alternating groups of 16
    Linear down;
    const void* norm1;  // [hidden] T
    const void* norm1_bias;  // [hidden] T: LayerNorm; null: RMS norm
    const void* norm2;
    const void* norm2_bias;
    const void* qk_norm;  // [heads + kv_heads, head_dim] T or null
};

struct Model {
    int64_t dtype;
    int64_t layers;
    int64_t hidden;
    int64_t heads;
    int64_t kv_heads;
    int64_t head_dim;
    int64_t intermediate;
    int64_t vocab;        // of the whole model
    int64_t first_token;  // of the rows that ``embedding`` and ``head`` hold; 0 where this is not one of several lanes
    int64_t max_length;  // positions that cos, sin or positions cover
    int64_t gated;  // 1: SiLU(gate)·up, 0: ReLU
    double eps;
    double scale;  // of attention scores
    const void* embedding;  // [embedded, hidden] T; null: rows of ``head``
    int64_t embedded;       // rows of the vocabulary held here
    const void* positions;  // [positions, hidden] T or null
    const void* cos;  // [positions, head_dim] T or null: rotary, see rotary.py
    const void* sin;
    const void* final_norm;  // null: none
    const void* final_norm_bias;
    Linear head;
    const Layer* layer;
    // Where each layer is cut over several lanes: replace so many elements of Step.sums by their sum over all of them; 0
    // when done. Called by the thread that runs the step, with no other at work. Null: this is the only lane.
    int64_t (*sum)(void* context, void* sums, int64_t elements);
    void* context;
};

struct Pool {  // [blocks, layers, 2, kv_heads, block_size, head_dim] T
    void* memory;
    int64_t block_size;
    int64_t blocks;
};

struct Segment {  // adjacent tokens of one sequence
    int64_t first;   // row
    int64_t length;  // tokens
    int64_t start;   // position of the first
    int64_t table;   // where its block table begins in Step.tables
    int64_t blocks;  // entries of that table
};

struct Step {
    int64_t rows;
    int64_t segments;
    int64_t samples;
    const int64_t* tokens;       // [rows]
    const Segment* segment;      // [segments]; they cover the rows in order
    const int64_t* tables;
    const int64_t* sample_rows;  // [samples]
    float* logits;               // [samples, outputs of the head]
    const void* before;          // [rows, hidden] T: what enters the first layer here; null: the tokens' embeddings
    void* after;                 // [rows, hidden] T: what leaves the last layer; or null
    void* sums;                  // [rows, hidden rounded up to 32] T, for Model.sum; null where that is
    const int64_t* given_up;     // number of the step to give up, written by any thread at any time; null: none ever
    int64_t number;              // of this step
};

}  // extern "C"
