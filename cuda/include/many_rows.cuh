// Products y = x W^T with many rows of x for sm_90a, at the pace of the tensor cores: what
// linear_gated.cu and linear_qkv.cu share. They differ in how a tile ends.
//
// Persistent thread blocks of three warpgroups, on tiles of 128 rows of x by COLUMNS of W. Two
// multiply, 64 rows of x each, and leave their sums, rounded, in shared memory. Of the third, one
// thread brings 64 k at a time with the tensor copy engine, and three warps end a tile while the next
// is multiplied. The two thread blocks of a cluster have other rows of x and the same of W, of which
// each brings half for both.
//
// The copies and the products move as many bytes through shared memory as it can: what the last three
// warps load, shuffle and store comes on top, and is to be little.
//
// NORM: x is normalized first (RMSNorm, Zhang & Sennrich 2019; its gains stand in W). It is multiplied
// as it is, and the sums of a row are scaled when a tile ends. The scales are made meanwhile by the
// warps that end tiles.
//
// Macros: SCALAR, COLUMNS (a multiple of 16), STAGES (of 64 k), NORM (0 or 1).
#pragma once
#include "cluster.cuh"
#include "row_scales.cuh"
#include "tensor_copy.cuh"
#include "wgmma.cuh"

namespace many_rows {
constexpr int kRows = 128, kColumns = COLUMNS, kHalf = kColumns / 2, kDepth = 64;
constexpr int kRowBytes = 2 * kDepth;
constexpr int kXBytes = kRows * kRowBytes, kWBytes = kColumns * kRowBytes;
constexpr int kStage = kXBytes + kWBytes;
constexpr int kStages = STAGES;
constexpr int kPitch = kColumns + 8;  // of a row of rounded sums: no two lanes meet in a bank
constexpr int kSumsBytes = kRows * kPitch * 2;
constexpr int kThreads = 384, kGroup = 128;
constexpr int kEndWarps = 3, kEndThreads = 32 * kEndWarps;
constexpr int kBand = 8;  // pairs of tiles of x that share W while it is in the L2

struct Place {
  int row, tile;  // the first row of x; which tile of W
};

// The clusters' tiles in an order that keeps W and x in the L2: down the pairs of tiles of a band of
// x, then to the next rows of W.
__device__ __forceinline__ Place place_of(int index, int pairs, int tiles, u32 rank) {
  const int band = index / (kBand * tiles), within = index % (kBand * tiles);
  const int height = min(kBand, pairs - band * kBand);
  return {((band * kBand + within % height) * 2 + static_cast<int>(rank)) * kRows,
          within / height};
}

// Which of the threads that end tiles this is.
__device__ __forceinline__ int end_thread() { return threadIdx.x - (kThreads - kEndThreads); }

#if __CUDA_ARCH_FEAT_SM90_ALL
// The box at (column, row), for both thread blocks.
__device__ __forceinline__ void copy_to_both(u32 to, const TensorMap& map, int column, int row,
                                             u32 barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes."
      "multicast::cluster [%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(static_cast<u16>(3))
      : "memory");
}

