// RMSNorm (Zhang & Sennrich 2019), plain and with the residual added first; and the embedding, which
// leaves what the product behind the first norm needs of it.
//
// One thread block a row. SCALAR, HIDDEN (a multiple of the 16-byte vector) and THREADS are
// macros, so that a thread's share of the row stays in registers between the sum and the scale.
#include "async_copy.cuh"

constexpr int kVec = Vec<SCALAR>::size;
constexpr int kVecs = HIDDEN / kVec;
constexpr int kShare = (kVecs + THREADS - 1) / THREADS;

static_assert(HIDDEN % kVec == 0, "HIDDEN must be a multiple of the vector");

template <bool Add>
__device__ __forceinline__ void norm_row(SCALAR* out, const SCALAR* x, SCALAR* residual,
                                         const SCALAR* __restrict__ weight, float eps) {
  __shared__ float scratch[THREADS / 32];
  let_next_start();
  Vec<SCALAR> scale[kShare], row[kShare], old[kShare];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v < kVecs) scale[i] = load_vec(weight + v * kVec);
  }
  const size_t base = size_t(blockIdx.x) * HIDDEN;
  // Whoever runs before this writes x, and the residual, at most, to L2.
  if (Add && threadIdx.x == 0) prefetch_bulk(residual + base, HIDDEN * sizeof(SCALAR));
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v < kVecs) {
      row[i] = load_vec(x + base + v * kVec);
      if constexpr (Add) old[i] = load_vec(residual + base + v * kVec);
    }
  }
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v < kVecs) {
      if constexpr (Add) {
        // The norm sees the sum as it is stored, as the next layer will.
#pragma unroll
        for (int j = 0; j < kVec; ++j) row[i].set(j, row[i][j] + old[i][j]);
        store_vec(residual + base + v * kVec, row[i]);
      }
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum += row[i][j] * row[i][j];
    }
  }
  const float factor = rsqrtf(block_sum<THREADS>(sum, scratch) / HIDDEN + eps);
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v < kVecs) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) row[i].set(j, row[i][j] * factor * scale[i][j]);
      store_vec(out + base + v * kVec, row[i]);
    }
  }
}

// Grid: rows.
extern "C" __global__ void __launch_bounds__(THREADS)
rms_norm(SCALAR* out, const SCALAR* x, const SCALAR* weight, float eps) {
  norm_row<false>(out, x, nullptr, weight, eps);
}

// Grid: rows. `out` may be `x`.
extern "C" __global__ void __launch_bounds__(THREADS)
add_rms_norm(SCALAR* out, const SCALAR* x, SCALAR* residual, const SCALAR* weight, float eps) {
  norm_row<true>(out, x, residual, weight, eps);
}

// Grid: rows. out: table[index[row]], zeros for an index outside [0, num_rows), as the row of a
// sequence whose last sample failed (-1) must not stop the batch. Beside it what linear_norm.cuh takes:
// scaled, out * weight, and each row's sum of out^2.
extern "C" __global__ void __launch_bounds__(THREADS)
embed_scaled(SCALAR* out, SCALAR* scaled, float* squares, const SCALAR* table,
             const SCALAR* __restrict__ weight, const int* index, int num_rows) {
  __shared__ float scratch[THREADS / 32];
  let_next_start();
  Vec<SCALAR> scale[kShare];
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v < kVecs) scale[i] = load_vec(weight + v * kVec);
  }
  wait_for_previous();
  const int row = index[blockIdx.x];
  const bool known = row >= 0 && row < num_rows;
  const size_t base = size_t(blockIdx.x) * HIDDEN;
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < kShare; ++i) {
    const int v = threadIdx.x + i * THREADS;
    if (v >= kVecs) continue;
    Vec<SCALAR> x = load_vec(table + (known ? size_t(row) * HIDDEN : 0) + v * kVec);
#pragma unroll
    for (int j = 0; j < kVec; ++j) {
      if (!known) x.set(j, 0.f);
      sum += x[j] * x[j];
      scale[i].set(j, x[j] * scale[i][j]);
    }
    store_vec(out + base + v * kVec, x);
    store_vec(scaled + base + v * kVec, scale[i]);
  }
  sum = block_sum<THREADS>(sum, scratch);
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}
