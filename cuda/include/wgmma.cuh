// The warpgroup matrix instruction of sm_90a for 64 rows of A and 16 to 128 of B, both with neighbouring
// k side by side in swizzled shared memory (PTX ISA, wgmma.mma_async).
#pragma once
#include "common.cuh"

// The matrix descriptor of rows of 64 k (128 bytes, in the 128-byte swizzle) at `address`: eight
// rows are one pattern, 1 KiB. 16 k further on is 32 bytes further on.
__device__ __forceinline__ u64 describe(u32 address) {
  return (address & 0x3ffff) >> 4 | u64{1} << 16 | u64{1024 >> 4} << 32 | u64{1} << 62;
}

#if __CUDA_ARCH_FEAT_SM90_ALL
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits until at most Pending committed groups are under way.
template <int Pending> __device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Pending) : "memory");
}

// Operand lists of the instruction: each is the one before it and what is new.
#define WGMMA_REGS_8 \
  "%0, %1, %2, %3, %4, %5, %6, %7"
#define WGMMA_REGS_16 WGMMA_REGS_8 ", " \
  "%8, %9, %10, %11, %12, %13, %14, %15"
#define WGMMA_REGS_32 WGMMA_REGS_16 ", " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define WGMMA_REGS_48 WGMMA_REGS_32 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define WGMMA_REGS_64 WGMMA_REGS_48 ", " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define WGMMA_SUMS_8 \
  "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3]), "+f"(acc[4]), "+f"(acc[5]), \
  "+f"(acc[6]), "+f"(acc[7])
#define WGMMA_SUMS_16 WGMMA_SUMS_8, \
  "+f"(acc[8]), "+f"(acc[9]), "+f"(acc[10]), "+f"(acc[11]), "+f"(acc[12]), "+f"(acc[13]), \
  "+f"(acc[14]), "+f"(acc[15])
#define WGMMA_SUMS_32 WGMMA_SUMS_16, \
  "+f"(acc[16]), "+f"(acc[17]), "+f"(acc[18]), "+f"(acc[19]), "+f"(acc[20]), "+f"(acc[21]), \
  "+f"(acc[22]), "+f"(acc[23]), "+f"(acc[24]), "+f"(acc[25]), "+f"(acc[26]), "+f"(acc[27]), \
  "+f"(acc[28]), "+f"(acc[29]), "+f"(acc[30]), "+f"(acc[31])
#define WGMMA_SUMS_48 WGMMA_SUMS_32, \
  "+f"(acc[32]), "+f"(acc[33]), "+f"(acc[34]), "+f"(acc[35]), "+f"(acc[36]), "+f"(acc[37]), \
  "+f"(acc[38]), "+f"(acc[39]), "+f"(acc[40]), "+f"(acc[41]), "+f"(acc[42]), "+f"(acc[43]), \
  "+f"(acc[44]), "+f"(acc[45]), "+f"(acc[46]), "+f"(acc[47])
#define WGMMA_SUMS_64 WGMMA_SUMS_48, \
  "+f"(acc[48]), "+f"(acc[49]), "+f"(acc[50]), "+f"(acc[51]), "+f"(acc[52]), "+f"(acc[53]), \
  "+f"(acc[54]), "+f"(acc[55]), "+f"(acc[56]), "+f"(acc[57]), "+f"(acc[58]), "+f"(acc[59]), \
  "+f"(acc[60]), "+f"(acc[61]), "+f"(acc[62]), "+f"(acc[63])
#define WGMMA_TILE(Scalar, kind, ntiles, columns, count, a_place, b_place)                       \
  template <>                                                                                     \
  __device__ __forceinline__ void multiply_tile<Scalar, ntiles>(float (&acc)[count], u64 a,       \
                                                                u64 b) {                          \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." kind "." kind            \
                 " {" WGMMA_REGS_##count "}, " a_place ", " b_place ", 1, 1, 1, 0, 0;"              \
                 : WGMMA_SUMS_##count                                                             \
                 : "l"(a), "l"(b));                                                               \
  }
#define WGMMA_TILES(Scalar, kind)                             \
  WGMMA_TILE(Scalar, kind, 2, 16, 8, "%8", "%9")              \
  WGMMA_TILE(Scalar, kind, 4, 32, 16, "%16", "%17")           \
  WGMMA_TILE(Scalar, kind, 8, 64, 32, "%32", "%33")           \
  WGMMA_TILE(Scalar, kind, 12, 96, 48, "%48", "%49")          \
  WGMMA_TILE(Scalar, kind, 16, 128, 64, "%64", "%65")

// acc[64 x 8 NTiles] += a[64 x 16] b[8 NTiles x 16]^T. Lane 4 g + t of warp w holds, for each 8
// columns, rows 16 w + g (columns 2 t, 2 t + 1) and 16 w + g + 8 (the same).
template <typename T, int NTiles>
__device__ __forceinline__ void multiply_tile(float (&acc)[NTiles * 4], u64 a, u64 b);
WGMMA_TILES(__nv_bfloat16, "bf16")
WGMMA_TILES(__half, "f16")
#undef WGMMA_TILES
#undef WGMMA_TILE
#undef WGMMA_REGS_8
#undef WGMMA_SUMS_8
#undef WGMMA_REGS_16
#undef WGMMA_SUMS_16
#undef WGMMA_REGS_32
#undef WGMMA_SUMS_32
#undef WGMMA_REGS_48
#undef WGMMA_SUMS_48
#undef WGMMA_REGS_64
#undef WGMMA_SUMS_64
#endif
