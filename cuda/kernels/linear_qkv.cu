// From hidden states to attention's input for many rows, for sm_90a: the qkv projection, whose end
// normalizes each head of q and k (RMSNorm over 128, optional), rotates both (RoPE, half-split pairs)
// and writes k and v to their slots of the paged cache, in the order of kv_layout.cuh.
//
// Macros: CACHE (SCALAR, or narrower), HEADS, KV_HEADS, QK_NORM (0 or 1), and many_rows.cuh's, of
// which COLUMNS is 256.
#include "heads_to.cuh"
#include "many_rows.cuh"

namespace {
constexpr int kHead = 128, kAllHeads = HEADS + 2 * KV_HEADS;
static_assert(many_rows::kColumns == 2 * kHead, "a tile is two heads");

// A tile is two heads. A group of 8 lanes has a row of one at a time, a lane 8 neighbours of the
// head's first half and the matching ones of the second, so that a pair to rotate never leaves it.
struct Heads : HeadsTo {
  static constexpr int kAtOnce = 3, kStep = many_rows::kEndThreads / 16, kVec = 8;
  // What the first half and then the second half of a lane's part of a head is.
  using Part = float[2 * kVec];

  int m;

  template <typename Wait>
  __device__ __forceinline__ void operator()(const many_rows::Place& place, Wait wait,
                                             const SCALAR* sums, const float* scales) const {
    const int half = threadIdx.x / 8 % 2, head = place.tile * 2 + half;
    const int column = threadIdx.x % 8 * kVec;
    const int rows = min(many_rows::kRows, m - place.row);
    const bool is_query = head < HEADS, is_value = head >= HEADS + KV_HEADS;
    const bool exists = head < kAllHeads;
    Part gains;
    if (QK_NORM && !is_value) load_part(gains, (is_query ? q_norm : k_norm) + column);
    const float* const stored = is_query ? nullptr : is_value ? v_scale : k_scale;
    const float inverse = stored == nullptr ? 1.f : 1.f / *stored;
    CACHE* const runs = (is_value ? values : keys) +
                        i64(head - HEADS - (is_value ? KV_HEADS : 0)) *
                            (kv_layout::kBlockTokens * kHead);
    int first = many_rows::end_thread() / 16, at[kAtOnce];
    load_rows(at, positions + place.row, first, rows);
    wait();
#pragma unroll 1
    for (; first < many_rows::kRows; first += kAtOnce * kStep) {
      // All rows take a step before one takes the next: each would wait for its own.
      Part x[kAtOnce], angles[kAtOnce];
      if (!is_value) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int j = 0; j < 2 * kVec; j += 4)
            *reinterpret_cast<float4*>(angles[i] + j) = __ldg(reinterpret_cast<const float4*>(
                cos_sin + i64(at[i]) * kHead + column + j / kVec * (kHead / 2) + j % kVec));
      }
      load_rows(at, positions + place.row, first + kAtOnce * kStep, rows);
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = min(first + i * kStep, many_rows::kRows - 1);
        load_part(x[i], sums + row * many_rows::kPitch + half * kHead + column);
        const float scale = NORM ? scales[row] : 1.f;
#pragma unroll
        for (float& value : x[i]) value *= scale;
      }
      if (QK_NORM) normalize(x, gains, is_value, eps);
      if (!is_value) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
          for (int j = 0; j < kVec; ++j) {
            const float low = x[i][j], high = x[i][kVec + j];
            const float cosine = angles[i][j], sine = angles[i][kVec + j];
            x[i][j] = low * cosine - high * sine;
            x[i][kVec + j] = high * cosine + low * sine;
          }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = first + i * kStep;
        if (row >= rows || !exists) continue;
        if (is_query) {
          SCALAR* const to = q_out + (i64(place.row + row) * HEADS + head) * kHead + column;
          store_vec(to, rounded(x[i]));
          store_vec(to + kHead / 2, rounded(x[i] + kVec));
          continue;
        }
#pragma unroll
        for (float& value : x[i]) value *= inverse;
        const int slot = __ldcg(slots + place.row + row);
        CACHE* const run = runs + (slot / kv_layout::kBlockTokens) * block_stride;
        store_cache<kHead, kVec>(run, slot % kv_layout::kBlockTokens, column, x[i]);
        store_cache<kHead, kVec>(run, slot % kv_layout::kBlockTokens, kHead / 2 + column,
                                 x[i] + kVec);
      }
    }
  }

  // Integers of the group's next rows. Every step writes them anew: an L1 may hold an earlier step's.
  static __device__ __forceinline__ void load_rows(int (&to)[kAtOnce], const int* from, int first,
                                                   int rows) {
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) to[i] = __ldcg(from + min(first + i * kStep, rows - 1));
  }

  static __device__ __forceinline__ void normalize(Part (&x)[kAtOnce], const Part& gains,
                                                   bool is_value, float eps) {
    float squares[kAtOnce] = {};
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (const float value : x[i]) squares[i] += value * value;
#pragma unroll
    for (int offset = 4; offset > 0; offset /= 2)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
        squares[i] += __shfl_xor_sync(0xffffffffu, squares[i], offset);
    if (is_value) return;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const float factor = rsqrtf(squares[i] / kHead + eps);
#pragma unroll
      for (int j = 0; j < 2 * kVec; ++j) x[i][j] *= factor * gains[j];
    }
  }

  static __device__ __forceinline__ void load_part(Part& to, const SCALAR* from) {
    const Vec<SCALAR> low = load_vec(from), high = load_vec(from + kHead / 2);
#pragma unroll
    for (int j = 0; j < kVec; ++j) to[j] = low[j], to[kVec + j] = high[j];
  }
  static __device__ __forceinline__ Vec<SCALAR> rounded(const float* x) {
    Vec<SCALAR> y;
#pragma unroll
    for (int j = 0; j < kVec; ++j) y.set(j, x[j]);
    return y;
  }
};
}  // namespace

// x [m, k]; W [(HEADS + 2 KV_HEADS) * 128, k]; q_out [m, HEADS, 128]; the rest as in rope_cache.cu.
// Grid and shared memory as in linear_gated.cu.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(many_rows::kThreads, 1)
    linear_qkv(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
               const SCALAR* x, float* scales, SCALAR* q_out, CACHE* keys, CACHE* values,
               const int* positions, const int* slots, const float* cos_sin, const SCALAR* q_norm,
               const SCALAR* k_norm, const float* k_scale, const float* v_scale, i64 block_stride,
               float eps, int m, int k) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  many_rows::multiply(x_map, w_map, {x, scales, eps}, m, k, (kAllHeads + 1) / 2,
                      many_rows::kColumns, many_rows::kHalf,
                      Heads{{q_out, keys, values, positions, slots, cos_sin, q_norm, k_norm,
                             k_scale, v_scale, block_stride, eps},
                            m});
#endif
}
