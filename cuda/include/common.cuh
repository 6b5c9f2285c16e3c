// What every kernel shares: integer names, 16-byte vectors of a scalar type with float32
// arithmetic, warp reductions, and the two instructions of programmatic dependent launch.
//
// A source is compiled for one scalar type: SCALAR is __nv_bfloat16, __half or float.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T> __device__ __forceinline__ T from_float(float x);
template <> __device__ __forceinline__ float from_float<float>(float x) { return x; }
template <> __device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <> __device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// The 16 bytes that one thread loads or stores at a time.
template <typename T> struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  T data[size];

  __device__ __forceinline__ float operator[](int i) const { return to_float(data[i]); }
  __device__ __forceinline__ void set(int i, float x) { data[i] = from_float<T>(x); }
};

template <typename T> __device__ __forceinline__ Vec<T> load_vec(const T* p) {
  Vec<T> out;
  *reinterpret_cast<uint4*>(&out) = *reinterpret_cast<const uint4*>(p);
  return out;
}
// For data that nothing reads again soon: leaves the L2 to what will be.
template <typename T> __device__ __forceinline__ Vec<T> load_vec_streaming(const T* p) {
  Vec<T> out;
  *reinterpret_cast<uint4*>(&out) = __ldcs(reinterpret_cast<const uint4*>(p));
  return out;
}
// Past the L1, where an earlier kernel may have left what stood there then.
template <typename T> __device__ __forceinline__ Vec<T> load_vec_from_l2(const T* p) {
  Vec<T> out;
  *reinterpret_cast<uint4*>(&out) = __ldcg(reinterpret_cast<const uint4*>(p));
  return out;
}
template <typename T> __device__ __forceinline__ void store_vec(T* p, const Vec<T>& x) {
  *reinterpret_cast<uint4*>(p) = *reinterpret_cast<const uint4*>(&x);
}

__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}
__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1)
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// Sum over a block of Threads threads; every thread gets it. `scratch` holds Threads / 32 floats
// and may be used again after the next barrier.
template <int Threads> __device__ __forceinline__ float block_sum(float x, float* scratch) {
  x = warp_sum(x);
  if constexpr (Threads > 32) {
    if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
    __syncthreads();
    x = 0.f;
#pragma unroll
    for (int w = 0; w < Threads / 32; ++w) x += scratch[w];
  }
  return x;
}

// Programmatic dependent launch (sm_90): a kernel may start while the one before it in the stream
// still runs. Nothing that an earlier kernel wrote may be read, and nothing that it reads may be
// written, before wait_for_previous(). Every thread block must call it, also one without work:
// that is what makes the chain transitive. Both are no-ops in an ordinary launch.
//
// What is const __restrict__ the compiler may read before the wait, for all that is written here: so
// only weights and tables are, which no step writes.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void let_next_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
