// The arithmetic of decode attention: a block of 16 keys and values against the query heads of its
// KV head. The 16 keys are the rows of the tensor core's tile, the query heads its 8 columns.
#pragma once
#include "async_copy.cuh"
#include "attention.cuh"

constexpr int kRowBytes = HEAD_DIM * (KV_FP8 ? 1 : 2);
constexpr int kRunBytes = kv_layout::run_bytes<kRowBytes>();
constexpr int kTiles = (GROUP + 7) / 8;  // of 8 query heads
constexpr int kSteps = HEAD_DIM / 16;    // of a product along the head size

#if KV_FP8
using Operand = __half;
#else
using Operand = SCALAR;
#endif

// The query heads as B fragments: step k, tile n. Lanes beyond GROUP hold zeros.
struct Queries {
  u32 b[kSteps][kTiles][2];

  // `pitch`: elements from one head to the next.
  __device__ void load(const SCALAR* q, int pitch = HEAD_DIM) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
        const bool real = n * 8 + g < GROUP;
        const SCALAR* p = q + (n * 8 + g) * pitch + k * 16;
#if KV_FP8
        // The order of k within a step is that of the converted keys: see load_keys().
        uint2 raw = real ? *reinterpret_cast<const uint2*>(p + 4 * t) : make_uint2(0, 0);
        const SCALAR* x = reinterpret_cast<const SCALAR*>(&raw);
        b[k][n][0] = pack<Operand>(to_float(x[0]), to_float(x[1]));
        b[k][n][1] = pack<Operand>(to_float(x[2]), to_float(x[3]));
#else
        b[k][n][0] = real ? *reinterpret_cast<const u32*>(p + 2 * t) : 0;
        b[k][n][1] = real ? *reinterpret_cast<const u32*>(p + 2 * t + 8) : 0;
#endif
      }
  }
};

// scores[n] += keys (16 rows) x queries. Two chains of products hide the latency of each other.
__device__ __forceinline__ void multiply_keys(float (&scores)[kTiles][4], u32 keys,
                                              const Queries& q) {
  const int lane = threadIdx.x % 32;
  float odd[kTiles][4] = {};
#if KV_FP8
#pragma unroll
  for (int k = 0; k < kSteps; k += 2) {
    // Lane (g, t) gets bytes 4t..4t+3 of rows g, g+8 of two 16-byte chunks. k 2t..2t+1 of the
    // fragment stands for elements 4t..4t+1, k 2t+8.. for 4t+2..4t+3.
    u32 raw[4];
    load_matrix_x4(raw, keys + kv_layout::offset<kRowBytes>(lane & 15, k + (lane >> 4)));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const u32 a[4] = {half2_from_e4m3x2(raw[2 * c]), half2_from_e4m3x2(raw[2 * c + 1]),
                        half2_from_e4m3x2(raw[2 * c] >> 16),
                        half2_from_e4m3x2(raw[2 * c + 1] >> 16)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(c ? odd[n] : scores[n], a, q.b[k + c][n]);
    }
  }
#else
#pragma unroll
  for (int k = 0; k < kSteps; ++k) {
    u32 a[4];
    load_matrix_x4(a, keys + kv_layout::offset<kRowBytes>(lane & 15, 2 * k + (lane >> 4)));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(k & 1 ? odd[n] : scores[n], a, q.b[k][n]);
  }
#endif
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[n][i] += odd[n][i];
}

// out[d][n] += transposed values (16 rows of the head size) x probabilities.
__device__ __forceinline__ void multiply_values(float (&out)[kSteps][kTiles][4], u32 values,
                                                const u32 (&p)[kTiles][2]) {
  const int lane = threadIdx.x % 32;
#if KV_FP8
#pragma unroll
  for (int d = 0; d < kSteps; d += 2) {
    // A transposed 16-bit element is a pair of neighbours along the head size: the even ones make
    // rows 0..7 of the fragment, the odd ones rows 8..15.
    u32 raw[4];
    load_matrix_x4_transposed(raw,
                              values + kv_layout::offset<kRowBytes>(lane & 15, d + (lane >> 4)));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const u32 low = __byte_perm(raw[2 * c], 0, 0x3120);
      const u32 high = __byte_perm(raw[2 * c + 1], 0, 0x3120);
      const u32 a[4] = {half2_from_e4m3x2(low), half2_from_e4m3x2(low >> 16),
                        half2_from_e4m3x2(high), half2_from_e4m3x2(high >> 16)};
#pragma unroll
      for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(out[d + c][n], a, p[n]);
    }
  }
