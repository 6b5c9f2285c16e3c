// y = x W^T for few rows of x: what a decode step does, bound by reading W once.
//
// Each block owns an equal run of W's rows (to one row), so every multiprocessor has the same
// bytes to read whatever N is. It takes them in tiles of at most ROWS; its WARPS_K groups of
// warps take turns at pieces of k, each with its own ring of asynchronous copies, so that with
// WARPS_N = 1 nothing but the end of a tile makes warps wait for each other. W's rows fill the
// M side of the matrix instruction and x's rows its N side: one instruction serves 8 rows of x.
// Which k a lane passes is free so long as both agree, so it passes 8 that stand side by side.
// Partial sums meet in shared memory and are added in a fixed order: same input, same bits.
//
// The first stages of W are asked for before the kernel before this one has ended.
//
// Macros: SCALAR; MTILES (of 16 rows of W a warp), NTILES (of 8 rows of x), WARPS_N, WARPS_K;
// SLABS (of 32 k) a stage, STAGES; and what is fused: NORM (RMSNorm of x before), ADD (a residual
// after), GATED (silu(gate) * up after).
#include "linear_finish.cuh"

namespace {
constexpr int ROWS = 16 * MTILES * WARPS_N;
constexpr int COLS = 8 * NTILES;
constexpr int DEPTH = 32 * SLABS;
constexpr int GROUP = 32 * WARPS_N;
constexpr int WARPS = WARPS_N * WARPS_K;
// A slab is [row][32 k]: 64 bytes a row, so a warp's 16-byte reads and copies meet no bank twice.
constexpr int W_SLAB = ROWS * 64;
constexpr int X_ROWS = COLS + NORM;
constexpr int X_SLAB = X_ROWS * 64;
constexpr int STAGE = SLABS * (W_SLAB + X_SLAB);
constexpr int PARTIAL_PITCH = ROWS + 4;
constexpr int PARTIALS = COLS * PARTIAL_PITCH;
constexpr int PIECES = 4 * SLABS;
constexpr int ROW_STEP = GROUP / PIECES;
// Two sums that alternate, where one would make each instruction wait for the one before it.
constexpr int SUMS = MTILES * NTILES <= 2 ? 2 : 1;

}  // namespace

extern "C" __global__ void __launch_bounds__(32 * WARPS)
    linear_skinny(const SCALAR* x, const SCALAR* w, SCALAR* out, const SCALAR* residual,
                  const SCALAR* norm, float eps, int m, int n, int k) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int group = warp / WARPS_N, row_block = warp % WARPS_N;
  const int g = lane / 4, t = lane % 4;
  const int piece = (threadIdx.x % GROUP) % PIECES, row0 = (threadIdx.x % GROUP) / PIECES;

  const u32 ring = shared_address(shared) + group * STAGES * STAGE;
  float* const partials = reinterpret_cast<float*>(shared + WARPS_K * STAGES * STAGE);
  float* const squares = partials + WARPS_K * PARTIALS;

  const Tile share = share_of(n, gridDim.x, blockIdx.x);
  constexpr int most = GATED ? ROWS / 2 : ROWS;
  const int tiles = (share.count + most - 1) / most;
  const int each = share.count / tiles, longer = share.count % tiles;
  const auto tile_at = [&](int i) {
    return Tile{share.first + i * each + min(i, longer), each + (i < longer)};
  };
  const int steps = (k + DEPTH * WARPS_K - 1) / (DEPTH * WARPS_K);
  const u32 into = (piece / 4) * W_SLAB + row0 * 64 + (piece % 4) * 16;
  const u32 into_x = SLABS * W_SLAB + (piece / 4) * X_SLAB + row0 * 64 + (piece % 4) * 16;

  const auto copy_w = [&](int slot, Tile tile, int step) {
    const int column = (step * WARPS_K + group) * DEPTH + piece * 8;
    const bool valid = column < k;
    const SCALAR* const from = w + (valid ? column : 0);
#pragma unroll
    for (int i = 0; i < (ROWS + ROW_STEP - 1) / ROW_STEP; ++i) {
      const int row = weight_row<GATED>(tile, n, row0 + i * ROW_STEP);
      if (row >= 0)
        copy_async(ring + slot * STAGE + into + i * ROW_STEP * 64,
                   from + static_cast<i64>(row) * k, valid);
    }
  };
  const auto copy_x = [&](int slot, int step) {
    const int column = (step * WARPS_K + group) * DEPTH + piece * 8;
    const bool valid = column < k;
    const SCALAR* const from = x + (valid ? column : 0);
#pragma unroll
    for (int i = 0; i < (COLS + ROW_STEP - 1) / ROW_STEP; ++i) {
      const int row = row0 + i * ROW_STEP;
      if (row >= m) break;
      copy_async(ring + slot * STAGE + into_x + i * ROW_STEP * 64, from + row * k, valid);
    }
    if (NORM && row0 == 0)
      copy_async(ring + slot * STAGE + into_x + COLS * 64, norm + (valid ? column : 0), valid);
  };

  // Where the copies stand: a step of a tile, STAGES - 1 ahead of the products.
  int ahead_tile = 0, ahead_step = 0;
  const auto advance = [&] {
    if (++ahead_step == steps) ahead_step = 0, ++ahead_tile;
  };
