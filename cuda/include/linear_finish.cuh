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

__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// partials: [Groups][row of x][row of the tile], a row of x every Rows + 4 floats; squares, if
// Norm: [Groups][row of x], sums over k of x^2. Each of the Split blocks of the
// cluster holds a part of every sum; the one of this rank adds and stores its share of the tile.
// Called by the block's first Warps warps; begins and ends with a barrier among them, or, with Split,
// of the whole cluster.
template <int Rows, int Cols, int Groups, int Split, int Warps, bool Norm, bool Add, bool Gated,
          typename T>
__device__ __forceinline__ void finish_tile(const Epilogue<T>& to, Tile tile, const float* partials,
                                            const float* squares, u32 rank) {
  static_assert(!Norm || Split == 1, "squares are of one block");
  constexpr int pitch = Rows + 4;
  constexpr int threads = Split * 32 * Warps;
  constexpr int most = (Cols * (Gated ? Rows / 2 : Rows) / 4 + threads - 1) / threads;
  // A thread takes four neighbours of an output row at a time.
  const int vectors = max((tile.count + 3) / 4, 1);
  const auto row_of = [&](int i) {
    return static_cast<int>(i * threads + rank * 32 * Warps + threadIdx.x) / vectors;
  };
  const auto column_of = [&](int i) {
    return static_cast<int>(i * threads + rank * 32 * Warps + threadIdx.x) % vectors * 4;
  };
  // Four at once where all four exist and stand at a multiple of 8 bytes.
  const bool aligned = (tile.first | to.n) % 4 == 0;
  const auto are_whole = [&](int o) { return aligned && o + 4 <= tile.count; };
  // What was there is asked for before the sums are waited for.
  float residual[Add ? most : 1][4] = {};
  if constexpr (Add) {
#pragma unroll
    for (int i = 0; i < most; ++i) {
      const int row = row_of(i), o = column_of(i);
      const i64 place = static_cast<i64>(row) * to.n + tile.first + o;
      if (row >= to.m) continue;
      if (are_whole(o)) {
        const uint2 old = *reinterpret_cast<const uint2*>(to.residual + place);
        const float2 low = unpack<T>(old.x), high = unpack<T>(old.y);
        residual[i][0] = low.x, residual[i][1] = low.y;
        residual[i][2] = high.x, residual[i][3] = high.y;
        continue;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c)
        if (o + c < tile.count) residual[i][c] = to_float(to.residual[place + c]);
    }
  }
  sync_split<Split, 32 * Warps>();
  const auto total = [&](const float* at) {
    return sum_of_parts<Split, Groups, Cols * pitch>(at);
  };
  // Without a residual in registers, a tall tile's many rounds need not all be code of their own.
#pragma unroll(Add || most < 4 ? most : 4)
  for (int i = 0; i < most; ++i) {
    const int row = row_of(i), o = column_of(i);
    if (row >= to.m) break;
    const i64 place = static_cast<i64>(row) * to.n + tile.first + o;
    const float* const at = partials + row * pitch + (Gated ? o / 8 * 16 + o % 8 : o);
    float scale = 1.f;
    if constexpr (Norm) {
      float sum = 0.f;
#pragma unroll
      for (int p = 0; p < Groups; ++p) sum += squares[p * Cols + row];
      scale = rsqrtf(sum / to.k + to.eps);
    }
    const float4 sums = total(at);
    float y[4] = {scale * sums.x, scale * sums.y, scale * sums.z, scale * sums.w};
    if constexpr (Gated) {
      const float4 up = total(at + 8);
      y[0] = silu(y[0]) * (scale * up.x), y[1] = silu(y[1]) * (scale * up.y);
      y[2] = silu(y[2]) * (scale * up.z), y[3] = silu(y[3]) * (scale * up.w);
    }
    T rounded[4];
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if constexpr (Add) y[c] += residual[i][c];
      rounded[c] = from_float<T>(y[c]);
    }
    if (are_whole(o)) {
      *reinterpret_cast<uint2*>(to.out + place) = {pair_of(rounded), pair_of(rounded + 2)};
      continue;
    }
#pragma unroll
    for (int c = 0; c < 4; ++c)
      if (o + c < tile.count) to.out[place + c] = rounded[c];
  }
  sync_split_relaxed<Split, 32 * Warps>();
}
