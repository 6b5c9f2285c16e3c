// What the parts of the resident decoder share: the model's shape, what a layer is made of, the
// thread block's shared memory and the roles of its warps.
//
// Macros: SCALAR; GRID (thread blocks, all resident at once); ROWS (tokens of the step, padding
// included); LAYERS, HIDDEN, INNER, HEADS, GROUP (query heads of a KV head), HEAD_DIM, QK_NORM;
// WARPS that multiply and PRODUCERS that copy, with COPIES of slots under way each; SLOTS of a
// warp's ring of SLOT_BYTES each; X_BYTES of x a warp, PARTIAL_ROWS of W whose sums wait for a
// barrier; QKV_ROWS, OUTPUT_ROWS, GATE_UP_ROWS and DOWN_ROWS of W in a slot; SHARED_BYTES that the
// launch asks for.
#pragma once
#include "decode_tile.cuh"
#include "linear_tile.cuh"
#include "mailbox.cuh"
#include "slot_ring.cuh"

constexpr int kKvHeads = HEADS / GROUP;
constexpr int kQkvWidth = (HEADS + 2 * kKvHeads) * HEAD_DIM;
constexpr int kAttended = HEADS * HEAD_DIM;
constexpr int kConsumersEach = WARPS / PRODUCERS;
constexpr int kThreads = (WARPS + PRODUCERS) * 32;
constexpr int kXPitch = X_BYTES / ROWS / 64 % 2 == 0 ? X_BYTES / ROWS + 64 : X_BYTES / ROWS;
constexpr int kPartialPitch = PARTIAL_ROWS + 4;
constexpr int kPadded = HEAD_DIM + 4;      // floats of a head: no bank conflicts
constexpr int kQueryPitch = HEAD_DIM + 8;  // the same for elements
constexpr int kResidualPairs = (HIDDEN / 2 + GRID - 1) / GRID;

static_assert(WARPS % PRODUCERS == 0 && SLOT_BYTES % 1024 == 0);
static_assert(X_BYTES % (64 * ROWS) == 0, "a row of x ends at a multiple of 64 bytes");
static_assert(kRunBytes <= SLOT_BYTES, "a slot must hold the keys of a block");

struct Layer {
  const SCALAR *input_norm, *qkv, *q_norm, *k_norm, *output, *post_norm, *gate_up, *down;
  SCALAR *keys, *values;
};

// One row of the step. Padding has no tokens.
struct Row {
  int tokens;  // in the cache, the step's own included
  int table_row;
  int slot;
  int position;
  int parts;       // that each KV head's blocks are cut into
  int first_part;  // of the row, among all pieces of the step
};

struct Partial {
  float max;  // of the scaled scores, in units of log2
  float sum;  // of 2^(score - max)
};

using Barriers = SlotBarriers<SLOTS>;

struct alignas(1024) Shared {
  u8 slots[WARPS][SLOTS][SLOT_BYTES];
  Barriers barriers[WARPS];
  alignas(16) u8 x[WARPS][ROWS * kXPitch];
  alignas(16) float partials[2][WARPS][ROWS][kPartialPitch];
  float squares[2][ROWS][WARPS];
  u32 residual[ROWS][kResidualPairs];
  // Attention of one piece.
  alignas(16) SCALAR queries[GROUP][kQueryPitch];
  alignas(16) SCALAR new_key[HEAD_DIM];
  alignas(16) SCALAR new_value[HEAD_DIM];
  alignas(16) float out[WARPS][GROUP][kPadded];
  Partial partial[WARPS][GROUP];
  Layer layers[LAYERS];
  Row rows[ROWS];
  int pieces;

  // The sum over all warps' partials of two rows of W.
  __device__ __forceinline__ float2 total(int buffer, int row_of_x, int row) const {
    float2 sum = {0.f, 0.f};
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
      const float2 v = *reinterpret_cast<const float2*>(&partials[buffer][w][row_of_x][row]);
      sum.x += v.x, sum.y += v.y;
    }
    return sum;
  }
};
static_assert(sizeof(Shared) <= SHARED_BYTES, "the plan counts too little shared memory");

// A warp that multiplies.
struct Consumer {
  int warp;
  RingPlace<SLOTS> at;
  int buffer = 0;  // of the sums, in turns
  int parity = 0;  // of the sums of squares, in turns
};

// A warp that copies, for several consumers in turns.
struct Producer {
  int first;  // of the consumers
  RingPlace<SLOTS> at[kConsumersEach];

  // After each slot. What the multiprocessor cannot send on at once stands in front of the
  // consumers' accesses, those to shared memory too, so a free slot alone is no reason to copy.
  __device__ __forceinline__ void pace() const {
    cp_async_commit();
    cp_async_wait<COPIES>();
  }
};

__device__ __forceinline__ void sync_consumers() {
  asm volatile("bar.sync 1, %0;" ::"n"(WARPS * 32) : "memory");
}
