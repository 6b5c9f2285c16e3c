// Log-probabilities under the unmodified distribution: of a chosen token, its rank, and the N
// most likely tokens. One thread block a row.
#include "sampling.cuh"

constexpr int kThreads = 1024;
constexpr int kStep = kThreads * kVec;

// The better of `best` and the best of one vector's logits that stand below `bar`.
__device__ __forceinline__ u64 best_of_vector(const SCALAR* row, int id, u64 bar, u64 best) {
  float x[kVec];
  load_logits(row, id, VOCAB, x);
#pragma unroll
  for (int j = 0; j < kVec; ++j) {
    const u64 mine = pack(x[j], id + j);
    if (id + j < VOCAB && mine < bar && mine > best) best = mine;
  }
  return best;
}

// Grid: rows. logits [rows, VOCAB]; chosen [rows] token ids, -1 for none. logprobs [rows] and
// ranks [rows] (1 is best; NaN and 0 where none is chosen); top_ids and top_logprobs
// [rows, num_top], best first.
extern "C" __global__ void __launch_bounds__(kThreads)
logprobs(float* out, int* ranks, int* top_ids, float* top_logprobs,
         const SCALAR* logits, const int* chosen, int num_top) {
  __shared__ u64 packed[kThreads / 32];
  __shared__ float sums[kThreads / 32];
  let_next_start();
  wait_for_previous();
  const SCALAR* row = logits + i64(blockIdx.x) * VOCAB;
  const int token = chosen[blockIdx.x];
  const bool known = token >= 0 && token < VOCAB;
  const float value = known ? to_float(row[token]) : 0.f;
  u64 best = 0;
  float top = -kInfinity, sum = 0.f;
  int above = 0;
#pragma unroll 2
  for (int id = threadIdx.x * kVec; id < VOCAB; id += kStep) {
    float x[kVec];
    load_logits(row, id, VOCAB, x);
    float most = x[0];
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      above += x[j] > value;
      most = fmaxf(most, x[j]);
    }
    if (most > top) {
      sum *= expf(top - most);
      top = most;
#pragma unroll
      for (int j = kVec - 1; j >= 0; --j)
        if (x[j] == top) best = pack(top, id + j);
    }
    if (top > -kInfinity) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += fast_exp2((x[j] - top) * 1.4426950408889634f);
    }
  }
  u64 leader = block_max<kThreads>(best, packed);
  const float peak = packed_value(leader);
  const float total = block_sum<kThreads>(top > -kInfinity ? sum * expf(top - peak) : 0.f, sums);
  const float normalizer = peak + logf(total);
  __syncthreads();
  const float rank = block_sum<kThreads>(float(above), sums);
  if (threadIdx.x == 0) {
    out[blockIdx.x] = known ? value - normalizer : __int_as_float(0x7fc00000);
    ranks[blockIdx.x] = known ? int(rank) + 1 : 0;
  }
  // One token a round: its owner's warp then looks for the owner's next best.
  for (int n = 0; n < num_top; ++n) {
    if (n > 0) leader = block_max<kThreads>(best, packed);
    const int id = packed_id(leader);
    if (threadIdx.x == 0) {
      top_ids[i64(blockIdx.x) * num_top + n] = id;
      top_logprobs[i64(blockIdx.x) * num_top + n] = packed_value(leader) - normalizer;
    }
    const int owner = id / kVec % kThreads, lane = threadIdx.x % 32;
    if (owner / 32 == threadIdx.x / 32) {
      u64 next = 0;
      for (int at = owner * kVec + lane * kStep; at < VOCAB; at += 32 * kStep)
        next = best_of_vector(row, at, leader, next);
      next = warp_max(next);
      if (threadIdx.x == owner) best = next;
    }
  }
}
