// A warp's own ring of KV blocks in shared memory: each stage holds the keys and the values of one
// head in one block. The warp that fetches is the warp that reads, so nothing but the warp itself
// and the copies need synchronizing.
#pragma once
#include "async_copy.cuh"
#include "kv_layout.cuh"

#if __CUDA_ARCH__ >= 900 && !defined(FORCE_CP_ASYNC)
#define BLOCK_RING_BULK 1
#else
#define BLOCK_RING_BULK 0
#endif

// Bytes of shared memory for `warps` rings, the barriers behind the stages.
constexpr int block_ring_bytes(int warps, int stages, int run_bytes) {
  return warps * stages * (2 * run_bytes + 8);
}

template <int Warps, int Stages, int RunBytes> class BlockRing {
 public:
  // `memory`: block_ring_bytes(), aligned to 128. All threads of the thread block call it together.
  __device__ explicit BlockRing(u32 memory)
      : data_(memory + warp() * Stages * 2 * RunBytes),
        barriers_(memory + Warps * Stages * 2 * RunBytes + warp() * Stages * 8) {
#if BLOCK_RING_BULK
    if (lane() == 0) {
#pragma unroll
      for (int s = 0; s < Stages; ++s) barrier_init(barriers_ + s * 8, 1);
      barrier_init_fence();
    }
    __syncwarp();
#endif
  }

  // Blocks fetched from now on are the first to leave the L2.
  __device__ void spare_l2() { policy_ = kEvictFirst; }

  // Starts the copy of the first `rows` rows of a block's runs, or more, into the next stage to
  // fill. Every lane has read what that stage held.
  __device__ void fetch(const u8* keys, const u8* values, int rows) {
    const u32 stage = data_ + fill_ * 2 * RunBytes;
#if BLOCK_RING_BULK
    constexpr int kRowBytes = RunBytes / kv_layout::kBlockTokens;
    const u32 barrier = barriers_ + fill_ * 8;
    __syncwarp();
    if (lane() == 0) barrier_expect(barrier, 2 * rows * kRowBytes);
    if (rows == kv_layout::kBlockTokens) {
      if (lane() == 0) {
        bulk_copy(stage, keys, RunBytes, barrier, policy_);
        bulk_copy(stage + RunBytes, values, RunBytes, barrier, policy_);
      }
    } else {
      constexpr int kColumns = kv_layout::num_columns<kRowBytes>();
      if (lane() < 2 * kColumns) {
        const int column = lane() % kColumns;
        const int offset = kv_layout::column_offset<kRowBytes>(column);
        bulk_copy(stage + (lane() < kColumns ? 0 : RunBytes) + offset,
                  (lane() < kColumns ? keys : values) + offset,
                  rows * kv_layout::column_width<kRowBytes>(column), barrier, policy_);
      }
    }
#else
    __syncwarp();
#pragma unroll
    for (int i = 0; i < RunBytes / 512; ++i) {
      const int offset = (i * 32 + lane()) * 16;
      cp_async_16(stage + offset, keys + offset);
      cp_async_16(stage + RunBytes + offset, values + offset);
    }
    cp_async_commit();
#endif
    fill_ = fill_ + 1 == Stages ? 0 : fill_ + 1;
  }

  // Stands for a fetch when there is nothing more to fetch: waiting counts them.
  __device__ void fetch_nothing() {
#if !BLOCK_RING_BULK
    cp_async_commit();
#endif
  }

  // The shared address of the oldest block, once it is there: its keys, then its values. Every
  // fetch() or fetch_nothing() is followed by one wait(), Stages fetches later.
  __device__ u32 wait() {
#if BLOCK_RING_BULK
    barrier_wait(barriers_ + read_.index * 8, read_.parity);
#else
    cp_async_wait<Stages - 1>();
    __syncwarp();
#endif
    const u32 stage = data_ + read_.index * 2 * RunBytes;
    read_.advance();
    return stage;
  }

 private:
  __device__ static int warp() { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  u32 data_;
  u32 barriers_;
  int fill_ = 0;
  u64 policy_ = kEvictNormal;
  RingPlace<Stages> read_;
};