#else
#pragma unroll
  for (int d = 0; d < kSteps; ++d) {
    u32 a[4];
    load_matrix_x4_transposed(
        a, values + kv_layout::offset<kRowBytes>((lane & 7) + (lane >> 4) * 8,
                                                 2 * d + ((lane >> 3) & 1)));
#pragma unroll
    for (int n = 0; n < kTiles; ++n) mma_16x8x16<Operand>(out[d][n], a, p[n]);
  }
#endif
}

// Where along the head size row `g` (+ 8 if `high`) of step d of multiply_values() lies.
__device__ __forceinline__ int out_element(int d, int g, bool high) {
  return KV_FP8 ? d * 16 + 2 * g + high : d * 16 + g + 8 * high;
}

// What a warp knows of one (row, KV head): online softmax (Milakov & Gimelshein 2018).
struct Accumulator {
  float out[kSteps][kTiles][4];
  float max[kTiles][2];  // of the columns 2t, 2t+1
  float sum[kTiles][2];  // of this lane's keys alone, until finish()

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        max[n][c] = -CUDART_INF_F;
        sum[n][c] = 0.f;
      }
#pragma unroll
      for (int d = 0; d < kSteps; ++d)
#pragma unroll
        for (int i = 0; i < 4; ++i) out[d][n][i] = 0.f;
    }
  }

  // Takes a block of 16 keys and values, of which the first `valid` count.
  __device__ void add(const Queries& q, u32 keys, u32 values, int valid, float scale) {
    const int g = threadIdx.x % 32 / 4;
    float s[kTiles][4] = {};
    multiply_keys(s, keys, q);
    u32 p[kTiles][2];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) {
      float top[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s[n][c] = g < valid ? s[n][c] * scale : -CUDART_INF_F;
        s[n][c + 2] = g + 8 < valid ? s[n][c + 2] * scale : -CUDART_INF_F;
        top[c] = fmaxf(s[n][c], s[n][c + 2]);
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          top[c] = fmaxf(top[c], __shfl_xor_sync(0xffffffffu, top[c], distance));
      }
      if (__any_sync(0xffffffffu, top[0] > max[n][0] || top[1] > max[n][1])) rescale(n, top);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        s[n][c] = exp2_fast(s[n][c] - max[n][c]);
        s[n][c + 2] = exp2_fast(s[n][c + 2] - max[n][c]);
        sum[n][c] += s[n][c] + s[n][c + 2];
      }
      p[n][0] = transpose_8x8(pack<Operand>(s[n][0], s[n][1]));
      p[n][1] = transpose_8x8(pack<Operand>(s[n][2], s[n][3]));
    }
    multiply_values(out, values, p);
  }

  // Sums over the lanes that share a column.
  __device__ void finish() {
#pragma unroll
    for (int n = 0; n < kTiles; ++n)
#pragma unroll
      for (int c = 0; c < 2; ++c)
#pragma unroll
        for (int distance = 4; distance < 32; distance *= 2)
          sum[n][c] += __shfl_xor_sync(0xffffffffu, sum[n][c], distance);
  }

 private:
  __device__ void rescale(int n, const float (&top)[2]) {
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float next = fmaxf(max[n][c], top[c]);
      const float factor = exp2_fast(max[n][c] - next);
      max[n][c] = next;
      sum[n][c] *= factor;
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
        out[d][n][c] *= factor;
        out[d][n][c + 2] *= factor;
      }
    }
  }
};

// Values behind a sequence's end may be anything, NaN too, and 0 x NaN is NaN.
__device__ __forceinline__ void clear_values(u32 values, int valid) {
  const int lane = threadIdx.x % 32;
  constexpr int kChunks = kRowBytes / 16;
  for (int i = valid * kChunks + lane; i < kBlockTokens * kChunks; i += 32)
    asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(
                     values + kv_layout::offset<kRowBytes>(i / kChunks, i % kChunks)),
                 "r"(0)
                 : "memory");
#if __CUDA_ARCH__ >= 900
  fence_async_proxy();  // the copy engine may fill the place next
#endif
  __syncwarp();
}

// Puts a warp's result where the thread block merges it: `partial` and `out` of its shared memory.
template <typename Shared>
__device__ __forceinline__ void publish(Shared& shared, const Accumulator& a) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int n = 0; n < kTiles; ++n)
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const int head = n * 8 + 2 * t + c;
      if (head >= GROUP) continue;
      if (g == 0) shared.partial[warp][head] = {a.max[n][c], a.sum[n][c]};
#pragma unroll
      for (int d = 0; d < kSteps; ++d) {
        shared.out[warp][head][out_element(d, g, false)] = a.out[d][n][c];
        shared.out[warp][head][out_element(d, g, true)] = a.out[d][n][c + 2];
      }
    }
}
