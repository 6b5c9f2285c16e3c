// The tensor copy engine of sm_90: boxes of a matrix to swizzled shared memory, each completing on
// an mbarrier. A wait on it must keep its default scope (async_copy.cuh): one that acquires at
// the scope of the cluster throws away L1, and did cost half of the bandwidth.
#pragma once
#include "async_copy.cuh"

// A CUtensorMap, passed by value (__grid_constant__).
struct alignas(64) TensorMap {
  unsigned char opaque[128];
};

#if __CUDA_ARCH__ >= 900
// Brings the map itself, which the first copy would wait for.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}
// The box at (column, row); what lies outside the matrix becomes zero. The data is not read again.
__device__ __forceinline__ void copy_box_once(u32 to, const TensorMap& map, int column, int row,
                                              u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}
// The same from a matrix seen as [unit][gate, up][8 rows][column]: whole units.
__device__ __forceinline__ void copy_gated_box_once(u32 to, const TensorMap& map, int column,
                                                    int unit, u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(0), "r"(unit), "r"(barrier), "l"(kEvictFirst)
      : "memory");
}
// The box at (column, row), for data that others read, too.
__device__ __forceinline__ void copy_box(u32 to, const TensorMap& map, int column, int row,
                                         u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3}], [%4];" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
#endif
