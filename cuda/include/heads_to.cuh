// Where the heads of a token go, and how they are turned.
//
// Macros: SCALAR, CACHE (SCALAR, or narrower).
#pragma once
#include "cache_type.cuh"

struct HeadsTo {
  SCALAR* q_out;         // [tokens, heads, D]
  CACHE *keys, *values;  // [blocks, kv heads, 16, D], in the order of kv_layout.cuh
  const int *positions, *slots;
  const float* cos_sin;  // [max_len, D]: cosines, then sines
  const SCALAR *q_norm, *k_norm;
  const float *k_scale, *v_scale;  // what is stored is divided by it; null for 1
  i64 block_stride;                // elements from block to block
  float eps;
};
