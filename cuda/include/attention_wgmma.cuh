// The warpgroup matrix instruction of sm_90a: 64 rows of A, from shared memory or registers, times
// 64 or 128 columns of B from shared memory (PTX ISA, "wgmma.mma_async").
//
// Accumulators, as of mma.sync: lane (g, t) of warp w holds, for every 8 columns, rows 16 w + g
// (columns 2t, 2t+1) and 16 w + g + 8. A in registers is laid out as mma.sync's A.
#pragma once
#include "mma.cuh"

// A tile in rows of 128 bytes with the 128-byte swizzle, aligned to 1,024 bytes; every 8 rows are
// one pattern. K-major operands (k along the row) need no more; for MN-major ones `column_bytes` is
// the distance between columns of 64 elements.
__device__ __forceinline__ u64 wgmma_tile(u32 address, u32 column_bytes = 16) {
  return static_cast<u64>((address & 0x3ffff) >> 4) | static_cast<u64>(column_bytes >> 4) << 16 |
         static_cast<u64>(1024 >> 4) << 32 | static_cast<u64>(1) << 62;
}

#if __CUDA_ARCH_FEAT_SM90_ALL
// Before products whose registers other instructions have written.
__device__ __forceinline__ void wgmma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void wgmma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most Pending committed groups are under way.
template <int Pending> __device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}
// Keeps the compiler from moving accesses to registers across the products that own them.
template <int N> __device__ __forceinline__ void wgmma_own(float (&d)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(d[i])::"memory");
}

template <int Registers> __device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers> __device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

#define WGMMA_LIST_32 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}, "
#define WGMMA_OUT_32 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31])
#define WGMMA_LIST_64 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
#define WGMMA_OUT_64 \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), \
  "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), \
  "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), \
  "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), \
  "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), \
  "+f"(d[30]), "+f"(d[31]), "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), \
  "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]), "+f"(d[40]), "+f"(d[41]), \
  "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]), \
  "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), \
  "+f"(d[54]), "+f"(d[55]), "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), \
  "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])

// d (+)= a b^T, both K-major in shared memory; `add` false: d is overwritten.
template <typename T>
__device__ __forceinline__ void wgmma_shared(float (&d)[32], u64 a, u64 b, bool add) {
  if constexpr (is_bf16<T>)
    asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_LIST_32
                 "%32, %33, add, 1, 1, 0, 0;}"
                 : WGMMA_OUT_32
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  else
    asm volatile("{.reg .pred add; setp.ne.b32 add, %34, 0; "
                 "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " WGMMA_LIST_32
                 "%32, %33, add, 1, 1, 0, 0;}"
                 : WGMMA_OUT_32
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
template <typename T>
__device__ __forceinline__ void wgmma_shared(float (&d)[64], u64 a, u64 b, bool add) {
  if constexpr (is_bf16<T>)
    asm volatile("{.reg .pred add; setp.ne.b32 add, %66, 0; "
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " WGMMA_LIST_64
                 "%64, %65, add, 1, 1, 0, 0;}"
                 : WGMMA_OUT_64
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  else
    asm volatile("{.reg .pred add; setp.ne.b32 add, %66, 0; "
                 "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " WGMMA_LIST_64
                 "%64, %65, add, 1, 1, 0, 0;}"
                 : WGMMA_OUT_64
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
// d += a b, a in registers, b MN-major in shared memory.
template <typename T>
__device__ __forceinline__ void wgmma_registers(float (&d)[32], const u32 (&a)[4], u64 b) {
  if constexpr (is_bf16<T>)
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " WGMMA_LIST_32
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : WGMMA_OUT_32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 " WGMMA_LIST_32
                 "{%32, %33, %34, %35}, %36, 1, 1, 1, 1;"
                 : WGMMA_OUT_32
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
template <typename T>
__device__ __forceinline__ void wgmma_registers(float (&d)[64], const u32 (&a)[4], u64 b) {
  if constexpr (is_bf16<T>)
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " WGMMA_LIST_64
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : WGMMA_OUT_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  else
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 " WGMMA_LIST_64
                 "{%64, %65, %66, %67}, %68, 1, 1, 1, 1;"
                 : WGMMA_OUT_64
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}
#undef WGMMA_LIST_32
#undef WGMMA_OUT_32
#undef WGMMA_LIST_64
#undef WGMMA_OUT_64
#endif
