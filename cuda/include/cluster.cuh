// The thread blocks of a cluster (sm_90): which one this is, their barrier, and what stands in each
// other's shared memory. Below sm_90 a cluster is one block, and nothing here does anything.
#pragma once
#include "common.cuh"

__device__ __forceinline__ u32 cluster_rank() {
  u32 rank = 0;
#if __CUDA_ARCH__ >= 900
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}
// Barrier of all threads of the cluster; what they wrote to shared memory is visible after it. To
// promise that of all they wrote takes a fence of the whole device, half a microsecond; compilers
// before PTX ISA 8.6 know no lesser one.
__device__ __forceinline__ void sync_cluster() {
#if __CUDA_ARCH__ >= 900
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1208
  asm volatile(
      "fence.release.sync_restrict::shared::cta.cluster;\n"
      "barrier.cluster.arrive.relaxed.aligned;\n" ::
          : "memory");
#else
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
#endif
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
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
// Arrives at the barrier of the same address in the cluster's thread block `rank`.
__device__ __forceinline__ void barrier_arrive_at(u32 barrier, u32 rank) {
#if __CUDA_ARCH__ >= 900
  asm volatile(
      "{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
      "r"(rank)
      : "memory");
#endif
}
