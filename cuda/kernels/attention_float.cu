// Attention in float32 for any mixture of rows: plain arithmetic, a warp for each query token and
// head. It serves --dtype float32, which is for comparisons and not for speed.
//
// Macros: HEAD_DIM, GROUP.
#define SCALAR float
#define KV_FP8 0
#include "attention.cuh"

constexpr int kWarps = 4;
constexpr int kRowBytes = HEAD_DIM * 4;
constexpr int kLaneElements = HEAD_DIM / 32;

__device__ __forceinline__ const float* element(const float* run, int token, int d) {
  return run + kv_layout::offset<kRowBytes>(token, d / 4) / 4 + d % 4;
}

// Grid: (tokens, heads / 4).
extern "C" __global__ void __launch_bounds__(kWarps * 32)
    attention_float(const float* q, float* out, const float* keys, const float* values,
                    const int* block_table, const int* rows, const int* q_start,
                    const int* kv_len, int num_rows, int num_kv_heads, int block_stride,
                    int table_stride, float scale) {
  __shared__ float query[kWarps][HEAD_DIM];
  let_next_start();
  wait_for_previous();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int token = blockIdx.x, head = blockIdx.y * kWarps + warp;
  if (head >= num_kv_heads * GROUP || token >= q_start[num_rows]) return;
  int low = 0, high = num_rows - 1;  // the last row that begins at or before the token
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (q_start[middle] <= token)
      low = middle;
    else
      high = middle - 1;
  }
  const int num_keys = kv_len[low] + token - q_start[low] + 1;
  const int* table = block_table + static_cast<i64>(rows[low]) * table_stride;
  const i64 at = (static_cast<i64>(token) * num_kv_heads * GROUP + head) * HEAD_DIM;
  const i64 run = static_cast<i64>(head / GROUP) * kBlockTokens * HEAD_DIM;
  for (int d = lane; d < HEAD_DIM; d += 32) query[warp][d] = q[at + d] * scale;
  __syncwarp();

  float o[kLaneElements] = {};
  float top = -CUDART_INF_F, sum = 0.f;
  for (int base = 0; base < num_keys; base += 32) {
    const int key = base + lane;
    float score = -CUDART_INF_F;
    if (key < num_keys) {
      const float* k = keys + table[key / kBlockTokens] * static_cast<i64>(block_stride) + run;
      score = 0.f;
      for (int d = 0; d < HEAD_DIM; ++d)
        score += query[warp][d] * *element(k, key % kBlockTokens, d);
    }
    const float next = fmaxf(top, warp_max(score));
    const float factor = expf(top - next), p = expf(score - next);
    top = next;
    sum = sum * factor + warp_sum(p);
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) o[i] *= factor;
    for (int j = 0; j < min(32, num_keys - base); ++j) {
      const int past = base + j;
      const float weight = __shfl_sync(0xffffffffu, p, j);
      const float* v = values + table[past / kBlockTokens] * static_cast<i64>(block_stride) + run;
#pragma unroll
      for (int i = 0; i < kLaneElements; ++i)
        o[i] += weight * *element(v, past % kBlockTokens, i * 32 + lane);
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) out[at + i * 32 + lane] = o[i] / sum;
}
