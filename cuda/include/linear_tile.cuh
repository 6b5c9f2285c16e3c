// What the products with few rows ask of the machine beyond mma.cuh and async_copy.cuh: copies that
// bring whole lines to L2, and 16-byte reads.
#pragma once
#include "async_copy.cuh"
#include "cluster.cuh"
#include "mma.cuh"

// Copies 16 bytes to shared memory past L1, or writes zeros where `valid` is false.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ uint4 load_shared(u32 from) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(from)
               : "memory");
  return v;
}

// Barrier of the `Threads` threads that share `id` (0 is __syncthreads' own).
template <int Threads> __device__ __forceinline__ void sync_group(int id) {
  if constexpr (Threads == 32)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(Threads) : "memory");
}

// Barrier of the `Threads` threads that end a tile or, where Split blocks of a cluster divide k, of the
// cluster; and the same without a promise about memory.
template <int Split, int Threads> __device__ __forceinline__ void sync_split() {
  if constexpr (Split > 1)
    sync_cluster();
  else
    sync_group<Threads>(0);
}
template <int Split, int Threads> __device__ __forceinline__ void sync_split_relaxed() {
  if constexpr (Split > 1)
    sync_cluster_relaxed();
  else
    sync_group<Threads>(0);
}

template <typename T> struct Pair;
template <> struct Pair<__nv_bfloat16> {
  using type = __nv_bfloat162;
  static __device__ __forceinline__ float2 to_float2(type p) { return __bfloat1622float2(p); }
};
template <> struct Pair<__half> {
  using type = __half2;
  static __device__ __forceinline__ float2 to_float2(type p) { return __half22float2(p); }
};
template <typename T> __device__ __forceinline__ float2 unpack(u32 pair) {
  return Pair<T>::to_float2(*reinterpret_cast<const typename Pair<T>::type*>(&pair));
}
// Two neighbours as the word that they are in memory.
template <typename T> __device__ __forceinline__ u32 pair_of(const T* two) {
  const typename Pair<T>::type pair(two[0], two[1]);
  return *reinterpret_cast<const u32*>(&pair);
}
// V: uint2 or uint4, of pairs of T.
template <typename T, typename V> __device__ __forceinline__ float sum_of_squares(V v) {
  const auto* pairs = reinterpret_cast<const typename Pair<T>::type*>(&v);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i) {
    const float2 f = Pair<T>::to_float2(pairs[i]);
    sum += f.x * f.x + f.y * f.y;
  }
  return sum;
}
template <typename T, typename V> __device__ __forceinline__ V product(V a, V b) {
  using P = typename Pair<T>::type;
  V out;
#pragma unroll
  for (int i = 0; i < static_cast<int>(sizeof(V) / 4); ++i)
    reinterpret_cast<P*>(&out)[i] =
        __hmul2(reinterpret_cast<const P*>(&a)[i], reinterpret_cast<const P*>(&b)[i]);
  return out;
}

// What stands at `at` in each of Groups arrays, Stride floats apart, of each of the cluster's Split
// blocks, added in that order.
template <int Split, int Groups, int Stride>
__device__ __forceinline__ float4 sum_of_parts(const float* at) {
  float4 sum{};
#pragma unroll
  for (int q = 0; q < Split; ++q)
#pragma unroll
    for (int p = 0; p < Groups; ++p) {
      const float* const from = at + p * Stride;
      const float4 v = Split > 1 ? load_cluster(shared_address(from), q)
                                 : *reinterpret_cast<const float4*>(from);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
  return sum;
}
