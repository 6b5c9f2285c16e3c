// What linear_skinny.cu asks of the machine: asynchronous copies, the matrix instruction in the
// order of k that 16-byte reads give, and the shared memory of a cluster's other blocks.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 shared_address(const void* p) {
  return static_cast<u32>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes to shared memory past L1, or writes zeros where `valid` is false.
__device__ __forceinline__ void copy_async(u32 to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Pending> __device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
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

// acc[16 x 8] += a[16 x 16] b[16 x 8] (PTX mma.m16n8k16). Lane 4 g + t passes, of rows g and g + 8
// of a and of column g of b, two registers of two neighbouring k each. Which k those are is free
// so long as a and b agree, so a lane passes k that stand side by side in memory.
template <typename T>
__device__ __forceinline__ void multiply(float (&acc)[4], u32 low0, u32 high0, u32 low1, u32 high1,
                                         u32 b0, u32 b1);
template <>
__device__ __forceinline__ void multiply<__nv_bfloat16>(float (&acc)[4], u32 low0, u32 high0,
                                                        u32 low1, u32 high1, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(b0), "r"(b1));
}
template <>
__device__ __forceinline__ void multiply<__half>(float (&acc)[4], u32 low0, u32 high0, u32 low1,
                                                 u32 high1, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
      : "r"(low0), "r"(high0), "r"(low1), "r"(high1), "r"(b0), "r"(b1));
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
template <typename T> __device__ __forceinline__ float sum_of_squares(uint4 v) {
  const auto* pairs = reinterpret_cast<const typename Pair<T>::type*>(&v);
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = Pair<T>::to_float2(pairs[i]);
    sum += f.x * f.x + f.y * f.y;
  }
  return sum;
}
template <typename T> __device__ __forceinline__ uint4 product(uint4 a, uint4 b) {
  using P = typename Pair<T>::type;
  uint4 out;
#pragma unroll
  for (int i = 0; i < 4; ++i)
    reinterpret_cast<P*>(&out)[i] =
        __hmul2(reinterpret_cast<const P*>(&a)[i], reinterpret_cast<const P*>(&b)[i]);
  return out;
}

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// Barrier of all threads of the cluster; what they wrote to shared memory is visible after it.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
#endif
}
// The same barrier without the promise about memory, which would wait for stores to arrive: when all
// that matters is that the other blocks have read what they came for.
__device__ __forceinline__ void sync_cluster_relaxed() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.aligned;" :::
                   "memory");
#endif
}
// What stands at `address` of this block's shared memory, in the block `rank` of the cluster.
__device__ __forceinline__ float4 load_cluster(u32 address, u32 rank) {
  float4 v{};
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %4, %5;\n"
      "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];\n}"
      : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
      : "r"(address), "r"(rank)
      : "memory");
#endif
  return v;
}
__device__ __forceinline__ float load_cluster_float(u32 address, u32 rank) {
  float v = 0.f;
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .u32 there;\nmapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [there];\n}"
      : "=f"(v)
      : "r"(address), "r"(rank)
      : "memory");
#endif
  return v;
}
