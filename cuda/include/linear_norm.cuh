// RMSNorm (Zhang & Sennrich 2019) between two products without a kernel of its own. Who writes the
// residual h leaves h * gains beside it and, of its columns, each row's sum of h^2; who needs
// rmsnorm(h) W^T multiplies (h * gains) W^T by each row's 1 / sqrt(mean(h^2) + eps).
#pragma once
#include "linear_tile.cuh"

template <typename T> struct ScaledResidual {
  T* out;             // [m, n]
  const T* residual;  // [m, n], perhaps `out` itself
  T* scaled;          // [m, n]: out * gains
  const T* gains;     // [n]
  float* squares;     // [m]: of these columns, each row's sum of out^2
  int m, n;
};

// Ends the `count` columns from `first` on, a multiple of 8: adds the partial sums of the cluster's
// Split blocks, [Rows][Columns + 4] each, and the residual. The block of this rank has whole rows,
// of 8 lanes. Called by the block's first Threads threads; begins and ends with a barrier among
// them, or, with Split, of the whole cluster.
template <int Rows, int Columns, int Split, int Threads, typename T>
__device__ __forceinline__ void finish_scaled(const ScaledResidual<T>& to, int first, int count,
                                              const float* partials, u32 rank) {
  constexpr int lanes = 8, vectors = Columns / 4, each = (vectors + lanes - 1) / lanes;
  constexpr int at_once = Threads / lanes;
  constexpr int rounds = (Rows + at_once * Split - 1) / (at_once * Split);
  const int lane = threadIdx.x % lanes;
  const auto row_of = [&](int round) {
    return static_cast<int>((round * Split + rank) * at_once + threadIdx.x / lanes);
  };
  const auto column_of = [&](int j) { return (j * lanes + lane) * 4; };
  // What was there is asked for before the sums are waited for.
  uint2 old[rounds][each] = {}, gains[each] = {};
#pragma unroll
  for (int j = 0; j < each; ++j) {
    const int o = column_of(j);
    if (o >= count) continue;
    gains[j] = *reinterpret_cast<const uint2*>(to.gains + first + o);
#pragma unroll
    for (int i = 0; i < rounds; ++i)
      if (row_of(i) < to.m)
        old[i][j] = *reinterpret_cast<const uint2*>(to.residual +
                                                    static_cast<i64>(row_of(i)) * to.n + first + o);
  }
  if constexpr (Split > 1)
    sync_cluster();
  else
    sync_group<Threads>(0);
#pragma unroll
  for (int i = 0; i < rounds; ++i) {
    const int row = row_of(i);
    float squares = 0.f;
#pragma unroll
    for (int j = 0; j < each; ++j) {
      const int o = column_of(j);
      if (row >= to.m || o >= count) continue;
      const float4 sum = sum_of_parts<Split, 1, 0>(partials + row * (Columns + 4) + o);
      const float2 low = unpack<T>(old[i][j].x), high = unpack<T>(old[i][j].y);
      const uint2 h = {pack<T>(sum.x + low.x, sum.y + low.y),
                       pack<T>(sum.z + high.x, sum.w + high.y)};
      squares += sum_of_squares<T>(h);  // of what is stored, as the next layer will see it
      const i64 place = static_cast<i64>(row) * to.n + first + o;
      *reinterpret_cast<uint2*>(to.out + place) = h;
      *reinterpret_cast<uint2*>(to.scaled + place) = product<T>(h, gains[j]);
    }
#pragma unroll
    for (int offset = lanes / 2; offset > 0; offset >>= 1)
      squares += __shfl_xor_sync(0xffffffffu, squares, offset);
    if (lane == 0 && row < to.m) to.squares[row] = squares;
  }
  if constexpr (Split > 1)
    sync_cluster_relaxed();
  else
    sync_group<Threads>(0);
}

// What rows [0, rows) of the x that a product takes are multiplied with, to `factors`, by Threads
// threads, of which this is number `thread`. squares: [parts][stride]; k: columns of x.
template <int Threads>
__device__ __forceinline__ void norm_factors(float* factors, const float* squares, int parts,
                                             int stride, int rows, int k, float eps, int thread) {
  const float mean = 1.f / k;
#pragma unroll 1
  for (int row = thread; row < rows; row += Threads) {
    float sum = 0.f;
#pragma unroll 16
    for (int p = 0; p < parts; ++p) sum += __ldcg(squares + p * stride + row);
    factors[row] = rsqrtf(sum * mean + eps);
  }
}
