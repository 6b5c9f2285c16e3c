// The warpgroup matrix instruction of sm_90a for 64 rows of A times 192 of B, both K-major in shared
// memory: what attention_wgmma.cuh says of descriptors and accumulators holds here too.
#pragma once
#include "attention_wgmma.cuh"

#if __CUDA_ARCH_FEAT_SM90_ALL
#define WGMMA_OUT_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
  "+f"(d[i + 6]), "+f"(d[i + 7])
#define WGMMA_OUT_16(i) WGMMA_OUT_8(i), WGMMA_OUT_8(i + 8)
#define WGMMA_OUT_32(i) WGMMA_OUT_16(i), WGMMA_OUT_16(i + 16)
#define WGMMA_OUT_96 WGMMA_OUT_32(0), WGMMA_OUT_32(32), WGMMA_OUT_32(64)
#define WGMMA_LIST_96 \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95}, "

// d (+)= a b^T; `add` false: d is overwritten.
template <typename T>
__device__ __forceinline__ void wgmma_shared(float (&d)[96], u64 a, u64 b, bool add) {
  if constexpr (is_bf16<T>)
    asm volatile("{.reg .pred add; setp.ne.b32 add, %98, 0; "
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.bf16.bf16 " WGMMA_LIST_96
                 "%96, %97, add, 1, 1, 0, 0;}"
                 : WGMMA_OUT_96
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
  else
    asm volatile("{.reg .pred add; setp.ne.b32 add, %98, 0; "
                 "wgmma.mma_async.sync.aligned.m64n192k16.f32.f16.f16 " WGMMA_LIST_96
                 "%96, %97, add, 1, 1, 0, 0;}"
                 : WGMMA_OUT_96
                 : "l"(a), "l"(b), "r"(static_cast<int>(add)));
}
#undef WGMMA_OUT_8
#undef WGMMA_OUT_16
#undef WGMMA_OUT_32
#undef WGMMA_OUT_96
#undef WGMMA_LIST_96
#endif
