// The warpgroup matrix instruction of sm_90a: 64 rows of A, from shared memory or registers, times 8
// to 256 columns of B from shared memory (PTX ISA, "wgmma.mma_async").
//
// Accumulators, as of mma.sync: lane (g, t) of warp w holds, for every 8 columns, rows 16 w + g
// (columns 2t, 2t+1) and 16 w + g + 8. A in registers is laid out as mma.sync's A.
#pragma once
#include "mma.cuh"

// A tile in rows of 128 bytes with the 128-byte swizzle, aligned to 1,024 bytes; every 8 rows are
// one pattern. K-major operands (k along the row) need no more, and 16 k further on is 32 bytes
// further on; for MN-major ones `column_bytes` is the distance between columns of 64 elements.
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

// The operands of a product: each list is the one before it and what is new.
#define WGMMA_LIST_4 "%0, %1, %2, %3"
#define WGMMA_LIST_8 WGMMA_LIST_4 ", %4, %5, %6, %7"
#define WGMMA_LIST_12 WGMMA_LIST_8 ", %8, %9, %10, %11"
#define WGMMA_LIST_16 WGMMA_LIST_12 ", %12, %13, %14, %15"
#define WGMMA_LIST_20 WGMMA_LIST_16 ", %16, %17, %18, %19"
#define WGMMA_LIST_24 WGMMA_LIST_20 ", %20, %21, %22, %23"
#define WGMMA_LIST_28 WGMMA_LIST_24 ", %24, %25, %26, %27"
#define WGMMA_LIST_32 WGMMA_LIST_28 ", %28, %29, %30, %31"
#define WGMMA_LIST_36 WGMMA_LIST_32 ", %32, %33, %34, %35"
#define WGMMA_LIST_40 WGMMA_LIST_36 ", %36, %37, %38, %39"
#define WGMMA_LIST_44 WGMMA_LIST_40 ", %40, %41, %42, %43"
#define WGMMA_LIST_48 WGMMA_LIST_44 ", %44, %45, %46, %47"
#define WGMMA_LIST_52 WGMMA_LIST_48 ", %48, %49, %50, %51"
#define WGMMA_LIST_56 WGMMA_LIST_52 ", %52, %53, %54, %55"
#define WGMMA_LIST_60 WGMMA_LIST_56 ", %56, %57, %58, %59"
#define WGMMA_LIST_64 WGMMA_LIST_60 ", %60, %61, %62, %63"
#define WGMMA_LIST_68 WGMMA_LIST_64 ", %64, %65, %66, %67"
#define WGMMA_LIST_72 WGMMA_LIST_68 ", %68, %69, %70, %71"
#define WGMMA_LIST_76 WGMMA_LIST_72 ", %72, %73, %74, %75"
#define WGMMA_LIST_80 WGMMA_LIST_76 ", %76, %77, %78, %79"
#define WGMMA_LIST_84 WGMMA_LIST_80 ", %80, %81, %82, %83"
#define WGMMA_LIST_88 WGMMA_LIST_84 ", %84, %85, %86, %87"
#define WGMMA_LIST_92 WGMMA_LIST_88 ", %88, %89, %90, %91"
#define WGMMA_LIST_96 WGMMA_LIST_92 ", %92, %93, %94, %95"
#define WGMMA_LIST_100 WGMMA_LIST_96 ", %96, %97, %98, %99"
#define WGMMA_LIST_104 WGMMA_LIST_100 ", %100, %101, %102, %103"
#define WGMMA_LIST_108 WGMMA_LIST_104 ", %104, %105, %106, %107"
#define WGMMA_LIST_112 WGMMA_LIST_108 ", %108, %109, %110, %111"
#define WGMMA_LIST_116 WGMMA_LIST_112 ", %112, %113, %114, %115"
#define WGMMA_LIST_120 WGMMA_LIST_116 ", %116, %117, %118, %119"
#define WGMMA_LIST_124 WGMMA_LIST_120 ", %120, %121, %122, %123"
#define WGMMA_LIST_128 WGMMA_LIST_124 ", %124, %125, %126, %127"
#define WGMMA_NEXT(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define WGMMA_SUMS_4 WGMMA_NEXT(0)
#define WGMMA_SUMS_8 WGMMA_SUMS_4, WGMMA_NEXT(4)
#define WGMMA_SUMS_12 WGMMA_SUMS_8, WGMMA_NEXT(8)
#define WGMMA_SUMS_16 WGMMA_SUMS_12, WGMMA_NEXT(12)
#define WGMMA_SUMS_20 WGMMA_SUMS_16, WGMMA_NEXT(16)
#define WGMMA_SUMS_24 WGMMA_SUMS_20, WGMMA_NEXT(20)
#define WGMMA_SUMS_28 WGMMA_SUMS_24, WGMMA_NEXT(24)
#define WGMMA_SUMS_32 WGMMA_SUMS_28, WGMMA_NEXT(28)
#define WGMMA_SUMS_36 WGMMA_SUMS_32, WGMMA_NEXT(32)
#define WGMMA_SUMS_40 WGMMA_SUMS_36, WGMMA_NEXT(36)
#define WGMMA_SUMS_44 WGMMA_SUMS_40, WGMMA_NEXT(40)
#define WGMMA_SUMS_48 WGMMA_SUMS_44, WGMMA_NEXT(44)
#define WGMMA_SUMS_52 WGMMA_SUMS_48, WGMMA_NEXT(48)
#define WGMMA_SUMS_56 WGMMA_SUMS_52, WGMMA_NEXT(52)
#define WGMMA_SUMS_60 WGMMA_SUMS_56, WGMMA_NEXT(56)
#define WGMMA_SUMS_64 WGMMA_SUMS_60, WGMMA_NEXT(60)
#define WGMMA_SUMS_68 WGMMA_SUMS_64, WGMMA_NEXT(64)
#define WGMMA_SUMS_72 WGMMA_SUMS_68, WGMMA_NEXT(68)
#define WGMMA_SUMS_76 WGMMA_SUMS_72, WGMMA_NEXT(72)
#define WGMMA_SUMS_80 WGMMA_SUMS_76, WGMMA_NEXT(76)
#define WGMMA_SUMS_84 WGMMA_SUMS_80, WGMMA_NEXT(80)
#define WGMMA_SUMS_88 WGMMA_SUMS_84, WGMMA_NEXT(84)
#define WGMMA_SUMS_92 WGMMA_SUMS_88, WGMMA_NEXT(88)
#define WGMMA_SUMS_96 WGMMA_SUMS_92, WGMMA_NEXT(92)
#define WGMMA_SUMS_100 WGMMA_SUMS_96, WGMMA_NEXT(96)
#define WGMMA_SUMS_104 WGMMA_SUMS_100, WGMMA_NEXT(100)
#define WGMMA_SUMS_108 WGMMA_SUMS_104, WGMMA_NEXT(104)
#define WGMMA_SUMS_112 WGMMA_SUMS_108, WGMMA_NEXT(108)
#define WGMMA_SUMS_116 WGMMA_SUMS_112, WGMMA_NEXT(112)
#define WGMMA_SUMS_120 WGMMA_SUMS_116, WGMMA_NEXT(116)
#define WGMMA_SUMS_124 WGMMA_SUMS_120, WGMMA_NEXT(120)
#define WGMMA_SUMS_128 WGMMA_SUMS_124, WGMMA_NEXT(124)

