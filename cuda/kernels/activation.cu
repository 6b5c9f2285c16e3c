// SwiGLU's gate: silu(gate) * up (Shazeer 2020). Macros: SCALAR, INTER (I), THREADS.
#include "common.cuh"

constexpr int kVec = Vec<SCALAR>::size;
constexpr int kRowVecs = INTER / kVec;

static_assert(INTER % kVec == 0, "INTER must be a multiple of the vector");

__device__ __forceinline__ float silu(float x) {
  // float32 tensors keep float32's accuracy; for 16 bits the fast exponential is exact enough.
  if constexpr (sizeof(SCALAR) == 4) return x / (1.f + expf(-x));
  return __fdividef(x, 1.f + __expf(-x));
}

// gate_up [rows, 2 * INTER] -> out [rows, INTER]; each thread makes Share vectors.
template <int Share>
__device__ __forceinline__ void silu_mul(SCALAR* out, const SCALAR* gate_up, int rows) {
  let_next_start();
  wait_for_previous();
  const u32 total = u32(rows) * kRowVecs;
  const u32 first = blockIdx.x * (THREADS * Share) + threadIdx.x;
  Vec<SCALAR> gate[Share], up[Share];
#pragma unroll
  for (int i = 0; i < Share; ++i) {
    const u32 v = first + i * THREADS;
    if (v < total) {
      const u32 row = v / kRowVecs, column = v % kRowVecs;
      const SCALAR* p = gate_up + (size_t(row) * 2 * kRowVecs + column) * kVec;
      gate[i] = load_vec_streaming(p);
      up[i] = load_vec_streaming(p + INTER);
    }
  }
#pragma unroll
  for (int i = 0; i < Share; ++i) {
    const u32 v = first + i * THREADS;
    if (v < total) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) gate[i].set(j, silu(gate[i][j]) * up[i][j]);
      store_vec(out + size_t(v) * kVec, gate[i]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
silu_mul_1(SCALAR* out, const SCALAR* gate_up, int rows) {
  silu_mul<1>(out, gate_up, rows);
}
extern "C" __global__ void __launch_bounds__(THREADS)
silu_mul_4(SCALAR* out, const SCALAR* gate_up, int rows) {
  silu_mul<4>(out, gate_up, rows);
}
