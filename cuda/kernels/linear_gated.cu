// SwiGLU's products for many rows of x, for sm_90a: silu(x G^T) * (x U^T) in one pass (Shazeer 2020),
// so that what is largest in a prefill, the two products, never reaches memory.
//
// Persistent thread blocks, whose two warpgroups work on tiles of 128 rows of x by 96 of G and the
// same 96 of U in turn: while one stores its tile, the other has the tensor cores. One thread brings
// 64 k at a time with the tensor copy engine. The two thread blocks of a cluster have the same rows
// of W, of which one brings G's and one U's for both.
//
// Rows of W stand permuted in shared memory, 32 among themselves: what a lane of wgmma's accumulator
// holds is then 8 neighbouring columns, of the gate and of the up projection.
//
// Macros: SCALAR.
#include "cluster.cuh"
#include "tensor_copy.cuh"
#include "wgmma.cuh"

namespace {
constexpr int kRows = 128, kColumns = 96, kDepth = 64;
constexpr int kPiece = 32;  // rows of W that are permuted among themselves
constexpr int kPieces = kColumns / kPiece;
constexpr int kRowBytes = 2 * kDepth;
constexpr int kXBytes = kRows * kRowBytes, kHalfBytes = kColumns * kRowBytes;
constexpr int kStage = kXBytes + 2 * kHalfBytes;
constexpr int kStages = 5;
constexpr int kThreads = 384;
constexpr int kProducerRegisters = 40, kConsumerRegisters = 232;
constexpr int kBand = 8;  // pairs of tiles of x that share W while it is in the L2

struct Place {
  int row, column;  // of y
};

// The clusters' tiles in an order that keeps W and x in the L2: down the pairs of tiles of a band of
// x, then to the next columns.
__device__ __forceinline__ Place place_of(int index, int pairs, int tiles, u32 rank) {
  const int band = index / (kBand * tiles), within = index % (kBand * tiles);
  const int height = min(kBand, pairs - band * kBand);
  return {((band * kBand + within % height) * 2 + static_cast<int>(rank)) * kRows,
          within / height * kColumns};
}

// The sums of 64 rows and of the next 64: of G's 96 columns, then of U's.
using Sums = float[2][kColumns];

// For 16 bits the fast exponential and division are exact enough.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// A thread holds 8 neighbouring columns of each piece, in 4 rows.
__device__ __forceinline__ void store_tile(SCALAR* out, const Sums& sums, const Place& place, int m,
                                           int n) {
  const int warp = threadIdx.x / 32 % 4, lane = threadIdx.x % 32;
  const int column = place.column + lane % 4 * 8;
#pragma unroll
  for (int quarter = 0; quarter < 4; ++quarter) {
    const int row = place.row + quarter / 2 * 64 + warp * 16 + quarter % 2 * 8 + lane / 4;
    if (row >= m) continue;
    SCALAR* const to = out + static_cast<i64>(row) * n + column;
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
      if (column + p * kPiece >= n) continue;
      Vec<SCALAR> y;
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float* const gate = &sums[quarter / 2][(p * 4 + i / 2) * 4 + quarter % 2 * 2 + i % 2];
        y.set(i, silu(gate[0]) * gate[kColumns / 2]);
      }
      store_vec(to + p * kPiece, y);
    }
  }
}

#if __CUDA_ARCH_FEAT_SM90_ALL
// kPieces of W, permuted, for both thread blocks.
__device__ __forceinline__ void copy_pieces(u32 to, const TensorMap& map, int column, int piece,
                                            u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%2, %3, %3, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(&map), "r"(column), "r"(0), "r"(piece), "r"(barrier), "h"(static_cast<u16>(3))
      : "memory");
}
// Warpgroups take turns at the ring. Without, the one ahead could take a stage's former contents for
// its own: a barrier tells only odd phases from even ones.
__device__ __forceinline__ void take_turn(int group) {
  asm volatile("bar.sync %0, 256;" ::"r"(1 + group) : "memory");
}
__device__ __forceinline__ void pass_turn(int group) {
  asm volatile("bar.arrive %0, 256;" ::"r"(2 - group) : "memory");
}
#endif
}  // namespace

// x [m, k]; W [2 n, k], G then U; out [m, n]; n is a multiple of 32. Grid: clusters of 2. Shared
// memory: kStages of kStage + 16 bytes.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(kThreads, 1)
    linear_gated(const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap w_map,
                 SCALAR* out, int m, int n, int k) {
#if __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) u8 memory[];
  const u32 ring = shared_address(memory);
  const u32 full = ring + kStages * kStage, empty = full + kStages * 8;
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, 2);  // a warpgroup of each thread block
    }
    barrier_init_fence();
  }
  sync_cluster();
  let_next_start();
  wait_for_previous();

  const int pairs = (m + 2 * kRows - 1) / (2 * kRows);
  const int tiles = (n + kColumns - 1) / kColumns;
  const int steps = (k + kDepth - 1) / kDepth;
  const int clusters = gridDim.x / 2, first = blockIdx.x / 2;
  RingPlace<kStages> slot;
  if (threadIdx.x < 128) {
    give_registers<kProducerRegisters>();
    if (threadIdx.x == 0) {
      for (int index = first; index < pairs * tiles; index += clusters) {
        const Place place = place_of(index, pairs, tiles, rank);
        const int piece = (place.column + static_cast<int>(rank) * n) / kPiece;
#pragma unroll 1
        for (int step = 0; step < steps; ++step) {
          const u32 to = ring + slot.index * kStage, barrier = full + slot.index * 8;
          barrier_wait(empty + slot.index * 8, slot.parity ^ 1);
          barrier_expect(barrier, kStage);
          copy_box(to, x_map, step * kDepth, place.row, barrier);
          copy_pieces(to + kXBytes + rank * kHalfBytes, w_map, step * kDepth, piece, barrier);
          slot.advance();
        }
      }
    }
  } else {
    take_registers<kConsumerRegisters>();
    const int group = threadIdx.x / 128 - 1;
    const auto release = [&](int index) {
      if (threadIdx.x % 128 < 2) barrier_arrive_at(empty + index * 8, threadIdx.x % 32);
    };
    if (group == 1) {
      slot.skip(steps);
      pass_turn(group);
    }
    for (int index = first + group * clusters; index < pairs * tiles; index += 2 * clusters) {
      Sums sums;
      wgmma_own(sums[0]);
      wgmma_own(sums[1]);
      int previous = 0;
      take_turn(group);
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const u32 x = ring + slot.index * kStage, w = x + kXBytes;
        barrier_wait(full + slot.index * 8, slot.parity);
        if (step == steps - 1) pass_turn(group);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i)
#pragma unroll
          for (int half = 0; half < 2; ++half)
            wgmma_shared<SCALAR>(sums[half], wgmma_tile(x + half * (64 * kRowBytes) + i * 32),
                                 wgmma_tile(w + i * 32), i > 0 || step > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(previous);
        previous = slot.index;
        slot.advance();
      }
      wgmma_wait<0>();
      wgmma_own(sums[0]);
      wgmma_own(sums[1]);
      release(previous);
      slot.skip(steps);
      store_tile(out, sums, place_of(index, pairs, tiles, rank), m, n);
    }
  }
  __syncwarp();
  sync_cluster();  // the other block may still copy to this one, or arrive at its barriers
#endif
}
