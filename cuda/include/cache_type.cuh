// Stores to the paged cache in its own type.
#pragma once
#include <cuda_fp8.h>

#include "common.cuh"
#include "kv_layout.cuh"

__device__ __forceinline__ void convert(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }
__device__ __forceinline__ void convert(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void convert(float x, float& out) { out = x; }
__device__ __forceinline__ void convert(float x, __nv_fp8_e4m3& out) {
  out.__x = __nv_cvt_float_to_fp8(x, __NV_SATFINITE, __NV_E4M3);
}

// Size elements from `element` on of row `row` of a run of heads of HeadDim.
template <int HeadDim, int Size, typename T>
__device__ __forceinline__ void store_cache(T* run, int row, int element, const float* x) {
  struct alignas(Size * sizeof(T)) Piece {
    T data[Size];
  } piece;
#pragma unroll
  for (int j = 0; j < Size; ++j) convert(x[j], piece.data[j]);
  const int byte = element * int(sizeof(T));
  const int at = kv_layout::offset<HeadDim * sizeof(T)>(row, byte / 16) + byte % 16;
  *reinterpret_cast<Piece*>(reinterpret_cast<char*>(run) + at) = piece;
}
