// Loads that stand where they are written, on one side of wait_for_previous() and in front of whatever
// takes long, and that are not waited for there.
#pragma once
#include "common.cuh"

// Integers, which every step writes anew, are read past L1, as it may hold an earlier step's.
__device__ __forceinline__ int load_here(const int* from) {
  int x;
  asm volatile("ld.global.cg.b32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
  return x;
}
// V: uint2 or uint4.
template <typename V> __device__ __forceinline__ V load_here(const void* from) {
  V x;
  if constexpr (sizeof(V) == 8)
    asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(x.x), "=r"(x.y) : "l"(from) : "memory");
  else
    asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
  return x;
}
// The compiler does not take the word apart, which would be to wait for it, before this.
__device__ __forceinline__ u32 arrived(u32 word) {
  asm volatile("" : "+r"(word));
  return word;
}
