// SwiGLU's products for many rows of x, for sm_90a: silu(x G^T) * (x U^T) in one pass (Shazeer 2020),
// so that what is largest in a prefill, the two products, never reaches memory.
//
// Macros: SCALAR, and many_rows.cuh's.
#include "linear_finish.cuh"
#include "many_rows.cuh"

namespace {
// A tile is half of its columns of the gate and the same of the up projection. A thread has 8 outputs
// of a row at a time.
struct SwiGLU {
  static constexpr int kAtOnce = 4, kVec = 8, kVecs = many_rows::kHalf / kVec;

  SCALAR* out;
  int m, n;

  template <typename Wait>
  __device__ __forceinline__ void operator()(const many_rows::Place& place, Wait wait,
                                             const SCALAR* sums, const float* scales) const {
    const int column = place.tile * many_rows::kHalf, left = n - column;
    const int end = min(many_rows::kRows, m - place.row) * kVecs;
    SCALAR* const to = out + i64(place.row) * n + column;
    wait();
#pragma unroll 1
    for (int first = many_rows::end_thread(); first < end; first += kAtOnce * many_rows::kEndThreads) {
      // All vectors take a step before one takes the next: each would wait for its own.
      Vec<SCALAR> gate[kAtOnce], up[kAtOnce];
      float scale[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int vec = min(first + i * many_rows::kEndThreads, end - 1);
        const SCALAR* const from = sums + vec / kVecs * many_rows::kPitch + vec % kVecs * kVec;
        gate[i] = load_vec(from);
        up[i] = load_vec(from + many_rows::kHalf);
        scale[i] = NORM ? scales[vec / kVecs] : 1.f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int j = 0; j < kVec; ++j)
          gate[i].set(j, silu(scale[i] * gate[i][j]) * (scale[i] * up[i][j]));
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int vec = first + i * many_rows::kEndThreads, at = vec % kVecs * kVec;
        if (vec < end && at < left) store_vec(to + i64(vec / kVecs) * n + at, gate[i]);
      }
    }
  }
};
}  // namespace

// x [m, k]; W [2 n, k], G then U; out [m, n]; n is a multiple of 8. Grid: clusters of 2, which all run at
// once. Shared memory: many_rows::kStages of kStage bytes, kSumsBytes, 8 for each barrier, and a float for
// each of 2 kRows.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(many_rows::kThreads, 1)
    linear_gated(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                 const SCALAR* x, float* scales, float eps, SCALAR* out, int m, int n, int k) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  constexpr int half = many_rows::kHalf;
  many_rows::multiply(x_map, w_map, {x, scales, eps}, m, k, (n + half - 1) / half, half, n,
                      SwiGLU{out, m, n});
#endif
}