// All products of m rows of x and `tiles` times the rows of W that a tile takes: kHalf from
// tile * `stride` on, and the kHalf that are `apart` behind those. `end`, called by each of the
// threads that end tiles, is end(Place, wait, sums, scales): rows of kPitch, which are there after
// wait(), and what each is to be multiplied by, with NORM.
template <typename End>
__device__ __forceinline__ void multiply(const TensorMap& x_map, const TensorMap& w_map,
                                         const Norm<SCALAR>& norm, int m, int k, int tiles,
                                         int stride, int apart, const End& end) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 ring = shared_address(memory);
  SCALAR* const rounded = reinterpret_cast<SCALAR*>(memory + kStages * kStage);
  const u32 full = ring + kStages * kStage + kSumsBytes, empty = full + kStages * 8;
  const u32 filled = empty + kStages * 8, taken = filled + 8;
  // Of two tiles in turn, as some threads may be one behind.
  float* scales = reinterpret_cast<float*>(memory + (taken + 8 - ring));
  const u32 rank = cluster_rank();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      barrier_init(full + s * 8, 1);
      barrier_init(empty + s * 8, 4);  // two warpgroups of each thread block
    }
    barrier_init(filled, 2 * kGroup);
    barrier_init(taken, kEndThreads);
    barrier_init_fence();
  }
  sync_cluster();
  let_next_start();
  wait_for_previous();

  const int pairs = (m + 2 * kRows - 1) / (2 * kRows);
  const int steps = (k + kDepth - 1) / kDepth;
  const int clusters = gridDim.x / 2, first = blockIdx.x / 2, group = threadIdx.x / kGroup;
  RingPlace<kStages> slot;
  RingPlace<1> buffer;
  if (group < 2) {
    const auto release = [&](int index) {
      if (threadIdx.x % kGroup < 2) barrier_arrive_at(empty + index * 8, threadIdx.x % 32);
    };
    const int lane = threadIdx.x % 32, row = group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;
    for (int index = first; index < pairs * tiles; index += clusters) {
      float sums[kColumns / 2];
      wgmma_own(sums);
      int previous = 0;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const u32 x = ring + slot.index * kStage + group * (64 * kRowBytes);
        const u32 w = ring + slot.index * kStage + kXBytes;
        barrier_wait(full + slot.index * 8, slot.parity);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < kDepth / 16; ++i)
          wgmma_shared<SCALAR>(sums, wgmma_tile(x + i * 32), wgmma_tile(w + i * 32),
                               i > 0 || step > 0);
        wgmma_commit();
        wgmma_wait<1>();
        if (step > 0) release(previous);
        previous = slot.index;
        slot.advance();
      }
      wgmma_wait<0>();
      wgmma_own(sums);
      release(previous);
      barrier_wait(taken, buffer.parity ^ 1);
      SCALAR* const to = rounded + row * kPitch + lane % 4 * 2;
#pragma unroll
      for (int i = 0; i < kColumns / 2; i += 2)
        *reinterpret_cast<u32*>(to + i / 2 % 2 * (8 * kPitch) + i / 4 * 8) =
            pack<SCALAR>(sums[i], sums[i + 1]);
      barrier_arrive(filled);
      buffer.advance();
    }
  } else if (threadIdx.x == 2 * kGroup) {
    for (int index = first; index < pairs * tiles; index += clusters) {
      const Place place = place_of(index, pairs, tiles, rank);
      const int w_row = place.tile * stride + static_cast<int>(rank) * apart;
#pragma unroll 1
      for (int step = 0; step < steps; ++step) {
        const u32 to = ring + slot.index * kStage, barrier = full + slot.index * 8;
        barrier_wait(empty + slot.index * 8, slot.parity ^ 1);
        barrier_expect(barrier, kStage);
        copy_box(to, x_map, step * kDepth, place.row, barrier);
        copy_to_both(to + kXBytes + rank * (kHalf * kRowBytes), w_map, step * kDepth, w_row,
                     barrier);
        slot.advance();
      }
    }
  } else if (end_thread() >= 0) {
    RowScales<SCALAR, kRows, kEndThreads> row_scales(norm, m, k, end_thread());
    Place place = place_of(first, pairs, tiles, rank);
    for (int index = first; index < pairs * tiles; index += clusters) {
      const Place next = place_of(min(index + clusters, pairs * tiles - 1), pairs, tiles, rank);
      if (NORM) {
        // This tile's whole band is made before it is waited for, and what the next round needs.
        const int until = ((index + clusters) / tiles + kBand + 1) * 2 * kRows;
        row_scales.take(place.row, until, scales);
        row_scales.look_for(next.row);
      }
      end(place, [&] { barrier_wait(filled, buffer.parity); }, rounded, scales);
      scales += buffer.parity == 0 ? kRows : -kRows;
      barrier_arrive(taken);
      buffer.advance();
      place = next;
    }
  }
  __syncwarp();
  sync_cluster();  // the other block may still copy to this one, or arrive at its barriers
}
#endif
}  // namespace many_rows