#pragma unroll
  for (int s = 0; s < STAGES - 1; ++s) {
    if (ahead_tile < tiles) copy_w(s, tile_at(ahead_tile), ahead_step);
    advance();
  }
  let_next_start();
  wait_for_previous();
  for (int s = 0; s < STAGES - 1; ++s) {
    if (s < tiles * steps) copy_x(s, s % steps);
    cp_async_commit();
  }

  int slot = 0;
  for (int i = 0; i < tiles; ++i) {
    float acc[SUMS][MTILES][NTILES][4] = {};
    float square[NTILES] = {};
    for (int step = 0; step < steps; ++step) {
      cp_async_wait<STAGES - 2>();
      sync_group<GROUP>(1 + group);
      if (ahead_tile < tiles) {
        const int free = slot == 0 ? STAGES - 1 : slot - 1;
        copy_w(free, tile_at(ahead_tile), ahead_step);
        copy_x(free, ahead_step);
        advance();
      }
      cp_async_commit();

      const u32 stage = ring + slot * STAGE;
#pragma unroll
      for (int s = 0; s < SLABS; ++s) {
        uint4 rows[MTILES][2];
#pragma unroll
        for (int a = 0; a < MTILES; ++a)
#pragma unroll
          for (int h = 0; h < 2; ++h)
            rows[a][h] = load_shared(stage + s * W_SLAB + t * 16 +
                                     ((row_block * MTILES + a) * 16 + h * 8 + g) * 64);
        const u32 columns = stage + SLABS * W_SLAB + s * X_SLAB + t * 16;
        uint4 scale;
        if constexpr (NORM) scale = load_shared(columns + COLS * 64);
#pragma unroll
        for (int b = 0; b < NTILES; ++b) {
          uint4 column = load_shared(columns + (b * 8 + g) * 64);
          if constexpr (NORM) {
            square[b] += sum_of_squares<SCALAR>(column);
            column = product<SCALAR>(column, scale);
          }
#pragma unroll
          for (int a = 0; a < MTILES; ++a) {
            const uint4 low = rows[a][0], high = rows[a][1];
            mma_16x8x16<SCALAR>(acc[0][a][b], {low.x, high.x, low.y, high.y}, {column.x, column.y});
            mma_16x8x16<SCALAR>(acc[SUMS - 1][a][b], {low.z, high.z, low.w, high.w},
                                {column.z, column.w});
          }
        }
      }
      slot = slot + 1 == STAGES ? 0 : slot + 1;
    }

    // partials[group][row of x][row of W]
    float* const mine = partials + group * PARTIALS + row_block * MTILES * 16 + g;
#pragma unroll
    for (int a = 0; a < MTILES; ++a)
#pragma unroll
      for (int b = 0; b < NTILES; ++b)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          float v = acc[0][a][b][c];
          if constexpr (SUMS == 2) v += acc[1][a][b][c];
          mine[(b * 8 + 2 * t + c % 2) * PARTIAL_PITCH + a * 16 + c / 2 * 8] = v;
        }
    if constexpr (NORM) {
#pragma unroll
      for (int b = 0; b < NTILES; ++b) {
        square[b] += __shfl_xor_sync(0xffffffffu, square[b], 1);
        square[b] += __shfl_xor_sync(0xffffffffu, square[b], 2);
        if (row_block == 0 && t == 0) squares[group * COLS + b * 8 + g] = square[b];
      }
    }
    finish_tile<ROWS, COLS, WARPS_K, 1, WARPS, NORM, ADD, GATED>(
        Epilogue<SCALAR>{out, residual, eps, m, n, k}, tile_at(i), partials, squares, 0);
  }
}
