// float8_e4m3fn to float16, two at a time; exact, since float16 holds every e4m3 value.
#pragma once
#include "common.cuh"

// The low two bytes of x, the first in the low half. The NaN of e4m3 is kept from sm_89 on only.
__device__ __forceinline__ u32 half2_from_e4m3x2(u32 x) {
#if __CUDA_ARCH__ >= 890
  u32 r;
  asm("{.reg .b16 low; .reg .b16 high; mov.b32 {low, high}, %1; cvt.rn.f16x2.e4m3x2 %0, low;}"
      : "=r"(r)
      : "r"(x));
  return r;
#else
  // Sign and magnitude fall into place by shifts; the exponent's bias grows from 7 to 15.
  const u32 wide = __byte_perm(x, 0, 0x1404);
  const u32 bits = (wide & 0x80008000u) | ((wide >> 1) & 0x3f803f80u);
  const __half2 scaled = __hmul2(*reinterpret_cast<const __half2*>(&bits), __float2half2_rn(256.f));
  return *reinterpret_cast<const u32*>(&scaled);
#endif
}
