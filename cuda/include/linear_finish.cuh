// The end of a tile of y = x W^T: partial sums that lie in shared memory (of every block of the
// cluster) are added in a fixed order, the fused parts are applied, and the tile is stored.
#pragma once
#include "linear_tile.cuh"

// The outputs [first, first + count) of one tile.
struct Tile {
  int first, count;
};

// `total` in `parts` runs whose lengths differ by one at most: run i.
__device__ __forceinline__ Tile share_of(u32 total, u32 parts, u32 i) {
  const u32 each = total / parts, longer = total % parts;
  return {static_cast<int>(i * each + min(i, longer)), static_cast<int>(each + (i < longer))};
}

// The row of W that stands at `row` of a tile, or -1. Gated: in each 16 rows of the tile, 8 of the
// gate and then their 8 of the up projection, which is n rows further on.
template <bool Gated> __device__ __forceinline__ int weight_row(Tile tile, int n, int row) {
  if constexpr (!Gated) return row < tile.count ? tile.first + row : -1;
  const int o = row / 16 * 8 + row % 8;
  return o < tile.count ? tile.first + o + (row % 16 < 8 ? 0 : n) : -1;
}

template <typename T> struct Epilogue {
  T* out;
  const T* residual;
  float eps;
  int m, n, k;
};

// partials: [Groups][row of x][row of the tile], a row of x every Rows + 4 floats; squares, if
// Norm: [Groups][row of x], sums over k of x^2. Begins and ends with a barrier.
template <int Rows, int Cols, int Groups, int Cluster, int Warps, bool Norm, bool Add, bool Gated,
          typename T>
__device__ __forceinline__ void finish_tile(const Epilogue<T>& to, Tile tile, const float* partials,
                                            const float* squares, u32 rank) {
  constexpr int pitch = Rows + 4;
  if constexpr (Cluster > 1)
    sync_cluster();
  else
    __syncthreads();
  const auto total = [&](const float* at, int stride) {
    float sum = 0.f;
#pragma unroll
    for (int q = 0; q < Cluster; ++q)
#pragma unroll
      for (int p = 0; p < Groups; ++p)
        sum += Cluster > 1 ? load_cluster(shared_address(at + p * stride), q) : at[p * stride];
    return sum;
  };
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int blocks = (tile.count + 31) / 32;
  for (int j = rank * Warps + warp; j < to.m * blocks; j += Cluster * Warps) {
    const int row = j / blocks, o = j % blocks * 32 + lane;
    if (o >= tile.count) continue;
    const i64 place = static_cast<i64>(row) * to.n + tile.first + o;
    const float* const at = partials + row * pitch + (Gated ? o / 8 * 16 + o % 8 : o);
    float residual = 0.f, scale = 1.f;
    if constexpr (Add) residual = to_float(to.residual[place]);
    if constexpr (Norm) scale = rsqrtf(total(squares + row, Cols) / to.k + to.eps);
    float y = scale * total(at, Cols * pitch);
    if constexpr (Gated) y = y / (1.f + __expf(-y)) * (scale * total(at + 8, Cols * pitch));
    to.out[place] = from_float<T>(y + residual);
  }
  if constexpr (Cluster > 1)
    sync_cluster();
  else
    __syncthreads();
}
