// y = x W^T for 9 to 128 rows of x on Hopper: linear_skinny.cu's shares of W, with wgmma.
//
// From some 16 rows on, what costs is to read x again for every tile of W. So tiles are tall (up
// to 192 rows of W a block) and, where W is too short for that, the SPLIT blocks of a cluster
// divide K and add their sums through each other's shared memory, in a fixed order. W is the M
// side of wgmma (64 rows a warpgroup), x its N side, both from shared memory.
//
// One warp asks the tensor copy engine for what the warpgroups then multiply, STAGES ahead; the
// first stages of W before the kernel before this one has ended. Where a block has one tile, its sums
// go through the ring when that is done with (STAGED), and leave as whole lines.
//
// Macros: SCALAR; ROWS (of W in a tile), NTILES (of 8 rows of x: see wgmma.cuh), STAGES (of 64 k),
// SPLIT, STAGED; ADD and GATED as in linear_skinny.cu.
#include "linear_finish.cuh"
#include "tensor_copy.cuh"
#include "wgmma.cuh"

namespace {
constexpr int WARPGROUPS = (ROWS + 63) / 64;
constexpr int CONSUMERS = 128 * WARPGROUPS;
constexpr int THREADS = CONSUMERS + 32;
constexpr int COLS = 8 * NTILES;
constexpr int DEPTH = 64;
constexpr int ROW_BYTES = 2 * DEPTH;
constexpr int W_BYTES = ROWS * ROW_BYTES;
constexpr int X_BYTES = COLS * ROW_BYTES;
// The last warpgroup's rows behind the tile are whatever lies there: nobody looks at their sums.
constexpr int STAGE = W_BYTES + X_BYTES;
constexpr int PITCH = 64 * WARPGROUPS + 4;
constexpr int UNIT = 8;  // rows of W: one pattern of the swizzle
constexpr int MOST = GATED ? ROWS / 2 : ROWS;
static_assert(!STAGED || COLS * PITCH * 4 <= STAGES * STAGE, "partial sums fit the ring");

struct Slot {
  int index = 0;
  u32 parity = 0;
  __device__ __forceinline__ void advance() {
    if (++index == STAGES) index = 0, parity ^= 1;
  }
};
}  // namespace

extern "C" __global__ void __launch_bounds__(THREADS)
#if SPLIT > 1
    __cluster_dims__(SPLIT, 1, 1)
