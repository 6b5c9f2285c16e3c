// What changes logits before they are sampled: penalties, bias, and end tokens that may not come
// yet; and the table of token counts that the penalties need.
//
// A row of `counts` holds 16 bits a token: how often the row has sampled it (15 bits, saturating)
// and, in the highest, whether its prompt holds it.
#include "sampling.cuh"

constexpr u16 kInPrompt = 0x8000, kCountMask = 0x7fff;

__device__ __forceinline__ float penalize(float x, u16 count, float presence, float frequency,
                                          float repetition) {
  if (count == 0) return x;
  x = x > 0.f ? x / repetition : x * repetition;
  const int sampled = count & kCountMask;
  return sampled > 0 ? x - presence - frequency * float(sampled) : x;
}

// Grid: (slices, S). out and logits [S, VOCAB], which may be the same tensor. counts
// [rows + 1, VOCAB] or null. bias_ids and bias_values [rows + 1, max_bias], bias_counts
// [rows + 1]; or null.
extern "C" __global__ void __launch_bounds__(256)
edit_logits(SCALAR* out, const SCALAR* logits, const u16* counts, const int* bias_ids,
            const float* bias_values, const int* bias_counts, int max_bias,
            const int* table, const int* sample_rows,
            const int* sample_tokens, const int* positions) {
  let_next_start();
  wait_for_previous();
  const int s = blockIdx.y;
  const i64 device_row = sample_rows[s];
  const int* record = table + device_row * PARAM_WORDS;
  const SCALAR* row = logits + i64(s) * VOCAB;
  SCALAR* target = out + i64(s) * VOCAB;
  const int share = (VOCAB / gridDim.x / kVec + 1) * kVec;
  const int begin = blockIdx.x * share, end = min(VOCAB, begin + share);

  const float presence = __int_as_float(record[P_PRESENCE]);
  const float frequency = __int_as_float(record[P_FREQUENCY]);
  const float repetition = __int_as_float(record[P_REPETITION]);
  const bool penalizes = counts != nullptr && repetition > 0.f &&
                         (presence != 0.f || frequency != 0.f || repetition != 1.f);
  if (penalizes || row != target) {
    for (int id = begin + threadIdx.x; id < end; id += 256) {
      const u16 count = penalizes ? counts[device_row * VOCAB + id] : u16(0);
      target[id] = from_float<SCALAR>(
          penalize(to_float(row[id]), count, presence, frequency, repetition));
    }
    __syncthreads();
  }
  if (bias_counts != nullptr) {
    for (int i = threadIdx.x; i < bias_counts[device_row]; i += 256) {
      const int id = bias_ids[device_row * max_bias + i];
      if (id >= begin && id < end)
        target[id] = from_float<SCALAR>(to_float(target[id]) + bias_values[device_row * max_bias + i]);
    }
    __syncthreads();
  }
  const int length = positions[sample_tokens[s]] + 1;
  if (length < record[P_MIN_LEN] && threadIdx.x < record[P_NUM_END_IDS]) {
    const int id = record[P_END_IDS + threadIdx.x];
    if (id >= begin && id < end) target[id] = from_float<SCALAR>(-kInfinity);
  }
}

// Grid: any. Adds a sequence's tokens to its (cleared) row of counts: the first `prompt_length`
// mark the prompt, the others count as sampled.
extern "C" __global__ void __launch_bounds__(256)
count_tokens(u16* counts, const int* tokens, int row, int num_tokens,
             int prompt_length) {
  for (int i = blockIdx.x * 256 + threadIdx.x; i < num_tokens; i += gridDim.x * 256) {
    if (tokens[i] < 0 || tokens[i] >= VOCAB) continue;
    u16* count = counts + i64(row) * VOCAB + tokens[i];
    u16 seen = *count, expected;
    do {
      expected = seen;
      u16 next = expected;
      if (i < prompt_length)
        next |= kInPrompt;
      else if ((expected & kCountMask) != kCountMask)
        next += 1;
      seen = atomicCAS(count, expected, next);
    } while (seen != expected);
  }
}