// d (+)= a b^T, both K-major in shared memory; `add` false: d is overwritten.
#define WGMMA_SHARED(count, columns, a_place, b_place, add_place)                                    \
  template <typename T>                                                                              \
  __device__ __forceinline__ void wgmma_shared(float (&d)[count], u64 a, u64 b, bool add = true) {   \
    if constexpr (is_bf16<T>)                                                                        \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " add_place ", 0; "                            \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 "                 \
                   "{" WGMMA_LIST_##count "}, " a_place ", " b_place ", add, 1, 1, 0, 0;}"           \
                   : WGMMA_SUMS_##count                                                              \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                    \
    else                                                                                             \
      asm volatile("{.reg .pred add; setp.ne.b32 add, " add_place ", 0; "                            \
                   "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 "                   \
                   "{" WGMMA_LIST_##count "}, " a_place ", " b_place ", add, 1, 1, 0, 0;}"           \
                   : WGMMA_SUMS_##count                                                              \
                   : "l"(a), "l"(b), "r"(static_cast<int>(add)));                                    \
  }
WGMMA_SHARED(4, 8, "%4", "%5", "%6")
WGMMA_SHARED(8, 16, "%8", "%9", "%10")
WGMMA_SHARED(12, 24, "%12", "%13", "%14")
WGMMA_SHARED(16, 32, "%16", "%17", "%18")
WGMMA_SHARED(20, 40, "%20", "%21", "%22")
WGMMA_SHARED(24, 48, "%24", "%25", "%26")
WGMMA_SHARED(28, 56, "%28", "%29", "%30")
WGMMA_SHARED(32, 64, "%32", "%33", "%34")
WGMMA_SHARED(36, 72, "%36", "%37", "%38")
WGMMA_SHARED(40, 80, "%40", "%41", "%42")
WGMMA_SHARED(44, 88, "%44", "%45", "%46")
WGMMA_SHARED(48, 96, "%48", "%49", "%50")
WGMMA_SHARED(52, 104, "%52", "%53", "%54")
WGMMA_SHARED(56, 112, "%56", "%57", "%58")
WGMMA_SHARED(60, 120, "%60", "%61", "%62")
WGMMA_SHARED(64, 128, "%64", "%65", "%66")
WGMMA_SHARED(68, 136, "%68", "%69", "%70")
WGMMA_SHARED(72, 144, "%72", "%73", "%74")
WGMMA_SHARED(76, 152, "%76", "%77", "%78")
WGMMA_SHARED(80, 160, "%80", "%81", "%82")
WGMMA_SHARED(84, 168, "%84", "%85", "%86")
WGMMA_SHARED(88, 176, "%88", "%89", "%90")
WGMMA_SHARED(92, 184, "%92", "%93", "%94")
WGMMA_SHARED(96, 192, "%96", "%97", "%98")
WGMMA_SHARED(100, 200, "%100", "%101", "%102")
WGMMA_SHARED(104, 208, "%104", "%105", "%106")
WGMMA_SHARED(108, 216, "%108", "%109", "%110")
WGMMA_SHARED(112, 224, "%112", "%113", "%114")
WGMMA_SHARED(116, 232, "%116", "%117", "%118")
WGMMA_SHARED(120, 240, "%120", "%121", "%122")
WGMMA_SHARED(124, 248, "%124", "%125", "%126")
WGMMA_SHARED(128, 256, "%128", "%129", "%130")

// d += a b, a in registers, b MN-major in shared memory.
#define WGMMA_REGISTERS(count, columns, a_places, b_place)                                           \
  template <typename T>                                                                              \
  __device__ __forceinline__ void wgmma_registers(float (&d)[count], const u32 (&a)[4], u64 b) {     \
    if constexpr (is_bf16<T>)                                                                        \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.bf16.bf16 "                 \
                   "{" WGMMA_LIST_##count "}, {" a_places "}, " b_place ", 1, 1, 1, 1;"              \
                   : WGMMA_SUMS_##count                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
    else                                                                                             \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32.f16.f16 "                   \
                   "{" WGMMA_LIST_##count "}, {" a_places "}, " b_place ", 1, 1, 1, 1;"              \
                   : WGMMA_SUMS_##count                                                              \
                   : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));                            \
  }
WGMMA_REGISTERS(32, 64, "%32, %33, %34, %35", "%36")
WGMMA_REGISTERS(64, 128, "%64, %65, %66, %67", "%68")
#endif
