// What the attention kernels share: the types they are compiled for and the lists that
// attention_plan.cu makes once a step.
//
// Macros: SCALAR (queries and output), HEAD_DIM, GROUP (query heads of one KV head), KV_FP8
// (1: the cache holds float8_e4m3fn, else SCALAR).
#pragma once
#include <math_constants.h>

#include "fp8.cuh"
#include "kv_layout.cuh"
#include "mma.cuh"

constexpr int kBlockTokens = kv_layout::kBlockTokens;
constexpr float kLog2e = 1.4426950408889634f;

// Where one thread block of the decode kernel starts, and how far it goes. The line that all of
// them share has, for each decode row and each KV head in turn, a gap, which stands for what a pair
// costs beside its blocks, and then the blocks. The first row is given in full, to save it a
// look-up.
struct alignas(16) DecodeShare {
  int row;     // index in the list of decode rows
  int head;    // KV head
  int block;   // block of the row's sequence; negative: that many places before its first
  int length;  // places on the line; 0: nothing to do
  int table_row;
  int tokens;
  int query;
  int share;   // places of every thread block but the last ones
};

struct alignas(16) DecodeRow {
  int query;      // the row's token in q
  int table_row;  // its row of the block table
  int tokens;     // tokens of its sequence that are in the cache, the step's own included
  int unused;
};

// One tile of the prefill kernels: query rows [tile * TILE, (tile + 1) * TILE) of a row's tokens
// with the GROUP query heads of a KV head packed, row m = token * GROUP + head.
struct alignas(16) PrefillTile {
  int query;      // the row's first token in q
  int queries;    // its tokens in q; 0: the list ends here
  int cached;     // tokens that were in the cache before the step
  int table_row;
  int tile;
  int count;      // of the list
  int part;       // which of `parts` equal pieces of the tile's keys
  short parts;
  short slot;     // the first of the slots that the parts of a tile share for a KV head
};

// Counts an arrival and returns how many came before: what they wrote can be read (with __ldcg),
// what this thread could see can be read by those that come after.
__device__ __forceinline__ int arrive(int* counter) {
  int before;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], 1;"
               : "=r"(before)
               : "l"(counter)
               : "memory");
  return before;
}
