// The end of a qkv product of few rows whose tiles are heads of 128: each head of q and k is
// normalized (RMSNorm, optional), rotated (RoPE, half-split pairs), and k and v go to their slots of
// the paged cache, in the order of kv_layout.cuh.
//
// Macros: SCALAR, CACHE (SCALAR, or narrower), HEADS, KV_HEADS, QK_NORM (0 or 1).
#pragma once
#include "early_loads.cuh"
#include "heads_to.cuh"
#include "linear_tile.cuh"

// Adds the partial sums of the cluster's Split blocks, [Rows][128 + 4] each. The block of this rank
// has every Split-th row, of 8 lanes: a lane has twice 4 neighbours of the head's first half and the
// matching ones of the second, so that a pair to rotate never leaves it, and what 8 lanes read at a
// time is in one piece. Called by the block's first Threads threads.
template <int Rows, int Split, int Threads> class HeadEnd {
  static constexpr int kHead = 128, kLanes = 8, kVec = 4, kVecs = kHead / kLanes / kVec;
  static constexpr int kHalf = kVecs / 2, kAtOnce = Threads / kLanes;
  static constexpr int kRounds = (Rows + kAtOnce * Split - 1) / (kAtOnce * Split);
  using Part = float[kVecs][kVec];

 public:
  // Of `head`, rows [above, above + rows).
  __device__ HeadEnd(const HeadsTo& to, int head, int above, int rows, u32 rank)
      : to_(to), head_(head), above_(above), rows_(rows), row_(threadIdx.x / kLanes * Split + rank),
        column_(threadIdx.x % kLanes * kVec) {}

  // Asks for all but the sums.
  __device__ __forceinline__ void ask() {
    if (QK_NORM && !is_value()) {
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        gains_[v] = load_here<uint2>((is_query() ? to_.q_norm : to_.k_norm) + at(v));
    }
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      const int token = above_ + min(row(i), rows_ - 1);
      slots_[i] = load_here(to_.slots + token);
      if (is_value()) continue;
      const float* const angles = to_.cos_sin + i64(load_here(to_.positions + token)) * kHead;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) angles_[i][v] = load_here<uint4>(angles + at(v));
    }
  }

  // Begins and ends with a barrier among the threads, or, with Split, of the whole cluster.
  __device__ __forceinline__ void finish(const float* partials) const {
    sync_split<Split, Threads>();
#pragma unroll
    for (int i = 0; i < kRounds; ++i) {
      Part x;
#pragma unroll
      for (int v = 0; v < kVecs; ++v) {
        float4 sum{};
        if (row(i) < rows_)
          sum = sum_of_parts<Split, 1, 0>(partials + row(i) * (kHead + 4) + at(v));
        x[v][0] = sum.x, x[v][1] = sum.y, x[v][2] = sum.z, x[v][3] = sum.w;
      }
      if constexpr (QK_NORM) normalize(x);
      if (!is_value()) rotate(x, i);
      if (row(i) < rows_) store(x, i);
    }
    sync_split_relaxed<Split, Threads>();
  }

 private:
  __device__ __forceinline__ int row(int round) const { return row_ + round * Split * kAtOnce; }
  __device__ __forceinline__ bool is_query() const { return head_ < HEADS; }
  __device__ __forceinline__ bool is_value() const { return head_ >= HEADS + KV_HEADS; }

  // Where the lane's vector v stands in the head.
  __device__ __forceinline__ int at(int v) const { return column_ + v * kLanes * kVec; }

  __device__ __forceinline__ void normalize(Part& x) const {
    float squares = 0.f;
#pragma unroll
    for (const auto& vector : x)
#pragma unroll
      for (const float value : vector) squares += value * value;
#pragma unroll
    for (int offset = kLanes / 2; offset > 0; offset /= 2)
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    if (is_value()) return;
    const float factor = rsqrtf(squares / kHead + to_.eps);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
      const float2 low = unpack<SCALAR>(arrived(gains_[v].x)), high = unpack<SCALAR>(arrived(gains_[v].y));
      x[v][0] *= factor * low.x, x[v][1] *= factor * low.y;
      x[v][2] *= factor * high.x, x[v][3] *= factor * high.y;
    }
  }
  __device__ __forceinline__ void rotate(Part& x, int round) const {
#pragma unroll
    for (int v = 0; v < kHalf; ++v)
#pragma unroll
      for (int j = 0; j < kVec; ++j) {
        const float low = x[v][j], high = x[kHalf + v][j];
        const float cosine = word(angles_[round][v], j), sine = word(angles_[round][kHalf + v], j);
        x[v][j] = low * cosine - high * sine;
        x[kHalf + v][j] = high * cosine + low * sine;
      }
  }
  __device__ __forceinline__ void store(Part& x, int round) const {
    if (is_query()) {
      SCALAR* const to = to_.q_out + (i64(above_ + row(round)) * HEADS + head_) * kHead;
#pragma unroll
      for (int v = 0; v < kVecs; ++v)
        *reinterpret_cast<uint2*>(to + at(v)) = {pack<SCALAR>(x[v][0], x[v][1]),
                                                 pack<SCALAR>(x[v][2], x[v][3])};
      return;
    }
    const float* const scale = is_value() ? to_.v_scale : to_.k_scale;
    const float inverse = scale == nullptr ? 1.f : 1.f / *scale;
    const int slot = arrived(slots_[round]), kv_head = head_ - HEADS - (is_value() ? KV_HEADS : 0);
    CACHE* const run = (is_value() ? to_.values : to_.keys) +
                       i64(slot / kv_layout::kBlockTokens) * to_.block_stride +
                       i64(kv_head) * (kv_layout::kBlockTokens * kHead);
#pragma unroll
    for (int v = 0; v < kVecs; ++v) {
#pragma unroll
      for (float& value : x[v]) value *= inverse;
      store_cache<kHead, kVec>(run, slot % kv_layout::kBlockTokens, at(v), x[v]);
    }
  }

  static __device__ __forceinline__ float word(const uint4& x, int j) {
    return __uint_as_float(arrived(j == 0 ? x.x : j == 1 ? x.y : j == 2 ? x.z : x.w));
  }

  HeadsTo to_;
  int head_, above_, rows_, row_, column_;
  int slots_[kRounds];
  uint2 gains_[kVecs];
  uint4 angles_[kRounds][kVecs];  // cosines, then sines
};
