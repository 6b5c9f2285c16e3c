// What the sampling kernels share: rows of logits, ordered keys and the counter-based Gumbel noise.
//
// Macros: SCALAR, VOCAB, and the P_ and PARAM_WORDS numbers of the arena.
#pragma once
#include "chunk.cuh"

constexpr int kVec = Vec<SCALAR>::size;

static_assert(VOCAB < (1 << 18), "histograms hold fewer than 2^18 tokens");

// A word of logits that are all -inf.
template <typename T> constexpr u32 kNothing = 0xff800000u;
template <> constexpr u32 kNothing<__half> = 0xfc00fc00u;
template <> constexpr u32 kNothing<__nv_bfloat16> = 0xff80ff80u;

template <typename T> __device__ __forceinline__ void unpack(const Vec<T>& v, float* x) {
#pragma unroll
  for (int j = 0; j < kVec; ++j) x[j] = v[j];
}
// Of the two bf16 in a word one is a shift away and one a mask.
__device__ __forceinline__ void unpack(const Vec<__nv_bfloat16>& v, float* x) {
  const uint4 words = *reinterpret_cast<const uint4*>(&v);
  const u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    x[2 * i] = __uint_as_float(w[i] << 16);
    x[2 * i + 1] = __uint_as_float(w[i] & 0xffff0000u);
  }
}

// kVec logits from `id` on, a multiple of kVec; from `end` on, such a multiple or VOCAB, -inf.
__device__ __forceinline__ void load_logits(const SCALAR* row, int id, int end, float* x) {
  if constexpr (VOCAB % kVec == 0) {
    constexpr u32 none = kNothing<SCALAR>;
    Vec<SCALAR> v;
    uint4& words = *reinterpret_cast<uint4*>(&v);
    words = make_uint4(none, none, none, none);
    if (id < end) words = *reinterpret_cast<const uint4*>(row + id);
    unpack(v, x);
  } else {
#pragma unroll
    for (int j = 0; j < kVec; ++j) x[j] = id + j < end ? to_float(row[id + j]) : -kInfinity;
  }
}

// (value, id) as one number: a larger value wins, then the lower id.
__device__ __forceinline__ u64 pack(float value, int id) {
  const u32 bits = __float_as_uint(value);
  const u32 key = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return u64(key) << 32 | ~u32(id);
}
__device__ __forceinline__ int packed_id(u64 packed) { return int(~u32(packed)); }
__device__ __forceinline__ float packed_value(u64 packed) {
  const u32 key = u32(packed >> 32);
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}
__device__ __forceinline__ u64 warp_max(u64 x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) {
    const u64 other = __shfl_xor_sync(0xffffffffu, x, offset);
    x = other > x ? other : x;
  }
  return x;
}
// Largest over a block of Threads; every thread gets it. `scratch` holds Threads / 32 numbers.
template <int Threads> __device__ __forceinline__ u64 block_max(u64 x, u64* scratch) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = scratch[0];
#pragma unroll
  for (int w = 1; w < Threads / 32; ++w) x = scratch[w] > x ? scratch[w] : x;
  return x;
}

// Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3").
__device__ __forceinline__ uint4 philox(uint4 counter, uint2 key) {
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const u64 a = u64(0xD2511F53u) * counter.x, b = u64(0xCD9E8D57u) * counter.z;
    counter = make_uint4(u32(b >> 32) ^ counter.y ^ key.x, u32(b), u32(a >> 32) ^ counter.w ^ key.y,
                         u32(a));
    key.x += 0x9E3779B9u;
    key.y += 0xBB67AE85u;
  }
  return counter;
}

// No noise is larger: -log(-log(u)) at the largest u below 1 is 16.64.
constexpr float kMaxNoise = 16.65f;

__device__ __forceinline__ float gumbel(u32 random) {
  const float u = fminf((float(random) + 0.5f) * 0x1p-32f, 0x1.fffffep-1f);
  return -logf(-logf(u));
}

// Random bits below this give less noise than `needed`: u < 1 - v <= exp(-v), v = exp(-needed). A
// bound, so a little too low.
__device__ __forceinline__ u32 least_bits(float needed) {
  const float v = __expf(0.001f - needed);
  return v < 1.f ? ~u32(v * 0x1p32f) : 0u;
}

// What draws noise, as the counter's third word: their noises are independent.
constexpr u32 kOfTokens = 0, kOfChunks = 1;

// The noise at a position of a sequence.
struct Noise {
  uint2 seed;
  u32 position;

  // That of tokens (or chunks) 4 * group .. 4 * group + 3.
  __device__ __forceinline__ uint4 bits(int group, u32 of = kOfTokens) const {
    return philox(make_uint4(position, u32(group), of, 0), seed);
  }
  // That of token `id`.
  __device__ __forceinline__ float operator()(int id) const {
    const uint4 r = bits(id / 4);
    const int i = id % 4;
    return gumbel(i == 0 ? r.x : i == 1 ? r.y : i == 2 ? r.z : r.w);
  }
};

// One row's sampling parameters, read from the device table.
struct Params {
  float temperature, top_p, min_p;
  int top_k;
  Noise noise;

  // `length`: tokens of the sequence so far, the position of the token to sample.
  __device__ __forceinline__ Params(const int* record, int length) {
    temperature = __int_as_float(record[P_TEMPERATURE]);
    // Logits over a smaller one would overflow; the best token wins at this one too.
    if (temperature > 0.f) temperature = fmaxf(temperature, 1e-30f);
    top_p = __int_as_float(record[P_TOP_P]);
    min_p = __int_as_float(record[P_MIN_P]);
    top_k = record[P_TOP_K];
    noise = {make_uint2(record[P_SEED_LOW], record[P_SEED_HIGH]), u32(length)};
  }
  __device__ __forceinline__ bool greedy() const { return !(temperature > 0.f); }
  __device__ __forceinline__ bool limits_count() const { return top_k > 0 && top_k < VOCAB; }
  __device__ __forceinline__ bool limits_mass() const { return top_p < 1.f; }
  __device__ __forceinline__ bool filtered() const {
    return !greedy() && (limits_count() || limits_mass() || min_p > 0.f);
  }
  // Whether chunks are weighed. Where top-k or min-p come first, top-p is of what they leave.
  __device__ __forceinline__ bool needs_weights() const {
    return !greedy() && !limits_count() && !(min_p > 0.f);
  }
};