#endif
        linear_wgmma(const __grid_constant__ TensorMap x_map,
                     const __grid_constant__ TensorMap w_map, SCALAR* out, const SCALAR* residual,
                     int m, int n, int k) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) unsigned char shared[];
  const u32 ring = shared_address(shared);
  const u32 full = ring + STAGES * STAGE, empty = full + STAGES * 8;

  const u32 rank = SPLIT > 1 ? cluster_rank() : 0;
  const int owners = gridDim.x / SPLIT;
  const Tile share = share_of_units<UNIT>(n, owners, blockIdx.x / SPLIT);
  // As many tiles in every block, so that one height of box serves all.
  const int longest = ((n + UNIT - 1) / UNIT + owners - 1) / owners * UNIT;
  const int tiles = (longest + MOST - 1) / MOST;
  const int steps = (k + DEPTH * SPLIT - 1) / (DEPTH * SPLIT);
  const auto tile_at = [&](int i) {
    const Tile tile = share_of_units<UNIT>(share.count, tiles, i);
    return Tile{share.first + tile.first, tile.count};
  };

  const auto column_of = [&](int step) { return (step * SPLIT + rank) * DEPTH; };

  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const bool producer = warp == CONSUMERS / 32;
  const int total = tiles * steps, first = min(total, STAGES);
  const auto copy_w = [&](int slot, int i, int step) {
    const u32 barrier = full + slot * 8, to = ring + slot * STAGE;
    const int column = column_of(step), row = tile_at(i).first;
    barrier_expect(barrier, STAGE);
    if constexpr (GATED)
      copy_gated_box_once(to, w_map, column, row / UNIT, barrier);
    else
      copy_box_once(to, w_map, column, row, barrier);
  };
  if (producer && lane == 0) {
    for (int s = 0; s < STAGES; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, WARPGROUPS);
    }
    barrier_init_fence();
    for (int s = 0; s < first; ++s) copy_w(s, s / steps, s % steps);
  }
  __syncwarp();
  if constexpr (SPLIT > 1)
    sync_cluster_relaxed();
  else
    __syncthreads();
  let_next_start();
  wait_for_previous();

  if (producer && lane == 0) {
    const auto copy_x = [&](int slot, int step) {
      copy_box(ring + slot * STAGE + W_BYTES, x_map, column_of(step), 0, full + slot * 8);
    };
    for (int s = 0; s < first; ++s) copy_x(s, s % steps);
    Slot slot;
    int i = first / steps, step = first % steps;
    for (int s = first; s < total; ++s) {
      barrier_wait(empty + slot.index * 8, slot.parity);
      copy_w(slot.index, i, step);
      copy_x(slot.index, step);
      slot.advance();
      if (++step == steps) step = 0, ++i;
    }
  }
  __syncwarp();

  const int warpgroup = threadIdx.x / 128;
  const int g = lane / 4, t = lane % 4;
  const auto release = [&](int slot) {
    if (threadIdx.x % 128 == 0) barrier_arrive(empty + slot * 8);
  };
  Slot slot;
  for (int i = 0; i < tiles; ++i) {
    const Tile tile = tile_at(i);
    if (!producer) {
      float acc[NTILES * 4] = {};
      int previous = 0;
      for (int step = 0; step < steps; ++step) {
        const u32 stage = ring + slot.index * STAGE;
        barrier_wait(full + slot.index * 8, slot.parity);
        begin_products();
#pragma unroll
        for (int s = 0; s < DEPTH / 16; ++s)
          multiply_tile<SCALAR, NTILES>(
              acc, describe(stage + warpgroup * 64 * ROW_BYTES + s * 32),
              describe(stage + W_BYTES + s * 32));
        commit_products();
        wait_products<1>();
        if (step > 0) release(previous);
        previous = slot.index;
        slot.advance();
      }
      wait_products<0>();
      release(previous);

      if constexpr (STAGED) {
        sync_group<CONSUMERS>(1);  // nobody reads the ring any more: it takes the partial sums
        float* const mine = reinterpret_cast<float*>(shared) + warp * 16 + g;
#pragma unroll
        for (int c = 0; c < NTILES * 4; ++c)
          mine[(c / 4 * 8 + 2 * t + c % 2) * PITCH + c % 4 / 2 * 8] = acc[c];
      } else {
#pragma unroll
        for (int c = 0; c < NTILES * 2; ++c) {
          const int row = c / 2 * 8 + 2 * t + c % 2;
          if (row >= m) continue;
          const i64 line = static_cast<i64>(row) * n + tile.first;
          const auto store = [&](int o, float y) {
            if (o >= tile.count) return;
            if constexpr (ADD) y += to_float(residual[line + o]);
            out[line + o] = from_float<SCALAR>(y);
          };
          const float low = acc[c / 2 * 4 + c % 2], high = acc[c / 2 * 4 + 2 + c % 2];
          if constexpr (GATED) {
            store(warp * 8 + g, silu(low) * high);
          } else {
            store(warp * 16 + g, low);
            store(warp * 16 + 8 + g, high);
          }
        }
      }
    }
    if constexpr (STAGED) {
      constexpr int warps = (SPLIT > 1 ? THREADS : CONSUMERS) / 32;
      if (threadIdx.x < 32 * warps)
        finish_tile<64 * WARPGROUPS, COLS, 1, SPLIT, warps, false, ADD, GATED>(
            Epilogue<SCALAR>{out, residual, 0.f, m, n, k}, tile,
            reinterpret_cast<const float*>(shared), nullptr, rank);
    }
  }
#endif
}
