// From the merged projection to attention's input in one pass: split q, k and v, normalize each
// head of q and k (RMSNorm over D, optional), rotate both (RoPE, half-split pairs) and write k and
// v to their slots of the paged cache, in the order of kv_layout.cuh.
//
// Macros: SCALAR, CACHE (SCALAR, or narrower: __nv_bfloat16, __half, __nv_fp8_e4m3), HEADS,
// KV_HEADS, HEAD_DIM, QK_NORM (0 or 1), THREADS.
//
// A group of lanes owns a head: each lane holds one vector of the first half and the matching one
// of the second, so that a pair to rotate never leaves its thread. A thread block is one token,
// whose cosines and sines a lane loads once for all its heads.
#include "cache_type.cuh"
#include "early_loads.cuh"

constexpr int kVec = Vec<SCALAR>::size;
constexpr int kHalfVecs = HEAD_DIM / 2 / kVec;
constexpr int ceil_pow2(int x) { return x <= 1 ? 1 : 2 * ceil_pow2((x + 1) / 2); }
constexpr int kLanes = ceil_pow2(kHalfVecs);
constexpr int kAllHeads = HEADS + 2 * KV_HEADS;
constexpr int kGroups = THREADS / kLanes;
constexpr bool kOneRound = kGroups >= kAllHeads;

static_assert(HEAD_DIM % (2 * kVec) == 0, "HEAD_DIM must be a multiple of two vectors");
static_assert(kLanes <= 32, "a head must fit in a warp");
static_assert(sizeof(CACHE) <= sizeof(SCALAR), "the cache must not be wider than the model");

// Grid: tokens. qkv [P, kAllHeads, D]; q_out [P, HEADS, D]; cos_sin [max_len, D]; keys and values
// [blocks, KV_HEADS, 16, D] with `block_stride` elements from block to block. Scales (one float
// each, or null for 1) divide what is stored. `early`: positions and slots were written before this
// kernel could start, so that only qkv is waited for.
extern "C" __global__ void __launch_bounds__(THREADS)
rope_cache(SCALAR* q_out, const SCALAR* qkv, CACHE* keys, CACHE* values, const int* positions,
           const int* slots, const float* __restrict__ cos_sin, const SCALAR* __restrict__ q_norm,
           const SCALAR* __restrict__ k_norm, const float* k_scale, const float* v_scale,
           i64 block_stride, float eps, int early) {
  let_next_start();
  if (!early) wait_for_previous();
  const int token = blockIdx.x;
  const int lane = threadIdx.x % kLanes;
  const bool active = lane < kHalfVecs;
  const int position = load_here(positions + token), slot = load_here(slots + token);
  float cosine[kVec], sine[kVec];
  if (active) {
    const float* p = cos_sin + size_t(position) * HEAD_DIM + lane * kVec;
#pragma unroll
    for (int j = 0; j < kVec; j += 4) {
      *reinterpret_cast<uint4*>(cosine + j) = load_here<uint4>(p + j);
      *reinterpret_cast<uint4*>(sine + j) = load_here<uint4>(p + HEAD_DIM / 2 + j);
    }
  }
  Vec<SCALAR> low_gains, high_gains;
  const auto load_gains = [&](int head) {
    if (!QK_NORM || !active || head >= HEADS + KV_HEADS) return;
    const SCALAR* const gains = (head < HEADS ? q_norm : k_norm) + lane * kVec;
    low_gains = load_vec(gains);
    high_gains = load_vec(gains + HEAD_DIM / 2);
  };
  if (kOneRound) load_gains(threadIdx.x / kLanes);
  wait_for_previous();
  const int row = slot % kv_layout::kBlockTokens;
  const i64 block = i64(slot / kv_layout::kBlockTokens) * block_stride;

  // Every lane of a warp goes round as often, so that the shuffles below are whole.
  for (int base = 0; base < kAllHeads; base += kGroups) {
    const int head = base + threadIdx.x / kLanes;
    const bool here = active && head < kAllHeads;
    const bool is_query = head < HEADS, is_value = head >= HEADS + KV_HEADS;
    float low[kVec], high[kVec];
    float squares = 0.f;
    if (here) {
      const SCALAR* p = qkv + (size_t(token) * kAllHeads + head) * HEAD_DIM + lane * kVec;
      const Vec<SCALAR> a = load_vec_streaming(p), b = load_vec_streaming(p + HEAD_DIM / 2);
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        low[j] = a[j];
        high[j] = b[j];
        squares += low[j] * low[j] + high[j] * high[j];
      }
    }
    if (QK_NORM) {
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset >>= 1)
        squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    }
    if (!here) continue;
    if (!is_value) {
      if (QK_NORM) {
        const float factor = rsqrtf(squares / HEAD_DIM + eps);
        if (!kOneRound) load_gains(head);
#pragma unroll
        for (int j = 0; j < kVec; ++j) {
          low[j] *= factor * low_gains[j];
          high[j] *= factor * high_gains[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float x = low[j], y = high[j];
        low[j] = x * cosine[j] - y * sine[j];
        high[j] = y * cosine[j] + x * sine[j];
      }
    }
    if (is_query) {
      Vec<SCALAR> a, b;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        a.set(j, low[j]);
        b.set(j, high[j]);
      }
      SCALAR* p = q_out + (size_t(token) * HEADS + head) * HEAD_DIM + lane * kVec;
      store_vec(p, a);
      store_vec(p + HEAD_DIM / 2, b);
      continue;
    }
    const float* scale = is_value ? v_scale : k_scale;
    if (scale != nullptr) {
      const float inverse = 1.f / *scale;
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        low[j] *= inverse;
        high[j] *= inverse;
      }
    }
    const int kv_head = head - HEADS - (is_value ? KV_HEADS : 0);
    CACHE* run = (is_value ? values : keys) + block +
                 i64(kv_head) * (kv_layout::kBlockTokens * HEAD_DIM);
    store_cache<HEAD_DIM, kVec>(run, row, lane * kVec, low);
    store_cache<HEAD_DIM, kVec>(run, row, HEAD_DIM / 2 + lane * kVec, high);
  }
}
