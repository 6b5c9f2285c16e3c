// What is left of each chunk of a row's logits for whoever samples: the largest, and the chunk's weight.
#pragma once
#include "common.cuh"

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr int kChunk = 64;

struct alignas(8) Chunk {
  float top;     // the largest logit; NaN if one is NaN
  float weight;  // sum of exp((logit - top) / T); nothing to go by where no one needs it
};

// exp2 to float32's accuracy but for results below the normal range, which become 0.
__device__ __forceinline__ float fast_exp2(float x) {
  float out;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// log2 to 2^-22, of 0 or a number in the normal range.
__device__ __forceinline__ float fast_log2(float x) {
  float out;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(out) : "f"(x));
  return out;
}
// The larger, or NaN if one is NaN.
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float out;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(out) : "f"(a), "f"(b));
  return out;
}

// What a difference of logits is multiplied by to be an exponent of 2. 0 where nothing is drawn.
__device__ __forceinline__ float weight_scale(float temperature) {
  constexpr float kLog2E = 1.4426950408889634f;
  // Logits over a smaller one would overflow; the best token wins at this one too.
  return temperature > 0.f ? kLog2E / fmaxf(temperature, 1e-30f) : 0.f;
}
// exp((logit - top) / T); 0 where both are -inf. The difference first: of a scaled one, a tiny
// temperature would scale its rounding too.
__device__ __forceinline__ float weight_of(float logit, float top, float scale) {
  return fast_exp2((logit - fmaxf(top, -0x1p127f)) * scale);
}
// log of the sum of exp(logit / T); -inf where all logits are.
__device__ __forceinline__ float log_of_sum(float top, float weight, float scale) {
  constexpr float kLn2 = 0.6931471805599453f;
  return (fmaxf(top, -0x1p127f) * scale + fast_log2(weight)) * kLn2;
}
// The chunk of `count` logits, in shared memory.
template <typename T>
__device__ __forceinline__ Chunk chunk_of(const T* logits, int count, float scale) {
  constexpr int kSize = Vec<T>::size;
  const auto visit = [&](auto f) {
#pragma unroll
    for (int v = 0; v < kChunk; v += kSize) {
      const Vec<T> x = load_vec(logits + v);
#pragma unroll
      for (int j = 0; j < kSize; ++j) f(v + j < count ? x[j] : -kInfinity);
    }
  };
  Chunk chunk = {-kInfinity, 0.f};
  visit([&](float x) { chunk.top = max_or_nan(chunk.top, x); });
  if (scale > 0.f) visit([&](float x) { chunk.weight += weight_of(x, chunk.top, scale); });
  return chunk;
}
